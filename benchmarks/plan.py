"""Plan the cost of a data set and a model, before anything is bought: computed, not measured.

Floating-point operations are counted by torch on the very networks, without running them, and divided by what the GPUs are
assumed to do; bytes follow from the format of the shards and from what autograd keeps.

    python benchmarks/plan.py                     # writes benchmarks/results/plan.md
    python benchmarks/plan.py --gpus 32 --price 2.5 --utilisation 0.35 --output outputs/plan.md
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from unittest.mock import patch

import torch
from autoencoders import stable_diffusion
from denoisers import dit_xl
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from ldm_smd.config import load_config
from ldm_smd.diffusion.process import DiffusionProcess
from ldm_smd.diffusion.settings import DiffusionConfig, DistillationConfig
from ldm_smd.models.backbone import Backbone
from ldm_smd.models.denoiser import predict
from ldm_smd.models.unet import SMDUNet2DModel
from ldm_smd.schedulers.schedule import build_scheduler
from ldm_smd.training.critics import make_critic
from ldm_smd.training.distillation_losses import DistillationLosses, critic_objective
from ldm_smd.training.settings import TrainConfig

RESULT = Path(__file__).parent / "results" / "plan.md"
TRAINING_CONFIG = "configs/train/imagenet-256.yaml"
DISTILLATION_CONFIG = "configs/train/emoji-distilled.yaml"
"""Whose settings of the distillation are taken for that model."""
CLASSES = 1000
LATENT = (4, 32, 32)
TAR_BLOCK, NPY_HEADER = 512, 128
FLOAT16, FLOAT32 = 2, 4
WEIGHTS_HELD = 5
"""Float32 values per parameter: weight, gradient, two moments of AdamW, average."""
BACKWARD = 2
"""Operations of the backward pass, relative to the forward pass."""
TF32 = 0.5
"""Speed relative to bf16. The autoencoder runs in float32, whose convolutions use TF32 on these GPUs."""
PICTURES_PER_CORE = 250
"""Images decoded and resized to 256 pixels, per second."""
ACTIVATION_BATCH = 8
DIT_BATCH = 32
FLOW_STEPS = 8
"""The default of objective.teacher_steps."""


@dataclass(frozen=True)
class Task:
    name: str
    pictures: int
    jpeg_bytes: int
    """Size of an original image."""
    images: int
    """Images seen in training."""


TASKS = (
    Task("ImageNet, 256 pixels", 1_281_167, 110_000, 200_000_000),
    Task("100 million pictures, 256 pixels", 100_000_000, 60_000, 600_000_000),
)


def encoder_flops(resolution: int) -> int:
    """Operations of the encoder of Stable Diffusion's autoencoder per image."""
    with FakeTensorMode(), torch.no_grad():
        autoencoder = stable_diffusion()
        with FlopCounterMode(display=False) as counter:
            autoencoder.encode(torch.empty(1, 3, resolution, resolution))
    return counter.get_total_flops()


Build = Callable[[bool, bool], torch.nn.Module]
"""(mixture or Gaussian model, gradient checkpointing) -> a network for 32x32x4 latents of CLASSES."""


class Model:
    """A network as a mixture or as a Gaussian model.

    Attributes:
        parameters: number of parameters.
        flops: operations of a training step per image.
        activations: bytes per image that autograd keeps for the backward pass, in bf16.
    """

    def __init__(self, build: Build, draws: int, checkpointing: bool = False) -> None:
        """``draws``: 0 for the Gaussian model."""
        with FakeTensorMode(allow_non_fake_inputs=True):
            network = build(draws > 0, checkpointing)
            inputs = (*pictures_and_t(), torch.zeros(ACTIVATION_BATCH, dtype=torch.long))
            eta = torch.empty(ACTIVATION_BATCH * draws, *LATENT) if draws else None
            with FlopCounterMode(display=False) as counter, torch.no_grad():
                predict(network, *inputs, eta)
            with kept_by(network) as kept:
                predict(network.train(), *inputs, eta)
        self.parameters = network.num_parameters()
        self.flops = (1 + BACKWARD) * counter.get_total_flops() / ACTIVATION_BATCH
        self.activations = kept() / ACTIVATION_BATCH


