"""A simulated GPU: a device whose tensors are stored and computed on the CPU.

It refuses what a GPU refuses: tensors of two devices in one operation (except CPU scalars), numpy, and, like Apple's GPUs,
float64. So tests find wrong devices without a GPU. Importing this module makes it the device of the process, for torch,
accelerate and ldm_smd.
"""

from __future__ import annotations

from concurrent.futures.thread import _WorkItem

import accelerate.state
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_flatten, tree_map_only
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

import ldm_smd.device

NAME = "pretend"
COPIES = (torch.ops.aten.copy_.default, torch.ops.aten._to_copy.default)
"""Operations that may read from one device and write to another."""

NOT_FOR_SUBCLASSES = {torch.Tensor.tolist, torch.Tensor.storage, torch.Tensor.untyped_storage, torch.Tensor.data_ptr}
"""Methods that torch refuses for wrapper subclasses."""

DEPEND_ON_VALUES = {"aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::equal", "aten::_unique2"}
"""Operations whose result depends on values, so that the host waits for the device."""
waits: list[str] = []
"""Operations so far for which the host would have waited, in order."""


class OnGpu(torch.Tensor):
    """A tensor that reports to be on the device. ``held`` is its content, on the CPU."""

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> OnGpu:
        return torch.Tensor._make_wrapper_subclass(
            cls,
            held.size(),
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            layout=held.layout,
            device=DEVICE,
            requires_grad=held.requires_grad,
        )

    def __init__(self, held: torch.Tensor) -> None:
        self.held = held

    def __repr__(self) -> str:
        return f"OnGpu({self.held!r})"

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function in NOT_FOR_SUBCLASSES:
            waits.append(function.__name__)
            return function(args[0].held)
        if function is torch.Tensor.__getitem__ and isinstance(args[1], list):
            args = (args[0], torch.tensor(args[1]))  # torch would create it on the device, unseen by modes
        with torch._C.DisableTorchFunctionSubclass():
            return function(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, operation, types, args=(), kwargs=None):
        return compute(operation, args, kwargs or {})


def compute(operation, args: tuple, kwargs: dict):
    """Compute on the contents of tensors. The result is on their device, or on the one in ``kwargs``."""
    tensors = [each for each in tree_flatten((args, kwargs))[0] if isinstance(each, torch.Tensor)]
    on_gpu = [isinstance(each, OnGpu) for each in tensors]
    if operation is torch.ops.aten.index.Tensor:
        tensors, on_gpu = tensors[:1], on_gpu[:1]  # indices may be on the CPU
    on_cpu = [tuple(each.shape) for each, is_on_gpu in zip(tensors, on_gpu) if not is_on_gpu and each.dim() > 0]
    if any(on_gpu) and on_cpu and operation not in COPIES:
        raise RuntimeError(f"{operation}: expected all tensors on the {NAME} device, found some on the CPU: {on_cpu}")
    device = kwargs.get("device")
    if device is not None:
        result_on_gpu = torch.device(device).type == NAME
    else:
        result_on_gpu = on_gpu[0] if operation is torch.ops.aten.copy_.default else any(on_gpu)
    inside_args, inside_kwargs = tree_map_only(OnGpu, lambda each: each.held, (args, kwargs))
    if device is not None:
        inside_kwargs["device"] = torch.device("cpu")
    with _disable_current_modes():
        result = operation(*inside_args, **inside_kwargs)
    if any(on_gpu) and (not result_on_gpu or operation._schema.name in DEPEND_ON_VALUES):
        waits.append(str(operation))
    if not result_on_gpu:
        return result
    if operation._schema.name.endswith("_") and isinstance(args[0], OnGpu):
        return args[0]  # the operation was in place
    if any(each.dtype == torch.float64 for each in tree_flatten(result)[0] if isinstance(each, torch.Tensor)):
        raise RuntimeError(f"{operation}: expected no float64 on the {NAME} device")
    return tree_map_only(torch.Tensor, OnGpu, result)


class Factories(TorchDispatchMode):
    """Intercepts operations that create tensors on the device or move them there."""

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        device = (kwargs or {}).get("device")
        if device is not None and torch.device(device).type == NAME:
            return compute(operation, args, kwargs)
        return operation(*args, **(kwargs or {}))


class Generator(torch.Generator):
    """A generator that gives the random numbers of the CPU for every device."""

    def __new__(cls, device="cpu"):
        return super().__new__(cls, "cpu")

    def __init__(self, device="cpu") -> None:
        self.requested = torch.device(device)

    @property
    def device(self) -> torch.device:
        return self.requested


class Backend(_DummyBackendModule):
    """The module of the device, like torch.cuda."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]

    def synchronize(self, device=None) -> None:
        pass

    def empty_cache(self) -> None:
        pass


def create_on_cpu(factory):
    """Wrap ``torch.tensor`` to create tensors on the CPU and then move them, because modes do not see it create them."""

    def create(*args, device=None, **kwargs):
        found = factory(*args, **kwargs)
        return found if device is None else found.to(device)

    return create


def install() -> torch.device:
    """Install the device in this process; returns it."""
    _setup_privateuseone_for_python_backend(rename=NAME, backend_module=Backend())
    torch.Generator = Generator
    torch.tensor = create_on_cpu(torch.tensor)
    Factories().__enter__()
    run = _WorkItem.run

    def run_with_mode(item) -> None:
        with Factories():  # a mode applies to one thread only
            run(item)

    _WorkItem.run = run_with_mode
    device = torch.device(NAME, 0)
    accelerate.state.PartialState.default_device = device
    ldm_smd.device.pick_device = lambda name: device
    return device


DEVICE = install()
