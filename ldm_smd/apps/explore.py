"""tools/explore.py: a local web page with samples of several models, their sampling steps, and draws of eta."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from diffusers.image_processor import VaeImageProcessor
from PIL import Image

from ..autoencoder import encoder_sha256, spatial_factor
from ..device import pick_device
from ..errors import UserError, one_line
from ..models.denoiser import is_mixture, num_classes
from ..pipelines import SMDPipeline, load_pipeline, seeded_generators
from ..sampling.grid import class_name, labelled_grid
from ..sampling.inputs import load_clip, prompt_embedding, training_side
from ..schedulers import make_scheduler
from .settings import ExploreConfig

if TYPE_CHECKING:
    import gradio

MOST_IMAGES, MOST_STEPS, MOST_SHIFT = 16, 100, 8
MOST_SIGMA = 1000.0
"""Above the largest sigma of any schedule."""
FILMSTRIP_FRAMES = 10
"""Maximum number of frames of a filmstrip."""
DRAWS = 8
"""Number of draws of eta to show."""
THUMBNAIL = 96
"""Longer side of the images in a filmstrip, in pixels."""
DECODED = 256
"""Maximum longer side at which they are decoded, in pixels."""
OWN = "model default"
SCHEDULERS = (
    OWN,
    "DDPMScheduler",
    "DDIMScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverMultistepScheduler:algorithm_type=sde-dpmsolver++",
    "UniPCMultistepScheduler",
    "GMSScheduler",
    "TeleportScheduler",
)
NO_CLASS = "no class"
CSS = ".grid-wrap.fixed-height { min-height: 0 !important }"
"""Avoids empty rows under the images."""
ABOUT = """# Models side by side
All models start from the same noise. The filmstrip shows the sampling of the first image: `x_t` before each step, and the
predicted `x_0`. The last row shows several predictions of each model for one `x_t` of the first model. The draws of a mixture
differ; a Gaussian model has a single prediction."""


@dataclass
class Request:
    """Settings of one request. They determine the images of a model.

    Attributes:
        label: class number, or None for no class.
        seed: seed of the first image; image i has ``seed + i``.
        scheduler: as in tools/sample.py, or OWN.
        interval: range of noise levels sigma with guidance.
        timestep_shift: see ``SMDPipeline``; None for that of each model.
        embedding: OpenCLIP embedding of an image or text prompt, (1, D), or None.
    """

    label: int | None = None
    count: int = 8
    steps: int = 8
    scheduler: str = OWN
    seed: int = 0
    guidance_scale: float = 1.0
    interval: tuple[float, float] = (0.0, MOST_SIGMA)
    timestep_shift: float | None = None
    embedding: torch.Tensor | None = None

    def options(self, count: int) -> dict:
        """Return the arguments of ``SMDPipeline`` for ``count`` images, shared by full sampling and single predictions."""
        return {
            "class_labels": None if self.label is None else [self.label] * count,
            "guidance_scale": self.guidance_scale,
            "guidance_interval": self.interval,
            "generator": seeded_generators(range(self.seed, self.seed + count)),
            "image_embeds": None if self.embedding is None else self.embedding.expand(count, -1),
        }


@dataclass
class Frame:
    """Step ``number`` of the first image: input x_t of the network and predicted x_0, each (1, C, h, w)."""

    number: int
    timestep: torch.Tensor
    sample: torch.Tensor
    prediction: torch.Tensor


@dataclass
class ModelSamples:
    """Samples of one model: images, up to FILMSTRIP_FRAMES frames of the first one, and the time taken."""

    images: list[Image.Image]
    frames: list[Frame]
    seconds: float


class Explorer:
    """The models of a page. Raises UserError if their classes or latents differ."""

    def __init__(self, config: ExploreConfig) -> None:
        device = pick_device(config.device)
        self.pipelines = {name: load_pipeline(folder).to(device) for name, folder in config.models.items()}
        for pipeline in self.pipelines.values():
            pipeline.set_progress_bar_config(disable=True)
        shared = {"classes": class_names, "autoencoder": lambda pipe: encoder_sha256(pipe.vae), "pixels": training_side}
        for what, value_of in shared.items():
            wanted = value_of(self.first)
            for name, pipeline in self.pipelines.items():
                if (found := value_of(pipeline)) != wanted:
                    raise UserError(f"models.{name}: expected {what} {wanted}, as for the first model, found {found}")
        self.own = {name: pipeline.scheduler for name, pipeline in self.pipelines.items()}
        self.stopping = False
        by_folder = dict(zip(config.models.values(), self.pipelines.values()))
        self.clip = None if config.clip is None else load_clip(config.clip, by_folder)

    @property
    def first(self) -> SMDPipeline:
        return next(iter(self.pipelines.values()))

    def embedding(self, image_prompt: str | None, prompt: str) -> torch.Tensor | None:
        """Embed the text ``prompt``, or else the image file ``image_prompt``, as (1, D); None for neither."""
        if self.clip is None or not (image_prompt or prompt):
            return None
        return prompt_embedding(self.clip, self.first, image_prompt, prompt)

    def sample(self, request: Request, report: Callable[[float], None]) -> dict[str, ModelSamples]:
        """Sample from every model. ``report`` is called with the fraction done."""

        def of_all(done: int, fraction: float) -> None:
            report((done + fraction) / len(self.pipelines))

        self.stopping = False
        return {name: self._sample(name, request, partial(of_all, done)) for done, name in enumerate(self.pipelines)}

    def _sample(self, name: str, request: Request, report: Callable[[float], None]) -> ModelSamples:
        started, frames, pipeline, own = time.perf_counter(), [], self.pipelines[name], self.own[name]
        pipeline.scheduler = own if request.scheduler == OWN else make_scheduler(request.scheduler, own)

        def keep(pipe: SMDPipeline, index: int, timestep: torch.Tensor, tensors: dict) -> dict:
            # Copied, because a view of the first image would keep the whole batch in memory.
            x_t, x_0 = (tensors[what][:1].clone() for what in ("sample", "pred_original_sample"))
            frames.append(Frame(index + 1, timestep, x_t, x_0))
            report((index + 1) / pipe.num_timesteps)
            pipe._interrupt = self.stopping
            return {}

        images = pipeline(
            num_inference_steps=request.steps,
            timestep_shift=request.timestep_shift,
            batch_size=request.count,
            callback_on_step_end=keep,
            callback_on_step_end_tensor_inputs=("sample", "pred_original_sample"),
            **request.options(request.count),
        ).images
        return ModelSamples(images, spaced(frames, FILMSTRIP_FRAMES), time.perf_counter() - started)

    def stop(self) -> None:
        """Stop sampling after the current step. Models that have not started take one step."""
        self.stopping = True

    def filmstrip(self, name: str, frames: list[Frame]) -> Image.Image:
        """Draw the frames of a model in two rows: x_t and predicted x_0."""
        rows = ([frame.sample for frame in frames], [frame.prediction for frame in frames])
        return labelled_grid([thumbnails(self.pipelines[name], torch.cat(row)) for row in rows], ["x_t", "x_0"])

    def draws(self, frame: Frame, request: Request) -> Image.Image:
        """Draw a row for each model: DRAWS predictions of x_0 for one x_t, or the single prediction of a Gaussian model."""
        rows = []
        for pipeline in self.pipelines.values():
            count = DRAWS if is_mixture(pipeline.unet) else 1
            sample = frame.sample.expand(count, -1, -1, -1)
            drawn = pipeline.pred_original_sample(sample, frame.timestep, **request.options(count))
            rows.append(thumbnails(pipeline, drawn))
        return labelled_grid(rows, list(self.pipelines))


def thumbnails(pipeline: SMDPipeline, latents: torch.Tensor) -> list[Image.Image]:
    """Decode normalised latents (B, C, h, w) to small images. Large latents are subsampled first, which is rough but fast: a
    filmstrip at 1024 pixels would take 15 minutes on a CPU."""
    scale = DECODED / (spatial_factor(pipeline.vae) * max(latents.shape[2:]))
    if scale < 1:
        latents = F.interpolate(latents, scale_factor=scale, mode="nearest-exact")
    images = VaeImageProcessor().postprocess(pipeline.decode_latents(latents), output_type="pil")
    for image in images:
        image.thumbnail((THUMBNAIL, THUMBNAIL))
    return images


def class_names(pipeline: SMDPipeline) -> list[str]:
    """List the names of the classes by number; [] for an unconditional model."""
    return [class_name(pipeline, number) for number in range(num_classes(pipeline.unet) or 0)]


def spaced(frames: list[Frame], most: int) -> list[Frame]:
    """Choose up to ``most`` frames, evenly spaced from the first to the last."""
    if len(frames) <= most:
        return frames
    return [frames[round(index * (len(frames) - 1) / (most - 1))] for index in range(most)]


def page(explorer: Explorer) -> gradio.Blocks:
    """Build the page."""
    gr = import_gradio()
    names, classes = list(explorer.pipelines), class_names(explorer.first)
    image_options = {"format": "png", "type": "pil", "show_label": False, "buttons": ["download", "fullscreen"]}

    with gr.Blocks(title="ldm_smd", analytics_enabled=False, fill_width=True) as blocks:
        gr.Markdown(ABOUT)
        shown = gr.State()
        with gr.Row():
            with gr.Column(scale=1, min_width=280):
                choices = [*((name, number) for number, name in enumerate(classes)), (NO_CLASS, len(classes))]
                label = gr.Dropdown(choices, value=0, label="Class", visible=bool(classes))
                prompted = explorer.clip is not None
                image_prompt = gr.Image(type="filepath", label="Image prompt", sources=["upload"], visible=prompted)
                prompt = gr.Textbox(label="Prompt (overrides the image prompt)", visible=prompted)
                count = gr.Slider(1, MOST_IMAGES, value=8, step=1, label="Images")
                steps = gr.Slider(1, MOST_STEPS, value=4, step=1, label="Steps")
                shift = gr.Slider(0, MOST_SHIFT, value=0, step=0.5, label="Shift of the steps to noise (0: that of the model)")
                scheduler = gr.Dropdown(SCHEDULERS, value=OWN, label="Scheduler", allow_custom_value=True)
                seed = gr.Number(0, label="Seed of the first image", precision=0, minimum=0)
                scale = gr.Slider(0, 8, value=1, step=0.1, label="Guidance scale (1: none)")
                with gr.Row():
                    low = gr.Number(0, label="sigma from", minimum=0, min_width=100)
                    high = gr.Number(MOST_SIGMA, label="sigma to", minimum=0, min_width=100)
                with gr.Row():
                    start = gr.Button("Sample", variant="primary", min_width=100)
                    stop = gr.Button("Stop", min_width=100)
                message = gr.Markdown()
            with gr.Column(scale=4):
                galleries, filmstrips = [], []
                with gr.Row():
                    for name, pipeline in explorer.pipelines.items():
                        with gr.Column(min_width=300):
                            gr.Markdown(f"### {name}\n{pipeline.unet.num_parameters() / 1e6:.1f} M parameters")
                            galleries.append(gr.Gallery(show_label=False, columns=4, height="auto", format="png"))
                            gr.Markdown("First image, step by step")
                            filmstrips.append(gr.Image(**image_options))
                step = gr.Radio([], label="Predictions for x_t of the first model at step")
                draws = gr.Image(**image_options)

        def sample(
            label,
            count,
            steps,
            shift,
            scheduler,
            seed,
            scale,
            low,
            high,
            image_prompt,
            prompt,
            progress=gr.Progress(),  # noqa: B008
        ):
            if None in (seed, low, high):
                raise gr.Error("seed, sigma from, sigma to: expected numbers, found an empty field")
            try:
                number = label if label < len(classes) else None
                embedding = explorer.embedding(image_prompt, prompt)
                request = Request(number, count, steps, scheduler, seed, scale, (low, high), shift or None, embedding)
                by_model = explorer.sample(request, progress)
            except (UserError, ValueError) as error:
                raise gr.Error(str(error)) from error
            frames = by_model[names[0]].frames
            steps_shown = [(f"{frame.number} (t = {float(frame.timestep):.0f})", index) for index, frame in enumerate(frames)]
            return [
                *(samples.images for samples in by_model.values()),
                *(explorer.filmstrip(name, samples.frames) for name, samples in by_model.items()),
                gr.Radio(steps_shown, value=0),
                explorer.draws(frames[0], request),
                ", ".join(f"{name} {samples.seconds:.1f} s" for name, samples in by_model.items()),
                (frames, request),
            ]

        def draw(index, shown):
            frames, request = shown
            return explorer.draws(frames[index], request)

        inputs = [label, count, steps, shift, scheduler, seed, scale, low, high, image_prompt, prompt]
        # The two share the models, so only one runs at a time.
        start.click(sample, inputs, [*galleries, *filmstrips, step, draws, message, shown], concurrency_id="models")
        step.input(draw, [step, shown], draws, concurrency_id="models")
        stop.click(explorer.stop, queue=False)
    return blocks


def import_gradio() -> ModuleType:
    try:
        import gradio
    except ImportError as error:
        raise UserError("explore: expected the package gradio (pip install 'gradio>=6'), found none") from error
    return gradio


def require_own_address(host: str) -> None:
    """Raise UserError unless this machine can listen on ``host``. Otherwise gradio would wait forever."""
    try:
        socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET).close()
    except (OSError, UnicodeError) as error:
        raise UserError(f"host: expected an address of this machine, found {host!r}: {one_line(error)}") from error


def explore(config: ExploreConfig) -> None:
    """Serve the page until interrupted."""
    gr = import_gradio()
    require_own_address(config.host)
    blocks = page(Explorer(config))
    # System fonts, so that the page loads nothing from the internet.
    theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"])
    looks: dict[str, Any] = {"theme": theme, "css": CSS, "footer_links": []}
    where: dict[str, Any] = {"server_name": config.host, "server_port": config.port}
    try:
        _, url, _ = blocks.launch(**where, **looks, quiet=True, prevent_thread_lock=True)
    except OSError as error:
        raise UserError(f"port: expected a free port, found {config.port}: {error}") from error
    print(f"open {url} (Ctrl-C to stop)", flush=True)
    blocks.block_thread()
