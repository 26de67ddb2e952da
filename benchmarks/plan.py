"""What a data set and a model will take, before anything is bought: computed, not measured.

Floating-point operations are counted by torch on the very networks, without running them, and divided by what the GPUs are
assumed to do; bytes follow from the format of the shards and from what autograd keeps.

    python benchmarks/plan.py                     # writes benchmarks/results/plan.md
    python benchmarks/plan.py --gpus 32 --price 2.5 --utilisation 0.35
"""

from __future__ import annotations

import argparse
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from autoencoders import stable_diffusion
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from ldm_smd.config import config_as_dict, load_config
from ldm_smd.models.unet import SMDUNet2DModel
from ldm_smd.training.settings import TrainConfig

RESULT = Path(__file__).parent / "results" / "plan.md"
TRAINING_CONFIG = "configs/train/imagenet-256.yaml"
CLASSES = 1000
TAR_BLOCK, NPY_HEADER = 512, 128
FLOAT16, FLOAT32 = 2, 4
WEIGHTS_HELD = 5
"""In float32: the weights, their gradients, AdamW's two moments, the average."""
BACKWARD = 2
"""Operations of the way back, in those of the way there."""
TF32 = 0.5
"""Of the bf16 rate: the autoencoder works in float32, whose convolutions are TF32 on these GPUs."""
PICTURES_PER_CORE = 250
"""A second, decoded and resized to 256 pixels."""
ACTIVATION_BATCH = 8


@dataclass(frozen=True)
class Task:
    name: str
    pictures: int
    jpeg_bytes: int
    """Of a picture as it comes."""
    images: int
    """Seen in training."""


TASKS = (
    Task("ImageNet, 256 pixels", 1_281_167, 110_000, 200_000_000),
    Task("100 million pictures, 256 pixels", 100_000_000, 60_000, 600_000_000),
)


def encoder_flops(resolution: int) -> int:
    """Of the encoder of Stable Diffusion's autoencoder, a picture."""
    with FakeTensorMode(), torch.no_grad():
        autoencoder = stable_diffusion()
        with FlopCounterMode(display=False) as counter:
            autoencoder.encode(torch.empty(1, 3, resolution, resolution))
    return counter.get_total_flops()


class Model:
    """The configured UNet on 32x32x4 latents, as a mixture and as a Gaussian model.

    Attributes:
        parameters: its number.
        flops: of a training step, a picture.
        activations: bytes a picture that autograd keeps for the way back, in bf16.
    """

    def __init__(self, config: TrainConfig, mixture: bool, checkpointing: bool = False) -> None:
        shape = config_as_dict(config.model) | ({} if mixture else {"z_channels": 0})
        draws = config.objective.draws if mixture else 1
        kept: dict[int, int] = {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            kept[storage._cdata] = storage.nbytes()
            alive.append(tensor)
            return tensor

        alive: list[torch.Tensor] = []
        with FakeTensorMode(allow_non_fake_inputs=True):
            unet = SMDUNet2DModel(sample_size=32, in_channels=4, out_channels=4, num_classes=CLASSES, **shape)
            if checkpointing:
                unet.enable_gradient_checkpointing()
            weights = {parameter.untyped_storage()._cdata for parameter in unet.parameters()}
            inputs = (torch.empty(ACTIVATION_BATCH, 4, 32, 32), torch.zeros(ACTIVATION_BATCH, dtype=torch.long))
            labels = torch.zeros(ACTIVATION_BATCH, dtype=torch.long)
            eta = torch.empty(ACTIVATION_BATCH * draws, 4, 32, 32) if mixture else None
            with FlopCounterMode(display=False) as counter, torch.no_grad():
                unet(*inputs, labels, eta)
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), torch.autocast("cpu", torch.bfloat16):
                unet.train()(*inputs, labels, eta)
        self.parameters = unet.num_parameters()
        self.flops = (1 + BACKWARD) * counter.get_total_flops() / ACTIVATION_BATCH
        self.activations = sum(size for storage, size in kept.items() if storage not in weights) / ACTIVATION_BATCH


def shard_bytes(pictures: int, views: int) -> int:
    """Of tars with float16 means and log-variances of 32x32x4 latents, and a label."""
    moments = 2 * 4 * 32 * 32 * FLOAT16 + NPY_HEADER
    member = TAR_BLOCK + math.ceil(moments / TAR_BLOCK) * TAR_BLOCK
    return pictures * (views * member + 2 * TAR_BLOCK)


def hours(flops: float, arguments: argparse.Namespace) -> float:
    return flops / (arguments.gpus * arguments.teraflops * 1e12 * arguments.utilisation) / 3600


