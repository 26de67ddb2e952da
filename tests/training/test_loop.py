import dataclasses
import functools
import math
import os
import re
import shutil
import signal
import time

import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ldm_smd.config import dump_config
from ldm_smd.errors import UserError
from ldm_smd.pipelines import load_pipeline
from ldm_smd.training import loop
from ldm_smd.training.checkpoint import checkpoints
from ldm_smd.training.loop import train
from ldm_smd.training.metrics_log import read_metrics
from ldm_smd.training.step import Denoising
from tests.forked import launched
from tests.training.critic import WithCritic
from tests.training.results import assert_same_losses, logged_losses, weights


@pytest.mark.slow
def test_resume_is_bit_equal_to_no_stop(train_config, tmp_path):
    """32 images, stop, 32 more, against 64 in one go: weights, EMA, optimizer and log."""
    straight = train_config(f"output={tmp_path / 'straight'}")
    train(straight)
    # The schedule depends on images_total through the cool-down only, and there is none here.
    train(train_config(f"output={tmp_path / 'stopped'}", "images_total=32"))
    train(train_config(f"output={tmp_path / 'stopped'}"))
    a, b = (checkpoints(tmp_path / name / "checkpoints")[-1] for name in ("straight", "stopped"))
    assert a.name == b.name == "images-000000000064"
    for part in ("model/diffusion_pytorch_model", "ema/diffusion_pytorch_model", "optimizer"):
        first, second = load_file(a / f"{part}.safetensors"), load_file(b / f"{part}.safetensors")
        assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    logs = [logged_losses(tmp_path / name) for name in ("straight", "stopped")]
    assert logs[0] == logs[1] and len(logs[0]) == 4


def test_a_run_that_was_killed_before_its_model_folder_writes_it(train_config, tmp_path):
    folder = train(train_config("images_total=32"))
    before = weights(folder / "unet")
    shutil.rmtree(folder)
    after = weights(train(train_config("images_total=32")) / "unet")
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.slow
def test_sigterm_saves_and_a_resumed_run_is_bit_equal(train_config, tmp_path, monkeypatch):
    """Also in its log, although the signal comes between two reports."""
    train(train_config(f"output={tmp_path / 'straight'}"))
    real, steps = Denoising.step, []

    def interrupted(self, *arguments):
        steps.append(0)
        if len(steps) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Denoising, "step", interrupted)
        with pytest.raises(SystemExit) as stopped:
            train(train_config())
    assert stopped.value.code == 143 and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert [path.name for path in checkpoints(tmp_path / "run/checkpoints")] == ["images-000000000024"]
    assert not (tmp_path / "run/model").exists()
    train(train_config())
    a, b = (checkpoints(tmp_path / name / "checkpoints")[-1] for name in ("straight", "run"))
    for part in ("model", "ema"):
        first, second = weights(a / part), weights(b / part)
        assert all(torch.equal(first[name], second[name]) for name in first)
    assert logged_losses(tmp_path / "straight") == logged_losses(tmp_path / "run")


@pytest.mark.slow
def test_the_same_in_less_memory(train_config, tmp_path, monkeypatch):
    """Blocks compute again on the way back, each of them."""
    again = count_calls(monkeypatch, torch.utils.checkpoint, "checkpoint")
    train(train_config(f"output={tmp_path / 'plain'}", "images_total=32"))
    assert not again
    train(train_config(f"output={tmp_path / 'other'}", "images_total=32", "gradient_checkpointing=true"))
    assert len(again) > 4 and len(again) % 4 == 0
    assert_same_losses(tmp_path / "plain", tmp_path / "other")


@pytest.mark.slow
def test_the_same_in_less_time(train_config, tmp_path, monkeypatch):
    # The graph that torch.compile makes, run as it is: compiling takes minutes on a CPU.
    graphs = []
    monkeypatch.setattr(
        torch, "compile", functools.partial(torch.compile, backend=lambda graph, _: graphs.append(graph) or graph)
    )
    train(train_config(f"output={tmp_path / 'plain'}", "images_total=32"))
    assert not graphs
    train(train_config(f"output={tmp_path / 'other'}", "images_total=32", "compile=true"))
    assert graphs
    assert_same_losses(tmp_path / "plain", tmp_path / "other")


