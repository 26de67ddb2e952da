"""The commands: names, settings, functions and help texts.

``ldm-smd NAME``, ``python -m ldm_smd NAME`` and ``python tools/NAME.py`` run the same code. Help texts name the script;
``for_console`` replaces it by the console command.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable
from dataclasses import dataclass

from .apps.settings import DemoConfig, ExploreConfig
from .data.settings import EncodeConfig, VerifyConfig
from .evaluation.settings import EvaluateConfig
from .sampling.settings import SampleConfig
from .training import settings as training


@dataclass(frozen=True)
class Command:
    """A command: its name, the dataclass of its settings, and its function as "module:function", imported when it runs."""

    name: str
    schema: type
    function: str

    @property
    def description(self) -> str:
        return DESCRIPTIONS[self.name]

    @property
    def summary(self) -> str:
        return self.description.partition("\n")[0].removesuffix(".")

    @property
    def script(self) -> str:
        """Return the path of its script in the repository."""
        return f"tools/{self.name.replace('-', '_')}.py"

    def run(self, settings: object) -> None:
        """Import the function and call it with an instance of ``schema``."""
        module, _, name = self.function.partition(":")
        main: Callable[[object], object] = getattr(importlib.import_module(module), name)
        main(settings)


DESCRIPTIONS = {
    "encode": """Encode images to latent shards for training.

examples:
  python tools/encode.py --config configs/encode/emoji.yaml
  python tools/encode.py images.source=my/pictures images.resolution=256 \\
      autoencoder=stabilityai/sd-vae-ft-mse output=my/latents
  python tools/encode.py --config configs/encode/emoji.yaml --dry-run
""",
    "verify": """Check latent shards, and decode some of them.

Compares hashes, counts, statistics and labels with the manifest. Reports duplicate keys and non-finite values.

examples:
  python tools/verify.py shards=my/latents
  python tools/verify.py shards=my/latents sheet=my/sheet.png
  python tools/verify.py shards=my/latents sheet=my/sheet.png autoencoder=my/vae pictures=100
""",
    "train": """Train a mixture model, or a Gaussian one, on latent shards.

examples:
  python tools/train.py --config configs/train/emoji-distilled.yaml
  python tools/train.py --config configs/train/emoji-vanilla.yaml output=outputs/vanilla
  python tools/train.py --config configs/train/emoji-distilled.yaml --dry-run
  accelerate launch --num_processes 8 tools/train.py --config configs/train/emoji-distilled.yaml
""",
    "sample": """Sample images from a trained model.

examples:
  python tools/sample.py model=outputs/demo/smd/model output=outputs/samples
  python tools/sample.py model=outputs/demo/smd/model output=outputs/flags classes=[Flags,Symbols] per_class=16 steps=4
  python tools/sample.py model=outputs/demo/smd/model output=outputs/free classes=[] per_class=64
  python tools/sample.py model=outputs/demo/vanilla/model output=outputs/ddim scheduler=DDIMScheduler guidance_scale=2
  python tools/sample.py model=outputs/demo/smd/model output=outputs/sde steps=16 \\
      scheduler=DPMSolverMultistepScheduler:algorithm_type=sde-dpmsolver++
  python tools/sample.py model=outputs/demo/smd/model output=outputs/from-sketch image=sketch.png strength=0.6 steps=16
  python tools/sample.py model=my/run/model output=outputs/guided guide=my/run/checkpoints/images-000000200000/ema \\
      guidance_scale=2 guidance_interval=[0.3,5]
  python tools/sample.py model=my/run/model output=outputs/prompt prompt="a red balloon" \\
      clip=open_clip:ViT-B-32:laion2b_s34b_b79k
""",
    "evaluate": """Compare samples with real images.

Frechet distance, KID, CMMD, precision, recall, density and coverage, in the features of any networks. Distances are named
after the network. Only the Frechet distance in Inception features is an FID.

examples:
  python tools/evaluate.py --config configs/evaluate/emoji.yaml model=outputs/demo/smd/model output=outputs/smd.json
  python tools/evaluate.py reference.source=my/pictures reference.resolution=256 pictures=my/samples output=my/result.json \\
      features=[open_clip:ViT-L-14-336:openai,dinov2:vit_large_patch14_dinov2:lvd142m]
  accelerate launch tools/evaluate.py model=my/run/model reference.source=my/pictures reference.resolution=256 \\
      features=[inception:my/weights-inception.pth] num_samples=50000 labels=balanced output=my/fid.json
""",
    "explore": """Compare trained models side by side on a local web page.

Choose class, steps, scheduler, seed and guidance; look at every step of a sample and at several draws of a mixture. Needs
the package gradio: pip install 'gradio>=6'.

examples:
  python tools/explore.py --config configs/explore.yaml
  python tools/explore.py models.mine=my/run/model port=8000
  python tools/explore.py models.mine=my/run/model clip=open_clip:ViT-B-32:my/clip.safetensors
