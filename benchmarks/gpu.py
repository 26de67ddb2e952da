"""Measures speed and memory on a GPU, with torch and wheels only: make gpu

It measures training images per second of the ImageNet UNet and of DiT-B/2 on 32x32x4 latents, as Gaussian model and as mixture,
in float32 (TF32), bf16 and compiled bf16, as a fraction of the GPU's peak; peak memory, compared with plan.py; images per
second of Stable Diffusion's encoder at 256 and 512 pixels; and xformers' attention, compared with torch's. Weights and inputs
are random.

Every number is saved when it is measured, so a stopped run leaves a result. Compiled networks come last, because compiling one
can take minutes.

    python benchmarks/gpu.py
    python benchmarks/gpu.py --teraflops 312 --seconds 3    # an A100

Ends with exit code 2 if there is no GPU. Writes benchmarks/results/gpu.json and .md.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from itertools import product
from pathlib import Path

import torch
import torch.nn.functional as F
from autoencoders import stable_diffusion
from denoisers import dit_b
from few_step.jobs import synchronised
from plan import TRAINING_CONFIG
from targets import target, target_table
from training_costs import FLOAT32, LATENT, Model, dit_of, unet_of

from ldm_smd.autoencoder import FrozenAutoencoder
from ldm_smd.config import load_config
from ldm_smd.diffusion.objectives import energy, mse
from ldm_smd.models.attention import xformers_runs
from ldm_smd.models.denoiser import predict
from ldm_smd.training.settings import TrainConfig

RESULT = Path(__file__).parent / "results" / "gpu.json"
DRAWS = 4
GAUSSIAN, MIXTURE = "Gaussian model", "mixture"
MODES = ("float32 (TF32)", "bf16", "bf16, compiled")
WEIGHTS_AND_ADAM = 4 * FLOAT32
"""Bytes per parameter: the parameter, its gradient, and the two moments of AdamW."""
WANTED_RATIO, WANTED_MEMORY = 2.0, 1.15


@dataclass(frozen=True)
class Sizes:
    """Networks and sizes to measure."""

    networks: dict[str, Callable[[bool, bool], torch.nn.Module]]
    batch: int
    """Images per training step."""
    encoded: int
    """Images per call of the encoder."""
    resolutions: tuple[int, ...]
    tokens: int


@dataclass
class Run:
    """The device, the seconds per measurement, and the peak of the device in TFLOP/s."""

    device: torch.device
    seconds: float
    teraflops: float

    def planned(self, build: Callable[[bool, bool], torch.nn.Module], mixture: bool) -> Model:
        return Model(build, DRAWS if mixture else 0)


def full_sizes() -> Sizes:
    config = load_config(TrainConfig, TRAINING_CONFIG)
    networks = {"UNet of configs/train/imagenet-256.yaml": partial(unet_of, config), "DiT-B/2": partial(dit_of, make=dit_b)}
    return Sizes(networks, batch=64, encoded=16, resolutions=(256, 512), tokens=1024)


class TrainingStep:
    """Forward, backward and AdamW of a network on one batch."""

    def __init__(self, network: torch.nn.Module, mode: str, batch: int, device: torch.device) -> None:
        generator = torch.Generator().manual_seed(0)

        def noise(rows: int) -> torch.Tensor:
            return torch.randn(rows, *LATENT, generator=generator).to(device)

        self.network, self.device, self.batch = network.to(device).train(), device, batch
        self.forward = torch.compile(network) if "compiled" in mode else network
        self.mixture, self.bf16 = bool(getattr(network, "is_mixture", False)), "bf16" in mode
        self.x, self.target, self.eta = noise(batch), noise(batch), noise(batch * DRAWS) if self.mixture else None
        self.t = torch.randint(0, 1000, (batch,), generator=generator).to(device)
        self.labels = torch.randint(0, 10, (batch,), generator=generator).to(device)
        self.optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, fused=device.type == "cuda")

    def __call__(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(self.device.type, torch.bfloat16) if self.bf16 else nullcontext():
            found = predict(self.forward, self.x, self.t, self.labels, self.eta)
        if self.mixture:
            loss = energy(found.float().unflatten(0, (-1, DRAWS)), self.target).mean()
        else:
            loss = mse(found.float()[:, None], self.target).mean()
        loss.backward()
        self.optimizer.step()


def rate(step: Callable[[], object], images: int, seconds: float, device: torch.device) -> float:
    """Return images per second: the median over rounds, after one that is not counted."""
    step()
    began = synchronised(device)
    step()
    rounds = max(3, int(seconds / (synchronised(device) - began)))
    found = []
    for _ in range(rounds):
        began = synchronised(device)
        step()
        found.append(images / (synchronised(device) - began))
    return statistics.median(found)


def training(build: Callable[[bool, bool], torch.nn.Module], mode: str, model: str, sizes: Sizes, run: Run) -> dict:
    """Measure speed, fraction of the peak and memory of a training step."""
    mixture = model == MIXTURE
    torch.manual_seed(0)
    if run.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    step = TrainingStep(build(mixture, False), mode, sizes.batch, run.device)
    found = rate(step, sizes.batch, run.seconds, run.device)
    result = {"images_per_second": found}
    if "bf16" in mode:
        planned = run.planned(build, mixture)
        result["share_of_peak"] = found * planned.flops / (run.teraflops * 1e12)
        if run.device.type == "cuda":
            result["peak_bytes"] = torch.cuda.max_memory_allocated()
            result["planned_bytes"] = planned.parameters * WEIGHTS_AND_ADAM + planned.activations * sizes.batch
    return result


def encoding(sizes: Sizes, run: Run) -> dict[str, float]:
    """Measure images per second of the encoder by resolution, run as in tools/encode.py."""
    autoencoder = FrozenAutoencoder(stable_diffusion()).to(run.device)
    found = {}
    for resolution in sizes.resolutions:
        pixels = torch.zeros(sizes.encoded, 3, resolution, resolution, dtype=torch.uint8, device=run.device)
        found[str(resolution)] = rate(partial(autoencoder.encode_moments, pixels), sizes.encoded, run.seconds, run.device)
    return found


def attention(sizes: Sizes, run: Run) -> dict | None:
    """Compare forward and backward passes of xformers and torch: relative time and largest difference. None if xformers has no
    kernel."""
    dtype, heads, width = torch.bfloat16, 12, 64
    if not xformers_runs(run.device.type, dtype, width):
        return None
    from xformers.ops import memory_efficient_attention

    shape = (8, sizes.tokens, heads, width)
    query, key, value = (torch.randn(shape, device=run.device, dtype=dtype, requires_grad=True) for _ in range(3))

    def by_torch() -> torch.Tensor:
        return F.scaled_dot_product_attention(*(each.transpose(1, 2) for each in (query, key, value))).transpose(1, 2)

    def by_xformers() -> torch.Tensor:
        return memory_efficient_attention(query, key, value)

    backends = {"torch": by_torch, "xformers": by_xformers}
    rates = {
        name: rate(lambda attend=attend: attend().square().sum().backward(), 1, run.seconds, run.device)
        for name, attend in backends.items()
    }
    difference = float((by_torch() - by_xformers()).abs().max())
    return {"seconds_over_torch": rates["torch"] / rates["xformers"], "largest_difference": difference, "shape": list(shape)}


def measure(sizes: Sizes, run: Run) -> Iterator[dict]:
    """Yield everything measured so far, after each measurement."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    cells: dict[str, dict] = {}
    found = {"encoding": encoding(sizes, run), "attention": attention(sizes, run), "training": cells}
    yield found
    for mode, (name, build), model in product(MODES, sizes.networks.items(), (GAUSSIAN, MIXTURE)):
        began = time.perf_counter()
        cell = f"{name}, {model}, {mode}"
        cells[cell] = training(build, mode, model, sizes, run)
        print(f"{cell}: {cells[cell]} ({time.perf_counter() - began:.0f} s)", flush=True)
        torch.compiler.reset()
        yield found


