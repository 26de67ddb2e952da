"""SMDPipeline: noise -> latents -> pictures, with any diffusers scheduler of a noise schedule."""

from __future__ import annotations

import functools
import inspect
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderTiny,
    DiffusionPipeline,
    ImagePipelineOutput,
    ModelMixin,
    SchedulerMixin,
    UNet2DModel,
)
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.image_processor import PipelineImageInput, VaeImageProcessor
from diffusers.pipelines.pipeline_loading_utils import LOADABLE_CLASSES
from diffusers.utils import logging
from diffusers.utils.torch_utils import randn_tensor

from .autoencoder import FrozenAutoencoder, spatial_factor
from .diffusion.process import DiffusionProcess
from .errors import UserError, brief
from .models.extended import ExtendedUNet2DModel
from .models.gaussian import LatentGaussians
from .models.moments import MomentHeads
from .models.unet import SMDUNet2DModel, embedding_dimensions, is_mixture, num_classes, predict
from .schedulers import GMSScheduler, TeleportScheduler
from .schedulers.support import check_scheduler, check_timesteps, run_from, steps_before

logger = logging.get_logger(__name__)

for kind in (SMDUNet2DModel, ExtendedUNet2DModel, MomentHeads, LatentGaussians, GMSScheduler, TeleportScheduler):
    # Otherwise a pipeline of the hub with these, which are of no library that diffusers knows, is refused.
    LOADABLE_CLASSES.setdefault(kind.__module__, {})[kind.__name__] = ["save_pretrained", "from_pretrained"]

NETWORKS = ("unet", "moments", "gaussian", "guide")
"""Components of a pipeline that are networks, apart from the autoencoder."""
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
TILED_PIXELS = 1024 * 1024
SLICE_PIXELS = 512 * 512
"""Decode at most this many pixels per call; larger images are decoded one by one. Stable Diffusion's decoder takes 4.9 GB for
1024 x 1024."""


