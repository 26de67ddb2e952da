"""Checkpoints: whole or not there, safetensors and JSON only, the newest complete one is resumed.

A checkpoint is a folder ``images-N`` with ``model/`` and ``ema/`` (diffusers layout), ``optimizer.safetensors`` and
``state.json``. It is written under another name and renamed at the end, so one that has its name is complete. Random
numbers need no state: they are drawn from (seed, images_seen) in every step.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from diffusers import ModelMixin
from diffusers.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.nn import Module

from ..errors import UserError
from ..files import atomic_folder
from ..models.backbone import current_name
from .ema import EMA
from .sharding import distribute_like, whole

PATTERN = re.compile(r"images-(\d{12})")


def save_checkpoint(
    folder: Path, model: ModelMixin, ema: ModelMixin, optimizer: dict[str, torch.Tensor], state: dict, keep: int
) -> Path:
    """Write ``folder/images-N``, N the state's images_seen, and remove all but the newest ``keep``.

    ``optimizer`` is of ``optimizer_tensors``.
    """
    path = folder / f"images-{state['images_seen']:012d}"
    with written_whole(path) as temporary:
        model.save_pretrained(temporary / "model")
        ema.save_pretrained(temporary / "ema")
        save_file(optimizer, temporary / "optimizer.safetensors")
        (temporary / "state.json").write_text(json.dumps(state), encoding="utf-8")
    for old in checkpoints(folder)[:-keep]:
        shutil.rmtree(old)
    return path


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """``atomic_folder``; a full disk is the user's to mend."""
    try:
        with atomic_folder(path) as temporary:
            yield temporary
    except (OSError, SafetensorError) as error:
        raise UserError(f"output: expected to write {path}, found {error}; the checkpoints before it are kept") from error


def resume(folder: Path, model: ModelMixin, ema: EMA) -> dict:
    """Load the newest checkpoint under ``folder`` in place, but for the optimizer; returns its state, images_seen 0 where there
    is none."""
    found = checkpoints(folder)
    if not found:
        return {"images_seen": 0}
    for module, name in ((model, "model"), (ema.model, "ema")):
        load_weights(module, found[-1] / name, "output")
    return json.loads((found[-1] / "state.json").read_text(encoding="utf-8"))


def resume_optimizer(folder: Path, model: Module, optimizer: torch.optim.Optimizer) -> None:
    """Load the optimizer of the newest checkpoint, if any. Call after FSDP sharding."""
    for path in checkpoints(folder)[-1:]:
        load_optimizer(model, optimizer, load_file(path / "optimizer.safetensors"))


def checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted(path for path in folder.glob("images-*") if PATTERN.fullmatch(path.name))


def newest_images(folder: Path) -> int:
    """Images seen by the newest checkpoint; 0 where there is none."""
    found = [match for path in checkpoints(folder) if (match := PATTERN.fullmatch(path.name))]
    return int(found[-1][1]) if found else 0


def load_weights(
    model: ModelMixin, folder: Path, key: str, new: Sequence[Module | None] = (), kept: Module | None = None
) -> None:
    """Copy the weights of a diffusers model folder into ``model``; ``key`` is the setting a mismatch is blamed on.

    Args:
        new: modules of the model that stay as they are where the folder has no weight of theirs: so a mixture starts from a
            Gaussian model.
        kept: a module that stays as it is in any case.
    """
    path = folder / SAFETENSORS_WEIGHTS_NAME
    if not path.is_file():
        raise UserError(f"{key}: expected a model folder with {path.name}, found none in {folder}")
    weights, expected = load_file(path), model.state_dict()
    model._fix_state_dict_keys_on_load(weights)  # as from_pretrained does
    left = names_in(model, kept).union(*(names for part in new if not (names := names_in(model, part)) & weights.keys()))
    own = sorted(name for name in expected if name not in left)
    for name in [*own, *sorted(weights.keys() - expected.keys())]:
        found = tuple(weights[name].shape) if name in weights else "nothing"
        wanted = tuple(expected[name].shape) if name in expected else "nothing"
        if found != wanted:
            raise UserError(
                f"{key}: expected the weights of the configured model, with {name} {wanted}, found {found} in {folder}"
            )
    model.load_state_dict({name: weights[name] for name in own}, strict=not left)


def names_in(model: Module, part: Module | None) -> set[str]:
    """Names in the model's state dict of the weights of one of its modules; none for None."""
    prefix = next((name for name, module in model.named_modules() if module is part), None)
    return set() if prefix is None else {name for name in model.state_dict() if name.startswith(f"{prefix}.")}


def optimizer_tensors(model: Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """The optimizer's state as one flat dictionary "parameter name/entry" -> tensor, whole: for all processes to call. On the
    CPU, as one GPU may not have the memory for what they have together."""
    names: dict[torch.Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    return {
        f"{names[parameter]}/{entry}": whole(value).cpu()
        for parameter, state in optimizer.state.items()
        for entry, value in state.items()
    }


def load_optimizer(model: Module, optimizer: torch.optim.Optimizer, tensors: dict[str, torch.Tensor]) -> None:
    """The inverse of ``optimizer_tensors``."""
    parameters = dict(model.named_parameters())
    fused = bool(optimizer.defaults.get("fused"))
    for flat, tensor in tensors.items():
        former, _, entry = flat.rpartition("/")
        name = current_name(former)
        # AdamW keeps its step counters on the CPU unless it is fused; then they lie beside the parameters.
        if entry != "step" or fused:
            tensor = distribute_like(tensor.to(parameters[name].device), parameters[name])
        optimizer.state[parameters[name]][entry] = tensor
