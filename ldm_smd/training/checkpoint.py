"""Checkpoints: complete or not there, safetensors and JSON only; runs resume from the newest.

A checkpoint is a folder ``images-N`` with ``model/`` and ``ema/`` (diffusers layout), ``optimizer.safetensors`` and
``state.json``; of every other network that is trained, it has ``NAME/`` and ``NAME-optimizer.safetensors``. It is written
under another name and renamed at the end, so one that has its name is complete. Random numbers need no state: they are drawn
from (seed, images_seen) in every step.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from diffusers import ModelMixin
from diffusers.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.nn import Module

from ..errors import UserError
from ..files import atomic_folder
from .ema import EMA
from .trained import TrainedNetwork

Networks = dict[str, TrainedNetwork]


def save_checkpoint(folder: Path, networks: Networks, ema: ModelMixin, state: dict, keep: int, writes: bool = True) -> None:
    """Write ``folder/images-N``, N the state's images_seen, and remove all but the newest ``keep``. For all processes to call,
    the one that ``writes`` among them."""
    models = {name: trained.full_network() for name, trained in networks.items()} | {"ema": ema}
    optimizers = {optimizer_file(name): trained.optimizer_tensors() for name, trained in networks.items()}
    if not writes:
        return
    with atomic_save(folder / f"images-{state['images_seen']:012d}") as temporary:
        for name, model in models.items():
            model.save_pretrained(temporary / name)
        for name, tensors in optimizers.items():
            save_file(tensors, temporary / name)
        (temporary / "state.json").write_text(json.dumps(state), encoding="utf-8")
    for old in checkpoints(folder)[:-keep]:
        shutil.rmtree(old)


def optimizer_file(name: str) -> str:
    return "optimizer.safetensors" if name == "model" else f"{name}-optimizer.safetensors"


@contextmanager
def atomic_save(path: Path) -> Iterator[Path]:
    """Write a folder as ``atomic_folder`` does; UserError where the disk is full."""
    try:
        with atomic_folder(path) as temporary:
            yield temporary
    except (OSError, SafetensorError) as error:
        raise UserError(f"output: expected to write {path}, found {error}; the checkpoints before it are kept") from error


def resume(folder: Path, networks: Networks, ema: EMA) -> dict:
    """Load the newest checkpoint in place, but for the optimizers; returns its state, images_seen 0 without one."""
    for path in checkpoints(folder)[-1:]:
        for name, trained in networks.items():
            load_weights(trained.network, path / name, "output")
        load_weights(ema.model, path / "ema", "output")
        return json.loads((path / "state.json").read_text(encoding="utf-8"))
    return {"images_seen": 0}


def resume_optimizers(folder: Path, networks: Networks) -> None:
    """Load the optimizers of the newest checkpoint, if any. Call after FSDP sharding."""
    for path in checkpoints(folder)[-1:]:
        for name, trained in networks.items():
            trained.load_optimizer(load_file(path / optimizer_file(name)))


def checkpoints(folder: Path) -> list[Path]:
    """List the complete checkpoints, oldest first."""
    return sorted(folder.glob("images-" + 12 * "[0-9]"))


def newest_images(folder: Path) -> int:
    """Return the images seen by the newest checkpoint; 0 where there is none."""
    return max((int(path.name.removeprefix("images-")) for path in checkpoints(folder)), default=0)


def load_weights(
    model: ModelMixin, folder: Path, key: str, new: Sequence[Module | None] = (), kept: Module | None = None
) -> None:
    """Copy the weights of a diffusers model folder into ``model``; ``key`` is the setting a mismatch is blamed on.

    Modules in ``new`` stay as they are where the folder has no weight of theirs: so a mixture starts from a Gaussian model;
    ``kept`` stays as it is in any case.
    """
    path = folder / SAFETENSORS_WEIGHTS_NAME
    if not path.is_file():
        raise UserError(f"{key}: expected a model folder with {path.name}, found none in {folder}")
    weights, expected = load_file(path), model.state_dict()
    model._fix_state_dict_keys_on_load(weights)  # as from_pretrained does
    left = names_in(model, kept).union(*(names for part in new if not (names := names_in(model, part)) & weights.keys()))
    own = sorted(expected.keys() - left)
    for name in [*own, *sorted(weights.keys() - expected.keys())]:
        found, wanted = (tuple(given[name].shape) if name in given else "nothing" for given in (weights, expected))
        if found != wanted:
            raise UserError(
                f"{key}: expected the weights of the configured model, with {name} {wanted}, found {found} in {folder}"
            )
    model.load_state_dict({name: weights[name] for name in own}, strict=not left)


def names_in(model: Module, part: Module | None) -> set[str]:
    """List the names, in the model's state dict, of the weights of one of its modules; none for None."""
    prefix = next((name for name, module in model.named_modules() if module is part), None)
    return set() if prefix is None else {name for name in model.state_dict() if name.startswith(f"{prefix}.")}
