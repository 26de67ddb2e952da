"""Measures the speed of SMDUNet2DModel: as a Gaussian model relative to diffusers.UNet2DModel with as many parameters, and as a
mixture relative to the Gaussian model.

A training step is forward pass, backward pass and AdamW, with 4 draws of the mixture. A sampling step is a forward pass with
one draw, at one t for the whole batch. All models get the same batch and take turns, so that a slow moment of the machine
affects all. The result is the median over rounds of the ratio within a round.

    python benchmarks/unet_throughput.py            # 8x8x16 latents and 32x32x4 latents, some minutes
    python benchmarks/unet_throughput.py --quick

Writes benchmarks/results/unet_throughput.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from importlib.metadata import version
from pathlib import Path

import torch
from diffusers import UNet2DModel
from targets import target

from ldm_smd.diffusion.objectives import energy, mse
from ldm_smd.models.unet import SMDUNet2DModel

RESULT = Path(__file__).parent / "results" / "unet_throughput.json"
CLASSES = 10
PARAMETER_TOLERANCE = 0.02

# Latent shape and batch sizes of each case. Small latents are sampled in the default batch of tools/sample.py. Widths are
# chosen so that the numbers of parameters agree within 2 %. Depth, attention (lower level and middle) and head width are equal.
CASES = {
    "8x8x16": {"shape": (16, 8, 8), "batch": 32, "sampling_batch": 64},
    "32x32x4": {"shape": (4, 32, 32), "batch": 4, "sampling_batch": 4},
}
WIDTHS = {"diffusers": (88, 184), "vanilla": (96, 192), "smd": (96, 192)}
COMMON = {"norm_num_groups": 8, "attention_head_dim": 8}
DRAWS = 4
SAMPLING_ROUNDS = 10
"""Sampling rounds per training round: sampling steps are short, and their times vary by 5 % on a shared machine."""


def build(case: dict) -> dict[str, torch.nn.Module]:
    channels, height, _ = case["shape"]
    ours = {
        "sample_size": height,
        "in_channels": channels,
        "out_channels": channels,
        "num_classes": CLASSES,
        "attention_levels": (1,),
        "layers_per_block": 2,
        "up_layers_per_block": 1,
        **COMMON,
    }
    # In its faster memory layout, which SMDUNet2DModel uses by default.
    theirs = UNet2DModel(
        sample_size=height,
        in_channels=channels,
        out_channels=channels,
        block_out_channels=WIDTHS["diffusers"],
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        num_class_embeds=CLASSES,
        layers_per_block=1,
        resnet_time_scale_shift="scale_shift",
        **COMMON,
    ).to(memory_format=torch.channels_last)
    return {
        "diffusers": theirs,
        "vanilla": SMDUNet2DModel(block_out_channels=WIDTHS["vanilla"], z_channels=0, **ours),
        "smd": SMDUNet2DModel(block_out_channels=WIDTHS["smd"], z_channels=32, hypernetwork_width=40, **ours),
    }


class Trainee:
    """A model with its optimizer and inputs, to time steps of."""

    def __init__(self, name: str, model: torch.nn.Module, case: dict, device: torch.device) -> None:
        self.name, self.device = name, device
        self.model = model.to(device).train()
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
        generator = torch.Generator().manual_seed(0)
        batch = case["batch"]
        self.x = torch.randn(batch, *case["shape"], generator=generator).to(device)
        self.target = torch.randn(batch, *case["shape"], generator=generator).to(device)
        self.t = torch.randint(0, 1000, (batch,), generator=generator).to(device)
        self.labels = torch.randint(0, CLASSES, (batch,), generator=generator).to(device)
        self.eta = torch.randn(batch * DRAWS, *case["shape"], generator=generator).to(device)
        many = case["sampling_batch"]
        self.noise = torch.randn(many, *case["shape"], generator=generator).to(device)
        self.noise_labels = torch.randint(0, CLASSES, (many,), generator=generator).to(device)

    def sampling_seconds(self) -> float:
        self.synchronize()
        start = time.perf_counter()
        with torch.no_grad():
            self.model(self.noise, self.t[0], self.noise_labels)
        self.synchronize()
        return time.perf_counter() - start

    def training_seconds(self) -> float:
        self.synchronize()
        start = time.perf_counter()
        x = self.x.contiguous(memory_format=torch.channels_last)
        if self.name == "smd":
            prediction = self.model(x, self.t, self.labels, self.eta).sample
            loss = energy(prediction.unflatten(0, (len(x), DRAWS)), self.target).mean()
        else:
            loss = mse(self.model(x, self.t, self.labels).sample.unsqueeze(1), self.target).mean()
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        self.synchronize()
        return time.perf_counter() - start

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def measure(case: dict, rounds: int, device: torch.device) -> dict:
    models = build(case)
    parameters = {name: sum(p.numel() for p in model.parameters()) for name, model in models.items()}
    apart = max(parameters.values()) / min(parameters.values()) - 1
    if apart > PARAMETER_TOLERANCE:
        raise SystemExit(f"parameters: expected within {PARAMETER_TOLERANCE:.0%} of each other, found {parameters}")
    trainees = [Trainee(name, model, case, device) for name, model in models.items()]
    for trainee in trainees:
        trainee.training_seconds()
    training = [{trainee.name: trainee.training_seconds() for trainee in trainees} for _ in range(rounds)]
    sampling = [{trainee.name: trainee.sampling_seconds() for trainee in trainees} for _ in range(SAMPLING_ROUNDS * rounds)]
    return {
        "latents": list(case["shape"]),
        "batch": case["batch"],
        "sampling_batch": case["sampling_batch"],
        "block_out_channels": {name: list(WIDTHS[name]) for name in models},
        "parameters": parameters,
        "training_images_per_second": {
            name: case["batch"] / statistics.median(row[name] for row in training) for name in models
        },
        "vanilla_speed_to_diffusers": median_ratio(training, "diffusers", "vanilla"),
        "smd_training_step_to_vanilla": median_ratio(training, "smd", "vanilla"),
        "smd_sampling_step_to_vanilla": median_ratio(sampling, "smd", "vanilla"),
        "training_seconds_per_step": training,
        "sampling_seconds_per_step": sampling,
    }


def median_ratio(rows: list[dict[str, float]], above: str, below: str) -> float:
    """Return the median over rounds of the ratio of the times of two models."""
    return statistics.median(row[above] / row[below] for row in rows)


def targets(name: str, case: dict) -> list[dict]:
    wanted = [
        ("training images/s, Gaussian model / diffusers.UNet2DModel", ">= 1.0", case["vanilla_speed_to_diffusers"]),
        ("training step, mixture with 4 draws / Gaussian model", "<= 2.0", case["smd_training_step_to_vanilla"]),
        ("sampling step, mixture / Gaussian model", "<= 1.05", case["smd_sampling_step_to_vanilla"]),
    ]
    return [target(f"{measure}, {name}", limit, value) for measure, limit, value in wanted]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few rounds; recorded in the result")
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rounds = 5 if arguments.quick else 40
    cases = {}
    for name, case in CASES.items():
        cases[name] = measure(case, rounds, device)
        for each in targets(name, cases[name]):
            print(f"{each['name']}: {each['measured']} ({each['target']})", flush=True)
    result = {
        "command": " ".join(["python", "benchmarks/unet_throughput.py", *sys.argv[1:]]),
        "quick": arguments.quick,
        "machine": {
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
            "gpu": torch.cuda.get_device_name() if device.type == "cuda" else None,
            "python": platform.python_version(),
            "torch": version("torch"),
            "diffusers": version("diffusers"),
        },
        "seeds": [0],
        "draws": DRAWS,
        "cases": cases,
        "targets": [each for name, case in cases.items() for each in targets(name, case)],
    }
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
