"""Measures memory and time for one image by its resolution: one evaluation of the UNet, and decoding.

The UNet is that of configs/train/imagenet-256.yaml with 109 million parameters. The autoencoders are that of Stable Diffusion
(f8, 4 channels) and a deep compression autoencoder (f32, 32 channels). Weights are random, because time and memory do not
depend on them. Each case runs in a process of its own, whose peak memory is reported.

    python benchmarks/resolution.py

Writes benchmarks/results/resolution.json and .md.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torch
from autoencoders import deep_compression, stable_diffusion
from diffusers import DDPMScheduler
from targets import target

from ldm_smd.autoencoder import FrozenAutoencoder
from ldm_smd.config import load_config
from ldm_smd.models.unet import SMDUNet2DModel
from ldm_smd.pipelines import SMDPipeline
from ldm_smd.training.settings import TrainConfig

RESULT = Path(__file__).parent / "results" / "resolution.json"
AUTOENCODERS = {"f8": stable_diffusion, "f32": deep_compression}
CASES = [("f8", 256), ("f8", 512), ("f8", 1024), ("f32", 512), ("f32", 1024)]
EVALUATIONS = 3
LIMIT_GB = 6.0
CLASSES = 1000


def one_case(kind: str, pixels: int) -> dict:
    vae = AUTOENCODERS[kind]().eval()
    encoder = FrozenAutoencoder(vae)
    side = pixels // encoder.factor
    shape = load_config(TrainConfig, "configs/train/imagenet-256.yaml").model.unet_arguments()
    channels = encoder.latent_channels
    unet = SMDUNet2DModel(sample_size=32, in_channels=channels, out_channels=channels, num_classes=CLASSES, **shape).eval()
    pipeline = SMDPipeline(unet, vae, DDPMScheduler())
    latents, labels = torch.randn(1, channels, side, side), torch.zeros(1, dtype=torch.long)
    result = {"latents": [channels, side, side]}
    with torch.no_grad():
        evaluation = [seconds(lambda: unet(latents, torch.tensor(500), labels)) for _ in range(EVALUATIONS)]
        result["evaluation_seconds"] = round(statistics.median(evaluation), 2)
        result["evaluation_gb"] = peak_gb()
        result["decode_seconds"] = round(seconds(lambda: pipeline.decode_latents(latents)), 1)
    return result | {"peak_gb": peak_gb()}


def seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def peak_gb() -> float:
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--case", nargs=2, metavar=("AUTOENCODER", "PIXELS"), help="measure this case only, and print it as JSON"
    )
    arguments = parser.parse_args()
    if arguments.case:
        print(json.dumps(one_case(arguments.case[0], int(arguments.case[1]))))
        return
    cases = {}
    for kind, pixels in CASES:
        command = [sys.executable, __file__, "--case", kind, str(pixels)]
        found = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()[-1]
        cases[f"{kind}, {pixels}"] = json.loads(found)
        print(f"{kind}, {pixels}: {found}", flush=True)
    worst = max(case["peak_gb"] for case in cases.values())
    result = {
        "command": "python benchmarks/resolution.py",
        "cores": os.cpu_count(),
        "torch": version("torch"),
        "cases": cases,
        "targets": [target("peak memory, GB", f"<= {LIMIT_GB:g}", worst)],
    }
    RESULT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    lines = [
        "| autoencoder | pixels | latents | UNet, one evaluation | decoding | peak memory of the process |",
        "|---" * 6 + "|",
    ]
    for name, case in cases.items():
        kind, pixels = name.split(", ")
        cells = [kind, pixels, "x".join(map(str, case["latents"])), f"{case['evaluation_seconds']:.2f} s"]
        lines.append("| " + " | ".join([*cells, f"{case['decode_seconds']:.1f} s", f"{case['peak_gb']:.1f} GB"]) + " |")
    text = "\n".join(lines) + "\n"
    RESULT.with_suffix(".md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
