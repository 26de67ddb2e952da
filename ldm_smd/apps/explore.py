"""tools/explore.py: a local web page with samples of several models, their sampling steps, and draws of eta."""

from __future__ import annotations

import functools
import math
import os
import socket
import tempfile
import uuid
from collections.abc import Callable
from types import ModuleType
from typing import TYPE_CHECKING, Any

from ..errors import UserError, one_line
from ..sampling.settings import check_interval
from ..schema import MAX_SEED
from .explorer import OWN, Explorer, Request, class_names
from .settings import ExploreConfig

if TYPE_CHECKING:
    import gradio

MOST_IMAGES, MOST_STEPS, MOST_SHIFT = 16, 100, 8
SCHEDULERS = (
    OWN,
    "DDPMScheduler",
    "DDIMScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverMultistepScheduler:algorithm_type=sde-dpmsolver++",
    "UniPCMultistepScheduler",
    "SMDScheduler",
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


def page(explorer: Explorer) -> gradio.Blocks:
    """Build the page."""
    gr = import_gradio()
    names, classes = list(explorer.pipelines), class_names(explorer.first)
    image_options = {"format": "png", "type": "pil", "show_label": False, "buttons": ["download", "fullscreen"]}

    def shows_errors(function: Callable) -> Callable:
        """Show any error on the page, where gradio would show a word only."""

        @functools.wraps(function)
        def called(*arguments):
            try:
                return function(*arguments)
            except gr.Error:
                raise
            except Exception as error:
                raise gr.Error(one_line(error) or type(error).__name__) from error

        return called

    with gr.Blocks(title="ldm_smd", analytics_enabled=False, fill_width=True) as blocks:
        gr.Markdown(ABOUT)
        shown = gr.State()
        session = gr.State(lambda: uuid.uuid4().hex)  # of each loaded page
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
                seed = gr.Number(0, label="Seed of the first image", precision=0, minimum=0, maximum=MAX_SEED)
                scale = gr.Slider(0, 8, value=1, step=0.1, label="Guidance scale (1: none)")
                with gr.Row():
                    low = gr.Number(0, label="sigma from", minimum=0, min_width=100)
                    high = gr.Number(None, label="sigma to (empty: no limit)", minimum=0, min_width=100)
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
            session,
            progress=gr.Progress(),  # noqa: B008
        ):
            if None in (seed, low):
                raise gr.Error("seed, sigma from: expected numbers, found an empty field")
            interval = [low, math.inf if high is None else high]
            check_interval(interval)
            number = label if label < len(classes) else None
            embedding = explorer.embedding(image_prompt, prompt)
            request = Request(number, count, steps, scheduler, seed, scale, tuple(interval), shift or None, embedding)
            by_model = explorer.sample(request, progress, session)
            frames = by_model[names[0]].frames
            steps_shown = [(f"{frame.number} (t = {float(frame.timestep):.0f})", index) for index, frame in enumerate(frames)]
            return [
                *(samples.images for samples in by_model.values()),
                *(explorer.filmstrip(name, samples.frames) for name, samples in by_model.items()),
                gr.Radio(steps_shown, value=0),
                explorer.draws(frames[0], request),
                ", ".join(f"{name} {samples.summary}" for name, samples in by_model.items()),
                (frames, request),
            ]

        def draw(index, shown):
            frames, request = shown
            return explorer.draws(frames[index], request)

        inputs = [label, count, steps, shift, scheduler, seed, scale, low, high, image_prompt, prompt, session]
        outputs = [*galleries, *filmstrips, step, draws, message, shown]
        # The two share the models, so only one runs at a time.
        begun = start.click(explorer.begin, session, queue=False)  # not later, or a stop while waiting would be forgotten
        begun.then(shows_errors(sample), inputs, outputs, concurrency_id="models")
        step.input(shows_errors(draw), [step, shown], draws, concurrency_id="models", trigger_mode="always_last")
        stop.click(explorer.stop, session, queue=False)
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
    explorer = Explorer(config)
    with tempfile.TemporaryDirectory(prefix="ldm_smd-") as folder:
        os.environ.setdefault("GRADIO_TEMP_DIR", folder)  # gradio's own is shared by all users of a machine
        serve(gr, page(explorer), config)


def serve(gr: ModuleType, blocks: gradio.Blocks, config: ExploreConfig) -> None:
    # System fonts, so that the page loads nothing from the internet.
    theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"])
    looks: dict[str, Any] = {"theme": theme, "css": CSS, "footer_links": []}
    host = f"[{config.host}]" if ":" in config.host else config.host  # as in a URL
    where: dict[str, Any] = {"server_name": host, "server_port": config.port}
    try:
        _, url, _ = blocks.launch(**where, **looks, quiet=True, prevent_thread_lock=True)
    except OSError as error:
        raise UserError(f"port: expected a free port, found {config.port}: {error}") from error
    print(f"open {url} (Ctrl-C to stop)", flush=True)
    blocks.block_thread()