class Distilled:
    """The same mixture where a Gaussian model of its shape is distilled into it: one draw a picture, the passes of critic and
    teacher with it. Counted where training goes, forth and back (ldm_smd/training/distillation_losses.py).

    Attributes:
        flops: operations of a training step per image.
        activations: bytes a picture that autograd keeps, of mixture and critic, in bf16.
        held: bytes of weights and what is as large: of the mixture as ever, of the critic all but the average, the teacher's.
        divided: the part of them that FSDP divides, which is all but the teacher's.
    """

    def __init__(self, build: Build, settings: DistillationConfig, checkpointing: bool = False) -> None:
        path = DiffusionProcess(build_scheduler(DiffusionConfig()).alphas_cumprod)
        distillation_losses = DistillationLosses(path, "v_prediction", settings)
        with FakeTensorMode(allow_non_fake_inputs=True) as fake:
            distillation_losses.path = DiffusionProcess(fake.from_tensor(path.alphas_cumprod))
            model, teacher = (build(mixture, checkpointing) for mixture in (True, False))
            with patch.object(type(teacher), "to", lambda critic, *_: critic):  # which fake weights do not like; they are there
                critic = make_critic(teacher.requires_grad_(False), settings).train()
            if checkpointing:
                critic.enable_gradient_checkpointing()
            labels = {"class_labels": torch.zeros(ACTIVATION_BATCH, dtype=torch.long)}
            (x_t, t), noise = pictures_and_t(), torch.empty(ACTIVATION_BATCH, *LATENT)

            def losses(model_learns: bool = True) -> dict[str, torch.Tensor]:
                with torch.set_grad_enabled(model_learns):
                    x = model(x_t, t, eta=noise, return_dict=False, **labels)[0].float()
                return distillation_losses.losses(teacher, critic, x, noise, x_t, t, t, noise, labels)

            with FlopCounterMode(display=False) as counter:
                for number in range(settings.critic_updates):
                    found = losses(last := number == settings.critic_updates - 1)
                    if last:
                        found["loss"].sum().backward()
                    critic_objective(found).sum().backward()
            with kept_by(model, teacher, critic) as kept:
                losses()
        self.flops = counter.get_total_flops() / ACTIVATION_BATCH
        self.activations = kept() / ACTIVATION_BATCH
        sizes = (network.num_parameters() for network in (model, critic, teacher))
        mixture, critical, frozen = (FLOAT32 * size for size in sizes)
        self.divided = WEIGHTS_HELD * mixture + (WEIGHTS_HELD - 1) * critical
        self.held = self.divided + frozen


def unet_of(config: TrainConfig, mixture: bool, checkpointing: bool) -> SMDUNet2DModel:
    shape = config.model.unet_arguments() | ({} if mixture else {"z_channels": 0})
    channels, side, _ = LATENT
    unet = SMDUNet2DModel(sample_size=side, in_channels=channels, out_channels=channels, num_classes=CLASSES, **shape)
    if checkpointing:
        unet.enable_gradient_checkpointing()
    return unet


def dit_of(mixture: bool, checkpointing: bool, make: Callable[[], Backbone] = dit_xl) -> torch.nn.Module:
    """A DiT as a mixture, or as the Gaussian model within."""
    extended = make()
    network = extended if mixture else extended.transformer
    if checkpointing:
        network.enable_gradient_checkpointing()
    return network


def pictures_and_t() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty(ACTIVATION_BATCH, *LATENT), torch.zeros(ACTIVATION_BATCH, dtype=torch.long)


