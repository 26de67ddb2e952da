"""Settings of tools/sample.py."""

import math
from dataclasses import dataclass
from typing import Optional

from ..schema import MAX_SEED, MISSING, PRECISIONS, Settings, check, choice, number


def check_interval(interval: Optional[list[float]]) -> None:
    """Raise UserError unless ``guidance_interval`` is None or [low, high]."""
    ordered = interval is None or (len(interval) == 2 and interval[0] <= interval[1])
    check(ordered, "guidance_interval", "[low, high], low not above high", interval)


@dataclass
class SampleConfig(Settings):
    """tools/sample.py"""

    RENAMED = {"like": "image_prompt", "text": "prompt"}

    model: str = MISSING
    """Folder or hub id of a model (RUN/model of tools/train.py), or of a pipeline of diffusers whose parts fit."""
    output: str = MISSING
    """New folder for the images, one PNG each named by class and seed. A grid of them is written to OUTPUT-grid.png."""
    classes: Optional[list[str]] = None
    """Names or numbers of classes, ``per_class`` images each. null: all classes. []: unconditional."""
    per_class: int = number(8, 1, 10**6)
    """Images per class; total number of images for unconditional sampling."""
    steps: int = number(8, 1, 10**5)
    timestep_shift: Optional[float] = number(None, above=0, maximum=1e3)
    """Above 1: more of the steps at high noise. The signal-to-noise ratio of each of the evenly spaced timesteps is divided by
    the square of this. For schedulers that take timesteps, as DDPM, DPMSolverMultistep and EulerDiscrete. null: that of
    the model, which is the timestep_shift of its training unless it says otherwise."""
    scheduler: Optional[str] = None
    """Class of diffusers or ldm_smd: CogVideoXDDIM, DDIM, DDIMParallel, DDPM, DDPMParallel, DEISMultistep, DPMSolverMultistep,
    DPMSolverSinglestep, EulerAncestralDiscrete, EulerDiscrete, FlowMatchEulerDiscrete, FlowMatchHeunDiscrete, GMS,
    HeunDiscrete, KDPM2AncestralDiscrete, KDPM2Discrete, LMSDiscrete, PNDM, SASolver, SMD, Teleport or UniPCMultistep, each
    followed by "Scheduler". Settings may follow: DPMSolverMultistepScheduler:algorithm_type=sde-dpmsolver++. null: the default
    of the model."""
    guidance_scale: float = number(1.0, 0, 1000)
    """Scale of classifier-free guidance, or of guidance away from ``guide``. 1: no guidance."""
    guidance_interval: Optional[list[float]] = number(None, 0, math.inf)
    """[low, high]: apply guidance only at noise levels sigma in this range, such as [0.3, 5]. null: at all levels."""
    guide: Optional[str] = None
    """Autoguidance: UNet folder of a weaker model (less trained or smaller), such as RUN/checkpoints/images-N/ema."""
    height: Optional[int] = number(None, 1, 2**16)
    """Height of the images in pixels; null: training resolution."""
    width: Optional[int] = number(None, 1, 2**16)
    image_prompt: Optional[str] = None
    """Image file: sample variations of this image. Needs a model trained with image_conditional=true."""
    prompt: Optional[str] = None
    """Text prompt. Needs image_conditional=true too: OpenCLIP embeds images and texts in one space, so no captions are needed
    in training."""
    clip: Optional[str] = None
    """OpenCLIP network that embeds ``image_prompt`` or ``prompt``, the same as in training:
    open_clip:ARCHITECTURE:FILE.safetensors, open_clip:ARCHITECTURE:NAME_OF_PRETRAINED_WEIGHTS or open_clip:FOLDER."""
    image: Optional[str] = None
    """Image to start from, noised (image-to-image, such as from a colour sketch). null: pure noise."""
    strength: float = number(0.6, above=0, maximum=1)
    """With ``image``, fraction of the timesteps to run. 1: nothing of the image is left, unless the scheduler is a
    TeleportScheduler, whose timesteps begin at ``sigma_skip``."""
    seed: int = number(0, 0, MAX_SEED)
    """Image i has seed ``seed + i``, so it does not depend on the batch size."""
    batch_size: int = number(64, 1, 2**16)
    precision: str = choice("no", PRECISIONS)
    """no: networks in float32. bf16: networks in bfloat16, with half the memory. auto: bf16 on GPUs that support it, otherwise
    float32."""
    device: str = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_interval(self.guidance_interval)
        check(self.image_prompt is None or self.prompt is None, "prompt", "null together with an image_prompt", self.prompt)
        given = self.image_prompt is not None or self.prompt is not None
        check(given == (self.clip is not None), "clip", "an OpenCLIP network if there is a prompt, null otherwise", self.clip)
        check(self.image is None or self.height is self.width is None, "height", "null if there is an image", self.height)
