"""tools/evaluate.py: how near pictures are to real ones, in the features of several networks, with all that the numbers depend
on.

Every process samples and looks at an equal share, in order, so that neither their number nor the batches change the result.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from safetensors import safe_open
from safetensors.torch import save_file

from ..data.images import read_pictures
from ..data.settings import ImagesConfig
from ..data.sources import Entry, fingerprint, list_entries
from ..device import pick_device, process_group
from ..errors import UserError
from ..files import atomic_file, claimed, claimed_by_first, sha256, this_process
from ..models.denoiser import num_classes
from ..pipelines.loading import NETWORKS, load_pipeline, model_folder, weight_files
from ..progress import progress
from ..sampling.batches import SamplingOptions, sample_batches
from ..schedulers import make_scheduler
from .distances import FeatureSet, distances
from .features import Extractor, load_extractor
from .settings import EvaluateConfig

IMAGES = ("source", "resolution", "crop", "background")
COLUMNS = ("frechet", "kid", "cmmd", "precision", "recall", "density", "coverage")


@dataclass
class Seen:
    """One set of pictures, as all networks see it.

    Attributes:
        features: of each network, float32 (N, D), in the order of the pictures; whole on the main process alone.
        sha256: of all pictures in any order.
        labels: of those that have one, in order.
    """

    features: list[torch.Tensor]
    sha256: str
    labels: list[int]

    def __len__(self) -> int:
        return len(self.features[0])

    def save(self, path: Path) -> None:
        tensors = {f"features.{index}": features for index, features in enumerate(self.features)}
        with atomic_file(path, this_process()) as temporary:  # others may keep the same at the same time
            save_file(tensors | {"labels": torch.tensor(self.labels)}, temporary, metadata={"sha256": self.sha256})

    @classmethod
    def load(cls, path: Path, networks: int) -> Seen:
        with safe_open(path, framework="pt") as file:
            features = [file.get_tensor(f"features.{index}") for index in range(networks)]
            return cls(features, file.metadata()["sha256"], file.get_tensor("labels").tolist())

    def about(self) -> dict:
        return {"count": len(self), "sha256": self.sha256}


def evaluate(config: EvaluateConfig) -> Path:
    """Measure, and write ``config.output`` and a table beside it; returns it."""
    output = Path(config.output)
    if output.is_dir():
        raise UserError(f"output: expected a JSON file to write, found a folder at {output}")
    if config.cache is not None:  # which others may use at the same time
        with claimed(Path(config.cache), "cache", worker=this_process(), inside=True):
            pass  # it can be written
    with claimed_by_first(output), process_group() as state:
        return measure(config, output, state)


def measure(config: EvaluateConfig, output: Path, state: PartialState) -> Path:
    """What ``evaluate`` does, in each process."""
    started = time.perf_counter()
    extractors = [load_extractor(weights, config.device) for weights in config.features]
    names = [extractor.name for extractor in extractors]
    if len(set(names)) < len(names):
        raise UserError(f"features: expected different networks, found {', '.join(names)}")
    reference = look_at_real("reference", config.reference, config, extractors, state)
    result: dict = {
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "reference": {name: getattr(config.reference, name) for name in IMAGES} | reference.about(),
    }
    compared: dict[str, Seen] = {}
    if config.pictures is not None:
        source = dataclasses.replace(config.reference, source=config.pictures)
        compared["pictures"] = look_at_real("pictures", source, config, extractors, state)
        result["pictures"] = {"source": config.pictures}
    elif config.model is not None:
        compared["samples"], result["samples"] = look_at_samples(config.model, config, reference, extractors, state)
    if config.held_out is not None:
        source = dataclasses.replace(config.reference, source=config.held_out)
        compared["held_out"] = look_at_real("held out", source, config, extractors, state)
        result["held_out"] = {"source": config.held_out}
    if not state.is_main_process:
        return output
    for name, seen in compared.items():
        result[name] |= seen.about()
    result["features"] = {}
    for index, extractor in enumerate(extractors):
        known = FeatureSet(reference.features[index])
        result["features"][extractor.name] = {
            "weights_sha256": extractor.sha256,
            "resize": extractor.resize,
            "dimensions": known.features.shape[1],
        } | {
            name: distances(seen.features[index], known, extractor.unit_length, config.bootstrap)
            for name, seen in compared.items()
        }
    result["versions"] = {name: version(name) for name in ("torch", "diffusers", "pillow")}
    result["processes"], result["seconds"] = state.num_processes, round(time.perf_counter() - started, 1)
    text = table(result, list(compared))
    for path, content in ((output, json.dumps(result, indent=1) + "\n"), (output.with_suffix(".md"), text)):
        with atomic_file(path) as temporary:
            temporary.write_text(content, encoding="utf-8")
    print(text)
    return output


def look_at_real(
    name: str, images: ImagesConfig, config: EvaluateConfig, extractors: list[Extractor], state: PartialState
) -> Seen:
    entries, _ = list_entries(images)
    cached = None
    if config.cache is not None:
        cached = Path(config.cache) / f"{digest_of(entries, images, extractors)[:32]}.safetensors"
        # What the main process finds decides: another may look when somebody else has just written it.
        [there] = broadcast_object_list([cached.is_file()])
        if there:
            return Seen.load(cached, len(extractors))
    mine = share(len(entries), state)
    starts = range(mine.start, mine.stop, config.batch_size)
    batches = [range(start, min(start + config.batch_size, mine.stop)) for start in starts]
    bar = progress(len(mine), 0, name, disable=not state.is_local_main_process)
    labels: list[int] = []

    def pixels() -> Iterator[torch.Tensor]:
        for pictures in read_pictures(entries, images, batches, config.num_workers):
            labels.extend(label for label in pictures.labels if label is not None)
            if len(pictures.pixels):
                yield pictures.pixels
            bar.update(len(pictures.keys) + len(pictures.unreadable))

    seen = look_at(name, pixels(), labels, extractors)
    bar.close()
    if cached is not None and state.is_main_process:
        seen.save(cached)
    return seen


def digest_of(entries: list[Entry], images: ImagesConfig, extractors: list[Extractor]) -> str:
    """Hash everything that the features of a source depend on."""
    digest = hashlib.sha256(repr([getattr(images, key) for key in IMAGES]).encode())
    digest.update("".join(extractor.sha256 + extractor.resize for extractor in extractors).encode())
    digest.update(fingerprint(entries).encode())
    return digest.hexdigest()


def look_at_samples(
    model: str, config: EvaluateConfig, reference: Seen, extractors: list[Extractor], state: PartialState
) -> tuple[Seen, dict]:
    """Samples of the model, and what they depend on."""
    folder = model_folder(model)
    pipeline = load_pipeline(folder).to(pick_device(config.device))
    if config.scheduler:
        pipeline.scheduler = make_scheduler(config.scheduler, pipeline.scheduler)
    labels = choose_labels(config, reference.labels, num_classes(pipeline.unet))
    options = SamplingOptions(config.steps, config.guidance_scale, seed=config.seed, batch_size=config.batch_size)
    batches = sample_batches(pipeline, labels, share(config.count, state), options, "samples")
    seen = look_at("samples", ((batch * 255).round().to(torch.uint8) for batch in batches), [], extractors)
    files = weight_files(folder, (*NETWORKS, "vae"))
    about = {
        "model": model,
        "weights_sha256": {f"{path.parent.name}/{path.name}": sha256(path) for path in files},
        "scheduler": config.scheduler or type(pipeline.scheduler).__name__,
        "steps": config.steps,
        "guidance_scale": config.guidance_scale,
        "labels": "none" if labels is None else config.labels,
        "seeds": [config.seed, config.seed + config.count - 1],
    }
    return seen, about


def choose_labels(config: EvaluateConfig, real: list[int], classes: int | None) -> list[int] | None:
    """One class for each sample, as ``config.labels`` says; None for an unconditional model."""
    if classes is None:
        return None
    if config.labels == "reference":
        if not real:
            raise UserError("labels: expected a reference with labels, found none; labels=balanced needs none")
        if max(real) >= classes:
            raise UserError(f"labels: expected labels below the model's {classes} classes, found {max(real)} in the reference")
        order = np.random.default_rng(config.seed).permutation(len(real))
        return [real[order[index % len(real)]] for index in range(config.count)]
    if config.labels == "balanced":
        return [index % classes for index in range(config.count)]
    return np.random.default_rng(config.seed).integers(classes, size=config.count).tolist()


def share(count: int, state: PartialState) -> range:
    """This process's part of so many pictures, in order."""
    rank, world = state.process_index, state.num_processes
    return range(count * rank // world, count * (rank + 1) // world)


def look_at(name: str, batches: Iterable[torch.Tensor], labels: list[int], extractors: list[Extractor]) -> Seen:
    """Each batch once: uint8 pictures (b, 3, H, W) of this process -> features of all."""
    parts: list[list[torch.Tensor]] = [[] for _ in extractors]
    hashes = 0
    for pixels in batches:
        hashes += sum(int.from_bytes(hashlib.sha256(picture.contiguous().numpy()).digest(), "big") for picture in pixels)
        for part, extractor in zip(parts, extractors):
            part.append(extractor(pixels).float())
    mine = [torch.cat(part) if part else None for part in parts]
    found = gather_object([(mine, hashes, labels)])
    if all(features[0] is None for features, _, _ in found):
        raise UserError(f"{name}: expected pictures that can be read, found none")
    gathered = [
        torch.cat([features[index] for features, _, _ in found if features[index] is not None]) for index in range(len(mine))
    ]
    total = sum(number for _, number, _ in found) % 2**256
    return Seen(gathered, f"{total:064x}", [label for _, _, of_process in found for label in of_process])


def table(result: dict, compared: list[str]) -> str:
    """Markdown, a row for each network and set; the interval is the bootstrap's, 95 %."""
    lines = [
        f"Against {result['reference']['count']:,} pictures of {result['reference']['source']}, "
        f"{result['reference']['resolution']} pixels (`{result['command']}`). "
        + "; ".join(f"{name.replace('_', ' ')}: {result[name]['count']:,}" for name in compared),
        "",
        "| features | | " + " | ".join(COLUMNS) + " |",
        "|---" * (len(COLUMNS) + 2) + "|",
    ]
    for features, entry in result["features"].items():
        for name in compared:
            cells = [
                ""
                if column not in entry[name]
                else f"{entry[name][column]:.4g}"
                + (f" ± {1.96 * entry[name][f'{column}_sd']:.2g}" if f"{column}_sd" in entry[name] else "")
                for column in COLUMNS
            ]
            lines.append(f"| {features} | {name.replace('_', ' ')} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"