@contextmanager
def kept_by(*networks: torch.nn.Module) -> Iterator[Callable[[], int]]:
    """Give the bytes that autograd keeps of what is computed meanwhile, in bf16, but for the weights."""
    sizes: dict[int, int] = {}
    alive: list[torch.Tensor] = []
    weights = {parameter.untyped_storage()._cdata for network in networks for parameter in network.parameters()}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        sizes[storage._cdata] = storage.nbytes()
        alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), torch.autocast("cpu", torch.bfloat16):
        yield lambda: sum(size for storage, size in sizes.items() if storage not in weights)


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
    build, draws = partial(unet_of, config), config.objective.draws
    mixture, gaussian, checkpointed = Model(build, draws), Model(build, 0), Model(build, draws, checkpointing=True)
    settings = load_config(TrainConfig, DISTILLATION_CONFIG).objective.distillation
    distilled, distilled_checkpointed = (Distilled(build, settings, checkpointing) for checkpointing in (False, True))
    per_gpu = config.batch_size // arguments.gpus
    steps_per_second = arguments.gpus * arguments.teraflops * 1e12 * arguments.utilisation / mixture.flops / config.batch_size
    lines = [
        f"Computed by `{' '.join(['python', 'benchmarks/plan.py', *sys.argv[1:]])}` for {arguments.gpus} GPUs of "
        f"{arguments.teraflops:g} TFLOP/s (bf16, dense), of which {arguments.utilisation:.0%} are assumed to be used, at "
        f"{arguments.price:g} $ an hour each; nothing here is measured. The model is that of `{TRAINING_CONFIG}`: "
        f"{mixture.parameters / 1e6:.0f} million parameters, {mixture.flops / 1e9:.0f} GFLOP a picture in training as a "
        f"mixture of {config.objective.draws} draws, {gaussian.flops / 1e9:.0f} as a Gaussian model, "
        f"{distilled.flops / 1e9:.0f} where one is distilled into it as in `{DISTILLATION_CONFIG}`. The autoencoder is Stable "
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
    million = hours(1e6 * distilled.flops, arguments)
    row("distilled from that, each million images", *([f"{million:.2f} h, {million * cost:,.2f} $"] * len(TASKS)))
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
        "(for a third more operations); micro_batches=N divides either.",
        "",
        f"Of a distillation: {distilled.held / 2**30:.1f} GiB for mixture, critic and teacher (with FSDP 1/{arguments.gpus} of "
        f"{distilled.divided / 2**30:.1f}, and the teacher's weights), and {distilled.activations * per_gpu / 2**30:.1f} GiB "
        f"that autograd keeps, {distilled_checkpointed.activations * per_gpu / 2**30:.1f} GiB with "
        "gradient_checkpointing=true.",
    ]
    return "\n".join([*lines, *plan_of_dit(arguments, settings, draws)]) + "\n"


def plan_of_dit(arguments: argparse.Namespace, settings: DistillationConfig, draws: int) -> list[str]:
    """What it takes to make a mixture of ImageNet's DiT-XL/2, trained elsewhere."""
    cost = arguments.gpus * arguments.price
    trainings = {
        f"energy score, {draws} draws": (Model(dit_of, draws), Model(dit_of, draws, checkpointing=True)),
        f"regression, 1 draw, {FLOW_STEPS} evaluations of the teacher": (
            Model(dit_of, 1),
            Model(dit_of, 1, checkpointing=True),
        ),
        "distillation": tuple(Distilled(dit_of, settings, checkpointing) for checkpointing in (False, True)),
    }
    parameters, teacher = trainings[next(iter(trainings))][0].parameters, Model(dit_of, 0)
    lines = [
        "",
        f"**A DiT-XL/2 from the hub** ({teacher.parameters / 1e6:.0f} million parameters, {parameters / 1e6:.0f} as a mixture) "
        f"on the same GPUs, {DIT_BATCH} pictures each. Weights: with gradients, AdamW, the average, critic and teacher, by "
        "FSDP. Kept: by autograd, then with gradient_checkpointing=true.",
        "",
        "| | GFLOP a picture | each million images | weights, a GPU | kept, a GPU |",
        "|---|---|---|---|---|",
    ]
    for name, (each, checkpointed) in trainings.items():
        flops = each.flops + ("regression" in name) * FLOW_STEPS * teacher.flops / (1 + BACKWARD)
        if isinstance(each, Distilled):
            weights = each.held - each.divided + each.divided / arguments.gpus
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
    """Read the command line. Without arguments, ``output`` is the file of the repository; otherwise it is None by default."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, default=8)
    parser.add_argument(
        "--teraflops", type=float, default=989.0, help="of one GPU, bf16 without sparsity (H100 SXM, H200: 989)"
    )
    parser.add_argument("--utilisation", type=float, default=0.3, help="the share of it that is used")
    parser.add_argument("--price", type=float, default=3.0, help="$ an hour for one GPU")
    parser.add_argument(
        "--output", type=Path, help="file for the plan; default: none, but without any option the one in results/"
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
