"""What runs on a GPU, on one that is not there (pretend_gpu.py), and that it comes to the same as on the CPU.

python tests/gpu_run.py MODEL GAUSSIAN CONDITIONAL CLIP SHARDS VAE PICTURES OUTPUT, started by test_gpu.py.
"""

import sys
from collections import Counter
from pathlib import Path

import pretend_gpu
import torch
from accelerate.state import AcceleratorState
from pretend_gpu import DEVICE

from ldm_smd.config import (
    AverageConfig,
    EncodeConfig,
    EvaluateConfig,
    ExploreConfig,
    FitGaussianConfig,
    SampleConfig,
    TrainAutoencoderConfig,
    TrainClassifierConfig,
    TrainConfig,
    TrainMomentsConfig,
    load_config,
)
from ldm_smd.data.encode import encode
from ldm_smd.data.shards import Manifest
from ldm_smd.evaluation.evaluate import evaluate
from ldm_smd.explore import Explorer, Wish
from ldm_smd.pipelines import load_pipeline, seeded_generators
from ldm_smd.sampling import sample
from ldm_smd.schedulers import make_scheduler
from ldm_smd.training.autoencoder import train_autoencoder
from ldm_smd.training.average import average
from ldm_smd.training.classifier import train_classifier
from ldm_smd.training.gaussian import fit_gaussian
from ldm_smd.training.loop import train
from ldm_smd.training.moments import train_moments

MODEL, GAUSSIAN, CONDITIONAL, CLIP, SHARDS, VAE, PICTURES, OUTPUT = sys.argv[1:]
OUTPUT = Path(OUTPUT)


def pictures(folder, device, scheduler=None, offload=False, guide=None, **options):
    pipeline = load_pipeline(folder)
    pipeline.set_progress_bar_config(disable=True)
    if guide is not None:
        pipeline.register_modules(guide=load_pipeline(guide).unet)
    if scheduler:
        pipeline.scheduler = make_scheduler(scheduler, pipeline.scheduler)
    if offload:
        pipeline.enable_model_cpu_offload(device=device)
    else:
        pipeline.to(device)
    options = {"num_inference_steps": 3, "guidance_scale": 2.0, "output_type": "pt", **options}
    found = pipeline([0, 1], generator=seeded_generators([5, 6]), **options).images
    assert found.device.type == torch.device(device).type
    if offload:
        assert pipeline.unet.device.type == "cpu"
    return found.cpu()


def train_settings(*more):
    tiny = ["model.block_out_channels=[16,32]", "model.layers_per_block=1", "model.up_layers_per_block=1"]
    sizes = ["model.attention_head_dim=8", "model.norm_num_groups=4", "model.hypernetwork_width=8", "images_total=32"]
    parts = ["model.latent_channels=8", "model.identifier_channels=8", "batch_size=8", "objective.draws=2", "num_workers=0"]
    rates = ["sample_every_images=16", "checkpoint_every_images=16", "log_every_images=8", "sample_steps=2"]
    return [f"shards={SHARDS}", f"autoencoder={VAE}", *tiny, *sizes, *parts, *rates, *more]


def same(a, b, tolerance=1e-3):
    assert a.shape == b.shape and torch.allclose(a, b, atol=tolerance), float((a - b).abs().max())


def tool(schema, main, *settings):
    AcceleratorState._reset_state(reset_partial_state=True)  # a process of its own
    return main(load_config(schema, None, list(map(str, settings))))


