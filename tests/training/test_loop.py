import dataclasses
import functools
import json
import math
import os
import re
import shutil
import signal
import time

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ldm_smd.autoencoder import FrozenAutoencoder
from ldm_smd.config import dump_config
from ldm_smd.data.shards import Manifest
from ldm_smd.data.stream import LatentBatch, LatentStream
from ldm_smd.diffusion.process import DiffusionProcess
from ldm_smd.errors import UserError
from ldm_smd.pipelines import load_pipeline
from ldm_smd.training.checkpoint import checkpoints
from ldm_smd.training.ema import EMA
from ldm_smd.training.loop import TrainingStep, build_model, build_scheduler, learning_rate_at, train
from ldm_smd.training.metrics_log import MetricsLog, read_metrics
from tests.tiny import diffusers_unet


def weights(folder):
    return load_file(folder / "diffusion_pytorch_model.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize(
    "overrides",
    [
        ["model.z_channels=0", "objective.name=mse"],
        ["objective.name=mse"],
        ["objective.name=energy", "objective.patches=[0,2]"],
    ],
)
def test_one_batch_can_be_overfitted(train_config, overrides):
    """Every kind of model and objective learns two pictures: the loss falls far below where it began."""
    config = train_config(*overrides, "label_dropout=0")
    manifest, vae = Manifest.load(config.shards), FrozenAutoencoder.from_pretrained(config.autoencoder)
    torch.manual_seed(0)
    model = build_model(config, manifest)
    process = DiffusionProcess(build_scheduler(config.diffusion).alphas_cumprod)
    step = TrainingStep(config, Accelerator(cpu=True), model, process, vae)
    two = LatentStream(manifest, 2, 2).batch_at(0)
    moments = two.moments.repeat(4, 1, 1, 1, 1)
    moments[:, 1] = -20.0  # no posterior noise: the two pictures and nothing else
    batch = LatentBatch(moments, two.labels.repeat(4))
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    losses = []
    for number in range(120):
        optimizer.zero_grad()
        loss = step(batch, number)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    first, last = sum(losses[:5]) / 5, sum(losses[-20:]) / 20
    # Not to zero: at the noisiest timesteps two pictures remain two, whatever the model.
    assert last < 0.5 * first


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


def logged_losses(folder):
    return [(line["images_seen"], line["loss"]) for line in read_metrics(folder / "metrics.jsonl") if "loss" in line]


@pytest.mark.slow
def test_sigterm_saves_and_a_resumed_run_is_bit_equal(train_config, tmp_path, monkeypatch):
    """Also in its log, although the signal comes between two reports."""
    train(train_config(f"output={tmp_path / 'straight'}"))
    real, steps = TrainingStep.__call__, []

    def interrupted(self, *arguments):
        steps.append(0)
        if len(steps) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(TrainingStep, "__call__", interrupted)
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
def test_parts_of_a_batch_add_up(train_config, tmp_path, monkeypatch):
    """But for rounding: 3 parts of 3, 3 and 2 pictures."""
    rows, real = [], TrainingStep.losses
    monkeypatch.setattr(
        TrainingStep, "losses", lambda self, batch, draws: rows.append(len(batch.labels)) or real(self, batch, draws)
    )
    for name, accumulate, parts in (("whole", 1, [8]), ("parts", 3, [3, 3, 2])):
        rows.clear()
        train(train_config(f"output={tmp_path / name}", f"accumulate={accumulate}"))
        assert rows == 8 * parts
    assert_same_losses(tmp_path / "whole", tmp_path / "parts")


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
def test_two_processes_learn_as_one_does(train_config, tmp_path, launch_with):
    """Same batches, same random numbers, same losses; and one process goes on from a checkpoint of two."""
    one = train_config(f"output={tmp_path / 'one'}")
    train(one)
    two = dataclasses.replace(one, output=str(tmp_path / "two"), images_total=32)
    _, error = launch_with(two, 2, "tools/train.py", "--config").communicate()
    assert checkpoints(tmp_path / "two/checkpoints"), error[-6000:]
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
    _, error = process.communicate()
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
        _, error = process.communicate()
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


@pytest.fixture
def launch_with(launch, tmp_path):
    """As ``launch``, of a config, which comes last."""

    def start(config, processes, script, *arguments):
        (tmp_path / "several.yaml").write_text(dump_config(config))
        return launch(processes, script, *arguments, tmp_path / "several.yaml")

    return start


def assert_same_losses(one, other):
    """But for rounding."""
    first, second = dict(logged_losses(one)), dict(logged_losses(other))
    assert first.keys() == second.keys() and all(second[n] == pytest.approx(first[n], rel=1e-4) for n in first)


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
    assert len(made["pictures"]) == 2
    lines = read_metrics(run / "metrics.jsonl")
    assert_finite_losses(run, [16, 32, 48, 64])
    assert {"spread/99", "spread/999"} <= {key for line in lines for key in line}


