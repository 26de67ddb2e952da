"""Operations and activations of one training step, counted by torch in the real networks without running them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest.mock import patch

import torch
from autoencoders import stable_diffusion
from denoisers import dit_xl
from einops import reduce
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from ldm_smd.diffusion.process import DiffusionProcess
from ldm_smd.diffusion.settings import DiffusionConfig, DistillationConfig
from ldm_smd.models.backbone import Backbone
from ldm_smd.models.denoiser import predict
from ldm_smd.models.unet import SMDUNet2DModel
from ldm_smd.schedulers.schedule import build_scheduler
from ldm_smd.training.critics import make_critic
from ldm_smd.training.distillation_losses import DistillationLosses, critic_objective
from ldm_smd.training.settings import TrainConfig

CLASSES = 1000
LATENT = (4, 32, 32)
FLOAT32 = 4
WEIGHTS_HELD = 5
"""Float32 values per parameter: weight, gradient, two moments of AdamW, average."""
BACKWARD = 2
"""Operations of the backward pass, relative to the forward pass."""
ACTIVATION_BATCH = 8


def encoder_flops(resolution: int) -> int:
    """Count the operations per image of the encoder of Stable Diffusion's autoencoder."""
    with FakeTensorMode(), torch.no_grad():
        autoencoder = stable_diffusion()
        with FlopCounterMode(display=False) as counter:
            autoencoder.encode(torch.empty(1, 3, resolution, resolution))
    return counter.get_total_flops()


Build = Callable[[bool, bool], torch.nn.Module]
"""(whether it is a mixture, gradient checkpointing) -> a network for 32x32x4 latents of CLASSES classes."""


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
            inputs = (*latents_and_t(), torch.zeros(ACTIVATION_BATCH, dtype=torch.long))
            eta = torch.empty(ACTIVATION_BATCH * draws, *LATENT) if draws else None
            with FlopCounterMode(display=False) as counter, torch.no_grad():
                predict(network, *inputs, eta)
            with kept_by(network) as kept:
                predict(network.train(), *inputs, eta)
        self.parameters = network.num_parameters()
        self.flops = (1 + BACKWARD) * counter.get_total_flops() / ACTIVATION_BATCH
        self.activations = kept() / ACTIVATION_BATCH


class Distilled:
    """The same mixture, trained by distillation of a Gaussian model of its shape, with critic and teacher: one draw per image,
    or ``draws`` with the energy score.

    Operations of forward and backward passes are counted in the training code itself
    (ldm_smd/training/distillation_losses.py).

    Attributes:
        flops: operations of a training step per image.
        activations: bytes per image that autograd keeps for mixture and critic, in bf16.
        held: bytes of the weights with gradients, optimizer and average: all for the mixture, without average for the critic,
            weights alone for the teacher.
        sharded: the part of them that FSDP shards, which is all but the teacher.
    """

    def __init__(self, build: Build, settings: DistillationConfig, checkpointing: bool = False, draws: int = 4) -> None:
        path = DiffusionProcess(build_scheduler(DiffusionConfig()).alphas_cumprod)
        distillation_losses = DistillationLosses(path, "v_prediction", settings)
        with FakeTensorMode(allow_non_fake_inputs=True) as fake:
            distillation_losses.path = DiffusionProcess(fake.from_tensor(path.alphas_cumprod))
            model, teacher = (build(mixture, checkpointing) for mixture in (True, False))
            with patch.object(type(teacher), "to", lambda critic, *_: critic):  # fake weights cannot be moved, and need not be
                critic = make_critic(teacher.requires_grad_(False), settings).train()
            if checkpointing:
                critic.enable_gradient_checkpointing()
            labels = {"class_labels": torch.zeros(ACTIVATION_BATCH, dtype=torch.long)}
            (x_t, t), noise = latents_and_t(), torch.empty(ACTIVATION_BATCH, *LATENT)

            def losses(model_learns: bool = True) -> dict[str, torch.Tensor]:
                repeats = draws if settings.energy_weight > 0 and model_learns else 1
                eta = torch.empty(ACTIVATION_BATCH * repeats, *LATENT)
                with torch.set_grad_enabled(model_learns):
                    x = model(x_t, t, eta=eta, return_dict=False, **labels)[0].float()
                    x = reduce(x, "(b m) ... -> b ...", "mean", m=repeats)  # gradients for all draws
                networks = (teacher if model_learns else None), critic
                return distillation_losses.losses(*networks, x, noise, x_t, t, t, noise, labels)

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
        mixture, of_critic, of_teacher = (FLOAT32 * size for size in sizes)
        self.sharded = WEIGHTS_HELD * mixture + (WEIGHTS_HELD - 1) * of_critic
        self.held = self.sharded + of_teacher


def unet_of(config: TrainConfig, mixture: bool, checkpointing: bool) -> SMDUNet2DModel:
    shape = config.model.unet_arguments() | ({} if mixture else {"z_channels": 0})
    channels, side, _ = LATENT
    unet = SMDUNet2DModel(sample_size=side, in_channels=channels, out_channels=channels, num_classes=CLASSES, **shape)
    if checkpointing:
        unet.enable_gradient_checkpointing()
    return unet


def dit_of(mixture: bool, checkpointing: bool, make: Callable[[], Backbone] = dit_xl) -> torch.nn.Module:
    """Build a DiT as a mixture, or return the Gaussian model inside it."""
    extended = make()
    network = extended if mixture else extended.transformer
    if checkpointing:
        network.enable_gradient_checkpointing()
    return network


def latents_and_t() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty(ACTIVATION_BATCH, *LATENT), torch.zeros(ACTIVATION_BATCH, dtype=torch.long)


@contextmanager
def kept_by(*networks: torch.nn.Module) -> Iterator[Callable[[], int]]:
    """Count the bytes that autograd keeps of what is computed in the block, in bf16 and without the weights."""
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