# Sampling, by every kind of scheduler, from noise and from a picture, guided, and with components that wait on the CPU.
tool(FitGaussianConfig, fit_gaussian, f"model={GAUSSIAN}", f"shards={SHARDS}", "rank=4", f"output={OUTPUT / 'fitted'}")
few = ["images_total=16", "batch_size=8"]
tool(TrainMomentsConfig, train_moments, f"model={OUTPUT / 'fitted'}", f"shards={SHARDS}", *few, f"output={OUTPUT / 'both'}")
image = torch.rand(2, 3, 16, 16)
for options in (
    {"folder": MODEL},
    {"folder": MODEL, "scheduler": "DPMSolverMultistepScheduler:algorithm_type=sde-dpmsolver++"},
    {"folder": MODEL, "scheduler": "EulerAncestralDiscreteScheduler", "guidance_interval": (0.3, 5.0)},
    {"folder": MODEL, "scheduler": "HeunDiscreteScheduler", "image": image},
    {"folder": MODEL, "guide": GAUSSIAN},
    {"folder": OUTPUT / "both"},
    {"folder": OUTPUT / "both", "scheduler": "GMSScheduler"},
    {"folder": OUTPUT / "both", "scheduler": "TeleportScheduler:scheduler=GMSScheduler", "image": image},
):
    expected = pictures(**options, device="cpu")
    same(pictures(**options, device=DEVICE, offload=True), expected)
    pretend_gpu.waits.clear()
    same(pictures(**options, device=DEVICE), expected)
    waits = len(pretend_gpu.waits)
    pretend_gpu.waits.clear()
    pictures(**options, device=DEVICE, num_inference_steps=7)
    assert len(pretend_gpu.waits) == waits, f"{options}: the host waits for the device in the steps: {pretend_gpu.waits}"

# Training, from the start and after a checkpoint, with previews and averages.
run = [
    f"output={OUTPUT / 'trained'}",
    "ema_widths=[0.05,0.1]",
    "gradient_checkpointing=true",
    "accumulate=2",
    "cooldown_images=8",
]
for images in (16, 32):
    tool(TrainConfig, train, *train_settings(*run, f"images_total={images}"))
tool(AverageConfig, average, f"run={OUTPUT / 'trained'}", "sigma_rel=0.07", f"output={OUTPUT / 'average'}")

# The host waits for the device no more often in a longer training.
waited = []
for images in (16, 64):
    pretend_gpu.waits.clear()
    rare = ["log_every_images=1000", "sample_every_images=1000", "checkpoint_every_images=1000", f"images_total={images}"]
    tool(TrainConfig, train, *train_settings(f"output={OUTPUT / str(images)}", *rare))
    waited.append(list(pretend_gpu.waits))
    assert waited[-1], "nothing was done on the device"
assert len(waited[0]) == len(waited[1]), Counter(waited[1]) - Counter(waited[0])

# The other tools.
images = [f"images.source={PICTURES}", "images.resolution=16"]
few = ["shard_size=8", "batch_size=4", "num_workers=0"]
few += [f"embedding={CLIP}", f"output={OUTPUT / 'shards'}"]
again = tool(EncodeConfig, encode, *images, f"autoencoder={VAE}", *few)
same(*(torch.tensor([shard["mean"] for shard in each.shards]) for each in (again, Manifest.load(SHARDS))))
wish = ["text=a disc", f"clip={CLIP}", "per_class=2", "steps=2", f"output={OUTPUT / 'pictures'}"]
tool(SampleConfig, sample, f"model={CONDITIONAL}", *wish)
explorer = tool(ExploreConfig, Explorer, f"models.a={CONDITIONAL}", f"models.b={CONDITIONAL}", f"clip={CLIP}")
wish = Wish(steps=2, embedding=explorer.embedding(None, "a square"))
[outcome, _] = explorer.sample(wish, lambda share: None).values()
explorer.film("a", outcome.frames)
explorer.draws(outcome.frames[0], wish)
real = [f"reference.source={PICTURES}", "reference.resolution=16", f"held_out={PICTURES}"]
tool(EvaluateConfig, evaluate, *real, f"model={MODEL}", "count=12", "steps=2", f"output={OUTPUT / 'evaluation.json'}")
both = f"{{source: '{PICTURES}', resolution: 16}}"
one_set = f"sets=[{{name: a, batch_size: 8, images: {both}, held_out: {both}}}]"
tool(TrainClassifierConfig, train_classifier, one_set, "images_total=16", f"output={OUTPUT / 'classifier'}")
held_out = [f"held_out.source={PICTURES}", "held_out.resolution=16", f"work={OUTPUT / 'work'}", f"output={OUTPUT / 'vae'}"]
small = ["model.block_out_channels=[8,8]", "model.norm_num_groups=4", "images_total=16", "batch_size=8"]
tool(TrainAutoencoderConfig, train_autoencoder, *images, *held_out, *small)
