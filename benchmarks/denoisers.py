"""Measures the cost of a mixture in networks of diffusers at full size: DiT-XL/2 and the UNet of Stable Diffusion 1.x.

The weights are random. Each network is extended to a mixture as ``tools/train.py init_from=`` does. Gaussian model and mixture
share their weights, so that both fit into memory, and take turns. Timed are a training step (forward and backward pass, 4 draws
per image) and a sampling step. Peak memory is that of two training steps of the mixture with AdamW, in a process of their own.

    python benchmarks/denoisers.py
    python benchmarks/denoisers.py --only DiT-XL/2 --rounds 9

Writes benchmarks/results/denoisers.json and .md.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import shlex
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version

import torch
from diffusers import DiTTransformer2DModel, UNet2DConditionModel
from few_step.jobs import synchronised
from targets import target, target_table
from yardstick import RESULTS

from ldm_smd.diffusion.objectives import energy, mse
from ldm_smd.models.backbone import Backbone
from ldm_smd.models.denoiser import predict
from ldm_smd.models.extended import plain_config
from ldm_smd.models.extended_condition import ExtendedUNet2DConditionModel
from ldm_smd.models.extended_dit import ExtendedDiTTransformer2DModel

DRAWS = 4
CHANNELS, SIDE = 4, 32
"""Latent shape of 256-pixel images in the VAE that both networks use."""
GAUSSIAN, MIXTURE = "Gaussian model", "mixture"


@dataclass(frozen=True)
class Network:
    """A network to measure: ``extended`` builds the mixture, ``plain`` returns the Gaussian model inside it."""

    extended: Callable[[], Backbone]
    plain: Callable[[Backbone], torch.nn.Module]


def dit(layers: int, heads: int, head_dim: int) -> Backbone:
    """Build a DiT for ImageNet (arXiv 2212.09748) with patches of 2x2, without the learned variance."""
    shape = {"num_layers": layers, "num_attention_heads": heads, "attention_head_dim": head_dim}
    with torch.device("meta"):
        config = plain_config(DiTTransformer2DModel(**shape, in_channels=CHANNELS, out_channels=CHANNELS))
    sizes = {"sample_size": SIDE, "in_channels": CHANNELS, "num_classes": 1000}
    return ExtendedDiTTransformer2DModel(config | {"sample_size": SIDE}, **sizes)


dit_xl = partial(dit, 28, 16, 72)
dit_b = partial(dit, 12, 12, 64)


def stable_diffusion(tail_blocks: int | None = None) -> Backbone:
    """Build a UNet like that of Stable Diffusion 1.x, conditioned on 1,000 classes."""
    with torch.device("meta"):
        config = plain_config(UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8))
    return ExtendedUNet2DConditionModel(config, sample_size=64, in_channels=CHANNELS, num_classes=1000, tail_blocks=tail_blocks)


NETWORKS = {
    "DiT-XL/2": Network(dit_xl, lambda model: model.transformer),
    "Stable Diffusion 1.x": Network(stable_diffusion, lambda model: model.unet),
    "Stable Diffusion 1.x, tail_blocks=2": Network(partial(stable_diffusion, 2), lambda model: model.unet),
    "Stable Diffusion 1.x, tail_blocks=1": Network(partial(stable_diffusion, 1), lambda model: model.unet),
}


class Steps:
    """Steps of a network and of the Gaussian model within it, on the same inputs."""

    def __init__(self, network: Network, device: torch.device, batch: int) -> None:
        torch.manual_seed(0)
        self.device, self.model = device, network.extended().to(device)
        self.plain = network.plain(self.model)
        self.x, self.target = (torch.randn(batch, CHANNELS, SIDE, SIDE, device=device) for _ in range(2))
        self.eta = torch.randn(batch * DRAWS, CHANNELS, SIDE, SIDE, device=device)
        self.t = torch.randint(0, 1000, (batch,), device=device)
        self.labels = torch.randint(0, 1000, (batch,), device=device)

    def loss(self, what: str) -> torch.Tensor:
        if what == MIXTURE:
            draws = self.model(self.x, self.t, self.labels, self.eta).sample
            return energy(draws.unflatten(0, (-1, DRAWS)), self.target).mean()
        return mse(predict(self.plain, self.x, self.t, self.labels)[:, None], self.target).mean()

    def training_seconds(self, what: str) -> float:
        self.model.train().zero_grad(set_to_none=True)
        started = synchronised(self.device)
        self.loss(what).backward()
        return synchronised(self.device) - started

    @torch.no_grad()
    def sampling_seconds(self, what: str) -> float:
        self.model.eval().zero_grad(set_to_none=True)
        started = synchronised(self.device)
        if what == MIXTURE:
            self.model(self.x, self.t, self.labels)
        else:
            predict(self.plain, self.x, self.t, self.labels)
        return synchronised(self.device) - started


def peak_memory(name: str, batch: int, queue: multiprocessing.Queue) -> None:
    """Put the peak memory of two training steps with AdamW in float32 into ``queue``, in GB: GPU memory, or that of the process
    if there is no GPU."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    steps = Steps(NETWORKS[name], device, batch)
    optimizer = torch.optim.AdamW(steps.model.train().parameters(), lr=1e-4, fused=True)
    for _ in range(2):
        optimizer.zero_grad(set_to_none=True)
        steps.loss(MIXTURE).backward()
        optimizer.step()
    on_gpu = torch.cuda.max_memory_allocated() if device.type == "cuda" else 0
    queue.put((on_gpu or 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) / 1e9)


