"""No value of a setting causes a traceback, an incomplete output or a hang (the cases are in hostile.py)."""

import shutil
from operator import attrgetter

import pytest
import yaml

from ldm_smd.commands import BY_NAME
from ldm_smd.models.feature_network import FeatureNetwork
from ldm_smd.training.loop import train
from tests.hostile import cases, run_case
from tests.tiny import TINY_MODEL


def nested(overrides):
    """Return settings as nested dictionaries, from ``key=value`` overrides."""
    content = {}
    for override in overrides:
        key, _, value = override.partition("=")
        *outer, last = key.split(".")
        section = content
        for name in outer:
            section = section.setdefault(name, {})
        section[last] = yaml.safe_load(value)
    return content


@pytest.fixture
def bases(image_folder, vae_folder, shards, train_config, gaussian_folder, tmp_path):
    """Working settings of every tool."""
    folder = tmp_path / "hostile"
    (folder / "empty").mkdir(parents=True)
    (folder / "a-file").write_text("some text\n")
    out = folder / "out"
    model = train(train_config(f"output={tmp_path / 'averaged'}", "images_total=16", "ema_widths=[0.05,0.1]"))
    FeatureNetwork((8, 16), {"shapes": 2}).save_pretrained(tmp_path / "features")
    images = {"source": str(image_folder), "resolution": 16}
    encoding = {"images": images, "autoencoder": str(vae_folder), "batch_size": 8, "num_workers": 0}
    training = nested([*TINY_MODEL, "objective.draws=2", "images_total=8", "batch_size=8", "sample_steps=1"])
    (tmp_path / "encode.yaml").write_text(yaml.safe_dump(encoding | {"output": "unused"}))
    unused = {"shards": "unused", "autoencoder": "unused", "output": "unused"}
    (tmp_path / "train.yaml").write_text(yaml.safe_dump(training | unused))
    (tmp_path / "showcase.yaml").write_text(yaml.safe_dump(training | unused | {"autoencoder": str(vae_folder)}))
    run = {"name": "smd", "config": str(tmp_path / "train.yaml"), "checkpoint": str(model / "unet")}
    short = {"images_total": 8, "batch_size": 8}
    return {
        "encode": encoding | {"output": str(out / "latents")},
        "verify": {"shards": str(shards), "sheet": str(out / "sheet.png"), "pictures": 4},
        "train": training | {"shards": str(shards), "autoencoder": str(vae_folder), "output": str(out / "run")},
        "train-autoencoder": {
            "images": images,
            "held_out": images,
            "model": {"block_out_channels": [8, 8], "latent_channels": 4, "norm_num_groups": 4},
            "output": str(out / "vae"),
            **short,
        },
        "train-classifier": {
            "sets": [{"name": "shapes", "images": images, "held_out": images, "batch_size": 8}],
            "block_out_channels": [4, 8],
            "images_total": 8,
            "output": str(out / "classifier"),
        },
        "average": {"run": str(tmp_path / "averaged"), "sigma_rel": 0.1, "output": str(out / "average")},
        "train-moments": {"model": str(gaussian_folder), "shards": str(shards), "output": str(out / "moments"), **short},
        "fit-gaussian": {"model": str(model), "shards": str(shards), "rank": 4, "output": str(out / "gaussian")},
        "sample": {"model": str(model), "output": str(out / "samples"), "per_class": 1, "steps": 1},
        "evaluate": {
            "model": str(model),
            "reference": images,
            "features": [str(tmp_path / "features")],
            "num_samples": 6,
            "steps": 1,
            "num_workers": 0,
            "output": str(out / "result.json"),
        },
        "explore": {"models": {"one": str(model)}},
        "demo": {
            "output": str(out / "demo"),
            "encode": str(tmp_path / "encode.yaml"),
            "held_out": images,
            "features": str(tmp_path / "features"),
            "runs": [run],
            "images": 8,
            "steps": [1],
            "showcase": {
                "images": images,
                "classes": ["disc"],
                "models": [
                    {
                        "name": "large",
                        "caption": "large",
                        "config": str(tmp_path / "showcase.yaml"),
                        "checkpoint": str(model / "unet"),
                        "steps": [1],
                    }
                ],
            },
        },
    }


WRONG = attrgetter("wrong")
TOOLS = tuple(BY_NAME)


def failures(tool, base, folder, capfd, chosen):
    """Run the chosen cases and print their number; returns a line for each that ends wrongly."""
    found, count = [], 0
    for case in filter(chosen, cases(tool, folder)):
        (folder / "out").mkdir()
        problem = run_case(case, base, folder, capfd.readouterr)
        if problem is not None:
            found.append(f"{case}: {problem}")
        shutil.rmtree(folder / "out", ignore_errors=True)
        count += 1
    with capfd.disabled():
        print(f"{tool}: {count} cases, {len(found)} failures")
    return found


@pytest.fixture
def hostile_folder(tmp_path, monkeypatch):
    monkeypatch.setattr("gradio.Blocks.block_thread", lambda self: self.close())  # otherwise the page would be served forever
    monkeypatch.chdir(tmp_path / "hostile" / "empty")
    return tmp_path / "hostile"


@pytest.mark.slow
def test_invalid_values_are_refused(bases, hostile_folder, capfd):
    found = [line for tool in TOOLS for line in failures(tool, bases[tool], hostile_folder, capfd, WRONG)]
    assert not found, "\n".join(found)


@pytest.mark.slow  # so that -m "not slow", which replaces the default, leaves it out too
@pytest.mark.exhaustive
@pytest.mark.parametrize("tool", TOOLS)
def test_every_value_is_accepted_or_refused_with_one_line(bases, hostile_folder, tool, capfd):
    found = failures(tool, bases[tool], hostile_folder, capfd, lambda case: True)
    assert not found, "\n".join(found)
