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
from ldm_smd.training.metrics_log import MetricsLog, read_metrics
from ldm_smd.training.step import Denoising
from tests.forked import run_launcher
from tests.tiny import diffusers_condition, diffusers_sd3, diffusers_unet
from tests.training.critic import WithCritic
from tests.training.results import assert_same_losses, logged_losses, weights


@pytest.mark.slow
def test_a_resumed_run_is_bit_identical_to_an_uninterrupted_one(train_config, tmp_path):
    """Training on 32 and then 32 more images is compared with training on 64: weights, EMA, optimizer and log."""
    straight = train_config(f"output={tmp_path / 'straight'}")
    train(straight)
    # The learning rate depends on images_total only through the cooldown, and there is none here.
    train(train_config(f"output={tmp_path / 'stopped'}", "images_total=32"))
    train(train_config(f"output={tmp_path / 'stopped'}"))
    a, b = (checkpoints(tmp_path / name / "checkpoints")[-1] for name in ("straight", "stopped"))
    assert a.name == b.name == "images-000000000064"
    for part in ("model/diffusion_pytorch_model", "ema/diffusion_pytorch_model", "optimizer"):
        first, second = load_file(a / f"{part}.safetensors"), load_file(b / f"{part}.safetensors")
        assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    logs = [logged_losses(tmp_path / name) for name in ("straight", "stopped")]
    assert logs[0] == logs[1] and len(logs[0]) == 4


@pytest.mark.parametrize("file", ["model/diffusion_pytorch_model.safetensors", "optimizer.safetensors", "state.json"])
def test_a_damaged_checkpoint_gives_one_line(train_config, tmp_path, file):
    train(train_config("images_total=16"))
    [newest] = checkpoints(tmp_path / "run/checkpoints")
    content = (newest / file).read_bytes()
    (newest / file).write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match=rf"^output: expected to read .*{file}, found .*; without its folder, the run resumes"):
        train(train_config("images_total=32"))


def test_a_run_killed_before_it_wrote_its_model_folder_writes_it_later(train_config, tmp_path):
    folder = train(train_config("images_total=32"))
    before = weights(folder / "unet")
    shutil.rmtree(folder)
    after = weights(train(train_config("images_total=32")) / "unet")
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_the_model_folder_has_the_averaged_weights(train_config, tmp_path):
    folder = train(train_config("images_total=16"))
    newest = checkpoints(tmp_path / "run/checkpoints")[-1]
    found, average, last = map(weights, (folder / "unet", newest / "ema", newest / "model"))
    assert found.keys() == average.keys() and all(torch.equal(found[name], average[name]) for name in found)
    assert not all(torch.equal(found[name], last[name]) for name in found)