def in_turn(seconds: Callable[[str], float], rounds: int) -> list[dict[str, float]]:
    """Return the seconds of both models for each round. They take turns; a first round is not counted."""
    return [{what: seconds(what) for what in (GAUSSIAN, MIXTURE)} for _ in range(rounds + 1)][1:]


def peak_in_a_process(name: str, batch: int) -> float:
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=peak_memory, args=(name, batch, queue))
    process.start()
    process.join()
    if process.exitcode:
        raise RuntimeError(f"memory of {name}: expected exit code 0 of its process, found {process.exitcode}")
    return queue.get()


def measure(name: str, rounds: int, batch: int, device: torch.device) -> dict:
    gigabytes = peak_in_a_process(name, batch)
    steps = Steps(NETWORKS[name], device, batch)
    both, plain = (sum(p.numel() for p in model.parameters()) for model in (steps.model, steps.plain))
    training, sampling = in_turn(steps.training_seconds, rounds), in_turn(steps.sampling_seconds, 2 * rounds)
    return {
        "parameters": plain,
        "mixture_parameters": both - plain,
        "training_peak_gb": round(gigabytes, 2),
        "training_seconds": training,
        "sampling_seconds": sampling,
        "training_ratio": statistics.median(row[MIXTURE] / row[GAUSSIAN] for row in training),
        "sampling_ratio": statistics.median(row[MIXTURE] / row[GAUSSIAN] for row in sampling),
    }


def targets(networks: dict[str, dict]) -> list[dict]:
    found = []
    for name, each in networks.items():
        training, sampling = each["training_ratio"], each["sampling_ratio"]
        found.append(target(f"{name}: training step, 4 draws, relative to the Gaussian model", "<= 1.6", training))
        found.append(target(f"{name}: sampling step, relative to the Gaussian model", "<= 1.03", sampling))
    return found


def table(result: dict) -> str:
    """Format the result as Markdown."""
    lines = [f"`{result['command']}`, {result['device']}, {result['threads']} threads, float32, batch {result['batch']}:", ""]
    lines += [
        "| network | parameters | added by the mixture | peak memory, training | training step | sampling step |",
        "|---|---|---|---|---|---|",
    ]
    for name, each in result["networks"].items():
        sizes = f"{each['parameters'] / 1e6:.0f} million | {each['mixture_parameters'] / 1e6:.1f} million"
        ratios = f"{each['training_ratio']:.2f} | {each['sampling_ratio']:.3f}"
        lines.append(f"| {name} | {sizes} | {each['training_peak_gb']:.1f} GB | {ratios} |")
    return "\n".join([*lines, *target_table(result["targets"])]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", nargs="+", choices=list(NETWORKS), help="measure only these networks; the others keep their earlier results"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch", type=int, default=1)
    arguments = parser.parse_args()
    device, path = torch.device("cuda" if torch.cuda.is_available() else "cpu"), RESULTS / "denoisers.json"
    networks = json.loads(path.read_text(encoding="utf-8"))["networks"] if path.is_file() else {}
    for name in arguments.only or NETWORKS:
        networks[name] = measure(name, arguments.rounds, arguments.batch, device)
        print(name, {key: value for key, value in networks[name].items() if not key.endswith("seconds")}, flush=True)
    result = {
        "command": shlex.join(["python", "benchmarks/denoisers.py", *sys.argv[1:]]),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else f"{os.cpu_count()} CPU cores",
        "threads": torch.get_num_threads(),
        "versions": {name: version(name) for name in ("torch", "diffusers")},
        "batch": arguments.batch,
        "networks": networks,
        "targets": targets(networks),
    }
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    path.with_suffix(".md").write_text(table(result), encoding="utf-8")
    print(table(result))


if __name__ == "__main__":
    main()
