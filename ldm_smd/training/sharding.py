"""Parameters that are divided over the processes (FSDP), as whole ones and back: torch's DTensor, one parameter at a time, so
that no GPU ever has all of them."""

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
    """What this process has of it."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """All of it; for all processes to call."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def distribute_like(tensor: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """Divided as the parameter, where that is divided; a tensor of another shape stays."""
    if not isinstance(parameter, DTensor) or tensor.shape != parameter.shape:
        return tensor
    # Every process has read the same, so none needs to send it.
    return distribute_tensor(tensor, parameter.device_mesh, parameter.placements, src_data_rank=None)


def divide_again(module: nn.Module, *_: object) -> None:
    """Hook after a forward pass: FSDP leaves some parameters whole until the way back, which one without gradients has not."""
    for part in module.modules():
        if isinstance(part, FSDPModule) and not torch.is_grad_enabled():
            part.reshard()


def is_divided(module: nn.Module) -> bool:
    return any(isinstance(parameter, DTensor) for parameter in module.parameters())


@torch.no_grad()
def gather_into(module: nn.Module, parameters: dict[str, torch.Tensor]) -> None:
    """Copy into the parameters of ``module`` the whole of those that are divided."""
    for name, parameter in module.named_parameters():
        if isinstance(parameters[name], DTensor):
            parameter.copy_(whole(parameters[name]))