class SMDPipeline(DiffusionPipeline):
    """Class-conditional and unconditional sampling in the latent space of a frozen autoencoder.

    Every evaluation of a mixture draws its own eta for each picture: with x_0 = D(x_t, eta) the scheduler's ordinary step
    is then a draw from the mixture: exact ancestral sampling with the posterior variance of DDPMScheduler. It is exact with
    DDIMScheduler too, at any variance: (x_t, x_0) being a true pair, (x_t - a_t x_0) / s_t is as good as fresh noise.

    Args:
        unet: the denoiser; a plain UNet2DModel is a Gaussian one, the last of its class embeddings that of no class.
        vae: AutoencoderKL, AutoencoderTiny or AutoencoderDC.
        scheduler: of a noise schedule; any of diffusers that schedulers/support.py lists, with the settings there, or ours.
        id2label: class names by number (as a string, as JSON has it).
        moments: what GMSScheduler needs of a Gaussian unet beside its prediction (tools/train_moments.py).
        gaussian: the distribution of the latents that TeleportScheduler starts from (tools/fit_gaussian.py).
        embedding: which OpenCLIP network the unet's image embeddings are of, as the manifest of its shards has it.
        guide: a weaker denoiser of the same latents, smaller or less trained, to be guided away from (autoguidance, arXiv
            2406.02507), instead of from the same one without the class.
    """

    # The others come between two evaluations of the unet: they stay on the device to the end of a sampling.
    model_cpu_offload_seq = "unet->vae"
    _optional_components = ["moments", "gaussian", "guide"]
    _callback_tensor_inputs = ["latents", "sample", "pred_original_sample"]

    def __init__(
        self,
        unet: SMDUNet2DModel | ExtendedUNet2DModel | UNet2DModel,
        vae: AutoencoderKL | AutoencoderTiny | AutoencoderDC,
        scheduler: SchedulerMixin,
        id2label: dict[str, str] | None = None,
        moments: MomentHeads | None = None,
        gaussian: LatentGaussians | None = None,
        guide: SMDUNet2DModel | ExtendedUNet2DModel | UNet2DModel | None = None,
        embedding: dict | None = None,
    ) -> None:
        super().__init__()
        check_scheduler(scheduler)
        self.register_modules(unet=unet, vae=vae, scheduler=scheduler, moments=moments, gaussian=gaussian, guide=guide)
        self.register_to_config(id2label=id2label, embedding=embedding)
        self.id2label = {int(number): name for number, name in (id2label or {}).items()}

    @torch.no_grad()
    def __call__(
        self,
        class_labels: Sequence[int] | torch.Tensor | None = None,
        batch_size: int = 1,
        num_inference_steps: int = 8,
        guidance_scale: float = 1.0,
        guidance_interval: tuple[float, float] = (0.0, math.inf),
        height: int | None = None,
        width: int | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        image: PipelineImageInput | None = None,
        strength: float = 0.6,
        image_embeds: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: (
            Callable[[DiffusionPipeline, int, torch.Tensor, dict], dict] | PipelineCallback | MultiPipelineCallbacks | None
        ) = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> ImagePipelineOutput | tuple:
        """Sample pictures.

        Args:
            class_labels: one class number per picture; None for unconditional pictures.
            batch_size: number of unconditional pictures; with labels, their number counts.
            num_inference_steps: steps of the scheduler.
            guidance_scale: w of guidance, other + w (own - other), both with the same eta; 1 is none. ``other`` is the
                prediction without the class (classifier-free guidance), or where the pipeline has one, that of ``guide``.
            guidance_interval: of noise levels sigma = s_t / a_t at which there is guidance (arXiv 2404.07724).
            height, width: of the pictures, in pixels; None as in training.
            generator: one for all, or a list with one per picture: then a picture does not depend on its batch.
            latents: starting noise (B, C, h, w) of unit variance, instead of a draw.
            image: start from these pictures, noised, and not from pure noise (SDEdit, arXiv 2108.01073): one for each sample,
                or one for all; PIL, or arrays or tensors of floats in [0, 1], as diffusers' image processor takes them.
            strength: of that noise, as the share of the timesteps that are gone through, more than 0 to 1; not read without
                ``image``.
            image_embeds: OpenCLIP embeddings (B, D) of pictures to be like, or of texts, of the network in ``embedding``; their
                number counts where there are no labels.
            output_type: "pil", "np", "pt" (floats in [0, 1]) or "latent" (normalised latents).
            callback_on_step_end: as in diffusers, called with the pipeline, the step, its timestep and the tensors asked for;
                may return {"latents": ...}, set ``pipeline._guidance_scale``, or set ``pipeline._interrupt = True``, after
                which no further step is done.
            callback_on_step_end_tensor_inputs: of "latents" (after the step), "sample" (before it, as the network saw them) and
                "pred_original_sample" (x_0 by the network).
        """
        if isinstance(callback_on_step_end, (PipelineCallback, MultiPipelineCallbacks)):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs
        unknown = set(callback_on_step_end_tensor_inputs) - set(self._callback_tensor_inputs)
        if unknown:
            known = ", ".join(self._callback_tensor_inputs)
            raise ValueError(
                f"callback_on_step_end_tensor_inputs: expected some of {known}, found {', '.join(sorted(unknown))}"
            )
        check_scheduler(self.scheduler)
        labels = self._labels(class_labels)
        image_embeds = self._embeds(image_embeds, labels)
        batch_size = next((len(given) for given in (labels, image_embeds) if given is not None), batch_size)
        steps_known = len(self._solver.alphas_cumprod)
        if not 1 <= num_inference_steps <= steps_known:
            raise ValueError(f"num_inference_steps: expected 1 to {steps_known}, found {num_inference_steps}")
        if not 0.0 < strength <= 1.0:
            raise ValueError(f"strength: expected more than 0, to 1, found {strength}")
        if isinstance(generator, list) and len(generator) != batch_size:
            raise ValueError(f"generator: expected one per picture, {batch_size}, found {len(generator)}")
        device, dtype = self._execution_device, self.unet.dtype
        shape = (batch_size, self.unet.config.in_channels, *self.latent_sides(height, width))
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=device, dtype=dtype)
        # On the CPU: schedulers look their timesteps up, and the host would wait for the device in every step.
        self.scheduler.set_timesteps(num_inference_steps, device="cpu")
        check_timesteps(self._solver, num_inference_steps)
        timesteps = run_from(self._solver, 0)
        latents = latents.to(device, dtype)
        if image is None and isinstance(self.scheduler, TeleportScheduler):
            latents = self.scheduler.start(latents, self._part("gaussian", "fit_gaussian"), labels, generator)
        elif image is None:
            latents = latents * self.scheduler.init_noise_sigma
        else:
            timesteps = run_from(self._solver, steps_before(self._solver, num_inference_steps, strength))
            latents = self.scheduler.add_noise(self._encode(image, shape).to(dtype), latents, timesteps[:1].repeat(batch_size))
        guided = self._guided(timesteps, guidance_interval)
        self._guidance_scale, self._num_timesteps, self._interrupt = guidance_scale, len(timesteps), False

        with self.progress_bar(total=len(timesteps)) as bar:
            for index, (timestep, t) in enumerate(zip(timesteps, timesteps.to(device))):
                if self.interrupt:
                    continue
                x_t = self.scheduler.scale_model_input(latents, timestep).to(dtype)
                eta = self._eta(x_t, generator)
                scale = self.guidance_scale if guided[index] else 1.0
                prediction = self._predict(x_t, t, labels, eta, scale, image_embeds)
                latents = self.scheduler.step(prediction, timestep, latents, **self._step_options(generator, index)).prev_sample
                if callback_on_step_end is not None:
                    tensors = {"latents": latents, "sample": x_t}
                    if "pred_original_sample" in callback_on_step_end_tensor_inputs:
                        tensors["pred_original_sample"] = self._to_x0(prediction, x_t, timestep)
                    wanted = {name: tensors[name] for name in callback_on_step_end_tensor_inputs}
                    latents = callback_on_step_end(self, index, timestep, wanted).get("latents", latents)
                bar.update()

        if output_type == "latent":
            images = latents
        else:
            images = VaeImageProcessor(do_resize=False).postprocess(self.decode_latents(latents), output_type=output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    @torch.no_grad()
    def pred_original_sample(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor,
        class_labels: Sequence[int] | torch.Tensor | None = None,
        guidance_scale: float = 1.0,
        guidance_interval: tuple[float, float] = (0.0, math.inf),
        generator: torch.Generator | list[torch.Generator] | None = None,
        image_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """x_0 by the network, (B, C, h, w); of a mixture, one draw for each x_t. The arguments are those of a sampling.

        Args:
            sample: x_t = a_t x_0 + s_t eps, (B, C, h, w), what callbacks are given as "sample".
            timestep: t, one for all.
        """
        labels = self._labels(class_labels)
        image_embeds = self._embeds(image_embeds, labels)
        [guided] = self._guided(timestep[None], guidance_interval)
        scale = guidance_scale if guided else 1.0
        eta, t = self._eta(sample, generator), timestep.to(sample.device)
        return self._to_x0(self._predict(sample, t, labels, eta, scale, image_embeds), sample, timestep)

    def _eta(self, x_t: torch.Tensor, generator: torch.Generator | list[torch.Generator] | None) -> torch.Tensor | None:
        """A draw for each row of a mixture's x_t."""
        if not is_mixture(self.unet):
            return None
        return randn_tensor(x_t.shape, generator=generator, device=x_t.device, dtype=x_t.dtype)

    @property
    def guidance_scale(self) -> float:
        """Guidance scale of the current call."""
        return self._guidance_scale

    @property
    def num_timesteps(self) -> int:
        """Number of timesteps of the current call."""
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        """Whether the current call is to stop before its next step."""
        return self._interrupt

    def label_of(self, name: str) -> int:
        """The number of a class given by name or number."""
        for number, label in self.id2label.items():
            if name == label or name == str(number):
                return number
        known = ", ".join(self.id2label.values()) or "none"
        raise UserError(f"classes: expected one of {known}, found {name!r}")

    def latent_sides(self, height: int | None, width: int | None) -> tuple[int, int]:
        """Return (height, width) of the latents of images of that size in pixels, None as in training.

        Raises ValueError unless the autoencoder's factor divides both."""
        factor, side = spatial_factor(self.vae), self.unet.config.sample_size
        for name, pixels in (("height", height), ("width", width)):
            if pixels is not None and (pixels < factor or pixels % factor):
                raise ValueError(f"{name}: expected a multiple of {factor}, found {pixels}")
        return height // factor if height else side, width // factor if width else side

    def _alphas_cumprod(self, timesteps: torch.Tensor) -> torch.Tensor:
        """alphabar of each of the timesteps, on the CPU; some schedulers' lie between those of training, by log(sigma)."""
        steps = self._solver.alphas_cumprod.cpu().double().numpy().clip(1e-12)
        log_snr = np.interp(timesteps.cpu().numpy(), np.arange(len(steps)), np.log(steps / (1.0 - steps)))
        return torch.from_numpy(1.0 / (1.0 + np.exp(-log_snr))).float()

    def _guided(self, timesteps: torch.Tensor, interval: tuple[float, float]) -> list[bool]:
        """For each timestep, whether its sigma is in the interval."""
        if interval == (0.0, math.inf):
            return [True] * len(timesteps)
        alphabar = self._alphas_cumprod(timesteps)
        sigma = ((1.0 - alphabar) / alphabar).sqrt()
        return ((sigma >= interval[0]) & (sigma <= interval[1])).tolist()

    def _to_x0(self, prediction: torch.Tensor, x_t: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        process = DiffusionProcess(self._alphas_cumprod(timestep[None]).to(x_t.device))
        mean, only = prediction[:, : x_t.shape[1]], torch.zeros(1, dtype=torch.long, device=x_t.device)
        return process.to_x0(mean, x_t, only, self._solver.config.prediction_type).to(x_t.dtype)

    def decode_latents(self, latents: torch.Tensor) -> torch.Tensor:
        """Normalised latents (B, C, h, w) -> pictures (B, 3, H, W) in [-1, 1].

        One at a time, which costs little and bounds the memory; and above TILED_PIXELS in tiles, where the seams may show. What
        the user has switched on stays on.
        """
        autoencoder = FrozenAutoencoder(self.vae)
        pixels = latents.shape[2] * latents.shape[3] * autoencoder.factor**2
        tiled = pixels > TILED_PIXELS and hasattr(self.vae, "enable_tiling") and not getattr(self.vae, "use_tiling", False)
        if tiled:
            logger.warning("pictures of more than %d pixels: decoding in tiles", TILED_PIXELS)
            self.vae.enable_tiling()
        try:
            with autoencoder.working():
                return torch.cat([autoencoder.decode(row) for row in latents.split(max(1, SLICE_PIXELS // pixels))])
        finally:
            if tiled:
                self.vae.disable_tiling()

    def _encode(self, image: PipelineImageInput, shape: tuple[int, ...]) -> torch.Tensor:
        """Normalised latents of pictures, one for each sample, (B, C, h, w) = ``shape``."""
        autoencoder = FrozenAutoencoder(self.vae)
        pixels = ((VaeImageProcessor(do_resize=False).preprocess(image) + 1.0) * 127.5).round().to(torch.uint8)
        if len(pixels) not in (1, shape[0]):
            raise ValueError(f"image: expected one picture, or one for each of {shape[0]} samples, found {len(pixels)}")
        latents = autoencoder.normalise(autoencoder.encode_moments(pixels)[:, 0])
        if latents.shape[1:] != shape[1:]:
            raise ValueError(f"image: expected pictures with latents {shape[1:]}, found {tuple(latents.shape[1:])}")
        return latents.expand(shape[0], -1, -1, -1)

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

    def _embeds(self, image_embeds: torch.Tensor | None, labels: torch.Tensor | None) -> torch.Tensor | None:
        if image_embeds is None:
            return None
        wanted = embedding_dimensions(self.unet)
        if wanted is None:
            raise ValueError("image_embeds: expected None, this model is not conditioned on embeddings")
        rows = len(image_embeds) if labels is None else len(labels)
        if image_embeds.shape != (rows, wanted):
            raise ValueError(f"image_embeds: expected ({rows}, {wanted}), found {tuple(image_embeds.shape)}")
        return image_embeds.to(self._execution_device, self.unet.dtype)

    def _predict(
        self,
        x_t: torch.Tensor,
        timestep: torch.Tensor,
        labels: torch.Tensor | None,
        eta: torch.Tensor | None,
        guidance_scale: float,
        image_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if guidance_scale == 1.0 or (labels is None and image_embeds is None and self.guide is None):
            return self._evaluate(x_t, timestep, labels, eta, image_embeds)
        if self.guide is not None:
            own = self._evaluate(x_t, timestep, labels, eta, image_embeds)
            other = predict(self.guide, x_t, timestep, labels, eta, image_embeds)
        else:
            classes = num_classes(self.unet)
            doubled = (
                None if values is None or other is None else torch.cat((values, other))
                for values, other in (
                    (labels, None if labels is None or classes is None else torch.full_like(labels, classes)),
                    (eta, eta),
                    (image_embeds, None if image_embeds is None else torch.zeros_like(image_embeds)),
                )
            )
            own, other = self._evaluate(torch.cat((x_t, x_t)), timestep, *doubled).chunk(2)
        # Guidance moves the mean; the other moments, where there are any, stay those of the class.
        mean, others = own[:, : x_t.shape[1]], own[:, x_t.shape[1] :]
        return torch.cat((other[:, : x_t.shape[1]].lerp(mean, guidance_scale), others), dim=1)

    def _evaluate(
        self,
        x_t: torch.Tensor,
        timestep: torch.Tensor,
        labels: torch.Tensor | None,
        eta: torch.Tensor | None,
        image_embeds: torch.Tensor | None,
    ) -> torch.Tensor:
        """The prediction, and for GMSScheduler two moments as further channels."""
        if not isinstance(self._solver, GMSScheduler):
            return predict(self.unet, x_t, timestep, labels, eta, image_embeds)
        return self._part("moments", "train_moments").predict(self.unet, x_t, timestep, labels, image_embeds)

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

    def _step_options(self, generator: torch.Generator | list[torch.Generator] | None, index: int) -> dict:
        """Schedulers differ in what ``step`` takes."""
        accepted = step_parameters(type(self._solver).step)
        options = {"generator": generator} if "generator" in accepted else {}
        if "order" in accepted:
            # LMSDiscreteScheduler takes its place among all steps for the number of steps done, also from a picture.
            options["order"] = min(index + 1, accepted["order"].default)
        return options


@functools.cache
def step_parameters(step: Callable) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(step).parameters


def seeded_generators(seeds: Sequence[int], device: torch.device | str = "cpu") -> list[torch.Generator]:
    """One generator per picture. On the CPU by default: its numbers are the same on every machine."""
    return [torch.Generator(device).manual_seed(seed) for seed in seeds]


def model_folder(source: str | Path) -> Path:
    """A local model folder, or that in which a model of the hub is kept, fetched where it is not there."""
    folder = Path(source)
    if not folder.exists() and HUB_ID.fullmatch(str(source)):
        try:
            folder = Path(SMDPipeline.download(str(source), use_safetensors=True))
        except (OSError, ValueError, KeyError) as error:
            raise UserError(
                f"model: expected a model folder (RUN/model) or a hub id, found {source}: {brief(error)}"
            ) from error
    if not (folder / "model_index.json").is_file():
        raise UserError(f"model: expected a model folder (tools/train.py writes RUN/model) or a hub id, found none at {source}")
    return folder


def weight_files(folder: Path, parts: Sequence[str]) -> list[Path]:
    """List the weight files of those parts of a model folder that exist."""
    return [path for part in parts for path in sorted((folder / part).glob("*.safetensors"))]


def load_pipeline(source: str | Path) -> SMDPipeline:
    """SMDPipeline.from_pretrained for a model folder or a hub id, with clear errors."""
    folder = model_folder(source)
    try:
        pipeline = SMDPipeline.from_pretrained(folder, use_safetensors=True)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"model: expected a readable model folder, found {folder}: {brief(error)}") from error
    for part in NETWORKS:
        module = getattr(pipeline, part)
        missing = [] if module is None else [name for name, value in module.state_dict().items() if value.is_meta]
        if missing:
            raise UserError(f"model: expected weights for every part of {folder}/{part}, found none for {missing[0]}")
    return pipeline
