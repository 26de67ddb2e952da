"""tools/train_classifier.py: train the feature network, one trunk with a head for each of several image sets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from ..data.classes import renumbered
from ..data.images import load_pixels
from ..device import pick_device
from ..errors import UserError, renamed_settings
from ..files import makes_folder
from ..models.feature_network import FeatureNetwork
from ..progress import progress
from .model_folder import model_card, write_model_folder
from .rates import warmup_then_cosine
from .settings import ClassifierSetConfig, TrainClassifierConfig

REPORT_EVERY_BATCHES = 50
WARMUP = 0.15


@dataclass
class LabelledImages:
    """Images, uint8 (N, 3, R, R), and class numbers (N,), in memory."""

    pixels: torch.Tensor
    labels: torch.Tensor

    @classmethod
    def load(cls, config: ClassifierSetConfig, part: str, known: Sequence[str] = ()) -> tuple[LabelledImages, list[str]]:
        """Load the "images" or "held_out" part, with the numbers of the classes in ``known``, and the class names."""
        key = f"sets.{config.name}.{part}"
        with renamed_settings({"images": key}):
            pixels, labels, classes = load_pixels(getattr(config, part))
        if any(label is None for label in labels):
            raise UserError(f"{key}: expected a class for every image, found images without one")
        return cls(pixels, torch.tensor(renumbered(labels, classes, known, key))), classes


Sets = dict[str, LabelledImages]


@makes_folder()
def train_classifier(config: TrainClassifierConfig) -> Path:
    """Train on all sets, measure the accuracy on the held-out parts, write the model folder; returns its path."""
    output = Path(config.output)
    device = pick_device("auto")
    torch.manual_seed(config.seed)
    training, held_out, classes = {}, {}, {}
    for entry in config.sets:
        training[entry.name], classes[entry.name] = LabelledImages.load(entry, "images")
        held_out[entry.name], _ = LabelledImages.load(entry, "held_out", classes[entry.name])
    counts = {name: len(names) for name, names in classes.items()}
    model = FeatureNetwork(tuple(config.block_out_channels), counts).to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=config.weight_decay)

    per_step = sum(entry.batch_size for entry in config.sets)
    steps = config.images_total // per_step
    bar = progress(steps * per_step, 0, output.name)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = warmup_then_cosine(config.learning_rate, step / steps, WARMUP)
        optimizer.zero_grad(set_to_none=True)
        losses = []
        for entry in config.sets:
            x, y = augmented_batch(training[entry.name], entry)
            logits = model.heads[entry.name](model(x.to(device)))
            losses.append(F.cross_entropy(logits, y.to(device), label_smoothing=0.1))
            losses[-1].backward()
        optimizer.step()
        bar.update(per_step)
        if step % REPORT_EVERY_BATCHES == 0:
            bar.set_postfix({entry.name: f"{float(loss.detach()):.3f}" for entry, loss in zip(config.sets, losses)})
    bar.close()

    model.eval()
    measured = {name: accuracy(model, name, images, device) for name, images in held_out.items()}
    write_model_folder(output, model, classifier_card(config, model, training, held_out, measured))
    print("held-out accuracy: " + ", ".join(f"{name} {right:.1%}" for name, right in measured.items()))
    return output


def augmented_batch(images: LabelledImages, config: ClassifierSetConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw a random batch in [-1, 1], shifted by up to an eighth of the side, half of it mirrored if ``mirror`` is set."""
    index = torch.randint(len(images.labels), (config.batch_size,))
    x = images.pixels[index].float() / 127.5 - 1.0
    if config.mirror:
        x = torch.where((torch.rand(len(x)) < 0.5).view(-1, 1, 1, 1), x.flip(3), x)
    side = x.shape[-1]
    margin = side // 8
    padded = F.pad(x, (margin,) * 4, mode="replicate")
    top, left = torch.randint(2 * margin + 1, (2, len(x), 1))
    rows, columns = top + torch.arange(side), left + torch.arange(side)
    # One gather for the whole batch, with a shift for every image.
    shifted = padded[torch.arange(len(x))[:, None, None], :, rows[:, :, None], columns[:, None, :]]
    return shifted.permute(0, 3, 1, 2), images.labels[index]


@torch.no_grad()
def accuracy(model: FeatureNetwork, name: str, images: LabelledImages, device: torch.device) -> float:
    """Return the top-1 accuracy."""
    right = 0
    for pixels, labels in zip(images.pixels.split(256), images.labels.split(256)):
        logits = model.heads[name](model(pixels.to(device).float() / 127.5 - 1.0))
        right += int((logits.argmax(dim=1).cpu() == labels).sum())
    return right / len(images.labels)


def classifier_card(
    config: TrainClassifierConfig, model: FeatureNetwork, training: Sets, held_out: Sets, measured: dict[str, float]
) -> str:
    """Return the README.md of the model folder."""
    rows = "\n".join(
        f"| {entry.name} | {model.config.classes[entry.name]} | {len(training[entry.name].labels):,} of "
        f"`{entry.images.source}` | {len(held_out[entry.name].labels):,} of `{entry.held_out.source}` | "
        f"{measured[entry.name]:.1%} |"
        for entry in config.sets
    )
    text = f"""\
{model.num_parameters() / 1e6:.2f} million parameters, trained for {config.images_total:,} images. The project \
measures distances between sets of images in its {config.block_out_channels[-1]} pooled features. Such a distance compares \
models on these image sets; it is not an FID.

| set | classes | trained on | measured on | accuracy |
|---|---|---|---|---|
{rows}

Trained by `tools/train_classifier.py` with these settings:"""
    return model_card("A small classifier, for features", text, config)
