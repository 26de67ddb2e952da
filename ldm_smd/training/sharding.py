"""Conversion between parameters sharded over processes (FSDP, DTensor) and full tensors.

One parameter at a time, so that no GPU ever holds all of them.
"""

from __future__ import annotations

import torch
from accelerate import Accelerator
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.distributed.tensor import DTensor, distribute_tensor


def set_sharded_precision(accelerator: Accelerator) -> None:
    """With bf16, communicate weights in bf16 and sum gradients in float32. Autocast chooses the precision of computations, as
    without FSDP; accelerate's own policy would round x_t too."""
    if accelerator.is_fsdp2 and accelerator.mixed_precision == "bf16":
        accelerator.state.fsdp_plugin.mixed_precision_policy = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False
        )


def local(tensor: torch.Tensor) -> torch.Tensor:
    """Return this process's shard."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def full_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """Gather a tensor. All processes must call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def distribute_like(tensor: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """Shard a tensor like ``parameter``. Returns it unchanged if the parameter is not sharded or has another shape."""
    if not isinstance(parameter, DTensor) or tensor.shape != parameter.shape:
        return tensor
    # Every process has the same tensor, so none needs to send it.
    return distribute_tensor(tensor, parameter.device_mesh, parameter.placements, src_data_rank=None)


def reshard(module: nn.Module, *_: object) -> None:
    """Forward hook. FSDP leaves some parameters unsharded for a backward pass, which does not come without gradients."""
    for part in module.modules():
        if isinstance(part, FSDPModule) and not torch.is_grad_enabled():
            part.reshard()


def is_sharded(module: nn.Module) -> bool:
    return any(isinstance(parameter, DTensor) for parameter in module.parameters())


@torch.no_grad()
def gather_into(module: nn.Module, parameters: dict[str, torch.Tensor]) -> None:
    """Copy the full values of sharded ``parameters`` into ``module``. All processes must call this."""
    for name, parameter in module.named_parameters():
        if isinstance(parameters[name], DTensor):
            parameter.copy_(full_tensor(parameters[name]))
