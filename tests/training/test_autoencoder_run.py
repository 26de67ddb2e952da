"""Training of the autoencoder: its batches, resumed and stopped runs, and mistakes in its folders."""

import os
import signal

import pytest
import torch
from safetensors.torch import load_file

from ldm_smd.errors import UserError
from ldm_smd.training import train_autoencoder as autoencoder
from ldm_smd.training.checkpoint import checkpoints
from ldm_smd.training.train_autoencoder import train_autoencoder
from tests.training.results import WEIGHTS


def test_every_step_has_its_own_batch_and_a_resumed_training_is_bit_identical(vae_config, tmp_path, monkeypatch):
    """The training is interrupted after its third step, and continues from the checkpoint after the second."""
    batches, real = [], autoencoder.random_batch

    def recorded(*given):
        if len(batches) == stop_after:
            raise KeyboardInterrupt
        batches.append(real(*given))
        return batches[-1]

    monkeypatch.setattr(autoencoder, "random_batch", recorded)
    stop_after = None
    settings = ["checkpoint_every_images=16", "learning_rate=1e-2"]
    straight = load_file(train_autoencoder(vae_config(*settings, f"work={tmp_path / 'a'}")) / WEIGHTS)
    assert len({batch.sum().item() for batch in batches}) == 4
    steps, stop_after = batches.copy(), 3
    batches.clear()
    with pytest.raises(KeyboardInterrupt):
        train_autoencoder(vae_config(*settings))
    batches.clear()
    resumed = load_file(train_autoencoder(vae_config(*settings)) / WEIGHTS)
    assert len(batches) == 2 and all(map(torch.equal, batches, steps[2:]))
    assert straight.keys() == resumed.keys() and all(torch.equal(straight[name], resumed[name]) for name in straight)


@pytest.mark.usefixtures("foreground")
@pytest.mark.parametrize("sent, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_a_checkpoint(vae_config, tmp_path, monkeypatch, sent, code):
    """After the step it comes in; the last step ends the training as usual."""
    batches, real = [], autoencoder.random_batch

    def recorded(*given):
        batches.append(real(*given))
        if len(batches) in (2, 4):
            os.kill(os.getpid(), sent)
        return batches[-1]

    monkeypatch.setattr(autoencoder, "random_batch", recorded)
    with pytest.raises(SystemExit) as stopped:
        train_autoencoder(vae_config())
    assert stopped.value.code == code and len(batches) == 2
    assert [path.name for path in checkpoints(tmp_path / "work/checkpoints")] == ["images-000000000016"]
    assert not (tmp_path / "vae").exists()
    train_autoencoder(vae_config())
    assert len(batches) == 4 and (tmp_path / "vae" / WEIGHTS).is_file()


def test_a_folder_with_other_files_is_not_replaced(vae_config, tmp_path):
    own = tmp_path / "own"
    own.mkdir()
    (own / "photo.png").touch()
    with pytest.raises(UserError, match=r"output: expected a new folder or one with a model alone.* found 'photo.png'"):
        train_autoencoder(vae_config(f"output={own}"))
    assert [path.name for path in own.iterdir()] == ["photo.png"]
    with pytest.raises(UserError, match="work: expected a folder outside of output"):
        train_autoencoder(vae_config(f"output={own}", f"work={own / 'run'}"))


@pytest.mark.parametrize("part", ["images", "held_out"])
def test_a_missing_source_is_named_by_its_setting(vae_config, part):
    with pytest.raises(UserError, match=f"^{part}.source: expected a folder, .* found nothing at none"):
        train_autoencoder(vae_config(f"{part}.source=none"))