def count_calls(monkeypatch, module, name):
    """A list that grows by one with each call."""
    calls, real = [], getattr(module, name)
    monkeypatch.setattr(module, name, lambda *given, **options: calls.append(1) or real(*given, **options))
    return calls


@pytest.mark.distributed
def test_two_processes_learn_as_one_does(train_config, tmp_path):
    """Same batches, same random numbers, same losses; and one process goes on from a checkpoint of two. By the launcher's own
    command line; other tests fork its processes, which is faster."""
    one = train_config(f"output={tmp_path / 'one'}")
    train(one)
    two = dataclasses.replace(one, output=str(tmp_path / "two"), images_total=32)
    (tmp_path / "two.yaml").write_text(dump_config(two))
    done = launched(2, "tools/train.py", "--config", tmp_path / "two.yaml")
    assert done.returncode == 0 and checkpoints(tmp_path / "two/checkpoints"), done.stderr[-6000:]
    train(dataclasses.replace(two, images_total=64))
    assert_same_losses(tmp_path / "one", tmp_path / "two")


@pytest.mark.distributed
def test_sigterm_to_the_launcher_saves_what_four_processes_agree_on(train_config, tmp_path, launch_with):
    """And one process goes on to the losses of a run that was never stopped."""
    one = train_config(f"output={tmp_path / 'one'}", "images_total=480", "checkpoint_every_images=480")
    stopped = dataclasses.replace(one, output=str(tmp_path / "stopped"))
    process = launch_with(stopped, 4, "tools/train.py", "--config")
    while process.poll() is None and not read_metrics(tmp_path / "stopped/metrics.jsonl"):
        time.sleep(0.01)
    process.terminate()
    error = process.said()
    assert process.returncode and "stopped by SIGTERM after" in error, error[-6000:]
    (saved,) = checkpoints(tmp_path / "stopped/checkpoints")
    assert int(saved.name.removeprefix("images-")) % 80 == 0  # of the 8 pictures of 10 steps
    train(one)
    train(stopped)
    assert_same_losses(tmp_path / "one", tmp_path / "stopped")


@pytest.mark.distributed
def test_divided_parameters_learn_as_whole_ones(train_config, tmp_path, launch_with):
    """FSDP: checkpoints have whole tensors, those of one process but for rounding, and are gone on with."""
    one = train_config(f"output={tmp_path / 'one'}", "images_total=48", "checkpoint_every_images=16", "keep_checkpoints=3")
    train(one)
    divided = dataclasses.replace(one, output=str(tmp_path / "divided"))
    for settings in ({"images_total": 16}, {"images_total": 32}, {"precision": "bf16"}):
        process = launch_with(dataclasses.replace(divided, **settings), 2, "tests/training/fsdp_run.py")
        error = process.said()
        assert process.returncode == 0, error[-6000:]
    paths = [checkpoints(tmp_path / name / "checkpoints")[1] for name in ("one", "divided")]
    for part in ("model/diffusion_pytorch_model", "ema/diffusion_pytorch_model", "optimizer"):
        first, second = (load_file(path / f"{part}.safetensors") for path in paths)
        assert first.keys() == second.keys()
        assert all(torch.allclose(first[name], second[name], rtol=1e-3, atol=1e-6) for name in first), part
    assert weights(paths[0] / "model").keys() == load_pipeline(tmp_path / "divided/model").unet.state_dict().keys()
    first, second = (logged_losses(tmp_path / name) for name in ("one", "divided"))
    assert second[:2] == [(images, pytest.approx(loss, rel=1e-4)) for images, loss in first[:2]]
    assert second[2:] == [(images, pytest.approx(loss, rel=0.02)) for images, loss in first[2:]]


@pytest.mark.distributed
def test_two_divided_networks_learn_as_whole_ones(train_config, tmp_path, launch_with, monkeypatch):
    """One of which last runs without gradients, after which FSDP would leave it whole."""
    one = train_config(f"output={tmp_path / 'one'}", "images_total=16")
    process = launch_with(dataclasses.replace(one, output=str(tmp_path / "divided")), 2, "tests/training/fsdp_run.py", "critic")
    error = process.said()
    assert process.returncode == 0, error[-6000:]
    monkeypatch.setattr(loop, "learner_for", WithCritic)
    train(one)
    paths = [checkpoints(tmp_path / name / "checkpoints")[-1] for name in ("one", "divided")]
    for part in ("model/diffusion_pytorch_model", "critic/diffusion_pytorch_model", "optimizer", "critic-optimizer"):
        first, second = (load_file(path / f"{part}.safetensors") for path in paths)
        assert first.keys() == second.keys()
        assert all(torch.allclose(first[name], second[name], rtol=1e-3, atol=1e-6) for name in first), part


