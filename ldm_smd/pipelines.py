"""SMDPipeline: noise -> latents -> pictures, with any diffusers scheduler."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput, ModelMixin, SchedulerMixin, UNet2DModel
from diffusers.image_processor import PipelineImageInput, VaeImageProcessor
from diffusers.utils.torch_utils import randn_tensor

from .autoencoder import FrozenAutoencoder
from .errors import UserError
from .models.extended import ExtendedUNet2DModel
from .models.gaussian import LatentGaussians
from .models.moments import MomentHeads
from .models.unet import SMDUNet2DModel, is_mixture, num_classes, predict
from .schedulers import GMSScheduler, TeleportScheduler


class SMDPipeline(DiffusionPipeline):
    """Class-conditional and unconditional sampling in the latent space of a frozen autoencoder.

    Every evaluation of a mixture draws its own eta for each picture: with x_0 = D(x_t, eta) the scheduler's ordinary step
    is then a draw from the mixture: exact ancestral sampling with the posterior variance of DDPMScheduler. It is exact with
    DDIMScheduler too, at any variance: (x_t, x_0) being a true pair, (x_t - a_t x_0) / s_t is as good as fresh noise.

    Args:
        unet: the denoiser; a plain UNet2DModel is a Gaussian one, the last of its class embeddings that of no class.
        vae: AutoencoderKL, AutoencoderTiny or AutoencoderDC.
        scheduler: any diffusers scheduler.
        id2label: class names by number (as a string, as JSON has it).
        moments: what GMSScheduler needs of a Gaussian unet beside its prediction (tools/train_moments.py).
        gaussian: the distribution of the latents that TeleportScheduler starts from (tools/fit_gaussian.py).
    """

    model_cpu_offload_seq = "gaussian->unet->moments->vae"
    _optional_components = ["moments", "gaussian"]
    _callback_tensor_inputs = ["latents"]

    def __init__(
        self,
        unet: SMDUNet2DModel | ExtendedUNet2DModel | UNet2DModel,
        vae: ModelMixin,
        scheduler: SchedulerMixin,
        id2label: dict[str, str] | None = None,
        moments: MomentHeads | None = None,
        gaussian: LatentGaussians | None = None,
    ) -> None:
        super().__init__()
        self.register_modules(unet=unet, vae=vae, scheduler=scheduler, moments=moments, gaussian=gaussian)
        self.register_to_config(id2label=id2label)
        self.id2label = {int(number): name for number, name in (id2label or {}).items()}

    @torch.no_grad()
    def __call__(
        self,
        class_labels: Sequence[int] | torch.Tensor | None = None,
        batch_size: int = 1,
        num_inference_steps: int = 8,
        guidance_scale: float = 1.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        image: PipelineImageInput | None = None,
        strength: float = 0.6,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[DiffusionPipeline, int, torch.Tensor, dict], dict] | None = None,
    ) -> ImagePipelineOutput | tuple:
        """Sample pictures.

        Args:
            class_labels: one class number per picture; None for unconditional pictures.
            batch_size: number of unconditional pictures; with labels, their number counts.
            num_inference_steps: steps of the scheduler.
            guidance_scale: w of classifier-free guidance, uncond + w (cond - uncond), both with the same eta; 1 is none.
            generator: one for all, or a list with one per picture: then a picture does not depend on its batch.
            latents: starting noise (B, C, h, w) of unit variance, instead of a draw.
            image: start from these pictures, noised, and not from pure noise (SDEdit, arXiv 2108.01073): one for each sample,
                or one for all; PIL, or arrays or tensors of floats in [0, 1], as diffusers' image processor takes them.
            strength: of that noise, as the share of the steps that are done, more than 0 to 1; not read without ``image``.
            output_type: "pil", "np", "pt" (floats in [0, 1]) or "latent" (normalised latents).
            callback_on_step_end: as in diffusers; may return {"latents": ...}.
        """
        labels = self._labels(class_labels)
        batch_size = batch_size if labels is None else len(labels)
        if isinstance(generator, list) and len(generator) != batch_size:
            raise ValueError(f"generator: expected one per picture, {batch_size}, found {len(generator)}")
        device, dtype = self._execution_device, self.unet.dtype
        side = self.unet.config.sample_size
        shape = (batch_size, self.unet.config.in_channels, side, side)
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=device, dtype=dtype)
        self.scheduler.set_timesteps(num_inference_steps, device=device)
        timesteps = self.scheduler.timesteps
        latents = latents.to(device, dtype)
        if image is None and isinstance(self.scheduler, TeleportScheduler):
            latents = self.scheduler.start(latents, self._part("gaussian", "fit_gaussian"), labels, generator)
        elif image is None:
            latents = latents * self.scheduler.init_noise_sigma
        else:
            timesteps = self._last_timesteps(num_inference_steps, strength)
            latents = self.scheduler.add_noise(
                self._encode(image, batch_size).to(dtype), latents, timesteps[:1].repeat(batch_size)
            )
        step_options = self._step_options(generator)

        with self.progress_bar(total=len(timesteps)) as bar:
            for index, timestep in enumerate(timesteps):
                x_t = self.scheduler.scale_model_input(latents, timestep).to(dtype)
                eta = None
                if is_mixture(self.unet):
                    eta = randn_tensor(x_t.shape, generator=generator, device=device, dtype=dtype)
                prediction = self._predict(x_t, timestep, labels, eta, guidance_scale)
                latents = self.scheduler.step(prediction, timestep, latents, **step_options).prev_sample
                if callback_on_step_end is not None:
                    latents = callback_on_step_end(self, index, timestep, {"latents": latents}).get("latents", latents)
                bar.update()

        if output_type == "latent":
            images = latents
        else:
            pixels = FrozenAutoencoder(self.vae).decode(latents)
            images = VaeImageProcessor(do_resize=False).postprocess(pixels, output_type=output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def label_of(self, name: str) -> int:
        """The number of a class given by name or number."""
        for number, label in self.id2label.items():
            if name == label or name == str(number):
                return number
        known = ", ".join(self.id2label.values()) or "none"
        raise UserError(f"classes: expected one of {known}, found {name!r}")

    def _last_timesteps(self, num_inference_steps: int, strength: float) -> torch.Tensor:
        """Those of the last steps, ``strength`` of them all."""
        if not 0.0 < strength <= 1.0:
            raise ValueError(f"strength: expected more than 0, to 1, found {strength}")
        skipped = num_inference_steps - max(1, round(num_inference_steps * strength))
        # A step of a second-order scheduler has two timesteps, as diffusers counts them.
        begin = skipped * self.scheduler.order
        if hasattr(self.scheduler, "set_begin_index"):
            self.scheduler.set_begin_index(begin)
        return self.scheduler.timesteps[begin:]

    def _encode(self, image: PipelineImageInput, batch_size: int) -> torch.Tensor:
        """Normalised latents of pictures, one for each sample."""
        autoencoder = FrozenAutoencoder(self.vae)
        pixels = ((VaeImageProcessor(do_resize=False).preprocess(image) + 1.0) * 127.5).round().to(torch.uint8)
        if len(pixels) not in (1, batch_size):
            raise ValueError(f"image: expected one picture, or one for each of {batch_size} samples, found {len(pixels)}")
        latents = autoencoder.normalise(autoencoder.encode_moments(pixels)[:, 0])
        wanted = (self.unet.config.in_channels, *[self.unet.config.sample_size] * 2)
        if latents.shape[1:] != wanted:
            raise ValueError(f"image: expected pictures with latents {wanted}, found {tuple(latents.shape[1:])}")
        return latents.expand(batch_size, -1, -1, -1)

    def _labels(self, class_labels: Sequence[int] | torch.Tensor | None) -> torch.Tensor | None:
        if class_labels is None:
            return None
        classes = num_classes(self.unet)
        if classes is None:
            raise ValueError("class_labels: expected None, this model is unconditional")
        labels = torch.as_tensor(class_labels, dtype=torch.long)
        if labels.numel() and not 0 <= int(labels.min()) <= int(labels.max()) <= classes:
            raise ValueError(f"class_labels: expected 0 to {classes} ({classes} is no class), found {labels.tolist()}")
        return labels.to(self._execution_device)

    def _predict(
        self,
        x_t: torch.Tensor,
        timestep: torch.Tensor,
        labels: torch.Tensor | None,
        eta: torch.Tensor | None,
        guidance_scale: float,
    ) -> torch.Tensor:
        if labels is None or guidance_scale == 1.0:
            return self._evaluate(x_t, timestep, labels, eta)
        null = torch.full_like(labels, num_classes(self.unet))
        both = (torch.cat((x_t, x_t)), timestep, torch.cat((labels, null)), None if eta is None else torch.cat((eta, eta)))
        cond, uncond = self._evaluate(*both).chunk(2)
        # Guidance moves the mean; the other moments, where there are any, stay those of the class.
        channels = x_t.shape[1]
        guided = uncond[:, :channels] + guidance_scale * (cond[:, :channels] - uncond[:, :channels])
        return torch.cat((guided, cond[:, channels:]), dim=1)

    def _evaluate(
        self, x_t: torch.Tensor, timestep: torch.Tensor, labels: torch.Tensor | None, eta: torch.Tensor | None
    ) -> torch.Tensor:
        """The prediction, and for GMSScheduler two moments as further channels."""
        if not isinstance(self._solver, GMSScheduler):
            return predict(self.unet, x_t, timestep, labels, eta)
        return self._part("moments", "train_moments").predict(self.unet, x_t, timestep, labels)

    @property
    def _solver(self) -> SchedulerMixin:
        """What takes the steps."""
        return self.scheduler.rest if isinstance(self.scheduler, TeleportScheduler) else self.scheduler

    def _part(self, name: str, tool: str) -> ModelMixin:
        """The component that the scheduler needs."""
        part = getattr(self, name)
        if part is None:
            needs = type(self.scheduler).__name__
            raise UserError(f"scheduler: expected a {name} part of the model for {needs}, found none; tools/{tool}.py makes it")
        return part

    def _step_options(self, generator: torch.Generator | list[torch.Generator] | None) -> dict:
        """Schedulers differ in whether ``step`` takes a generator."""
        accepted = inspect.signature(self._solver.step).parameters
        return {"generator": generator} if "generator" in accepted else {}


def seeded_generators(seeds: Sequence[int], device: torch.device | str = "cpu") -> list[torch.Generator]:
    """One generator per picture. On the CPU by default: its numbers are the same on every machine."""
    return [torch.Generator(device).manual_seed(seed) for seed in seeds]


def load_pipeline(folder: str | Path) -> SMDPipeline:
    """SMDPipeline.from_pretrained for a local folder, with clear errors."""
    if not (Path(folder) / "model_index.json").is_file():
        raise UserError(f"model: expected a model folder (tools/train.py writes RUN/model), found none at {folder}")
    try:
        pipeline = SMDPipeline.from_pretrained(folder, use_safetensors=True)
    except (OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"model: expected a readable model folder, found {folder}: {reason}") from error
    for part in ("unet", "moments", "gaussian"):
        module = getattr(pipeline, part)
        missing = [] if module is None else [name for name, value in module.state_dict().items() if value.is_meta]
        if missing:
            raise UserError(f"model: expected weights for every part of {folder}/{part}, found none for {missing[0]}")
    return pipeline
