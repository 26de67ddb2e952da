"""Estimates the cost of encoding a data set and training a model, before buying anything: computed, not measured.

torch counts the floating-point operations of the real networks without running them. Time is their number over the assumed
speed of the GPUs. Bytes follow from the format of the shards and from what autograd keeps.

    python benchmarks/plan.py                     # writes benchmarks/results/plan.md
    python benchmarks/plan.py --gpus 32 --price 2.5 --utilisation 0.35 --output outputs/plan.md
"""

from __future__ import annotations

import argparse
import math
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from training_costs import BACKWARD, FLOAT32, WEIGHTS_HELD, Distilled, Model, dit_of, encoder_flops, unet_of

from ldm_smd.config import load_config
from ldm_smd.diffusion.settings import DistillationConfig
from ldm_smd.training.settings import TrainConfig

RESULT = Path(__file__).parent / "results" / "plan.md"
TRAINING_CONFIG = "configs/train/imagenet-256.yaml"
DISTILLATION_CONFIG = "configs/train/emoji-distilled.yaml"
"""Training config that the settings of the distillation are taken from."""
TAR_BLOCK, NPY_HEADER = 512, 128
FLOAT16 = 2
TF32 = 0.5
"""Speed relative to bf16. The autoencoder runs in float32, whose convolutions use TF32 on these GPUs."""
IMAGES_PER_CORE = 250
"""Images decoded and resized to 256 pixels, per second."""
DIT_BATCH = 32
FLOW_STEPS = 8
"""The default of objective.teacher_steps."""


@dataclass(frozen=True)
class Task:
    name: str
    dataset_size: int
    """Images of the data set."""
    jpeg_bytes: int
    """Size of an original image."""
    images_total: int
    """Images seen in training."""


TASKS = (
    Task("ImageNet, 256 pixels", 1_281_167, 110_000, 200_000_000),
    Task("100 million images, 256 pixels", 100_000_000, 60_000, 600_000_000),
)


def shard_bytes(images: int, encodings: int) -> int:
    """Return the size of tars with float16 means and log-variances of 32x32x4 latents, and labels.

    Args:
        encodings: per image; 2 with that of the mirror image.
    """
    moments = 2 * 4 * 32 * 32 * FLOAT16 + NPY_HEADER
    member = TAR_BLOCK + math.ceil(moments / TAR_BLOCK) * TAR_BLOCK
    return images * (encodings * member + 2 * TAR_BLOCK)


def hours(flops: float, arguments: argparse.Namespace) -> float:
    return flops / (arguments.gpus * arguments.teraflops * 1e12 * arguments.utilisation) / 3600


def plan(arguments: argparse.Namespace) -> str:
    config = load_config(TrainConfig, TRAINING_CONFIG)
    encoder = 2 * encoder_flops(256)  # the image and its mirror image
    build, draws = partial(unet_of, config), config.objective.draws
    mixture, gaussian, checkpointed = Model(build, draws), Model(build, 0), Model(build, draws, checkpointing=True)
    objective = load_config(TrainConfig, DISTILLATION_CONFIG).objective
    settings = objective.distillation
    distilled, distilled_checkpointed = (
        Distilled(build, settings, checkpointing, objective.draws) for checkpointing in (False, True)
    )
    per_gpu = config.batch_size // arguments.gpus
    steps_per_second = arguments.gpus * arguments.teraflops * 1e12 * arguments.utilisation / mixture.flops / config.batch_size
    lines = [
        f"Computed by `{' '.join(['python', 'benchmarks/plan.py', *sys.argv[1:]])}` for {arguments.gpus} GPUs of "
        f"{arguments.teraflops:g} TFLOP/s (bf16, dense) at an assumed utilisation of {arguments.utilisation:.0%} and "
        f"{arguments.price:g} $ per hour and GPU. Nothing here is measured. The model is that of `{TRAINING_CONFIG}`: "
        f"{mixture.parameters / 1e6:.0f} million parameters. A training step takes {mixture.flops / 1e9:.0f} GFLOP per image "
        f"as a mixture with {config.objective.draws} draws, {gaussian.flops / 1e9:.0f} as a Gaussian model, and "
        f"{distilled.flops / 1e9:.0f} in distillation with the settings of `{DISTILLATION_CONFIG}`. The autoencoder is that of "
        f"Stable Diffusion in float32 (TF32, half the speed): {encoder / 1e9:.0f} GFLOP for an image and its mirror image.",
        "",
        "| | " + " | ".join(task.name for task in TASKS) + " |",
        "|---" * (len(TASKS) + 1) + "|",
    ]

    def row(name: str, *values: str) -> None:
        lines.append(f"| {name} | " + " | ".join(values) + " |")

    encode = [hours(task.dataset_size * encoder / TF32, arguments) for task in TASKS]
    train = [hours(task.images_total * mixture.flops, arguments) for task in TASKS]
    base = [hours(task.images_total * gaussian.flops, arguments) for task in TASKS]
    read = [task.dataset_size / (each * 3600) for task, each in zip(TASKS, encode)]
    cost = arguments.gpus * arguments.price
    row("encoding, once", *(f"{each:.1f} h, {each * cost:,.0f} $" for each in encode))
    row(
        "reading and decoding for it",
        *(f"{rate:,.0f} images/s, {rate * task.jpeg_bytes / 2**20:,.0f} MiB/s" for task, rate in zip(TASKS, read)),
    )
    row(f"CPU cores for it, at {IMAGES_PER_CORE} images/s each", *(f"{math.ceil(rate / IMAGES_PER_CORE)}" for rate in read))
    row("latent shards with mirrored encodings", *(f"{shard_bytes(task.dataset_size, 2) / 2**30:,.0f} GiB" for task in TASKS))
    epochs = [task.images_total / task.dataset_size for task in TASKS]
    row("training", *(f"{task.images_total / 1e6:.0f} million images, {each:.0f} epochs" for task, each in zip(TASKS, epochs)))
    row("as a mixture", *(f"{each:.0f} h, {each * cost:,.0f} $" for each in train))
    row("as a Gaussian model", *(f"{each:.0f} h, {each * cost:,.0f} $" for each in base))
    million = hours(1e6 * distilled.flops, arguments)
    row("distillation of it, per million images", *([f"{million:.2f} h, {million * cost:,.2f} $"] * len(TASKS)))
    moments = shard_bytes(1, 1)
    same = [f"{steps_per_second * config.batch_size * moments / 2**20:,.0f} MiB/s"] * len(TASKS)
    row("reading latents in training, all GPUs", *same)
    gradients = 2 * mixture.parameters * FLOAT32 * (arguments.gpus - 1) / arguments.gpus
    row("exchange of gradients, per GPU", *([f"{steps_per_second * gradients / 2**30:.1f} GiB/s"] * len(TASKS)))
    row("checkpoint", *([f"{4 * mixture.parameters * FLOAT32 / 2**30:.1f} GiB"] * len(TASKS)))
    lines += [
        "",
        f"Memory per GPU: {WEIGHTS_HELD * mixture.parameters * FLOAT32 / 2**30:.1f} GiB for weights, gradients, AdamW and the "
        f"average (1/{arguments.gpus} of it with FSDP), and {mixture.activations * per_gpu / 2**30:.1f} GiB of activations for "
        f"{per_gpu} images. With gradient_checkpointing=true these are {checkpointed.activations * per_gpu / 2**30:.1f} GiB, "
        "at a third more operations. micro_batches=N divides either by N.",
        "",
        f"In distillation: {distilled.held / 2**30:.1f} GiB for mixture, critic and teacher (with FSDP 1/{arguments.gpus} of "
        f"{distilled.sharded / 2**30:.1f} GiB, plus the teacher's weights), and "
        f"{distilled.activations * per_gpu / 2**30:.1f} GiB of activations, or "
        f"{distilled_checkpointed.activations * per_gpu / 2**30:.1f} GiB with gradient_checkpointing=true.",
    ]
    return "\n".join([*lines, *plan_of_dit(arguments, settings, draws)]) + "\n"