def plan(arguments: argparse.Namespace) -> str:
    config = load_config(TrainConfig, TRAINING_CONFIG)
    encoder = 2 * encoder_flops(256)  # the picture and its mirror image
    mixture, gaussian = Model(config, mixture=True), Model(config, mixture=False)
    checkpointed = Model(config, mixture=True, checkpointing=True)
    per_gpu = config.batch_size // arguments.gpus
    steps_per_second = arguments.gpus * arguments.teraflops * 1e12 * arguments.utilisation / mixture.flops / config.batch_size
    lines = [
        f"Computed by `{' '.join(['python', 'benchmarks/plan.py', *sys.argv[1:]])}` for {arguments.gpus} GPUs of "
        f"{arguments.teraflops:g} TFLOP/s (bf16, dense), of which {arguments.utilisation:.0%} are assumed to be used, at "
        f"{arguments.price:g} $ an hour each; nothing here is measured. The model is that of `{TRAINING_CONFIG}`: "
        f"{mixture.parameters / 1e6:.0f} million parameters, {mixture.flops / 1e9:.0f} GFLOP a picture in training as a "
        f"mixture of {config.objective.draws} draws, {gaussian.flops / 1e9:.0f} as a Gaussian model. The autoencoder is Stable "
        f"Diffusion's in float32 (TF32, half the rate), {encoder / 1e9:.0f} GFLOP for a picture and its mirror image.",
        "",
        "| | " + " | ".join(task.name for task in TASKS) + " |",
        "|---" * (len(TASKS) + 1) + "|",
    ]

    def row(name: str, *values: str) -> None:
        lines.append(f"| {name} | " + " | ".join(values) + " |")

    encode = [hours(task.pictures * encoder / TF32, arguments) for task in TASKS]
    train = [hours(task.images * mixture.flops, arguments) for task in TASKS]
    base = [hours(task.images * gaussian.flops, arguments) for task in TASKS]
    read = [task.pictures / (each * 3600) for task, each in zip(TASKS, encode)]
    cost = arguments.gpus * arguments.price
    row("encode once", *(f"{each:.1f} h, {each * cost:,.0f} $" for each in encode))
    row(
        "to be read and decoded meanwhile",
        *(f"{rate:,.0f} pictures/s, {rate * task.jpeg_bytes / 2**20:,.0f} MiB/s" for task, rate in zip(TASKS, read)),
    )
    row(f"cores for that, at {PICTURES_PER_CORE} pictures/s each", *(f"{math.ceil(rate / PICTURES_PER_CORE)}" for rate in read))
    row("latent shards with mirrored encodings", *(f"{shard_bytes(task.pictures, 2) / 2**30:,.0f} GiB" for task in TASKS))
    row("training", *(f"{task.images / 1e6:.0f} million images, {task.images / task.pictures:.0f} epochs" for task in TASKS))
    row("as a mixture", *(f"{each:.0f} h, {each * cost:,.0f} $" for each in train))
    row("as a Gaussian model", *(f"{each:.0f} h, {each * cost:,.0f} $" for each in base))
    moments = shard_bytes(1, 1)
    same = [f"{steps_per_second * config.batch_size * moments / 2**20:,.0f} MiB/s"] * len(TASKS)
    row("latents to be read meanwhile, all GPUs", *same)
    gradients = 2 * mixture.parameters * FLOAT32 * (arguments.gpus - 1) / arguments.gpus
    row("gradients exchanged, each GPU", *([f"{steps_per_second * gradients / 2**30:.1f} GiB/s"] * len(TASKS)))
    row("checkpoint", *([f"{4 * mixture.parameters * FLOAT32 / 2**30:.1f} GiB"] * len(TASKS)))
    lines += [
        "",
        f"Memory of a GPU: {WEIGHTS_HELD * mixture.parameters * FLOAT32 / 2**30:.1f} GiB for weights, gradients, AdamW and the "
        f"average (1/{arguments.gpus} of it with FSDP), and {mixture.activations * per_gpu / 2**30:.1f} GiB that autograd "
        f"keeps of {per_gpu} pictures, {checkpointed.activations * per_gpu / 2**30:.1f} GiB with gradient_checkpointing=true "
        "(for a third more operations); accumulate=N divides either.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, default=8)
    parser.add_argument(
        "--teraflops", type=float, default=989.0, help="of one GPU, bf16 without sparsity (H100 SXM, H200: 989)"
    )
    parser.add_argument("--utilisation", type=float, default=0.3, help="the share of it that is used")
    parser.add_argument("--price", type=float, default=3.0, help="$ an hour for one GPU")
    text = plan(parser.parse_args())
    RESULT.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
