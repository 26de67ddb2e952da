"""fsdp_run.py [critic] CONFIG: tools/train.py, or the learner of critic.py, with the parameters divided over the processes, on
CPUs. Accelerate does that on GPUs alone, where configs/accelerate/eight-gpus-fsdp.yaml asks for it; here it is told what it
would find there."""

import sys
import threading

from accelerate import Accelerator, FullyShardedDataParallelPlugin, PartialState
from accelerate.utils import DistributedType
from critic import WithCritic

from ldm_smd.config import load_config
from ldm_smd.training import loop
from ldm_smd.training.settings import TrainConfig
from ldm_smd.training.sharding import is_sharded

config = load_config(TrainConfig, sys.argv[-1])
if "critic" in sys.argv:
    loop.learner_for = WithCritic
accelerator = Accelerator(cpu=True, mixed_precision="no" if config.precision == "auto" else config.precision)
accelerator.state.distributed_type = PartialState().distributed_type = DistributedType.FSDP
accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
    fsdp_version=2, auto_wrap_policy="transformer_based_wrap", cpu_ram_efficient_loading=False
)
loop.training_loop(config, accelerator, threading.Event())
assert all(map(is_sharded, accelerator._models))
accelerator.end_training()
