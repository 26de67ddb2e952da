"""The tools one after another on images, as in the README; and the demo with tiny models."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
import yaml
from diffusers import AutoencoderKL
from PIL import Image
from safetensors.torch import load_file

from ldm_smd.apps.demo import demo, remove_earlier, run_config
from ldm_smd.apps.settings import DemoConfig
from ldm_smd.apps.showcase import Showcase
from ldm_smd.config import load_config
from ldm_smd.data.encode import encode
from ldm_smd.data.settings import EncodeConfig
from ldm_smd.errors import UserError
from ldm_smd.models.feature_network import FeatureNetwork
from ldm_smd.pipelines import SMDPipeline
from ldm_smd.sampling.settings import SampleConfig
from ldm_smd.sampling.tool import sample
from ldm_smd.training.ema import EMA
from ldm_smd.training.loop import train
from ldm_smd.training.metrics_log import read_metrics
from ldm_smd.training.settings import TrainAutoencoderConfig, TrainConfig
from ldm_smd.training.train_autoencoder import train_autoencoder
from tests.forked import ROOT
from tests.tiny import TINY_AUTOENCODER, TINY_MODEL


@pytest.mark.slow
def test_from_images_to_samples(run, image_folder, tmp_path):
    vae, latents, training, samples = (tmp_path / name for name in ("vae", "latents", "training", "samples"))
    images = [f"images.source={image_folder}", "images.resolution=16"]
    code, out, _ = run(
        TrainAutoencoderConfig,
        train_autoencoder,
        *images,
        f"held_out.source={image_folder}",
        "held_out.resolution=16",
        f"output={vae}",
        f"work={tmp_path / 'work'}",
        *TINY_AUTOENCODER,
        "images_total=1200",
        "batch_size=16",
        "checkpoint_every_images=640",
        "warmup_images=100",
        "learning_rate=3e-3",
    )
    assert code == 0 and "held-out PSNR" in out
    measured = [line["held_out_psnr"] for line in read_metrics(tmp_path / "work/metrics.jsonl") if "held_out_psnr" in line]
    assert float(out.split("PSNR ")[1].split()[0]) > 12 and len(measured) == 1
    assert len(AutoencoderKL.from_pretrained(vae).config.latents_mean) == 4

    code, out, _ = run(EncodeConfig, encode, *images, f"autoencoder={vae}", f"output={latents}", "num_workers=0")
    assert code == 0 and "22 images in 1 shards" in out
    given = [f"shards={latents}", f"autoencoder={vae}", f"output={training}", "images_total=96", "batch_size=16"]
    code, _, _ = run(TrainConfig, train, *given, *TINY_MODEL, "objective.draws=2", "sample_steps=2")
    assert code == 0
    code, _, _ = run(SampleConfig, sample, f"model={training / 'model'}", f"output={samples}", "per_class=2", "steps=2")
    assert code == 0
    with Image.open(samples / "class0001-seed00000003.png") as picture:
        assert picture.size == (16, 16) and picture.mode == "RGB"


@pytest.mark.slow
def test_autoencoder_training_resumes(image_folder, tmp_path, monkeypatch):
    """Interrupted between two checkpoints, it resumes from the first, with the weights of an uninterrupted run."""

    def train_in(name):
        images = [f"{part}.{key}" for part in ("images", "held_out") for key in (f"source={image_folder}", "resolution=16")]
        counts = ["images_total=64", "batch_size=8", "checkpoint_every_images=32", "warmup_images=16"]
        folders = [f"output={tmp_path / name}", f"work={tmp_path / f'work-{name}'}"]
        return train_autoencoder(load_config(TrainAutoencoderConfig, None, [*images, *counts, *TINY_AUTOENCODER, *folders]))

    seen, real = [], EMA.update

    def update(self, model, batch_images, images_seen):
        seen.append(images_seen)
        if seen == [8, 16, 24, 32, 40, 48]:
            raise KeyboardInterrupt
        return real(self, model, batch_images, images_seen)

    straight = train_in("straight")
    monkeypatch.setattr(EMA, "update", update)
    with pytest.raises(KeyboardInterrupt):
        train_in("stopped")
    assert not (tmp_path / "stopped").exists()
    stopped = train_in("stopped")
    assert seen[6:] == [40, 48, 56, 64]
    a, b = (load_file(folder / "diffusion_pytorch_model.safetensors") for folder in (straight, stopped))
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    logs = [read_metrics(tmp_path / f"work-{name}/metrics.jsonl") for name in ("straight", "stopped")]
    assert logs[0] == logs[1] and [line["images_seen"] for line in logs[0]] == [32, 64]


@pytest.mark.parametrize("missing", ["shards", "autoencoder"])
def test_missing_inputs_give_exit_code_2(run, train_config, tmp_path, missing):
    config = train_config()
    given = {name: getattr(config, name) for name in ("shards", "autoencoder", "output")}
    given[missing] = tmp_path / "none"
    code, _, err = run(TrainConfig, train, *[f"{name}={value}" for name, value in given.items()])
    assert code == 2 and f"{missing}: expected" in err and not (tmp_path / "run").exists()


@pytest.mark.slow
def test_demo(image_folder, vae_folder, train_config, tmp_path):
    """With tiny models: one as shipped, one that continues its training, and one that is distilled. The report is complete."""
    runs = []
    for name, changes in (("smd", []), ("vanilla", ["model.z_channels=0", "objective.name=mse"])):
        config = train_config(*changes, f"output={tmp_path / 'shipped' / name}", "log_every_images=16")
        folder = train(config)
        settings = tmp_path / f"{name}.yaml"
        overrides = {"model": {}, "objective": {"draws": 2}}
        for override in [*TINY_MODEL, *changes]:
            key, value = override.split("=")
            section, inner = key.split(".")
            overrides[section][inner] = yaml.safe_load(value)
        shared = {"shards": "unused", "autoencoder": "unused", "output": "unused", "batch_size": 8}
        settings.write_text(yaml.safe_dump({**shared, **overrides}))
        (folder / "unet/metrics.jsonl").write_text((tmp_path / "shipped" / name / "metrics.jsonl").read_text())
        runs.append({"name": name, "config": str(settings), "checkpoint": str(folder / "unet")})
    smd, vanilla = runs
    distilling = yaml.safe_load(Path(smd["config"]).read_text()) | {"objective": {"name": "distillation"}}
    (tmp_path / "distilled.yaml").write_text(yaml.safe_dump(distilling))
    showing = yaml.safe_load(Path(smd["config"]).read_text()) | {"autoencoder": str(vae_folder)}
    (tmp_path / "showcase.yaml").write_text(yaml.safe_dump(showing))
    distilled = vanilla | {"name": "distilled", "config": str(tmp_path / "distilled.yaml"), "learning_rate_factor": 1}
    runs = [vanilla | {"learning_rate_factor": 0}, distilled, smd]
    encoding = {"images": {"source": str(image_folder), "resolution": 16}, "autoencoder": str(vae_folder), "num_workers": 0}
    (tmp_path / "encode.yaml").write_text(yaml.safe_dump({**encoding, "output": "unused"}))
    FeatureNetwork((8, 16), {"shapes": 2}).save_pretrained(tmp_path / "features")
    content = {
        "output": str(tmp_path / "demo"),
        "features": str(tmp_path / "features"),
        "encode": str(tmp_path / "encode.yaml"),
        "held_out": encoding["images"],
        "runs": runs,
        "images": 32,
        "steps": [2, 3],
        "showcase": {
            "images": encoding["images"],
            "classes": ["square", "disc", "disc"],
            "models": [
                {
                    "name": "a",
                    "caption": "Gaussian",
                    "config": str(tmp_path / "showcase.yaml"),
                    "checkpoint": vanilla["checkpoint"],
                    "steps": [2],
                    "guidance_scale": 2,
                    "guide": smd["checkpoint"],
                    "timestep_shift": 2,
                },
                {
                    "name": "b",
                    "caption": "mixture",
                    "config": str(tmp_path / "showcase.yaml"),
                    "checkpoint": smd["checkpoint"],
                    "steps": [1, 2],
                },
            ],
        },
    }
    (tmp_path / "demo.yaml").write_text(yaml.safe_dump(content))
    config = load_config(DemoConfig, tmp_path / "demo.yaml")
    page = demo(config).read_text()
    report = json.loads((tmp_path / "demo/report.json").read_text())
    assert set(report["distance"]) == {"floor", "vanilla, DDPM", "distilled, DDPM", "smd, DDPM"}
    assert set(report["distance"]["smd, DDPM"]) == {"2", "3"} and report["distance"]["floor"] < 1e-6
    assert set(report["spread"]["vanilla"].values()) == {0.0}
    assert {t["name"] for t in report["targets"]} >= {"demo, peak memory", "difference in parameter count"}
    assert (tmp_path / "demo/comparison.png").stat().st_size > 10_000
    row = report["few_steps"]
    assert row["steps"] == 3 and [model["caption"] for model in row["models"]] == [
        "Gaussian model, as shipped",
        "mixture, after 32 images of distillation",
        "mixture, after 32 images of training",
    ]
    assert [model["distance"] for model in row["models"]] == [report["distance"][m["title"]]["3"] for m in row["models"]]
    before, after = (model["distance"] for model in row["models"][:2])
    assert f"{before:.2f} before, {after:.2f} after" in row["gains"] and ("did not lower" in row["gains"]) == (after >= before)
    assert row["gains"] in page and page.count("data:image/png;base64,") == 3 + 6 + 2
    assert page.count("data:image/jpeg;base64,") == 3
    captions = [page.index(f"<figcaption>{text}</figcaption>") for text in ("Gaussian, 2 steps, guidance 2", "mixture, 1 step")]
    assert captions == sorted(captions) and captions[-1] < page.index("Distance to the training images")
    assert Image.open(tmp_path / "demo/large.jpg").size == (3 * 18 + 2, 3 * 20)
    assert SMDPipeline.from_pretrained(tmp_path / "demo/a/model").guide.num_parameters() > 0
    assert SMDPipeline.from_pretrained(tmp_path / "demo/b/model")([1], num_inference_steps=1).images
    with pytest.raises(UserError, match=r"showcase\.classes: expected some of disc, square, found ring"):
        Showcase(dataclasses.replace(config.showcase, classes=["disc", "ring"]))

    # A run without training has the weights of the shipped network. A distillation has the full learning rate.
    weights = [
        load_file(folder / "diffusion_pytorch_model.safetensors")
        for folder in (Path(vanilla["checkpoint"]), tmp_path / "demo/vanilla/model/unet")
    ]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert not (tmp_path / "demo/vanilla/metrics.jsonl").exists() and "train vanilla" not in report["seconds"]
    configs = {run.name: run_config(config, run, str(vae_folder)) for run in config.runs}
    assert configs["distilled"].learning_rate == pytest.approx(10 * configs["smd"].learning_rate)

    # It replaces its own results only.
    (tmp_path / "own/latents").mkdir(parents=True)
    with pytest.raises(UserError, match=r"output: expected a new folder or that of an earlier demo.* found latents"):
        demo(dataclasses.replace(config, output=str(tmp_path / "own")))
    assert (tmp_path / "own/latents").exists()
    remove_earlier(config, tmp_path / "demo")
    assert not (tmp_path / "demo/latents").exists()


def test_a_demo_with_two_models_of_one_name_is_refused(monkeypatch):
    """Each has its folder."""
    monkeypatch.chdir(ROOT)
    config = load_config(DemoConfig, ROOT / "configs/demo.yaml")
    config.showcase.models[0].name = config.runs[0].name
    with pytest.raises(
        UserError, match=rf"runs, showcase.models: expected different names, found '{config.runs[0].name}' 2 times"
    ):
        demo(config)
