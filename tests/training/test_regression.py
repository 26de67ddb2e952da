"""Regression on the posterior flow of a Gaussian model, with the training loop of tools/train.py."""

import pytest
import torch

from ldm_smd.errors import UserError
from ldm_smd.training.checkpoint import checkpoints
from ldm_smd.training.loop import train
from ldm_smd.training.regression import PosteriorRegression
from ldm_smd.training.step import model_conditions
from tests.rounding import nearly_equal
from tests.training.results import assert_same_losses, logged_losses, weights


@pytest.fixture
def regression(gaussian_folder):
    """Settings of a regression on the Gaussian model, which is also its initial model."""
    teacher = f"init_from={gaussian_folder / 'unet'}"
    return teacher, "objective.name=regression", "model.noise_rank=0", "objective.teacher_steps=3"


def test_draws_learn_to_depend_on_eta(open_run, regression):
    """Initially they are equal. After some steps on one batch they differ, and are closer to the results of the flow."""
    learner = PosteriorRegression(open_run(*regression))
    batch = learner.run.batches().batch_at(0)
    noise = learner.draw(batch, 0)
    model, teacher = learner.model.network, {name: value.clone() for name, value in learner.teacher.state_dict().items()}

    def spread():
        x, eta = noise.eps, noise.eta.flatten(0, 1)
        draws = model(x, noise.t, eta=eta, return_dict=False)[0].unflatten(0, (8, 2))
        return (draws[:, 0] - draws[:, 1]).square().mean().item()

    before = learner.losses(batch, noise)
    assert before.shape == (8,) and spread() == 0
    for number in range(40):
        learner.step(batch, number, learning_rate=3e-3)
    after = learner.losses(batch, noise)
    assert after.mean() < 0.9 * before.mean() and spread() > 1e-3
    assert all(torch.equal(teacher[name], value) for name, value in learner.teacher.state_dict().items())


def test_the_loss_is_the_mean_over_draws(open_run, regression):
    learner = PosteriorRegression(open_run(*regression))
    batch = learner.run.batches().batch_at(0)
    noise = learner.draw(batch, 0)
    together, etas = learner.losses(batch, noise), noise.eta
    each = []
    for draw in range(2):
        learner.draws, noise.eta = 1, etas[:, draw : draw + 1]
        each.append(learner.losses(batch, noise))
    assert torch.allclose(together, torch.stack(each).mean(dim=0), rtol=1e-4)
    assert not torch.allclose(each[0], each[1], rtol=1e-2)


def test_the_loss_computes_its_formula(open_run, regression):
    """With one evaluation of the teacher, the flow is its prediction of x_0. The error of v is that of x_0 over s_t."""
    learner = PosteriorRegression(open_run(*regression, "objective.teacher_steps=1"))
    torch.manual_seed(0)
    network = learner.model.network.eval()
    with torch.no_grad():
        for parameter in (*learner.teacher.parameters(), *network.parameters()):
            parameter += 0.1 * torch.randn_like(parameter)
    batch, inputs = learner.run.batches().batch_at(0), []
    noise = learner.draw(batch, 0)
    network.register_forward_pre_hook(lambda _, given: inputs.append(given))
    with torch.no_grad():
        found = learner.losses(batch, noise)
        x_t, t = inputs[0]
        labels = model_conditions(learner.run, batch, noise, 2)["class_labels"]
        goal = learner.teacher(x_t, t, labels, return_dict=False)[0]
        draws = network(x_t, t, labels, noise.eta.flatten(0, 1), return_dict=False)[0].unflatten(0, (8, 2))
    assert len(labels.unique()) > 1
    assert nearly_equal(found, (draws - goal[:, None]).square().mean(dim=(1, 2, 3, 4)), 1e-3)


def test_pure_noise_has_the_last_timestep(open_run, regression):
    learner = PosteriorRegression(open_run(*regression, "objective.distillation.pure_noise_fraction=1.0"))
    assert (learner.draw(learner.run.batches().batch_at(0), 0).t == learner.process.last).all()


@pytest.mark.slow
def test_a_resumed_regression_is_bit_identical_and_micro_batches_give_the_same_losses(train_config, regression, tmp_path):
    train(train_config(*regression, f"output={tmp_path / 'straight'}"))
    train(train_config(*regression, f"output={tmp_path / 'stopped'}", "images_total=32"))
    train(train_config(*regression, f"output={tmp_path / 'stopped'}"))
    train(train_config(*regression, f"output={tmp_path / 'micro-batches'}", "micro_batches=3"))
    found = [weights(checkpoints(tmp_path / name / "checkpoints")[-1] / "model") for name in ("straight", "stopped")]
    assert found[0].keys() == found[1].keys() and all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    assert logged_losses(tmp_path / "straight") == logged_losses(tmp_path / "stopped")
    assert_same_losses(tmp_path / "straight", tmp_path / "micro-batches")


def test_fitted_noise_and_gaussian_models_are_refused(open_run, regression):
    with pytest.raises(UserError, match=r"model\.noise_rank: expected 0 \(white noise\) .* found 8"):
        PosteriorRegression(open_run(*regression, "model.noise_rank=8"))
    with pytest.raises(UserError, match=r"objective\.name: expected mse for a Gaussian model"):
        open_run(*regression, "model.z_channels=0")
    with pytest.raises(UserError, match=r"objective\.distillation\.teacher: expected .*, found None"):
        PosteriorRegression(open_run("objective.name=regression", "model.noise_rank=0"))