@pytest.mark.slow
@pytest.mark.usefixtures("foreground")
@pytest.mark.parametrize("sent, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_a_checkpoint_and_the_resumed_run_is_bit_identical(train_config, tmp_path, monkeypatch, sent, code):
    """Its log is too, although the signal comes between two reports."""
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    train(train_config(f"output={tmp_path / 'straight'}"))
    real, steps = Denoising.step, []

    def interrupted(self, *arguments):
        steps.append(0)
        if len(steps) == 3:
            os.kill(os.getpid(), sent)
        return real(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Denoising, "step", interrupted)
        with pytest.raises(SystemExit) as stopped:
            train(train_config())
    assert stopped.value.code == code and [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == handlers
    assert [path.name for path in checkpoints(tmp_path / "run/checkpoints")] == ["images-000000000024"]
    assert not (tmp_path / "run/model").exists()
    train(train_config())
    a, b = (checkpoints(tmp_path / name / "checkpoints")[-1] for name in ("straight", "run"))
    for part in ("model", "ema"):
        first, second = weights(a / part), weights(b / part)
        assert all(torch.equal(first[name], second[name]) for name in first)
    assert logged_losses(tmp_path / "straight") == logged_losses(tmp_path / "run")


@pytest.mark.slow
def test_gradient_checkpointing_gives_the_same_losses(train_config, tmp_path, monkeypatch):
    """And every block uses it."""
    checkpointed = count_calls(monkeypatch, torch.utils.checkpoint, "checkpoint")
    train(train_config(f"output={tmp_path / 'plain'}", "images_total=32"))
    assert not checkpointed
    train(train_config(f"output={tmp_path / 'other'}", "images_total=32", "gradient_checkpointing=true"))
    assert len(checkpointed) > 4 and len(checkpointed) % 4 == 0
    assert_same_losses(tmp_path / "plain", tmp_path / "other")


@pytest.mark.slow
def test_a_compiled_model_gives_the_same_losses(train_config, tmp_path, monkeypatch):
    # The graphs of torch.compile are run without compiling them, which would take minutes on a CPU.
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
    """Return a list to which every call appends an element."""
    calls, real = [], getattr(module, name)
    monkeypatch.setattr(module, name, lambda *given, **options: calls.append(1) or real(*given, **options))
    return calls


@pytest.mark.distributed
def test_two_processes_give_the_losses_of_one(train_config, tmp_path):
    """They use the same batches and random numbers. One process resumes from a checkpoint of two. This test uses the command
    line of the launcher. Other tests fork its processes, which is faster."""
    one = train_config(f"output={tmp_path / 'one'}")
    train(one)
    two = dataclasses.replace(one, output=str(tmp_path / "two"), images_total=32)
    (tmp_path / "two.yaml").write_text(dump_config(two))
    done = run_launcher(2, "tools/train.py", "--config", tmp_path / "two.yaml")
    assert done.returncode == 0 and checkpoints(tmp_path / "two/checkpoints"), done.stderr[-6000:]
    train(dataclasses.replace(two, images_total=64))
    assert_same_losses(tmp_path / "one", tmp_path / "two")


@pytest.mark.distributed
def test_after_sigterm_to_the_launcher_four_processes_save_one_checkpoint(train_config, tmp_path, launch_with):
    """One process resumes from it, with the losses of an uninterrupted run."""
    one = train_config(f"output={tmp_path / 'one'}", "images_total=480", "checkpoint_every_images=480")
    stopped = dataclasses.replace(one, output=str(tmp_path / "stopped"))
    process = launch_with(stopped, 4, "tools/train.py", "--config")
    while process.poll() is None and not read_metrics(tmp_path / "stopped/metrics.jsonl"):
        time.sleep(0.01)
    process.terminate()
    error = process.output()
    assert process.returncode and "stopped by SIGTERM after" in error, error[-6000:]
    (saved,) = checkpoints(tmp_path / "stopped/checkpoints")
    assert int(saved.name.removeprefix("images-")) % 80 == 0  # processes agree every 10 steps of 8 images
    train(one)
    train(stopped)
    assert_same_losses(tmp_path / "one", tmp_path / "stopped")


@pytest.mark.distributed
def test_fsdp_gives_the_weights_of_one_process(train_config, tmp_path, launch_with):
    """Its checkpoints have full tensors, equal to those of one process up to rounding, and it resumes from them."""
    one = train_config(f"output={tmp_path / 'one'}", "images_total=48", "checkpoint_every_images=16", "keep_checkpoints=3")
    train(one)
    sharded = dataclasses.replace(one, output=str(tmp_path / "sharded"))
    for settings in ({"images_total": 16}, {"images_total": 32}, {"precision": "bf16"}):
        process = launch_with(dataclasses.replace(sharded, **settings), 2, "tests/training/fsdp_run.py")
        error = process.output()
        assert process.returncode == 0, error[-6000:]
    paths = [checkpoints(tmp_path / name / "checkpoints")[1] for name in ("one", "sharded")]
    for part in ("model/diffusion_pytorch_model", "ema/diffusion_pytorch_model", "optimizer"):
        first, second = (load_file(path / f"{part}.safetensors") for path in paths)
        assert first.keys() == second.keys()
        assert all(torch.allclose(first[name], second[name], rtol=1e-3, atol=1e-6) for name in first), part
    assert weights(paths[0] / "model").keys() == load_pipeline(tmp_path / "sharded/model").unet.state_dict().keys()
    first, second = (logged_losses(tmp_path / name) for name in ("one", "sharded"))
    assert second[:2] == [(images, pytest.approx(loss, rel=1e-4)) for images, loss in first[:2]]
    assert second[2:] == [(images, pytest.approx(loss, rel=0.02)) for images, loss in first[2:]]


@pytest.mark.distributed
@pytest.mark.parametrize("build", [diffusers_unet, diffusers_condition, diffusers_sd3])
def test_fsdp_divides_the_blocks_of_a_network_of_diffusers(build, train_config, tmp_path, launch_with):
    build().save_pretrained(tmp_path / "plain")
    path = ("diffusion.path=flow",) if build is diffusers_sd3 else ("diffusion.prediction_type=epsilon",)
    own = (f"init_from={tmp_path / 'plain'}", "model.noise_rank=0", "model.tail_blocks=1", "images_total=16", *path)
    process = launch_with(train_config(*own), 2, "tests/training/fsdp_run.py")
    error = process.output()
    assert process.returncode == 0, error[-6000:]


@pytest.mark.distributed
def test_fsdp_with_two_networks_gives_the_weights_of_one_process(train_config, tmp_path, launch_with, monkeypatch):
    """The last forward pass of one of them is without gradients, after which FSDP would leave it unsharded."""
    one = train_config(f"output={tmp_path / 'one'}", "images_total=16")
    process = launch_with(dataclasses.replace(one, output=str(tmp_path / "sharded")), 2, "tests/training/fsdp_run.py", "critic")
    error = process.output()
    assert process.returncode == 0, error[-6000:]
    monkeypatch.setattr(loop, "learner_for", WithCritic)
    train(one)
    paths = [checkpoints(tmp_path / name / "checkpoints")[-1] for name in ("one", "sharded")]
    for part in ("model/diffusion_pytorch_model", "critic/diffusion_pytorch_model", "optimizer", "critic-optimizer"):
        first, second = (load_file(path / f"{part}.safetensors") for path in paths)
        assert first.keys() == second.keys()
        # As a whole: AdamW enlarges the rounding of a gradient near zero.
        assert all((first[name] - second[name]).norm() < 1e-3 * first[name].norm() + 1e-6 for name in first), part


@pytest.fixture
def launch_with(launch, tmp_path):
    """Like ``launch``, with a config whose path becomes the last argument."""

    def start(config, processes, script, *arguments):
        (tmp_path / "several.yaml").write_text(dump_config(config))
        return launch(processes, script, *arguments, tmp_path / "several.yaml")

    return start


def assert_finite_losses(folder, reported):
    losses = dict(logged_losses(folder))
    assert list(losses) == reported and all(map(math.isfinite, losses.values()))


@pytest.mark.slow
def test_a_full_disk_keeps_the_last_checkpoint(train_config, tmp_path, monkeypatch):
    train(train_config("images_total=32"))

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("ldm_smd.training.checkpoint.save_file", full)
    with pytest.raises(UserError, match=r"output: expected to write .*images-000000000064, found .*No space left"):
        train(train_config())
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == ["images-000000000032"]


@pytest.mark.slow
def test_a_seed_determines_the_model(train_config, tmp_path):
    folders = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        folders.append(train(train_config(f"output={tmp_path / name}", f"seed={seed}", "images_total=16")) / "unet")
    a, b, c = map(weights, folders)
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not all(torch.equal(a[name], c[name]) for name in a)


@pytest.mark.slow
def test_a_run_writes_its_documented_files(train_config, tmp_path):
    train(train_config("sample_every_images=32", "keep_checkpoints=1", "timestep_shift=2", "sampling_shift=1.5"))
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
    variables = {}
    exec(program, variables)
    assert len(variables["images"]) == 2
    assert load_pipeline(run / "model").config.timestep_shift == 1.5
    lines = read_metrics(run / "metrics.jsonl")
    assert_finite_losses(run, [16, 32, 48, 64])
    assert {"spread/99", "spread/999"} <= {key for line in lines for key in line}
    MetricsLog(run, 32).close()  # as if the run resumed after 32 images
    board.Reload()
    assert [event.step for event in board.Scalars("loss")] == [16, 32]


@pytest.mark.parametrize("setting", ["objective.name=mixture_nll", "objective.weighting=min_snr", "objective.beta=0.5"])
def test_objectives_give_finite_losses(train_config, tmp_path, setting):
    train(train_config(setting, "images_total=32"))
    assert_finite_losses(tmp_path / "run", [16, 32])


def test_an_unconditional_model_has_no_class_embedding(train_config):
    folder = train(train_config("class_conditional=false", "images_total=16"))
    assert not any(name.startswith("class_embedding") for name in weights(folder / "unet"))


@pytest.mark.slow
def test_a_non_finite_loss_ends_the_run_with_the_keys_and_keeps_the_last_checkpoint(train_config, tmp_path, monkeypatch):
    train(train_config("images_total=32"))
    monkeypatch.setattr(Denoising, "losses", lambda self, *_: nan_losses(self.model.network))

    def nan_losses(model):
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
