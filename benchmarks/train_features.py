"""Trains a second feature network without labels, so that no claim of the image benchmarks rests on one network alone.

The method is SimCLR (arXiv 2002.05709): two views of an image, with random crop, colours and blur, are to be matched among the
views of all images of the batch. The trunk is a wider version of that of checkpoints/classifier. The head is discarded after
training.

examples:
  python benchmarks/train_features.py --config configs/benchmarks/features-selfsupervised.yaml
  python benchmarks/train_features.py --config configs/benchmarks/features-selfsupervised.yaml output=outputs/features

Writes a model folder for tools/evaluate.py (features=[FOLDER]). Its model card has the measurements.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from omegaconf import MISSING
from torch import nn
from views import ViewConfig, random_views

from ldm_smd.cli import run_tool
from ldm_smd.data.images import load_pixels
from ldm_smd.data.settings import ImagesConfig
from ldm_smd.device import pick_device
from ldm_smd.evaluation.features import Extractor, load_extractor
from ldm_smd.files import makes_folder
from ldm_smd.models.feature_network import FeatureNetwork
from ldm_smd.progress import progress
from ldm_smd.schema import check
from ldm_smd.training.model_folder import model_card, write_model_folder
from ldm_smd.training.rates import warmup_then_cosine

WARMUP = 0.1
FROZEN_NORMS = 0.8
"""After this fraction of the training, norms use their running statistics, as in evaluation."""
NEIGHBOURS = 10
REPORT_EVERY_STEPS = 10

Loaded = tuple[torch.Tensor, list[int | None], list[str]]
"""Images, labels and class names, as load_pixels returns them."""


@dataclass
class FeatureSetConfig:
    """One set of images. Labels are used for measurements only."""

    name: str = MISSING
    images: ImagesConfig = field(default_factory=ImagesConfig)
    held_out: ImagesConfig = field(default_factory=ImagesConfig)
    """Images that are not trained on."""
    batch_size: int = 128
    """Images per step, with two views each."""
    views: ViewConfig = field(default_factory=ViewConfig)


@dataclass
class TrainFeaturesConfig:
    """benchmarks/train_features.py"""

    output: str = MISSING
    sets: list[FeatureSetConfig] = field(default_factory=list)
    """Every step takes a batch of each set. Negatives come from the same set, because sets are easy to tell apart."""
    block_out_channels: list[int] = field(default_factory=lambda: [16, 32, 96, 176])
    head_channels: int = 256
    """Width of the head's hidden layer. Its output is half as wide."""
    temperature: float = 0.2
    images_total: int = 200_000
    """Training images of all sets together."""
    learning_rate: float = 2e-3
    """Peak learning rate of AdamW."""
    weight_decay: float = 1e-3
    compared: str = "checkpoints/classifier"
    """Feature network to compare with in the model card."""
    precision: str = "no"
    """no or bf16, which is slow on CPUs without hardware support."""
    seed: int = 0
    device: str = "auto"

    def __post_init__(self) -> None:
        check(len(self.sets) > 0, "sets", "at least one set of images", len(self.sets))
        check(self.precision in ("no", "bf16"), "precision", "no or bf16", self.precision)
        check(self.images_total >= self.per_step, "images_total", f"at least a step of {self.per_step}", self.images_total)

    @property
    def per_step(self) -> int:
        return sum(entry.batch_size for entry in self.sets)


@makes_folder()
def train_features(config: TrainFeaturesConfig) -> Path:
    """Train and measure the network; returns its model folder."""
    torch.manual_seed(config.seed)
    device, output = pick_device(config.device), Path(config.output)
    loaded = {entry.name: (load_pixels(entry.images), load_pixels(entry.held_out)) for entry in config.sets}
    images = {name: training[0] for name, (training, _) in loaded.items()}
    width = config.block_out_channels[-1]
    model = FeatureNetwork(tuple(config.block_out_channels)).to(device, memory_format=torch.channels_last)
    hidden = config.head_channels
    head = nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, hidden // 2)).to(device)
    parameters = [*model.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=config.learning_rate, weight_decay=config.weight_decay)
    steps = config.images_total // config.per_step
    bar = progress(steps * config.per_step, 0, output.name)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = warmup_then_cosine(config.learning_rate, step / steps, WARMUP)
        # Sets differ in brightness. In training each batch has its own statistics, but in evaluation all sets share one.
        model.train(step < FROZEN_NORMS * steps)
        optimizer.zero_grad(set_to_none=True)
        found = {}
        for entry in config.sets:
            chosen = torch.randint(len(images[entry.name]), (entry.batch_size,))
            x = images[entry.name][chosen].to(device).float() / 255.0
            views = torch.cat([random_views(x, entry.views) for _ in range(2)]) * 2.0 - 1.0
            with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16"):
                z = head(model(views))
            loss = contrastive_loss(z.float(), config.temperature)
            loss.backward()
            found[entry.name] = loss.detach()
        optimizer.step()
        bar.update(config.per_step)
        if step % REPORT_EVERY_STEPS == 0:
            bar.set_postfix({name: f"{float(loss):.3f}" for name, loss in found.items()})
    bar.close()
    model.eval()
    losses = {name: float(loss) for name, loss in found.items()}
    write_model_folder(output, model, features_card(config, model, {}, losses))
    measured = {
        name: measure_features(load_extractor(name, config.device), loaded) for name in (config.output, config.compared)
    }
    (output / "README.md").write_text(features_card(config, model, measured, losses), encoding="utf-8")
    for folder, rows in measured.items():
        print(folder, rows)
    return output