def plan_of_dit(arguments: argparse.Namespace, settings: DistillationConfig, draws: int) -> list[str]:
    """Estimate the cost of turning a pretrained DiT-XL/2 for ImageNet into a mixture."""
    cost = arguments.gpus * arguments.price
    trainings = {
        f"energy score, {draws} draws": (Model(dit_of, draws), Model(dit_of, draws, checkpointing=True)),
        f"regression, 1 draw, {FLOW_STEPS} evaluations of the teacher": (
            Model(dit_of, 1),
            Model(dit_of, 1, checkpointing=True),
        ),
        "distillation": tuple(Distilled(dit_of, settings, checkpointing, draws) for checkpointing in (False, True)),
    }
    parameters, teacher = trainings[next(iter(trainings))][0].parameters, Model(dit_of, 0)
    lines = [
        "",
        f"**A DiT-XL/2 from the hub** ({teacher.parameters / 1e6:.0f} million parameters, {parameters / 1e6:.0f} as a mixture) "
        f"on the same GPUs with {DIT_BATCH} images each. Weights include gradients, AdamW, the average, critic and teacher, "
        "with FSDP. Activations are given without and with gradient_checkpointing=true.",
        "",
        "| | GFLOP per image | per million images | weights per GPU | activations per GPU |",
        "|---|---|---|---|---|",
    ]
    for name, (each, checkpointed) in trainings.items():
        flops = each.flops + ("regression" in name) * FLOW_STEPS * teacher.flops / (1 + BACKWARD)
        if isinstance(each, Distilled):
            weights = each.held - each.sharded + each.sharded / arguments.gpus
        else:
            frozen = teacher.parameters if "regression" in name else 0
            weights = FLOAT32 * (WEIGHTS_HELD * each.parameters / arguments.gpus + frozen)
        kept = [f"{DIT_BATCH * one.activations / 2**30:.1f} GiB" for one in (each, checkpointed)]
        spent = hours(1e6 * flops, arguments)
        cells = [
            name,
            f"{flops / 1e9:,.0f}",
            f"{spent:.2f} h, {spent * cost:.2f} $",
            f"{weights / 2**30:.1f} GiB",
            ", ".join(kept),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def arguments_of(command: list[str]) -> argparse.Namespace:
    """Parse the command line. ``output`` defaults to RESULT if there are no options, else to None."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, default=8)
    parser.add_argument(
        "--teraflops", type=float, default=989.0, help="peak of one GPU in bf16, without sparsity (H100 SXM, H200: 989)"
    )
    parser.add_argument("--utilisation", type=float, default=0.3, help="fraction of the peak that is reached")
    parser.add_argument("--price", type=float, default=3.0, help="$ per hour for one GPU")
    parser.add_argument(
        "--output", type=Path, help="file to write; default: benchmarks/results/plan.md if there are no options, else none"
    )
    arguments = parser.parse_args(command)
    if not command:
        arguments.output = RESULT
    return arguments


def main() -> None:
    arguments = arguments_of(sys.argv[1:])
    text = plan(arguments)
    if arguments.output is not None:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
