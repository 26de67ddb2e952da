"""Checkpoints, in safetensors and JSON only. Runs resume from the newest one.

A checkpoint is a folder ``images-N`` with ``model/`` and ``ema/`` (diffusers layout), ``optimizer.safetensors`` and
``state.json``. Every other trained network adds ``NAME/`` and ``NAME-optimizer.safetensors``. The folder is written under a
temporary name and renamed at the end, so it is always complete. There is no state of random generators: random numbers are a
function of (seed, images_seen).
"""

from __future__ import annotations

import json
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

from ..errors import UserError, one_line
from ..files import atomic_folder
from ..models.hub import SHARDS
from .ema import EMA
from .trained import TrainedNetwork

Networks = dict[str, TrainedNetwork]


def save_checkpoint(folder: Path, networks: Networks, ema: ModelMixin, state: dict, keep: int, writes: bool = True) -> None:
    """Write ``folder/images-N``, where N is images_seen in ``state``, and remove all but the newest ``keep`` checkpoints. All
    processes must call this; one of them ``writes``."""
    models = {name: trained.full_network(writes) for name, trained in networks.items()} | {"ema": ema}
    optimizers = {optimizer_file(name): trained.optimizer_tensors(writes) for name, trained in networks.items()}
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
    """Write a folder as ``atomic_folder`` does. Raises UserError if writing fails, such as on a full disk."""
    try:
        with atomic_folder(path) as temporary:
            yield temporary
    except (OSError, SafetensorError) as error:
        raise UserError(f"output: expected to write {path}, found {error}; earlier checkpoints are kept") from error


def resume(folder: Path, networks: Networks, ema: EMA) -> dict:
    """Load the networks of the newest checkpoint in place; returns its state, or {"images_seen": 0} without a checkpoint."""
    for path in checkpoints(folder)[-1:]:
        for name, trained in networks.items():
            load_weights(trained.network, path / name, "output")
        load_weights(ema.model, path / "ema", "output")
        try:
            return json.loads((path / "state.json").read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise damaged(path / "state.json", "output", error) from error
    return {"images_seen": 0}


def resume_optimizers(folder: Path, networks: Networks) -> None:
    """Load the optimizers of the newest checkpoint, if any. Call after FSDP sharding."""
    for path in checkpoints(folder)[-1:]:
        for name, trained in networks.items():
            trained.load_optimizer(load_tensors(path / optimizer_file(name), "output"))


def checkpoints(folder: Path) -> list[Path]:
    """List the complete checkpoints, oldest first."""
    return sorted(folder.glob("images-" + 12 * "[0-9]"))


def newest_images(folder: Path) -> int:
    """Return the images seen by the newest checkpoint, or 0 without one."""
    return max((int(path.name.removeprefix("images-")) for path in checkpoints(folder)), default=0)


def load_tensors(path: Path, key: str) -> dict[str, torch.Tensor]:
    """Load a safetensors file. Raises UserError that names the setting ``key`` if the file is missing or damaged."""
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise damaged(path, key, error) from error


def damaged(path: Path, key: str, error: Exception) -> UserError:
    """Return the error for a file that cannot be read. That of a run's own checkpoint (``key`` is "output") says what to do."""
    advice = "; without its folder, the run resumes from the checkpoint before, if any" if key == "output" else ""
    return UserError(f"{key}: expected to read {path}, found {type(error).__name__}: {one_line(error)}{advice}")


def load_weights(
    model: ModelMixin, folder: Path, key: str, new: Sequence[Module | None] = (), kept: Module | None = None
) -> None:
    """Load the weights of a diffusers model folder into ``model``.

    Args:
        key: the setting to name in the UserError for missing or mismatched weights.
        new: modules that keep their values if the folder has no weights for them, as when a mixture starts from a Gaussian
            model.
        kept: module that always keeps its values.
    """
    whole = folder / SAFETENSORS_WEIGHTS_NAME
    paths = [whole] if whole.is_file() else sorted(folder.glob(SHARDS))  # save_pretrained splits weights of 10 GB and more
    if not paths:
        raise UserError(f"{key}: expected a model folder with {whole.name}, found none in {folder}")
    weights = {name: tensor for path in paths for name, tensor in load_tensors(path, key).items()}
    expected = model.state_dict()
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
    """Return the names in the model's state dict that belong to ``part``, one of its modules; none for None."""
    prefix = next((name for name, module in model.named_modules() if module is part), None)
    return set() if prefix is None else {name for name in model.state_dict() if name.startswith(f"{prefix}.")}
