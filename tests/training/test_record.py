"""A run resumes only with the same settings and data. Allowed changes are listed on its card."""

import json
import os
import signal
import time

import pytest
from PIL import Image

from ldm_smd.config import config_as_dict, dump_config, load_config
from ldm_smd.data.encode import encode
from ldm_smd.data.settings import EncodeConfig
from ldm_smd.errors import UserError
from ldm_smd.files import claimed
from ldm_smd.training.checkpoint import newest_images
from ldm_smd.training.loop import train
from ldm_smd.training.metrics_log import read_metrics
from ldm_smd.training.record import MAY_CHANGE, NOT_COMPARED, flat
from ldm_smd.training.settings import TrainAutoencoderConfig, TrainConfig
from ldm_smd.training.train_autoencoder import train_autoencoder
from tests.forked import ROOT, script


@pytest.fixture
def other_shards(image_folder, vae_folder, tmp_path):
    """Latent shards of the images upside down."""
    for path in image_folder.rglob("*.png"):
        (tmp_path / "upside-down" / path.parent.name).mkdir(parents=True, exist_ok=True)
        with Image.open(path) as image:
            image.rotate(180).save(tmp_path / "upside-down" / path.relative_to(image_folder))
    common = ["images.resolution=16", f"autoencoder={vae_folder}", "num_workers=0"]
    settings = [f"images.source={tmp_path / 'upside-down'}", *common]
    encode(load_config(EncodeConfig, None, [*settings, f"output={tmp_path / 'other'}"]))
    return tmp_path / "other"


@pytest.mark.parametrize(
    "name, before, after",
    [
        ("seed", "0", "1"),
        ("batch_size", "8", "4"),
        ("objective.beta", "1.0", "0.5"),
        ("diffusion.beta_schedule", '"cosine"', '"linear"'),
        ("diffusion.prediction_type", '"v_prediction"', '"epsilon"'),
        ("model.hypernetwork_width", "8", "4"),
        ("mirror", "false", "true"),
    ],
)
def test_resuming_with_other_settings_is_refused(train_config, tmp_path, name, before, after):
    train(train_config("images_total=32"))
    files = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    with pytest.raises(UserError, match=rf"output: expected .*resume_changed=true.*found: {name} was {before} and is {after}"):
        train(train_config(f"{name}={after.strip(chr(34))}"))
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == files


def test_other_data_are_refused_or_listed_on_the_card(train_config, other_shards, tmp_path):
    train(train_config("images_total=32"))
    with pytest.raises(UserError, match=r"found: shards was .* and is "):
        train(train_config(f"shards={other_shards}"))
    card = train(train_config(f"shards={other_shards}", "seed=3", "learning_rate=1e-4", "resume_changed=true")) / "README.md"
    text = card.read_text()
    assert "* until 32 images `seed` was 0, then 3" in text and "* until 32 images `shards` was" in text
    assert "* until 32 images `learning_rate` was 0.0003, then 0.0001" in text


def test_the_same_data_in_another_folder_are_accepted(train_config, shards, tmp_path):
    train(train_config("images_total=32"))
    (tmp_path / "moved").symlink_to(shards)
    train(train_config(f"shards={tmp_path / 'moved'}", "images_total=32"))


def test_allowed_changes_are_logged_and_listed_on_the_card(train_config, tmp_path, caplog):
    train(train_config("images_total=32"))
    text = (train(train_config("learning_rate=1e-4", "log_every_images=32")) / "README.md").read_text()
    assert "learning_rate: 0.0003 until 32 images, 0.0001 from now on" in caplog.messages
    assert "* until 32 images `images_total` was 32, then 64" in text
    changes = json.loads((tmp_path / "run/run.json").read_text())["changes"]
    assert changes == [
        {
            "images": 32,
            "changed": {"images_total": [32, 64], "learning_rate": [3e-4, 1e-4], "log_every_images": [16, 32]},
        }
    ]


def test_a_record_with_old_names_of_settings_is_compared(train_config, tmp_path):
    train(train_config("images_total=32"))
    record = tmp_path / "run/run.json"
    record.write_text(record.read_text().replace('"model.z_channels": 8', '"model.latent_channels": 7'))
    with pytest.raises(UserError, match=r"found: model\.z_channels was 7 and is 8"):
        train(train_config("images_total=64"))


