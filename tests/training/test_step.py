"""The learner of the denoiser, and other learners in the training loop."""

import pytest
import torch
from safetensors.torch import load_file

from ldm_smd.data.stream import LatentBatch
from ldm_smd.diffusion.process import RectifiedFlow
from ldm_smd.training import loop
from ldm_smd.training.checkpoint import checkpoints
from ldm_smd.training.learners import learner_for
from ldm_smd.training.loop import train
from ldm_smd.training.metrics_log import read_metrics
from ldm_smd.training.step import Denoising
from ldm_smd.training.step_noise import BLOCK, NOISE, PURE_NOISE, SECOND_VIEW, draw_in_blocks, draw_step_noise, step_seed
from tests.training.critic import WithCritic
from tests.training.results import assert_same_losses, logged_losses


@pytest.mark.slow
@pytest.mark.parametrize(
    "overrides",
    [
        ["model.z_channels=0", "objective.name=mse"],
        ["objective.name=mse"],
        ["objective.name=energy", "objective.patch_sizes=[0,2]"],
    ],
)
def test_one_batch_can_be_overfitted(open_run, overrides):
    """Every kind of model and objective can learn two images: the loss falls to less than half of its initial value."""
    run = open_run(*overrides, "label_dropout=0")
    torch.manual_seed(0)
    learner = Denoising(run)
    two = run.batches().batch_at(0).rows(0, 2)
    moments = two.moments.repeat(4, 1, 1, 1, 1)
    moments[:, 1] = -20.0  # no posterior noise, so that there are only two latents
    batch = LatentBatch(moments, two.labels.repeat(4))
    losses = [learner.step(batch, number, learning_rate=5e-3)["loss"].item() for number in range(120)]
    first, last = sum(losses[:5]) / 5, sum(losses[-20:]) / 20
    # It cannot fall to zero, because at the noisiest timesteps no model can tell which of the two images it was.
    assert last < 0.5 * first


@pytest.mark.parametrize("objective", ["energy", "distillation", "regression"])
def test_the_network_gets_noised_samples_of_the_normalised_latents(open_run, gaussian_folder, objective):
    """The samples are drawn from the encoder's posterior, independently of the noise."""
    run = open_run(f"objective.name={objective}", f"init_from={gaussian_folder / 'unet'}", "model.noise_rank=0")
    learner, batch, inputs = learner_for(run), run.batches().batch_at(0), []
    learner.model.network.register_forward_pre_hook(lambda _, given: inputs.append(given[0]))
    noise = learner.draw(batch, 0)
    learner.losses(batch, noise)
    mean, logvar = batch.moments.float().unbind(dim=1)
    latents = (mean + (0.5 * logvar).exp() * noise.posterior - 0.1) * 0.7  # the constants of the autoencoder
    a, s = run.process().signal_and_noise(noise.t.clamp_min(1), latents)
    assert torch.allclose(inputs[0], a * latents + s * noise.eps, atol=1e-5)
    assert torch.corrcoef(torch.stack((noise.posterior, noise.eps)).flatten(1))[0, 1].abs() < 0.15


@pytest.mark.slow
def test_micro_batches_give_the_losses_of_the_batch(train_config, tmp_path, monkeypatch):
    """Up to rounding, with micro-batches of 3, 3 and 2 images."""
    rows, real = [], Denoising.losses
    monkeypatch.setattr(
        Denoising, "losses", lambda self, batch, draws: rows.append(len(batch.labels)) or real(self, batch, draws)
    )
    for name, micro_batches, sizes in (("batch", 1, [8]), ("micro-batches", 3, [3, 3, 2])):
        rows.clear()
        train(train_config(f"output={tmp_path / name}", f"micro_batches={micro_batches}"))
        assert rows == 8 * sizes
    assert_same_losses(tmp_path / "batch", tmp_path / "micro-batches")