@pytest.fixture
def launch_with(launch, tmp_path):
    """As ``launch``, of a config, which comes last."""

    def start(config, processes, script, *arguments):
        (tmp_path / "several.yaml").write_text(dump_config(config))
        return launch(processes, script, *arguments, tmp_path / "several.yaml")

    return start


def assert_finite_losses(folder, reported):
    losses = dict(logged_losses(folder))
    assert list(losses) == reported and all(map(math.isfinite, losses.values()))


@pytest.mark.slow
def test_a_full_disk_leaves_the_last_checkpoint(train_config, tmp_path, monkeypatch):
    train(train_config("images_total=32"))

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("ldm_smd.training.checkpoint.save_file", full)
    with pytest.raises(UserError, match=r"output: expected to write .*images-000000000064, found .*No space left"):
        train(train_config())
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == ["images-000000000032"]


@pytest.mark.slow
def test_the_same_seed_gives_the_same_model_and_another_does_not(train_config, tmp_path):
    folders = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        folders.append(train(train_config(f"output={tmp_path / name}", f"seed={seed}", "images_total=16")) / "unet")
    a, b, c = map(weights, folders)
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not all(torch.equal(a[name], c[name]) for name in a)


@pytest.mark.slow
def test_a_run_leaves_what_it_says(train_config, tmp_path):
    train(train_config("sample_every_images=32", "keep_checkpoints=1"))
    run = tmp_path / "run"
    assert [path.name for path in checkpoints(run / "checkpoints")] == ["images-000000000064"]
    assert sorted(path.name for path in (run / "samples").iterdir()) == ["000000000032.png", "000000000064.png"]
    assert {path.name for path in (run / "model").iterdir()} >= {"model_index.json", "unet", "vae", "scheduler", "README.md"}
    board = EventAccumulator(str(run / "tensorboard"))
    board.Reload()
    assert [event.step for event in board.Scalars("loss")] == [16, 32, 48, 64]
    assert [event.step for event in board.Images("samples")] == [32, 64]
    card = (run / "model" / "README.md").read_text()
    assert "Classes: 0 disc, 1 square." in card and "license" not in card
    program = re.search(r"```python\n(.*?)```", card, flags=re.DOTALL)[1].replace("this folder", str(run / "model"))
    made = {}
    exec(program, made)
    assert len(made["images"]) == 2
    lines = read_metrics(run / "metrics.jsonl")
    assert_finite_losses(run, [16, 32, 48, 64])
    assert {"spread/99", "spread/999"} <= {key for line in lines for key in line}


@pytest.mark.parametrize("setting", ["objective.name=mixture_nll", "objective.weighting=min_snr", "objective.beta=0.5"])
def test_objectives_train(train_config, tmp_path, setting):
    train(train_config(setting, "images_total=32"))
    assert_finite_losses(tmp_path / "run", [16, 32])


def test_unlabelled_and_unconditional(train_config):
    folder = train(train_config("class_conditional=false", "images_total=16"))
    assert not any(name.startswith("class_embedding") for name in weights(folder / "unet"))


@pytest.mark.slow
def test_a_non_finite_loss_stops_with_the_keys_and_keeps_the_last_checkpoint(train_config, tmp_path, monkeypatch):
    train(train_config("images_total=32"))
    monkeypatch.setattr(Denoising, "losses", lambda self, *_: poisoned(self.model.network))

    def poisoned(model):
        return sum(parameter.sum() for parameter in model.parameters()) * torch.full((8,), float("nan"))

    with pytest.raises(UserError, match=r"loss: expected a finite number, found nan at 48 images; last batch: (disc|square)/"):
        train(train_config())
    newest = checkpoints(tmp_path / "run/checkpoints")[-1]
    assert newest.name == "images-000000000032"
    assert all(value.isfinite().all() for value in weights(newest / "model").values())


def test_another_autoencoder_is_refused(train_config, model_folder, tmp_path):
    config = train_config()
    with pytest.raises(UserError, match="autoencoder: expected"):
        train(dataclasses.replace(config, autoencoder=str(tmp_path)))
    assert not (tmp_path / "run").exists()
