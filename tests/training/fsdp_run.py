"""fsdp_run.py [critic] CONFIG...: run tools/train.py, or the learner of critic.py, with FSDP on CPUs, once for each config.

Accelerate uses FSDP only on GPUs (configs/accelerate/eight-gpus-fsdp.yaml), so this script sets the state that it would have
there. A config called ddp-* is trained with DDP instead. Several runs share the processes, because starting them takes longer
than a tiny run.
"""

import sys
import threading
from pathlib import Path

from accelerate import Accelerator, FullyShardedDataParallelPlugin, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from critic import WithCritic
from torch.distributed.fsdp import FSDPModule

from ldm_smd.config import load_config
from ldm_smd.training import loop
from ldm_smd.training.settings import TrainConfig
from ldm_smd.training.sharding import is_sharded

arguments = sys.argv[1:]
if arguments[0] == "critic":
    loop.learner_for = WithCritic
    arguments = arguments[1:]
for path in arguments:
    config = load_config(TrainConfig, path)
    AcceleratorState._reset_state()  # otherwise it keeps the precision and distributed type of the previous run
    accelerator = Accelerator(cpu=True, mixed_precision="no" if config.precision == "auto" else config.precision)
    ddp = Path(path).name.startswith("ddp-")
    distributed_type = DistributedType.MULTI_CPU if ddp else DistributedType.FSDP
    accelerator.state.distributed_type = PartialState().distributed_type = distributed_type
    if not ddp:
        accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2, auto_wrap_policy="transformer_based_wrap", cpu_ram_efficient_loading=False
        )
    loop.training_loop(config, accelerator, threading.Event())
    assert len(accelerator._models) > 0 and all(is_sharded(model) != ddp for model in accelerator._models)
    for model in accelerator._models:
        blocks = [each for each in model.modules() if type(each).__name__.endswith(tuple(model._no_split_modules or ()))]
        assert len(blocks) > 1 and all(isinstance(block, FSDPModule) != ddp for block in blocks)
accelerator.end_training()
