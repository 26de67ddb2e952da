"""Parameters sharded over the processes (FSDP), to full tensors and back: torch's DTensor, one parameter at a time, so that no
GPU ever has all of them."""

from __future__ import annotations

import torch
from accelerate import Accelerator
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.distributed.tensor import DTensor, distribute_tensor


def set_sharded_precision(accelerator: Accelerator) -> None:
    """With bf16, weights travel in bf16 and gradients are summed in float32. What is computed in which is left to autocast, as
    without FSDP, where accelerate's own policy would also round x_t."""
    if accelerator.is_fsdp2 and accelerator.mixed_precision == "bf16":
        accelerator.state.fsdp_plugin.mixed_precision_policy = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False
        )


def local(tensor: torch.Tensor) -> torch.Tensor:
    """Return this process's shard."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def full_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """Gather all of it; for all processes to call."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def distribute_like(tensor: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """Shard a tensor as the parameter is sharded, if it is; a tensor of another shape stays as it is."""
    if not isinstance(parameter, DTensor) or tensor.shape != parameter.shape:
        return tensor
    # Every process has read the same, so none needs to send it.
    return distribute_tensor(tensor, parameter.device_mesh, parameter.placements, src_data_rank=None)


def reshard(module: nn.Module, *_: object) -> None:
    """Hook after a forward pass without gradients: FSDP leaves some parameters unsharded for a backward pass."""
    for part in module.modules():
        if isinstance(part, FSDPModule) and not torch.is_grad_enabled():
            part.reshard()


def is_sharded(module: nn.Module) -> bool:
    return any(isinstance(parameter, DTensor) for parameter in module.parameters())


@torch.no_grad()
def gather_into(module: nn.Module, parameters: dict[str, torch.Tensor]) -> None:
    """Copy the sharded ones of ``parameters``, in full, into those of ``module``; for all processes to call."""
    for name, parameter in module.named_parameters():
        if isinstance(parameters[name], DTensor):
            parameter.copy_(full_tensor(parameters[name]))