def targets(result: dict, sizes: Sizes) -> list[dict]:
    found = []
    for name in sizes.networks:
        gaussian, mixture = (result["training"].get(f"{name}, {model}, bf16") for model in (GAUSSIAN, MIXTURE))
        if gaussian is None or mixture is None:
            continue
        ratio = gaussian["images_per_second"] / mixture["images_per_second"]
        step = f"{name}: training step, {DRAWS} draws, relative to the Gaussian model"
        found.append(target(step, f"<= {WANTED_RATIO}", ratio))
        if "peak_bytes" in mixture:
            over = mixture["peak_bytes"] / mixture["planned_bytes"]
            found.append(target(f"{name}: peak memory / plan", f"<= {WANTED_MEMORY}", over))
    return found


def versions() -> dict[str, str]:
    found = {}
    for name in ("torch", "diffusers", "xformers"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "none"
    return found


def table(result: dict) -> str:
    lines = [
        f"`{result['command']}`, {result['device']}, torch {result['versions']['torch']}; peak {result['teraflops']:g} "
        f"TFLOP/s. Training: batch {result['batch']}, 32x32x4 latents, {DRAWS} draws of the mixture.",
        "",
        "| training | images/s | of peak FLOP/s | peak memory | planned |",
        "|---|---|---|---|---|",
    ]
    for name, each in result["training"].items():
        of_peak = f"{each['share_of_peak']:.1%}" if "share_of_peak" in each else ""
        memory = [f"{each[part] / 2**30:.1f} GiB" if part in each else "" for part in ("peak_bytes", "planned_bytes")]
        lines.append(f"| {name} | {each['images_per_second']:,.0f} | {of_peak} | {' | '.join(memory)} |")
    rates = ", ".join(f"{each:,.0f} images/s at {resolution} pixels" for resolution, each in result["encoding"].items())
    lines += ["", f"Encoder of Stable Diffusion's autoencoder: {rates}."]
    if result["attention"]:
        ratio, difference = result["attention"]["seconds_over_torch"], result["attention"]["largest_difference"]
        lines += [
            "",
            f"xformers' attention takes {ratio:.2f} times as long as torch's; largest difference {difference:.2g} (bf16).",
        ]
    return "\n".join([*lines, *target_table(result["targets"])]) + "\n"


def write_result(sizes: Sizes, run: Run) -> None:
    about = {
        "command": " ".join(["python", "benchmarks/gpu.py", *sys.argv[1:]]),
        "device": torch.cuda.get_device_name() if run.device.type == "cuda" else run.device.type,
        "teraflops": run.teraflops,
        "versions": versions(),
        "batch": sizes.batch,
    }
    for found in measure(sizes, run):
        result = about | found
        result["targets"] = targets(result, sizes)
        RESULT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        RESULT.with_suffix(".md").write_text(table(result), encoding="utf-8")
    print(table(result))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--teraflops", type=float, default=989.0, help="peak of the GPU in bf16, without sparsity (H100 SXM: 989)"
    )
    parser.add_argument("--seconds", type=float, default=2.0, help="length of each measurement")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("expected a GPU that torch can use, found none")
    write_result(full_sizes(), Run(torch.device("cuda"), arguments.seconds, arguments.teraflops))


if __name__ == "__main__":
    main()
