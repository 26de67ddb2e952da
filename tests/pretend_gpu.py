"""A GPU that is not there: a device whose tensors are kept and computed on the CPU.

What a GPU refuses is refused: tensors of two devices in one operation (but for CPU scalars), numpy, and, as by Apple's GPUs,
float64. So device mistakes show where there is no GPU. Importing this makes it the device of the process, for torch, accelerate
and ldm_smd.
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
"""These may read one device and write another."""

OF_NO_SUBCLASS = {torch.Tensor.tolist, torch.Tensor.storage, torch.Tensor.untyped_storage, torch.Tensor.data_ptr}
"""Which torch refuses of tensors that are wrapped."""


DEPEND_ON_VALUES = {"aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::equal", "aten::_unique2"}
waits: list[str] = []
"""Operations for which the host would have waited for the device, in order."""


class OnGpu(torch.Tensor):
    """A tensor that says it is on the device; ``held`` is what it has, on the CPU."""

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
        if function in OF_NO_SUBCLASS:
            waits.append(function.__name__)
            return function(args[0].held)
        if function is torch.Tensor.__getitem__ and isinstance(args[1], list):
            args = (args[0], torch.tensor(args[1]))  # torch would make it on the device, where no mode sees it
        with torch._C.DisableTorchFunctionSubclass():
            return function(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, operation, types, args=(), kwargs=None):
        return computed(operation, args, kwargs or {})


def computed(operation, args: tuple, kwargs: dict):
    """On what the tensors hold; the result is on the device where they are, or where it is asked for there."""
    tensors = [each for each in tree_flatten((args, kwargs))[0] if isinstance(each, torch.Tensor)]
    on_gpu = [isinstance(each, OnGpu) for each in tensors]
    if operation is torch.ops.aten.index.Tensor:
        tensors, on_gpu = tensors[:1], on_gpu[:1]  # indices may be on the CPU
    strangers = [tuple(each.shape) for each, there in zip(tensors, on_gpu) if not there and each.dim() > 0]
    if any(on_gpu) and strangers and operation not in COPIES:
        raise RuntimeError(f"{operation}: expected all tensors on the {NAME} device, found some on the CPU: {strangers}")
    device = kwargs.get("device")
    if device is not None:
        there = torch.device(device).type == NAME
    else:
        there = on_gpu[0] if operation is torch.ops.aten.copy_.default else any(on_gpu)
    inside_args, inside_kwargs = tree_map_only(OnGpu, lambda each: each.held, (args, kwargs))
    if device is not None:
        inside_kwargs["device"] = torch.device("cpu")
    with _disable_current_modes():
        result = operation(*inside_args, **inside_kwargs)
    if any(on_gpu) and (not there or operation._schema.name in DEPEND_ON_VALUES):
        waits.append(str(operation))
    if not there:
        return result
    if operation._schema.name.endswith("_") and isinstance(args[0], OnGpu):
        return args[0]  # written in place
    if any(each.dtype == torch.float64 for each in tree_flatten(result)[0] if isinstance(each, torch.Tensor)):
        raise RuntimeError(f"{operation}: expected no float64 on the {NAME} device")
    return tree_map_only(torch.Tensor, OnGpu, result)


class Factories(TorchDispatchMode):
    """Catches what makes tensors on the device from none, and what moves them there."""

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        device = (kwargs or {}).get("device")
        if device is not None and torch.device(device).type == NAME:
            return computed(operation, args, kwargs)
        return operation(*args, **(kwargs or {}))


class Generator(torch.Generator):
    """The CPU's numbers for every device."""

    def __new__(cls, device="cpu"):
        return super().__new__(cls, "cpu")

    def __init__(self, device="cpu") -> None:
        self.asked = torch.device(device)

    @property
    def device(self) -> torch.device:
        return self.asked


class Backend(_DummyBackendModule):
    """What torch.cuda is to a GPU."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]

    def synchronize(self, device=None) -> None:
        pass

    def empty_cache(self) -> None:
        pass


def made_on_cpu(make):
    """From Python's numbers torch makes tensors where no mode sees it."""

    def made(*args, device=None, **kwargs):
        found = make(*args, **kwargs)
        return found if device is None else found.to(device)

    return made


def install() -> torch.device:
    """From here on there is the device, which is returned."""
    _setup_privateuseone_for_python_backend(rename=NAME, backend_module=Backend())
    torch.Generator = Generator
    torch.tensor = made_on_cpu(torch.tensor)
    Factories().__enter__()
    work = _WorkItem.run

    def work_here_too(item) -> None:
        with Factories():  # a mode is of one thread
            work(item)

    _WorkItem.run = work_here_too
    device = torch.device(NAME, 0)
    accelerate.state.PartialState.default_device = device
    ldm_smd.device.pick_device = lambda name: device
    return device


DEVICE = install()
