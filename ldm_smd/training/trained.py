"""A network in training and its optimizer, possibly sharded over processes."""

from __future__ import annotations

import copy
from typing import cast

import torch
from accelerate import Accelerator
from diffusers import ModelMixin
from torch import nn

from ..models.backbone import current_name
from .sharding import distribute_like, full_tensor, gather_into, is_sharded, reshard, set_sharded_precision


class TrainedNetwork:
    """A network with the optimizer of its parameters.

    Attributes:
        network: holds the weights.
        forward: what training steps call: ``network``, or its wrapper by DDP, FSDP or torch.compile.
    """

    def __init__(self, network: ModelMixin, optimizer: torch.optim.Optimizer) -> None:
        self.network, self.optimizer = network, optimizer
        self.forward: nn.Module = network
        self._structure: ModelMixin | None = None

    def prepare(self, accelerator: Accelerator, gradient_checkpointing: bool = False, compiled: bool = False) -> None:
        """Distribute the network over the processes of the launcher. Call after loading its weights and before loading its
        optimizer."""
        if gradient_checkpointing:
            self.network.enable_gradient_checkpointing()
        set_sharded_precision(accelerator)
        if accelerator.is_fsdp2:
            self._structure = without_weights(self.network)
        prepared, _ = accelerator.prepare(self.network, self.optimizer)
        self.forward = cast(nn.Module, torch.compile(prepared)) if compiled else prepared
        if is_sharded(self.network):
            self.forward.register_forward_hook(reshard)

    def descend(self, learning_rate: float, gradient_clip: float) -> torch.Tensor:
        """Clip the gradients and take an optimizer step; returns the norm before clipping."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        # accelerate's clipping fails under FSDP if two networks have the same number of parameters.
        norm = full_tensor(nn.utils.clip_grad_norm_(self.network.parameters(), gradient_clip))
        self.optimizer.step()
        return norm

    def full_network(self, keeps: bool = True) -> ModelMixin:
        """Return ``network`` or, if it is sharded, a full copy on the CPU. All processes must call this. Those that do not keep
        the copy get one without values."""
        if self._structure is None:
            return self.network
        copied = copy.deepcopy(self._structure)
        if keeps:
            copied.to_empty(device="cpu")
        gather_into(copied, dict(self.network.named_parameters()))
        for buffer, value in zip(copied.buffers(), self.network.buffers()):
            buffer.copy_(value)
        return copied

    def optimizer_tensors(self, keeps: bool = True) -> dict[str, torch.Tensor]:
        """Return the optimizer's state as "parameter name/entry" -> full tensor. All processes must call this. Those that do
        not keep it get nothing.

        The tensors are on the CPU, because a single GPU may not have enough memory.
        """
        names: dict[torch.Tensor, str] = {parameter: name for name, parameter in self.network.named_parameters()}
        found: dict[str, torch.Tensor] = {}
        for parameter, state in self.optimizer.state.items():
            for entry, value in state.items():
                full = full_tensor(value)
                if keeps:
                    found[f"{names[parameter]}/{entry}"] = full.cpu().contiguous()  # safetensors needs it
        return found

    def load_optimizer(self, tensors: dict[str, torch.Tensor]) -> None:
        """Load the result of ``optimizer_tensors``."""
        parameters = dict(self.network.named_parameters())
        for flat, tensor in tensors.items():
            name, _, entry = flat.rpartition("/")
            parameter = parameters[current_name(name)]
            # AdamW keeps its step counters on the CPU, unless it is fused.
            if entry != "step" or self.optimizer.defaults.get("fused"):
                tensor = distribute_like(tensor.to(parameter.device), parameter)
            self.optimizer.state[parameter][entry] = tensor


def adamw(network: nn.Module, rate: float, weight_decay: float = 0.0, momentum: float = 0.9) -> torch.optim.Optimizer:
    betas = (momentum, 0.99)
    return torch.optim.AdamW(network.parameters(), lr=rate, betas=betas, weight_decay=weight_decay, fused=True)


def without_weights(network: ModelMixin) -> ModelMixin:
    """Copy a network to the meta device, where its weights take no memory."""
    parameters = {id(value): nn.Parameter(torch.empty_like(value, device="meta")) for value in network.parameters()}
    buffers = {id(value): torch.empty_like(value, device="meta") for value in network.buffers()}
    return copy.deepcopy(network, parameters | buffers)
