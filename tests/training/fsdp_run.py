"""fsdp_run.py [critic] CONFIG...: tools/train.py, or the learner of critic.py, once for each config, with the parameters
divided over the processes, on CPUs. Accelerate does that on GPUs alone, where configs/accelerate/eight-gpus-fsdp.yaml asks for
it; here it is told what it would find there. A config called whole-* is trained with whole parameters (DDP): starting processes
takes longer than a tiny run."""

import sys
import threading
from pathlib import Path

from accelerate import Accelerator, FullyShardedDataParallelPlugin, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from critic import WithCritic

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
    AcceleratorState._reset_state()  # it keeps the precision and the kind of the run before
    accelerator = Accelerator(cpu=True, mixed_precision="no" if config.precision == "auto" else config.precision)
    whole = Path(path).name.startswith("whole-")
    kind = DistributedType.MULTI_CPU if whole else DistributedType.FSDP
    accelerator.state.distributed_type = PartialState().distributed_type = kind
    if not whole:
        accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2, auto_wrap_policy="transformer_based_wrap", cpu_ram_efficient_loading=False
        )
    loop.training_loop(config, accelerator, threading.Event())
    assert len(accelerator._models) > 0 and all(is_sharded(model) != whole for model in accelerator._models)
accelerator.end_training()