""",
    "average": """Average the weights of a finished run (post-hoc EMA).

Makes an average of any width from the snapshots of a run with ema_widths.

examples:
  python tools/train.py --config my/train.yaml ema_widths=[0.05,0.1]
  python tools/average.py run=my/run sigma_rel=0.12 output=my/average
  python tools/average.py run=my/run sigma_rel=0.07 images=150000 output=my/earlier
  python tools/sample.py model=my/average output=my/samples
""",
    "train-autoencoder": """Train a small autoencoder on your own images.

examples:
  python tools/train_autoencoder.py --config configs/autoencoder/emoji.yaml
  python tools/train_autoencoder.py --config configs/autoencoder/emoji.yaml images.source=my/pictures output=my/vae
  python tools/train_autoencoder.py --config configs/autoencoder/emoji.yaml --dry-run
""",
    "train-moments": """Train moment heads on a Gaussian model, for GMSScheduler.

The heads predict the variance and the skew of each step; the model predicts its mean. The UNet is frozen, and a small head on
its last features is trained. The output is the same model folder with a moments component and GMSScheduler as its scheduler.

examples:
  python tools/train_moments.py model=outputs/demo/vanilla/model shards=outputs/demo/latents output=outputs/gms
  python tools/train_moments.py model=my/run/model shards=my/latents output=my/gms images_total=200000 batch_size=256
  python tools/sample.py model=outputs/gms output=outputs/gms-samples steps=10
""",
    "train-classifier": """Train the feature network that tools/evaluate.py uses.

It is a small classifier. Distances between sets of images are measured in its last features.

examples:
  python tools/train_classifier.py --config configs/classifier.yaml
  python tools/train_classifier.py --config configs/classifier.yaml output=outputs/classifier images_total=20000
  python tools/train_classifier.py --config configs/classifier.yaml --dry-run
""",
    "fit-gaussian": """Fit Gaussians to the latents, for TeleportScheduler.

One pass over the shards gives the mean and covariance of the latents, per class and overall. The output is the same model
folder with a gaussian component and TeleportScheduler as its scheduler.

examples:
  python tools/fit_gaussian.py model=outputs/demo/vanilla/model shards=outputs/demo/latents output=outputs/teleport
  python tools/fit_gaussian.py model=outputs/demo/vanilla/model shards=outputs/demo/latents output=outputs/gm components=256
  python tools/sample.py model=outputs/teleport output=outputs/teleport-samples steps=8
""",
    "demo": """Run the demo: encode, train, sample, write a report.

Uses the shipped images and starts from the shipped weights. The report is an HTML page.

examples:
  python tools/demo.py --config configs/demo.yaml
  python tools/demo.py --config configs/demo.yaml images=20000 output=outputs/longer
  python tools/demo.py --config configs/demo.yaml --dry-run
""",
}
"""Help texts. The first line is shown in the list of commands."""
COMMANDS = (
    Command("encode", EncodeConfig, "ldm_smd.data.encode:encode"),
    Command("verify", VerifyConfig, "ldm_smd.data.verify:verify"),
    Command("train", training.TrainConfig, "ldm_smd.training.loop:train"),
    Command("sample", SampleConfig, "ldm_smd.sampling.tool:sample"),
    Command("evaluate", EvaluateConfig, "ldm_smd.evaluation.evaluate:evaluate"),
    Command("explore", ExploreConfig, "ldm_smd.apps.explore:explore"),
    Command("average", training.AverageConfig, "ldm_smd.training.average:average"),
    Command("train-autoencoder", training.TrainAutoencoderConfig, "ldm_smd.training.train_autoencoder:train_autoencoder"),
    Command("train-moments", training.TrainMomentsConfig, "ldm_smd.training.train_moments:train_moments"),
    Command("train-classifier", training.TrainClassifierConfig, "ldm_smd.training.train_classifier:train_classifier"),
    Command("fit-gaussian", training.FitGaussianConfig, "ldm_smd.training.fit_gaussian:fit_gaussian"),
    Command("demo", DemoConfig, "ldm_smd.apps.demo:demo"),
)
BY_NAME = {command.name: command for command in COMMANDS}
BY_SCRIPT = {command.script: command for command in COMMANDS}
CALL = re.compile(
    r"(?P<python>python )?(?P<launcher>accelerate launch (?:--\S+ \S+ )*)?(?<![\w./-])(?P<script>tools/\w+\.py)\b"
)


def for_console(text: str) -> str:
    """Replace calls of scripts by the console command, "python tools/train.py" by "ldm-smd train"."""

    def replacement(call: re.Match) -> str:
        command = BY_SCRIPT.get(call["script"])
        if command is None:
            return call[0]
        return f"{call['launcher']}-m ldm_smd {command.name}" if call["launcher"] else f"ldm-smd {command.name}"

    return CALL.sub(replacement, text)
