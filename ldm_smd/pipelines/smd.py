"""SMDPipeline: noise -> latents -> images, with diffusers schedulers for noise schedules and flow matching."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput, SchedulerMixin
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.image_processor import PipelineImageInput, VaeImageProcessor
from diffusers.utils.torch_utils import randn_tensor

from ..autoencoder import Autoencoder, spatial_factor
from ..errors import UserError, shortened
from ..models.denoiser import is_mixture, num_classes, sample_sides
from ..models.gaussian import LatentGaussians
from ..models.moments import MomentHeads
from ..models.registry import Denoiser
from ..schedulers.conversion import PredictionConversion, predicted_x0, prediction_conversions, process_of
from ..schedulers.support import check_scheduler, learns_variance, without_learned_variance
from ..schedulers.timesteps import Generators, begin_run, first_sample, network_input, noised, step_options, usable_shift
from .decoding import decode_latents, encode_images
from .guidance import Conditions, guided_prediction, guided_steps, read_conditions

ClassLabels: TypeAlias = Sequence[int | str] | str | torch.Tensor
"""Class numbers or names."""
TOOLS = {"moments": "train_moments", "gaussian": "fit_gaussian"}
"""Component that a scheduler may need -> the tool that makes it."""


class SMDPipeline(DiffusionPipeline):
    """Class-conditional and unconditional sampling in the latent space of a frozen autoencoder.

    Every evaluation of a mixture draws a new eta for each image. With x_0 = D(x_t, eta), the ordinary step of the scheduler
    samples from the mixture: with DDPMScheduler and the posterior variance, this is exact ancestral sampling. It is also exact
    with DDIMScheduler at any variance: for a true pair (x_t, x_0), (x_t - a_t x_0) / s_t is distributed as fresh noise.

    Args:
        unet: the denoiser, UNet or transformer. A plain model of diffusers is a Gaussian denoiser: UNet2DModel and
            DiTTransformer2DModel, whose last class embedding stands for the null class, or UNet2DConditionModel and
            SD3Transformer2DModel, which get zeros in place of text.
        vae: AutoencoderKL, AutoencoderTiny or AutoencoderDC.
        scheduler: a scheduler of this package, or of diffusers as listed in schedulers/support.py.
        id2label: class number (as a string, as in JSON) -> class name.
        moments: moment heads of a Gaussian unet, for GMSScheduler (tools/train_moments.py).
        gaussian: distribution of the latents that TeleportScheduler starts from (tools/fit_gaussian.py).
        training_scheduler: a scheduler of the process that the unet was trained on, if ``scheduler`` has another process. The
            unet is then evaluated at equal signal-to-noise ratio. None: the process of ``scheduler``; ``pipeline.scheduler``
            may be replaced later.
        embedding: description of the OpenCLIP network of the unet's image embeddings, from the manifest of its shards.
        guide: a weaker denoiser of the same latents, smaller or less trained, to guide away from (autoguidance, arXiv
            2406.02507). Without it, guidance is classifier-free.
        timestep_shift: default of ``timestep_shift`` when sampling. tools/train.py sets that of the training.
    """

    # The other networks run between evaluations of the unet and stay on the device until sampling ends.
    model_cpu_offload_seq = "unet->vae"
    _optional_components = ["moments", "gaussian", "guide", "training_scheduler"]
    _callback_tensor_inputs = ["latents", "sample", "pred_original_sample"]

    def __init__(
        self,
        unet: Denoiser,
        vae: Autoencoder,
        scheduler: SchedulerMixin,
        id2label: dict[str, str] | None = None,
        moments: MomentHeads | None = None,
        gaussian: LatentGaussians | None = None,
        guide: Denoiser | None = None,
        embedding: dict | None = None,
        training_scheduler: SchedulerMixin | None = None,
        timestep_shift: float = 1.0,
    ) -> None:
        super().__init__()
        check_scheduler(scheduler)
        training_scheduler = training_scheduler or scheduler
        if learns_variance(training_scheduler.config):  # takes no steps; saved so by earlier versions
            training_scheduler = type(training_scheduler).from_config(without_learned_variance(training_scheduler.config))
        check_scheduler(training_scheduler)
        self.register_modules(unet=unet, vae=vae, scheduler=scheduler, training_scheduler=training_scheduler)
        self.register_modules(moments=moments, gaussian=gaussian, guide=guide)
        self.register_to_config(id2label=id2label, embedding=embedding, timestep_shift=timestep_shift)
        self.id2label = {int(number): name for number, name in (id2label or {}).items()}

    @torch.no_grad()
    def __call__(
        self,
        class_labels: ClassLabels | None = None,
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
        callback_on_step_end: Callable[..., dict] | PipelineCallback | MultiPipelineCallbacks | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        num_images_per_prompt: int = 1,
        timestep_shift: float | None = None,
    ) -> ImagePipelineOutput | tuple:
        """Sample images.

        Args:
            class_labels: one class per image, by number or by name in ``id2label``; None for unconditional images.
            batch_size: number of images, if there are neither labels nor embeddings.
            num_inference_steps: steps of the scheduler.
            guidance_scale: w in other + w (own - other), with the same eta for both; 1 is no guidance. ``other`` is the
                prediction of ``guide`` or, without a guide, the prediction without a class (classifier-free guidance).
            guidance_interval: range of noise levels sigma = s_t / a_t with guidance (arXiv 2404.07724).
            height, width: size of the images in pixels; None for the training resolution.
            generator: one for the batch, or a list with one per image. With a list, an image does not depend on its batch.
            latents: starting noise (B, C, h, w) of unit variance; None to draw it. It gives the size of the images and, without
                conditions, their number.
            image: start from these images, noised, instead of pure noise (SDEdit, arXiv 2108.01073). One for all, one per
                sample or one per label: PIL images, or arrays or tensors of floats in [0, 1], as in diffusers' image processor.
            strength: fraction of the timesteps to run from ``image``, above 0, at most 1. Ignored without ``image``.
            image_embeds: OpenCLIP embeddings (B, D) of image or text prompts, from the network that ``embedding`` names.
            output_type: "pil", "np", "pt" (floats in [0, 1]) or "latent" (normalised latents).
            callback_on_step_end: as in diffusers, called with the pipeline, the step index, the timestep and the requested
                tensors. It may return {"latents": ...}, change ``pipeline._guidance_scale``, or stop after the current step
                with ``pipeline._interrupt = True``.
            callback_on_step_end_tensor_inputs: some of "latents" (after the step), "sample" (x_t before the step) and
                "pred_original_sample" (the predicted x_0).
            num_images_per_prompt: number of images per label or embedding, next to each other; or times ``batch_size``.
            timestep_shift: above 1, take more of the steps at high noise: the signal-to-noise ratio of each of the evenly
                spaced timesteps is divided by its square. Large images of few steps gain from it. None: that of the model,
                or 1 for a scheduler that spaces its timesteps itself.

        Only the networks compute in their own precision. The samples between them are float32.

        Returns:
            ImagePipelineOutput with ``images``, or a tuple with the images if ``return_dict`` is False.
        """
        tensor_names = self._callback_tensors(callback_on_step_end, callback_on_step_end_tensor_inputs)
        check_scheduler(self.scheduler)
        device, dtype = self._execution_device, self.unet.dtype
        if num_images_per_prompt < 1:
            raise ValueError(f"num_images_per_prompt: expected at least 1, found {num_images_per_prompt}")
        conditions = read_conditions(self.unet, self._class_numbers(class_labels), image_embeds, device)
        conditions = conditions.repeated(num_images_per_prompt)
        unconditional = batch_size * num_images_per_prompt if latents is None else len(latents)
        batch_size = next((len(given) for given in conditions if given is not None), unconditional)
        if not 0.0 < strength <= 1.0:
            raise ValueError(f"strength: expected a number above 0, at most 1, found {strength}")
        if isinstance(generator, list) and len(generator) != batch_size:
            raise ValueError(f"generator: expected one per image, {batch_size}, found {len(generator)}")

        sides = self.latent_sides(height, width, latents)
        shape = (batch_size, self.unet.config.in_channels, *sides)
        if latents is not None and latents.shape != shape:
            raise ValueError(f"latents: expected {shape}, found {tuple(latents.shape)}")
        shift = self.shift_of_steps(timestep_shift)
        timesteps = begin_run(self.scheduler, num_inference_steps, None if image is None else strength, shift)
        guided = guided_steps(self.scheduler, timesteps, guidance_interval)
        conversions = self._conversions(timesteps)
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
        # In half precision, a scheduler that works in sigma loses x_0 in the rounding of x_t.
        latents = latents.to(device, torch.float32)
        if image is not None:
            clean = encode_images(self.vae, image, shape, num_images_per_prompt).float()
            latents = noised(self.scheduler, clean, latents, timesteps[0])
        elif (part := self._scheduler_part("start_part")) is not None:
            latents = self.scheduler.start(latents, part, conditions.labels, generator)
        else:
            latents = first_sample(self.scheduler, latents)
        self._guidance_scale, self._num_timesteps, self._interrupt = guidance_scale, len(timesteps), False

        with self.progress_bar(total=len(timesteps)) as bar:
            for index, (timestep, conversion) in enumerate(zip(timesteps, conversions)):
                if self.interrupt:
                    continue
                x_t = network_input(self.scheduler, latents, timestep)
                scale = self.guidance_scale if guided[index] else 1.0
                prediction = self._predict(x_t, conversion, conditions, scale, generator)
                options = step_options(self.scheduler, generator, index)
                latents = self.scheduler.step(prediction, timestep, latents, **options).prev_sample
                if callback_on_step_end is not None:
                    tensors = {"latents": latents, "sample": x_t}
                    if "pred_original_sample" in tensor_names:
                        tensors["pred_original_sample"] = predicted_x0(self.scheduler, prediction, x_t, timestep)
                    wanted = {name: tensors[name] for name in tensor_names}
                    latents = callback_on_step_end(self, index, timestep, wanted).get("latents", latents)
                bar.update()

        if output_type == "latent":
            images = latents.to(dtype)
        else:
            images = VaeImageProcessor(do_resize=False).postprocess(self.decode_latents(latents), output_type=output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    @torch.no_grad()
    def pred_original_sample(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor,
        class_labels: ClassLabels | None = None,
        guidance_scale: float = 1.0,
        guidance_interval: tuple[float, float] = (0.0, math.inf),
        generator: torch.Generator | list[torch.Generator] | None = None,
        image_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Predict x_0, (B, C, h, w), from ``sample``, x_t = a_t x_0 + s_t eps as callbacks receive it, at one timestep.

        A mixture draws one x_0 for each x_t. The other arguments are those of ``__call__``.
        """
        conditions = read_conditions(self.unet, self._class_numbers(class_labels), image_embeds, self._execution_device)
        [guided] = guided_steps(self.scheduler, timestep[None], guidance_interval)
        [conversion] = self._conversions(timestep[None])
        prediction = self._predict(sample, conversion, conditions, guidance_scale if guided else 1.0, generator)
        return predicted_x0(self.scheduler, prediction, sample, timestep)

    def decode_latents(self, latents: torch.Tensor) -> torch.Tensor:
        """Decode normalised latents (B, C, h, w) to images (B, 3, H, W) in [-1, 1]; see pipelines/decoding.py."""
        return decode_latents(self.vae, latents)

    @property
    def guidance_scale(self) -> float:  # this and the next two: of the current call, as in diffusers
        return self._guidance_scale

    @property
    def num_timesteps(self) -> int:
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        return self._interrupt

    def label_of(self, name: str, key: str = "classes") -> int:
        """Return the number of a class that is given by its name, its number, or a synonym that no other class has ("tench" for
        "tench, Tinca tinca"). A name goes before a number. Raises UserError for an unknown one, blamed on ``key``."""
        for number, label in self.id2label.items():
            if name == label:
                return number
        if name in map(str, self.id2label or range(num_classes(self.unet) or 0)):
            return int(name)
        synonymous = [number for number, label in self.id2label.items() if name in label.split(", ")]
        if len(synonymous) == 1:
            return synonymous[0]
        known = shortened(", ".join(self.id2label.values())) or "none"
        raise UserError(f"{key}: expected one of {known}, found {name!r}")

    def shift_of_steps(self, given: float | None = None) -> float:
        """Return the ``timestep_shift`` that ``__call__`` uses if it is ``given`` this one."""
        return usable_shift(self.scheduler, self.config.timestep_shift) if given is None else given

    def latent_sides(self, height: int | None, width: int | None, latents: torch.Tensor | None = None) -> tuple[int, int]:
        """Return height and width of the latents of images of this size in pixels. None: that of ``latents`` or, without them,
        the training resolution.

        Raises ValueError unless both are multiples of the autoencoder's downsampling factor.
        """
        factor, sides = spatial_factor(self.vae), list[int]()
        trained = sample_sides(self.unet) if latents is None else latents.shape[-2:]
        for name, pixels, side in zip(("height", "width"), (height, width), trained):
            if pixels is None and side is None:
                raise ValueError(f"{name}: expected a number of pixels, because the model has no size of its own, found None")
            if pixels is not None and (pixels < factor or pixels % factor):
                raise ValueError(f"{name}: expected a multiple of {factor}, found {pixels}")
            sides.append(pixels // factor if pixels else int(side or 0))
        return sides[0], sides[1]

    def _class_numbers(self, class_labels: ClassLabels | None) -> Sequence[Any] | torch.Tensor | None:
        """Return ``class_labels`` with numbers in place of names."""
        labels = [class_labels] if isinstance(class_labels, str) else class_labels
        if not isinstance(labels, (list, tuple)):
            return labels
        return [self.label_of(label, "class_labels") if isinstance(label, str) else label for label in labels]

    def _callback_tensors(self, callback: object, names: Sequence[str]) -> Sequence[str]:
        """Return the names of the tensors that the callback requests. Raises ValueError for unknown ones."""
        names = callback.tensor_inputs if isinstance(callback, (PipelineCallback, MultiPipelineCallbacks)) else names
        if unknown := ", ".join(sorted({*names} - {*self._callback_tensor_inputs})):
            known = ", ".join(self._callback_tensor_inputs)
            raise ValueError(f"callback_on_step_end_tensor_inputs: expected some of {known}, found {unknown}")
        return names

    def _conversions(self, timesteps: torch.Tensor) -> list[PredictionConversion]:
        """Return how the unet is evaluated at each of the scheduler's timesteps."""
        own, other = process_of(self.training_scheduler), process_of(self.scheduler)
        return prediction_conversions(own, other, timesteps, self._execution_device)

    def _predict(
        self, x_t: torch.Tensor, conversion: PredictionConversion, conditions: Conditions, scale: float, generator: Generators
    ) -> torch.Tensor:
        """Return the model output for ``scheduler.step``. A mixture draws one eta per row of x_t."""
        dtype = self.unet.dtype
        # In float32: the fitted noise chooses a mode by one number of eta. Rounded to bf16, some modes would never be drawn.
        eta = randn_tensor(x_t.shape, generator, x_t.device, torch.float32) if is_mixture(self.unet) else None
        moments = self._scheduler_part("step_part")
        own_x_t, t = conversion.network_inputs(x_t)
        prediction = guided_prediction(self.unet, own_x_t.to(dtype), t, conditions, eta, scale, self.guide, moments)
        return conversion.to_scheduler(prediction.float(), x_t)

    def _scheduler_part(self, purpose: str) -> Any:
        """Return the component that the scheduler's attribute ``purpose`` names (schedulers/timesteps.py), or None."""
        name = getattr(self.scheduler, purpose, None)
        if name is not None and getattr(self, name) is None:
            cls, tool = type(self.scheduler).__name__, TOOLS[name]
            raise UserError(f"scheduler: expected a model with a {name} component for {cls}, found none; see tools/{tool}.py")
        return None if name is None else getattr(self, name)


def seeded_generators(seeds: Sequence[int], device: torch.device | str = "cpu") -> list[torch.Generator]:
    """Return one generator per seed. On the CPU, the default, they give the same numbers on every machine."""
    return [torch.Generator(device).manual_seed(seed) for seed in seeds]
