"""tools/fit_gaussian.py: fit LatentGaussians to latent shards in one pass, for TeleportScheduler."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import reduce

from ..autoencoder import FrozenAutoencoder, sample_latents
from ..data.shards import Manifest
from ..data.stream import LatentStream
from ..device import process_group
from ..errors import UserError
from ..files import makes_folder
from ..models.denoiser import num_classes
from ..models.fit import fit_shared, leading, weights_by_class
from ..models.gaussian import LatentGaussians
from ..pipelines import SMDPipeline, load_pipeline
from ..progress import progress
from ..schedulers import make_scheduler
from ..schema import check
from .coarse_labels import SEPARATOR
from .model_folder import model_card, write_model_folder
from .settings import FitGaussianConfig

FITTING_LATENTS = 16_384
"""Maximum number of latents that a mixture is fitted to."""
LATENTS_PER_COMPONENT = 8
MEMORY_LIMIT = 4 * 2**30
"""Memory for the sums of products, in bytes. Larger covariances are sketched; larger sketches are refused."""
OVERSAMPLING = 4
FLOOR = 1e-4


@dataclass
class LatentSums:
    """Sums over the normalised latents per class, for means and covariances, in float64. The last row is for no class.

    Attributes:
        probes: white noise (D, L), or None.
        counts: (rows,).
        sums: sum of the encoder's means, (rows, D).
        squares: sum of all squared elements of the means, (rows,).
        spreads: sum of the encoder's variances, (rows, D).
        products: sum of x x^T over the means x, (rows, D, D); for large latents its product with ``probes``, (rows, D, L).
    """

    probes: torch.Tensor | None
    counts: torch.Tensor
    sums: torch.Tensor
    squares: torch.Tensor
    spreads: torch.Tensor
    products: torch.Tensor

    @classmethod
    def empty(cls, rows: int, elements: int, sketch: int | None = None, seed: int = 0) -> LatentSums:
        """Make sums of zero. ``sketch`` is L, or None for the full products."""
        probes = None
        if sketch is not None:
            generator = torch.Generator().manual_seed(seed)
            probes = torch.randn(elements, sketch, generator=generator, dtype=torch.float64)
        shapes = ((rows,), (rows, elements), (rows,), (rows, elements), (rows, elements, sketch or elements))
        return cls(probes, *(torch.zeros(shape, dtype=torch.float64) for shape in shapes))

    def add(self, means: torch.Tensor, variances: torch.Tensor, labels: torch.Tensor) -> None:
        """Add the exact moments of latents N(means, diag(variances)), both (N, D); labels (N,), -1 for none."""
        for label in labels.unique().tolist():
            chosen = labels == label
            x = means[chosen].double()
            self.counts[label] += len(x)
            self.sums[label] += x.sum(dim=0)
            self.squares[label] += x.square().sum()
            self.spreads[label] += variances[chosen].double().sum(dim=0)
            self.products[label].addmm_(x.T, x if self.probes is None else x @ self.probes)

    def apply(self, function: Callable[[torch.Tensor], torch.Tensor]) -> LatentSums:
        """Apply a linear function to every tensor of sums."""
        return LatentSums(self.probes, *map(function, (self.counts, self.sums, self.squares, self.spreads, self.products)))

    def pooled(self) -> LatentSums:
        return self.apply(lambda total: total.sum(dim=0, keepdim=True))

    def joined(self, rows: list[int]) -> LatentSums:
        """Return the sums over the latents of these classes."""
        return self.apply(lambda total: total[rows].sum(dim=0, keepdim=True))

    def principal(self, row: int, rank: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the mean (D,), the leading eigenvectors (rank, D) and eigenvalues (rank,) of the covariance, and the mean of
        the other eigenvalues.

        For large latents, the covariance C of the encoder's means is approximated from C Omega, with Omega the probes, by
        C Omega (Omega^T C Omega)^-1 (C Omega)^T (Nystroem), with the small shift of algorithm 3 of arXiv 1706.05736 for
        stability. This is exact if C has rank L or less. The encoder's variances are replaced by their mean.
        """
        mean, spread = self.sums[row] / self.counts[row], self.spreads[row] / self.counts[row]
        second = self.products[row] / self.counts[row]
        if self.probes is None:
            return mean, *leading(second - torch.outer(mean, mean) + torch.diag(spread), rank)
        product = second - torch.outer(mean, mean @ self.probes)
        # Relative to the second moment, because a class of equal latents has no covariance.
        shift = torch.finfo(torch.float64).eps * torch.maximum(product.norm(), second.norm()).clamp_min(1e-300)
        product = product + shift * self.probes
        inner = self.probes.T @ product
        lower = torch.linalg.cholesky(0.5 * (inner + inner.T))
        root = torch.linalg.solve_triangular(lower, product.T, upper=False).T
        vectors, roots, _ = torch.linalg.svd(root, full_matrices=False)
        variances = (roots.square() - shift).clamp_min(0.0)[:rank]
        total = self.squares[row] / self.counts[row] - mean.square().sum()
        tail = ((total - variances.sum()) / (len(mean) - rank)).clamp_min(0.0)
        return mean, vectors[:, :rank].T, variances + spread.mean(), tail + spread.mean()