def test_a_run_without_a_record_resumes_with_a_warning(train_config, tmp_path, caplog):
    train(train_config("images_total=32"))
    (tmp_path / "run/run.json").unlink()
    train(train_config())
    assert any("has no run.json" in message for message in caplog.messages)
    (tmp_path / "run/run.json").write_text("[]")
    with pytest.raises(UserError, match=r"expected the record of a run in .*run\.json, found"):
        train(train_config())


def test_the_newest_checkpoint_has_seen_the_most_images(tmp_path):
    assert newest_images(tmp_path) == 0
    for images in (8, 16, 104):
        (tmp_path / f"images-{images:012d}").mkdir()
    assert newest_images(tmp_path) == 104


def test_settings_with_other_rules_exist():
    names = flat(config_as_dict(TrainConfig(shards="x", autoencoder="x", output="x")))
    assert set(NOT_COMPARED) | set(MAY_CHANGE) <= names.keys()
    assert not set(NOT_COMPARED) & set(MAY_CHANGE)


@pytest.mark.slow
def test_a_second_run_in_the_same_folder_is_refused(train_config, tmp_path, fork):
    """It changes nothing. After the first run is killed, a new run resumes from its checkpoint."""
    config = train_config("images_total=100000", "checkpoint_every_images=64")
    (tmp_path / "config.yaml").write_text(dump_config(config))
    first = fork(script, ROOT / "tools/train.py", "--config", tmp_path / "config.yaml")
    while first.poll() is None and not newest_images(tmp_path / "run/checkpoints"):
        time.sleep(0.05)
    with pytest.raises(UserError, match=rf"output: expected no other run at .*run, found process {first.pid} of"):
        train(config)
    os.kill(first.pid, signal.SIGKILL)
    assert first.wait() == -signal.SIGKILL
    seen = newest_images(tmp_path / "run/checkpoints")
    train(train_config(f"images_total={seen + 8}", "checkpoint_every_images=64"))
    images = [line["images_seen"] for line in read_metrics(tmp_path / "run/metrics.jsonl") if "loss" in line]
    assert images == sorted(set(images)) and images[-1] == seen + 8
    assert not list(tmp_path.rglob(".*lock"))


@pytest.fixture
def autoencoder_config(image_folder, tmp_path):
    shape = ["model.block_out_channels=[8,8]", "model.norm_num_groups=4", "model.latent_channels=4"]
    both = [f"{part}.{setting}" for part in ("images", "held_out") for setting in (f"source={image_folder}", "resolution=16")]
    length = ["images_total=32", "batch_size=8", "checkpoint_every_images=16"]

    def build(*overrides):
        return load_config(TrainAutoencoderConfig, None, [*both, *shape, *length, f"output={tmp_path / 'vae'}", *overrides])

    return build


def test_two_autoencoders_do_not_share_a_work_folder(autoencoder_config, image_folder, tmp_path):
    """By default each has its own. If both name the same one, the second is refused, and gets no weights of the first."""
    train_autoencoder(autoencoder_config())
    others = f"images.source={image_folder / 'disc'}"
    train_autoencoder(autoencoder_config(others, f"output={tmp_path / 'second'}"))
    first, second = (tmp_path / name / "diffusion_pytorch_model.safetensors" for name in ("vae", "second"))
    assert first.read_bytes() != second.read_bytes()
    with pytest.raises(UserError, match=r"found: images was .*; output was .*vae\" and is .*third\""):
        train_autoencoder(autoencoder_config(others, f"output={tmp_path / 'third'}", f"work={tmp_path / 'vae.run'}"))
    assert not (tmp_path / "third").exists()


def test_an_autoencoder_resumes_only_with_the_same_settings(autoencoder_config, tmp_path):
    train_autoencoder(autoencoder_config())
    with pytest.raises(UserError, match=r"found: kl_weight was 1e-06 and is 0\.1"):
        train_autoencoder(autoencoder_config("images_total=64", "kl_weight=0.1"))
    text = (train_autoencoder(autoencoder_config("images_total=64")) / "README.md").read_text()
    assert "* until 32 images `images_total` was 32, then 64" in text


def test_a_work_folder_in_use_is_refused(autoencoder_config, tmp_path):
    with (
        claimed(tmp_path / "vae.run", inside=True),
        pytest.raises(UserError, match="work: expected no other run at"),
    ):
        train_autoencoder(autoencoder_config())