@pytest.mark.slow
def test_the_loop_trains_and_resumes_every_network_of_a_learner(train_config, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "learner_for", WithCritic)
    train(train_config(f"output={tmp_path / 'straight'}"))
    train(train_config(f"output={tmp_path / 'stopped'}", "images_total=32"))
    train(train_config(f"output={tmp_path / 'stopped'}"))
    a, b = (checkpoints(tmp_path / name / "checkpoints")[-1] for name in ("straight", "stopped"))
    files = {path.relative_to(a) for path in a.rglob("*.safetensors")}
    parts = {f"{name}/diffusion_pytorch_model.safetensors" for name in ("model", "ema", "critic")}
    assert set(map(str, files)) == parts | {"optimizer.safetensors", "critic-optimizer.safetensors"}
    for file in files:
        first, second = load_file(a / file), load_file(b / file)
        assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first), file
    steps = [load_file(a / f"{name}.safetensors")["conv_in.weight/step"] for name in ("optimizer", "critic-optimizer")]
    assert steps == [8, 16]
    lines = [line for line in read_metrics(tmp_path / "straight/metrics.jsonl") if "loss" in line]
    assert len(lines) == 4 and all(line["critic_loss"] > 0 and line["critic_norm"] > 0 for line in lines)
    assert logged_losses(tmp_path / "straight") == logged_losses(tmp_path / "stopped")
    assert not (tmp_path / "straight/model/critic").exists()


def test_dropout_has_random_numbers_of_its_own(open_run):
    """Not those that the noise of process 0 is made of, and after a start from a saved network too."""
    learner = Denoising(open_run())
    assert learner.model.network.training
    batch = learner.run.batches().batch_at(0)
    learner.draw(batch, 0)
    found = torch.randn(8)
    for purpose in (NOISE, SECOND_VIEW, PURE_NOISE):
        noise = torch.Generator().manual_seed(step_seed(learner.run.config.seed, 0, 0, purpose, 0))
        assert not torch.equal(found, torch.randn(8, generator=noise))


def test_random_numbers_of_other_processes_do_not_stay_in_memory(open_run, monkeypatch):
    learner = Denoising(open_run())
    monkeypatch.setattr(type(learner.run.accelerator), "num_processes", property(lambda self: 4))
    batch = learner.run.batches().batch_at(0)
    noise = learner.draw(batch, 0)
    assert len(noise.eps) == len(batch.labels)
    assert all(value.untyped_storage().nbytes() == value.nbytes for value in vars(noise).values())


def test_labels_and_embeddings_are_dropped_with_the_given_probability():
    noise = draw_step_noise(torch.Generator().manual_seed(0), (10_000, 1, 1, 1), 0, RectifiedFlow(), label_dropout=0.3)
    for dropped in (noise.drop_label, noise.drop_embedding):
        assert dropped.double().mean() == pytest.approx(0.3, abs=0.03)
    assert (noise.drop_label & noise.drop_embedding).double().mean() == pytest.approx(0.09, abs=0.02)


@pytest.mark.parametrize("processes", [1, 2, 3, 5])
def test_random_numbers_do_not_depend_on_the_number_of_processes(processes):
    count, drawn = 150, []

    def draw(generator, rows):
        drawn.append(rows)
        return torch.randn(rows, 2, generator=generator), torch.rand(rows, generator=generator)

    def batch_of(world):
        size = count // world
        parts = [
            draw_in_blocks(range(i * size, (i + 1) * size), count, (3, 0), torch.device("cpu"), draw) for i in range(world)
        ]
        return [torch.cat(values) for values in zip(*parts)]

    assert all(map(torch.equal, batch_of(processes), batch_of(1)))
    assert max(drawn) == BLOCK and drawn[-3:] == [64, 64, 22]


def test_the_log_does_not_stop_the_device_at_every_step(train_config, tmp_path):
    """By default values are read every 32 batches, however large they are."""
    run = train(train_config("log_every_images=0", "images_total=128", "batch_size=2", "sample_every_images=128")).parent
    assert [line["images_seen"] for line in read_metrics(run / "metrics.jsonl") if "loss" in line] == [64, 128]