@makes_folder(distributed=True)
def fit_gaussian(config: FitGaussianConfig) -> Path:
    """Fit the Gaussians and write the model folder; returns its path."""
    output = Path(config.output)
    pipeline = load_pipeline(config.model)
    manifest = Manifest.load(config.shards, config.shards_cache)
    autoencoder = FrozenAutoencoder(pipeline.vae, config.model)
    manifest.check_autoencoder(autoencoder)
    check_classes(pipeline, manifest)
    classes = num_classes(pipeline.unet) or 0
    with process_group() as state:
        sums = latent_sums(config, manifest, autoencoder, classes if config.components == 1 else 0, state)
    if not state.is_main_process:
        return output
    members = coarse_members(manifest.classes, pipeline.id2label)
    if config.components == 1:
        gaussians = class_gaussians(sums, manifest.latent_shape, config.rank, classes, members)
    else:
        gaussians = shared_gaussians(config, sums, manifest, autoencoder, classes, members)
    scheduler = make_scheduler(f"TeleportScheduler:sigma_skip={config.sigma_skip}", pipeline.scheduler)
    pipeline.register_modules(gaussian=gaussians, scheduler=scheduler)
    found = f"{len(gaussians.means)} Gaussians fitted to {int(sums.counts.sum()):,} latents"
    covariance = "a mixture with a shared covariance" if gaussians.config.shared else "one per class and one for all classes"
    text = f"""\
{found}, {covariance}, with {gaussians.config.rank} directions each. All other components are those of `{config.model}`.

Made by `tools/fit_gaussian.py` with these settings:"""
    card = model_card("Gaussians of the latents, for TeleportScheduler", text, config)
    write_model_folder(output, pipeline, card, "gaussian")
    print(f"{found}; wrote {output}")
    return output


def check_classes(pipeline: SMDPipeline, manifest: Manifest) -> None:
    """Raise UserError if the shards have more classes than the model has, unless it is unconditional."""
    classes, wanted = num_classes(pipeline.unet), len(manifest.classes)
    expected = f"a model of {wanted} classes and the null class, as in the shards"
    check(classes is None or classes >= wanted, "model", expected, classes)


def coarse_members(names: list[str], id2label: dict[int, str]) -> dict[int, list[int]]:
    """Return coarse class of the model -> classes of the shards, by name, that it stands for: "noto" for "noto, flags"."""
    coarse = {row: name for row, name in id2label.items() if row >= len(names)}
    return {row: [number for number, fine in enumerate(names) if name in fine.split(SEPARATOR)] for row, name in coarse.items()}