def test_init_from_starts_at_those_weights(train_config, model_folder, tmp_path):
    """But with the noise of its own latents, here of fewer modes."""
    still = ("images_total=8", "learning_rate=1e-12", "weight_decay=0", "model.noise_modes=1")
    before = weights(model_folder / "unet")
    after = weights(train(train_config(f"init_from={model_folder / 'unet'}", *still)) / "unet")
    trained = [name for name in before if not name.startswith("mixture.noise.")]
    assert all(torch.allclose(before[name], after[name], atol=1e-6) for name in trained)
    assert len(before["mixture.noise.means"]) > len(after["mixture.noise.means"]) == 1
    with pytest.raises(UserError, match="init_from: expected the weights of the configured model"):
        train(train_config(f"init_from={model_folder / 'unet'}", "model.z_channels=6", f"output={tmp_path / 'other'}"))
    with pytest.raises(UserError, match="init_from: expected a model folder"):
        train(train_config(f"init_from={model_folder}", f"output={tmp_path / 'other'}"))


def test_a_gaussian_model_starts_a_mixture(train_config, tmp_path):
    gaussian = ("model.z_channels=0", "objective.name=mse", f"output={tmp_path / 'gaussian'}", "images_total=8")
    start = train(train_config(*gaussian)) / "unet"
    still = ("learning_rate=1e-12", "weight_decay=0", "images_total=8")
    after = weights(train(train_config(f"init_from={start}", *still)) / "unet")
    before = weights(start)
    assert all(torch.allclose(before[name], after[name], atol=1e-6) for name in before)
    assert {name.split(".")[0] for name in after.keys() - before.keys()} == {"mixture"}
    assert after["mixture.noise.alphas_cumprod"].any()


@pytest.mark.slow
def test_a_diffusers_unet_starts_a_mixture(train_config, tmp_path):
    """UNet2DModel -> mixture -> training, resumed -> a pipeline that samples -> training from that."""
    diffusers_unet().save_pretrained(tmp_path / "unet")
    start = f"init_from={tmp_path / 'unet'}"
    train(train_config(start, "images_total=32"))
    folder = train(train_config(start, "images_total=64"))
    assert json.loads((folder / "unet/config.json").read_text())["_class_name"] == "ExtendedUNet2DModel"
    assert load_pipeline(folder)([0, 1], num_inference_steps=2, output_type="pt").images.isfinite().all()
    train(train_config(f"init_from={folder / 'unet'}", f"output={tmp_path / 'again'}", "images_total=8"))
    with pytest.raises(UserError, match="init_from: expected a mixture"):
        train(train_config(start, "model.z_channels=0", "objective.name=mse", f"output={tmp_path / 'x'}"))


def test_a_collapsed_mixture_is_reported(train_config, caplog):
    train(train_config("objective.name=mse", "model.noise_rank=0", "images_total=16"))
    assert any("the mixture has collapsed" in record.message for record in caplog.records)


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
    monkeypatch.setattr("ldm_smd.training.loop.TrainingStep.losses", lambda self, *_: poisoned(self.model))

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


def test_learning_rate(train_config):
    config = train_config("images_total=100", "batch_size=10", "warmup_images=20", "cooldown_images=40", "learning_rate=1")
    rates = [round(learning_rate_at(config, seen), 3) for seen in range(0, 100, 10)]
    assert rates == [0.5, 1, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25]


def test_ema_follows_its_formula():
    torch.manual_seed(0)
    model = torch.nn.Linear(2, 2)
    ema = EMA(model, halflife_images=8, ramp=False)
    start = model.weight.detach().clone()
    with torch.no_grad():
        model.weight.add_(1.0)
    ema.update(model, batch_images=8, images_seen=8)
    assert torch.allclose(ema.model.weight, start + 0.5)
    ema.update(model, batch_images=16, images_seen=24)
    assert torch.allclose(ema.model.weight, start + 0.875)


def test_ema_of_random_weights_forgets_them_and_copies_buffers():
    """At first the half-life is a twentieth of the images seen."""
    model = torch.nn.BatchNorm1d(2)
    ema = EMA(model, halflife_images=1000)
    start = model.weight.detach().clone()
    with torch.no_grad():
        model.weight.add_(1.0)
        model.running_mean.fill_(7.0)
    ema.update(model, batch_images=8, images_seen=160)
    assert torch.allclose(ema.model.weight, start + 0.5) and (ema.model.running_mean == 7).all()
    assert ema.rate(1000, 1_000_000) == pytest.approx(0.5)
    assert not ema.model.training and not any(parameter.requires_grad for parameter in ema.model.parameters())


def test_log_lines_after_the_checkpoint_are_dropped(tmp_path):
    log = MetricsLog(tmp_path)
    for images in (10, 20, 30):
        log.log(images, {"loss": images / 10})
    log.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"images_seen": 40, "lo')
    log = MetricsLog(tmp_path, images_seen=20)
    log.log(30, {"loss": 9.0})
    log.close()
    assert [line["loss"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [1.0, 2.0, 9.0]
