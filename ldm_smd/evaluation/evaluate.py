"""tools/evaluate.py: distances between samples and real images in the features of several networks."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from tqdm import tqdm

from ..autoencoder import FrozenAutoencoder
from ..data.classes import renumbered
from ..data.images import read_images, warn_unreadable
from ..data.index import ImageIndex
from ..data.settings import ImagesConfig
from ..data.sources import list_images
from ..device import process_group
from ..errors import UserError, renamed_settings
from ..files import atomic_file, claimed, claimed_by_first, sha256, this_process
from ..models.denoiser import num_classes
from ..models.hub import network_folder
from ..pipelines import SMDPipeline
from ..pipelines.loading import NETWORKS, model_folder, weight_files
from ..progress import progress
from ..sampling.batches import SamplingOptions, sample_batches
from ..sampling.configured import configured_pipeline, guided_levels
from ..sampling.inputs import training_side
from .distances import FeatureSet, distances
from .features import Extractor, load_extractor
from .image_features import ImageFeatures, extract_features, rank_slice
from .reconstruction import reconstruct
from .settings import EvaluateConfig

IMAGES = ("source", "resolution", "crop", "background")
GUIDE = "guide"
"""Part of a model folder."""
COLUMNS = ("frechet", "kid", "cmmd", "precision", "recall", "density", "coverage")


def evaluate(config: EvaluateConfig) -> Path:
    """Evaluate and write ``config.output`` and a table next to it; returns the path."""
    output = Path(config.output)
    if output.is_dir():
        raise UserError(f"output: expected a JSON file to write, found a folder at {output}")
    if config.cache is not None:  # shared with other runs
        with claimed(Path(config.cache), "cache", worker=this_process(), inside=True):
            pass  # checks that it is writable
    with claimed_by_first(output), process_group() as state:
        result = measure(config, state)
        if state.is_main_process:
            text = table(result)
            for path, content in ((output, json.dumps(result, indent=1) + "\n"), (output.with_suffix(".md"), text)):
                with atomic_file(path) as temporary:
                    temporary.write_text(content, encoding="utf-8")
            print(text)
    return output


def measure(config: EvaluateConfig, state: PartialState) -> dict:
    """Compute the features of all sets, in all processes. Returns the result on the main process, {} on others."""
    started = time.perf_counter()
    extractors = [load_extractor(weights, config.device) for weights in config.features]
    names = [extractor.name for extractor in extractors]
    if len(set(names)) < len(names):
        raise UserError(f"features: expected different networks, found {', '.join(names)}")
    folder = None if config.model is None else model_folder(config.model)
    pipeline = None if folder is None else sampled_pipeline(folder, config)
    reference = real_features("reference", config.reference, config, extractors, state)
    result: dict = {
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "reference": {name: getattr(config.reference, name) for name in IMAGES},
    }
    compared: dict[str, ImageFeatures] = {}
    for name, source in (("held_out", config.held_out), ("pictures", config.pictures)):
        if source is not None:  # before the samples, which take longer: a missing folder is found at once
            images = dataclasses.replace(config.reference, source=source)
            compared[name] = real_features(name, images, config, extractors, state)
            result[name] = {"source": source}
    if folder is not None and pipeline is not None:
        of_samples = sample_features(folder, pipeline, config, reference, extractors, state)
        compared["samples"], result["samples"] = of_samples
        if config.reconstructions:
            of_reconstructions = reconstructed_features(pipeline, config, extractors, state)
            compared["reconstructions"], result["reconstructions"] = of_reconstructions
    if not state.is_main_process:
        return {}
    if state.num_processes > 1:
        # Launchers set 1, and the other processes have finished.
        torch.set_num_threads(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    for name, found in {"reference": reference, **compared}.items():
        if len(found) < 2:
            raise UserError(f"{name}: expected at least two images, found {len(found)}")
        for network, features in zip(names, found.features):
            if not features.isfinite().all():
                raise UserError(f"features: expected finite features of {network}, found others for the {name}")
        result[name] |= {"count": len(found), "sha256": found.sha256}
    result["features"] = {}
    for index, extractor in enumerate(extractors):
        known = FeatureSet(reference.features[index])
        result["features"][extractor.name] = {
            "weights_sha256": extractor.sha256,
            "resize": extractor.resize,
            "dimensions": known.features.shape[1],
        } | {
            name: distances(found.features[index], known, extractor.unit_length, config.bootstrap)
            for name, found in compared.items()
        }
    result["versions"] = {name: version(name) for name in ("torch", "diffusers", "pillow")}
    result["processes"], result["seconds"] = state.num_processes, round(time.perf_counter() - started, 1)
    return result


def real_features(
    name: str, images: ImagesConfig, config: EvaluateConfig, extractors: list[Extractor], state: PartialState
) -> ImageFeatures:
    """Compute the features of a source, or load them from the cache. ``name``: its setting, and in the progress bar."""
    with renamed_settings(setting_names(name)):
        entries = list_images(images)
    cached = None
    if config.cache is not None:
        cached = Path(config.cache) / f"{digest_of(entries, images, extractors)[:32]}.safetensors"
        # The main process decides, because another one might see a file that has just been written.
        [there] = broadcast_object_list([cached.is_file()])
        if there:
            return dataclasses.replace(ImageFeatures.load(cached, len(extractors)), classes=entries.classes)
    found = features_of(name, entries, rank_slice(len(entries), state), images, config, extractors)
    if cached is not None and state.is_main_process:
        found.save(cached)
    return dataclasses.replace(found, classes=entries.classes)


def reconstructed_features(
    pipeline: SMDPipeline, config: EvaluateConfig, extractors: list[Extractor], state: PartialState
) -> tuple[ImageFeatures, dict]:
    """Encode and decode a random sample of the held-out images, or of the reference; return the features and a description."""
    name, source = ("reference", config.reference.source) if config.held_out is None else ("held_out", config.held_out)
    images = dataclasses.replace(config.reference, source=source)
    with renamed_settings(setting_names(name)):
        entries = list_images(images)
    chosen = np.random.default_rng(config.seed).permutation(len(entries))[: config.num_samples].tolist()
    autoencoder = FrozenAutoencoder(pipeline.vae)
    indices = [chosen[place] for place in rank_slice(len(chosen), state)]
    through = partial(reconstruct, autoencoder)
    found = features_of(name, entries, indices, images, config, extractors, through, "reconstructions")
    return found, {"source": source}


def features_of(
    name: str,
    entries: ImageIndex,
    indices: Sequence[int],
    images: ImagesConfig,
    config: EvaluateConfig,
    extractors: list[Extractor],
    through: Callable[[torch.Tensor], torch.Tensor] = lambda pixels: pixels,
    description: str | None = None,
) -> ImageFeatures:
    """Read this process's images, send them ``through`` a function, and compute the features.

    Args:
        name: the setting of the images, for messages, and by default the ``description`` in the progress bar.
    """
    batches = [indices[start : start + config.batch_size] for start in range(0, len(indices), config.batch_size)]
    labels: list[int] = []
    unreadable: list[dict] = []

    def pixels(bar: tqdm) -> Iterator[torch.Tensor]:
        for pictures in read_images(entries, images, batches, config.num_workers):
            labels.extend(label for label in pictures.labels if label is not None)
            unreadable.extend(pictures.unreadable)
            if len(pictures.pixels):
                yield through(pictures.pixels)
            bar.update(len(pictures.keys) + len(pictures.unreadable))

    description, hidden = description or name.replace("_", " "), not PartialState().is_local_main_process
    with renamed_settings(setting_names(name)), progress(len(indices), 0, description, disable=hidden) as bar:
        found = extract_features(description, pixels(bar), labels, extractors)
    warn_unreadable(images, unreadable)
    return found


def setting_names(name: str) -> dict[str, str]:
    """Return the settings that messages about images should name, by those of ImagesConfig."""
    return {"images.source": "reference.source" if name == "reference" else name, "images": "reference"}


def digest_of(entries: ImageIndex, images: ImagesConfig, extractors: list[Extractor]) -> str:
    """Hash everything that the features of a source depend on."""
    digest = hashlib.sha256(repr([getattr(images, key) for key in IMAGES]).encode())
    digest.update("".join(extractor.sha256 + extractor.resize for extractor in extractors).encode())
    digest.update(entries.files_sha256().encode() + repr(entries.classes).encode())
    return digest.hexdigest()


def sampled_pipeline(folder: Path, config: EvaluateConfig) -> SMDPipeline:
    """Load the model to sample from. Raises UserError if its images have another size than the reference."""
    pipeline = configured_pipeline(folder, config)
    side = training_side(pipeline)
    if side != config.reference.resolution:
        raise UserError(
            f"reference.resolution: expected {side}, the side of the images of {config.model}, found "
            f"{config.reference.resolution}; to compare at another size, write samples with tools/sample.py and set pictures"
        )
    return pipeline


def sample_features(
    folder: Path,
    pipeline: SMDPipeline,
    config: EvaluateConfig,
    reference: ImageFeatures,
    extractors: list[Extractor],
    state: PartialState,
) -> tuple[ImageFeatures, dict]:
    """Sample from the model; return the features and a description of the samples for the JSON file."""
    real, classes = reference.labels, num_classes(pipeline.unet)
    if classes is not None and config.labels == "reference":
        known = [pipeline.id2label[number] for number in sorted(pipeline.id2label)]
        real = renumbered(real, reference.classes, known, "reference.source")
    labels = choose_labels(config, real, classes)
    options = SamplingOptions(
        config.steps,
        config.guidance_scale,
        guidance_interval=guided_levels(config),
        seed=config.seed,
        batch_size=config.batch_size,
        timestep_shift=pipeline.shift_of_steps(config.timestep_shift),
    )
    batches = sample_batches(pipeline, labels, rank_slice(config.num_samples, state), options, "samples")
    found = extract_features("samples", ((batch * 255).round().to(torch.uint8) for batch in batches), [], extractors)
    used = [(path.parent.name, path) for path in weight_files(folder, (*NETWORKS, "vae"))]
    if config.guide is not None:  # in place of the model's own
        of_guide = network_folder(config.guide, "guide").glob("*.safetensors")
        used = [(part, path) for part, path in used if part != GUIDE] + [(GUIDE, path) for path in sorted(of_guide)]
    return found, {
        "model": config.model,
        "weights_sha256": {f"{part}/{path.name}": sha256(path) for part, path in used},
        "scheduler": config.scheduler or type(pipeline.scheduler).__name__,
        "steps": config.steps,
        "timestep_shift": options.timestep_shift,
        "guidance_scale": config.guidance_scale,
        "guidance_interval": config.guidance_interval,
        "guide": config.guide,
        "precision": str(pipeline.unet.dtype).removeprefix("torch."),
        "labels": "none" if labels is None else config.labels,
        "seeds": [config.seed, config.seed + config.num_samples - 1],
    }


def choose_labels(config: EvaluateConfig, real: list[int], classes: int | None) -> list[int] | None:
    """Choose the class of each sample by ``config.labels``; None for an unconditional model."""
    if classes is None:
        return None
    if config.labels == "reference":
        if not real:
            raise UserError("labels: expected a reference with labels, found none; use labels=balanced")
        if max(real) >= classes:
            raise UserError(f"labels: expected labels below the model's {classes} classes, found {max(real)} in the reference")
        order = np.random.default_rng(config.seed).permutation(len(real))
        return [real[order[index % len(real)]] for index in range(config.num_samples)]
    if config.labels == "balanced":
        return [index % classes for index in range(config.num_samples)]
    return np.random.default_rng(config.seed).integers(classes, size=config.num_samples).tolist()


def table(result: dict) -> str:
    """Format the result as Markdown, a row for each network and set, with 95 % bootstrap intervals."""
    compared = [name for name in ("pictures", "samples", "reconstructions", "held_out") if name in result]
    lines = [
        f"Compared with {result['reference']['count']:,} images of {result['reference']['source']}, "
        f"{result['reference']['resolution']} pixels (`{result['command']}`). "
        + "; ".join(f"{name.replace('_', ' ')}: {result[name]['count']:,}" for name in compared),
        "",
        "| features | | " + " | ".join(COLUMNS) + " |",
        "|---" * (len(COLUMNS) + 2) + "|",
    ]
    for features, entry in result["features"].items():
        for name in compared:
            found = entry[name]
            margins = {column: f" ± {1.96 * found[f'{column}_sd']:.2g}" for column in COLUMNS if f"{column}_sd" in found}
            cells = [f"{found[column]:.4g}{margins.get(column, '')}" if column in found else "" for column in COLUMNS]
            lines.append(f"| {features} | {name.replace('_', ' ')} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"
