"""Post-hoc EMA: averages of a run's weights of any width (EDM2, arXiv 2312.02696, section 3 and appendix C).

During training, a run tracks a few PowerEMAs and saves a snapshot of each at every checkpoint. A profile of another width,

    p(tau) = (gamma + 1) tau^gamma / t^(gamma + 1),    0 < tau < t,

is then approximated by a linear combination of theirs. The least-squares coefficients x solve A x = b with
A_ij = <p_i, p_j>, b_i = <p_i, p>.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import safe_open

from ..errors import UserError
from ..files import makes_folder
from ..models.backbone import current_name
from ..pipelines import load_pipeline
from .checkpoint import atomic_save, load_weights
from .ema import PowerEMA, gamma_of
from .model_folder import model_card, write_model_folder
from .settings import AverageConfig

FOLDER = re.compile(r"images-(\d{12})-width-([0-9.]+)")


@dataclass(frozen=True)
class Snapshot:
    """A PowerEMA as saved after ``images`` images."""

    path: Path
    images: int
    sigma_rel: float


def snapshot_path(run: Path, images: int, sigma_rel: float) -> Path:
    return run / "averages" / f"images-{images:012d}-width-{sigma_rel:g}"


def save_snapshot(run: Path, images: int, average: PowerEMA, writes: bool = True) -> None:
    """Save a snapshot of the average. All processes must call this; one of them ``writes``."""
    model = average.gather()
    if writes:
        with atomic_save(snapshot_path(run, images, average.sigma_rel)) as folder:
            model.save_pretrained(folder, max_shard_size="1TB")  # in one file


def resume_averages(run: Path, images: int, averages: list[PowerEMA]) -> None:
    """Load the averages as saved after ``images`` images, in place."""
    for average in averages:
        load_weights(average.model, snapshot_path(run, images, average.sigma_rel), "ema_widths")


def snapshots(run: Path, until: int | None) -> list[Snapshot]:
    """List the snapshots of a run, up to ``until`` images."""
    paths = {path: FOLDER.fullmatch(path.name) for path in sorted((run / "averages").glob("images-*"))}
    found = [Snapshot(path, int(matched[1]), float(matched[2])) for path, matched in paths.items() if matched]
    return [snapshot for snapshot in found if until is None or snapshot.images <= until]


def inner_product(t_a: np.ndarray, gamma_a: np.ndarray, t_b: np.ndarray, gamma_b: np.ndarray) -> np.ndarray:
    """Return <p_a, p_b>, the integral of the product of two profiles that end at t_a and t_b:

        (gamma_a + 1) (gamma_b + 1) / ((gamma_a + gamma_b + 1) t_max) * (t_min / t_max)^gamma

    with the last gamma that of the profile that ends later.
    """
    first, last = np.minimum(t_a, t_b), np.maximum(t_a, t_b)
    exponent = np.where(t_a < t_b, gamma_b, gamma_a)
    return (gamma_a + 1) * (gamma_b + 1) / ((gamma_a + gamma_b + 1) * last) * (first / last) ** exponent


def coefficients(kept: list[Snapshot], images: int, sigma_rel: float) -> np.ndarray:
    """Solve for the coefficients of the snapshots in an average of width ``sigma_rel``. They are scaled to a sum of 1, because
    with few snapshots the solution may shrink or enlarge all weights."""
    # In units of the whole training, for better conditioning.
    ends = np.array([snapshot.images for snapshot in kept], dtype=np.float64) / images
    gammas = np.array([gamma_of(snapshot.sigma_rel) for snapshot in kept])
    products = inner_product(ends[:, None], gammas[:, None], ends[None], gammas[None])
    wanted = inner_product(ends, gammas, np.ones(1), np.array([gamma_of(sigma_rel)]))
    solution = np.linalg.lstsq(products, wanted, rcond=None)[0]
    return solution / solution.sum()


@makes_folder()
def average(config: AverageConfig) -> Path:
    """Write a model folder with an average of the weights of ``config.run``; returns its path."""
    run, output = Path(config.run), Path(config.output)
    kept = snapshots(run, config.images)
    if not kept:
        raise UserError(f"run: expected a run with EMA snapshots (tools/train.py ema_widths=[0.05,0.1]), found none in {run}")
    images = max(snapshot.images for snapshot in kept)
    pipeline = load_pipeline(run / "model")
    factors = coefficients(kept, images, config.sigma_rel).tolist()
    # One tensor at a time, because the snapshots may not fit in memory together.
    files = [safe_open(snapshot.path / SAFETENSORS_WEIGHTS_NAME, framework="pt") for snapshot in kept]
    names = [{current_name(name): name for name in file.keys()} for file in files]  # noqa: SIM118
    with torch.no_grad():
        for name, value in pipeline.unet.named_parameters():
            tensors = (file.get_tensor(known[name]).double() for file, known in zip(files, names))
            value.copy_(sum(factor * tensor for factor, tensor in zip(factors, tensors)))
    text = f"Post-hoc EMA of relative width {config.sigma_rel:g} of `{run}` after {images:,} images, {len(kept)} snapshots."
    write_model_folder(output, pipeline, model_card(type(pipeline.unet).__name__, text, config), "unet")
    print(f"{len(kept)} snapshots, {images:,} images; wrote {output}")
    return output