def contrastive_loss(z: torch.Tensor, temperature: float) -> torch.Tensor:
    """Return the NT-Xent loss of embeddings (2 N, D), where i and i + N are views of one image. With s the cosine similarity,

    mean_i -log( exp(s(z_i, z_j(i)) / T) / sum_{k != i} exp(s(z_i, z_k) / T) ),   j(i) = i +- N
    """
    z = F.normalize(z, dim=1)
    logits = (z @ z.T / temperature).fill_diagonal_(-torch.inf)
    return F.cross_entropy(logits, torch.arange(len(z), device=z.device).roll(len(z) // 2))


def measure_features(extractor: Extractor, loaded: dict[str, tuple[Loaded, Loaded]]) -> dict[str, dict[str, float]]:
    """Measure features of each set.

    Returns:
        For each set, the number of held-out images; the fraction of them whose class is that of most of the nearest training
        images; the fraction of the most frequent class; and the effective rank of the features.
    """
    rows = {}
    for name, ((pixels, labels, _), (held_out, true, _)) in loaded.items():
        features, new = extractor(pixels), extractor(held_out)
        counts = torch.tensor(true).bincount()
        rows[name] = {
            "pictures": len(true),
            "neighbours": round(nearest_right(features, torch.tensor(labels), new, torch.tensor(true)), 4),
            "chance": round(float(counts.max() / counts.sum()), 4),
            "effective_rank": round(effective_rank(new), 2),
        }
    return rows


def nearest_right(features: torch.Tensor, labels: torch.Tensor, new: torch.Tensor, true: torch.Tensor) -> float:
    """Return the fraction of rows ``new`` (M, D) whose class is the most frequent one among the nearest rows by cosine."""
    features, classes = F.normalize(features, dim=1).float(), int(labels.max()) + 1
    right = 0
    for rows, own in zip(F.normalize(new, dim=1).float().split(1024), true.split(1024)):
        nearest = (rows @ features.T).topk(min(NEIGHBOURS, len(features)), dim=1).indices
        votes = F.one_hot(labels[nearest], classes).sum(dim=1)
        right += int((votes.argmax(dim=1) == own).sum())
    return right / len(true)


def effective_rank(features: torch.Tensor) -> float:
    """Return the effective rank of features (N, D), where l are the eigenvalues of their covariance and p_i = l_i / sum l:

    exp(-sum_i p_i log p_i)

    It is 1 if all lie on a line or have collapsed, and D if the variance is the same in all directions.
    """
    eigenvalues = torch.linalg.eigvalsh(torch.cov(features.double().T)).clamp_min(0)
    return float(torch.special.entr(eigenvalues / eigenvalues.sum()).sum().exp())


def features_card(config: TrainFeaturesConfig, model: FeatureNetwork, measured: dict, losses: dict[str, float]) -> str:
    """Return the README.md of the model folder."""
    rows = [
        f"| {Path(folder).name} | {name} | {found['pictures']:,} | {found['neighbours']:.1%} | {found['chance']:.1%} | "
        f"{found['effective_rank']:.1f} |"
        for folder, sets in measured.items()
        for name, found in sets.items()
    ]
    ends = ", ".join(f"{name} {loss:.2f}" for name, loss in losses.items())
    chance = ", ".join(
        f"{entry.name} {torch.tensor(2.0 * entry.batch_size - 1).log():.2f}" for entry in config.sets
    )  # the loss if all views are equally similar
    text = f"""\
{model.num_parameters() / 1e6:.2f} million parameters, trained without labels on {config.images_total:,} images of the \
training sets (SimCLR, arXiv 2002.05709). Its {config.block_out_channels[-1]} pooled features measure distances between sets \
of images. They complement those of the classifier, which was trained differently: a claim about images must hold in both. \
These distances are no FID.

The table gives the accuracy of a {NEIGHBOURS}-nearest-neighbour classifier on held-out images, the fraction of the most \
frequent class, and the effective rank of the features of held-out images (exp of the entropy of the eigenvalues of their \
covariance). The final loss is {ends}; that of a network that cannot tell views apart is {chance}.

| features | set | held out | nearest neighbours | most frequent class | effective rank |
|---|---|---|---|---|---|
{chr(10).join(rows)}

Made by `benchmarks/train_features.py` with these settings:"""
    return model_card("A feature network trained without labels", text, config)


if __name__ == "__main__":
    sys.exit(run_tool(TrainFeaturesConfig, train_features, __doc__))