def latent_sums(
    config: FitGaussianConfig, manifest: Manifest, autoencoder: FrozenAutoencoder, classes: int, state: PartialState
) -> LatentSums:
    """Sum over all latents of the shards per class, on all processes; half of them mirrored with ``config.mirror``."""
    elements, sketch = math.prod(manifest.latent_shape), None
    if 8 * (classes + 1) * elements**2 > MEMORY_LIMIT:
        sketch = min(OVERSAMPLING * config.rank, elements)
        if 8 * (classes + 1) * elements * sketch > MEMORY_LIMIT:
            raise UserError(
                f"shards: expected latents for which {sketch} directions fit in {MEMORY_LIMIT / 2**30:.0f} GB, found "
                f"{elements} elements and {classes} classes; lower rank, or set components=256 for one shared covariance"
            )
    sums = LatentSums.empty(classes + 1, elements, sketch, config.seed)
    size = min(config.batch_size, manifest.count)
    stream = LatentStream(manifest, size, manifest.count, seed=config.seed, mirror=config.mirror)
    starts = range(0, manifest.count, size)[state.process_index :: state.num_processes]
    bar = progress(size * len(starts), 0, "fit")
    for start, batch in zip(starts, stream.batches_at(starts)):
        left = manifest.count - start  # the last batch continues into the next epoch
        moments, labels = batch.moments[:left].float(), batch.labels[:left]
        means = autoencoder.normalise(moments[:, 0])
        variances = torch.zeros_like(means) if moments.shape[1] == 1 else moments[:, 1].exp() * autoencoder.scale**2
        sums.add(means.flatten(1), variances.flatten(1), labels if classes else torch.full_like(labels, -1))
        bar.update(len(labels))
    bar.close()
    return sums.apply(partial(reduce, reduction="sum"))  # over the processes


def class_gaussians(
    sums: LatentSums, shape: tuple[int, int, int], rank: int, classes: int, members: dict[int, list[int]] | None = None
) -> LatentGaussians:
    """Make a Gaussian per class and one for all classes. A coarse class has the latents of its ``members``. A class without
    latents gets the Gaussian of all."""
    rank = min(rank, sums.sums.shape[1] - 1)
    gaussians = LatentGaussians(*shape, rank, classes + 1, num_classes=classes or None)
    pooled = sums.pooled()
    for row in range(classes + 1):
        rows = (members or {}).get(row, [row])
        pools = row == classes or sums.counts[rows].sum() == 0
        own = pooled if pools else sums.joined(rows)
        mean, vectors, variances, tail = own.principal(0, rank)
        gaussians.log_weights[row, row], gaussians.means[row] = 0.0, mean
        gaussians.vectors[row], gaussians.variances[row], gaussians.tails[row] = vectors, variances, tail
    return gaussians


def shared_gaussians(
    config: FitGaussianConfig,
    sums: LatentSums,
    manifest: Manifest,
    autoencoder: FrozenAutoencoder,
    classes: int,
    members: dict[int, list[int]],
) -> LatentGaussians:
    """Fit a mixture with a shared covariance, in the leading principal components of all latents."""
    generator = torch.Generator().manual_seed(config.seed)
    latents, labels = fitting_latents(manifest, autoencoder, config.seed, config.mirror, generator)
    components = max(1, min(config.components, len(latents) // LATENTS_PER_COMPONENT))
    rank = min(config.rank, sums.sums.shape[1] - 1)
    mean, vectors, _, tail = sums.pooled().principal(0, rank)
    weights, means, within, responsibilities = fit_shared((latents.flatten(1).double() - mean) @ vectors.T, components, FLOOR)
    variances, axes = torch.linalg.eigh(within)
    gaussians = LatentGaussians(*manifest.latent_shape, rank, components, shared=True, num_classes=classes or None)
    coarse = [torch.where(torch.isin(labels, torch.tensor(fine, dtype=labels.dtype)), row, -1) for row, fine in members.items()]
    every = torch.stack((labels, *coarse), dim=1)
    gaussians.log_weights.copy_(weights_by_class(weights, responsibilities, every, classes).log())
    gaussians.means.copy_(mean + means @ vectors)
    gaussians.vectors[0], gaussians.variances[0], gaussians.tails[0] = axes.T @ vectors, variances, tail
    return gaussians


def fitting_latents(
    manifest: Manifest, autoencoder: FrozenAutoencoder, seed: int, mirror: bool, generator: torch.Generator | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the latents that a mixture is fitted to, the first of the stream, normalised, and their labels, on the CPU."""
    count = min(manifest.count, FITTING_LATENTS)
    batch = LatentStream(manifest, count, count, seed=seed, mirror=mirror, checks=False).batch_at(0)
    latents = autoencoder.normalise(sample_latents(batch.moments.to(autoencoder.device), generator))
    return latents.cpu(), batch.labels
