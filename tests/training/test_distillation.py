"""Posterior distillation, with the training loop of tools/train.py."""

import copy
import dataclasses

import pytest
import torch
from safetensors.torch import load_file

from ldm_smd.autoencoder import sample_latents
from ldm_smd.errors import UserError
from ldm_smd.training.checkpoint import checkpoints
from ldm_smd.training.distillation import Distillation, evenly_spaced
from ldm_smd.training.loop import train
from ldm_smd.training.metrics_log import read_metrics
from ldm_smd.training.step import Denoising
from tests.training.results import assert_same_losses, logged_losses, weights

ADVERSARIAL = "objective.distillation.adversarial_weight=0.3"
ABOVE = "objective.distillation.marginal_above=2"
SIMULATED = "objective.distillation.backward_simulation_fraction=0.5"
ENERGY = "objective.distillation.energy_weight=0.3 objective.draws=2"


def with_objective(run, objective):
    """Return the same run with another objective."""
    config = copy.deepcopy(run.config)
    config.objective.name = objective
    return dataclasses.replace(run, config=config)


@pytest.fixture
def learner(open_run, distillation):
    return lambda *overrides: Distillation(open_run(*distillation, *overrides))


@pytest.mark.slow
@pytest.mark.parametrize(
    "views", ["conditional", "joined", "marginal", f"conditional {ADVERSARIAL} {ABOVE} {SIMULATED}", f"joined {ENERGY}"]
)
def test_a_resumed_distillation_is_bit_identical(distil, tmp_path, views):
    """All networks, optimizers and losses are."""
    chosen = f"objective.distillation.views={views}".split()
    train(distil(*chosen, f"output={tmp_path / 'straight'}"))
    train(distil(*chosen, f"output={tmp_path / 'stopped'}", "images_total=32"))
    train(distil(*chosen, f"output={tmp_path / 'stopped'}"))
    a, b = (checkpoints(tmp_path / name / "checkpoints")[-1] for name in ("straight", "stopped"))
    files = sorted(path.relative_to(a) for path in a.rglob("*.safetensors"))
    assert len(files) == 5
    for file in files:
        first, second = load_file(a / file), load_file(b / file)
        assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first), file
    assert logged_losses(tmp_path / "straight") == logged_losses(tmp_path / "stopped")
    lines = [line for line in read_metrics(tmp_path / "straight/metrics.jsonl") if "loss" in line]
    assert lines and all(line["critic_loss"] > 0 and line["teacher_loss"] > 0 for line in lines)


@pytest.mark.slow
def test_micro_batches_give_the_losses_of_the_batch(distil, tmp_path):
    for name, micro_batches in (("batch", 1), ("micro-batches", 3)):
        train(distil(f"output={tmp_path / name}", f"micro_batches={micro_batches}"))
    assert_same_losses(tmp_path / "batch", tmp_path / "micro-batches")


@pytest.mark.parametrize("views", ["conditional", "joined"])
def test_a_critic_equal_to_the_teacher_gives_no_loss(learner, views):
    """Initially they have the same weights, so the loss of the mixture is 0. The critic learns from the draws of the mixture,
    and the loss becomes positive. The teacher does not change."""
    learner = learner(f"objective.distillation.views={views}")
    batch = learner.run.batches().batch_at(0)
    losses = learner.losses(batch, learner.draw(batch, 0))
    assert losses["loss"].shape == (8,) and losses["loss"].abs().max() < 1e-10
    assert torch.allclose(losses["critic_loss"], losses["teacher_loss"]) and losses["critic_loss"].min() > 0
    before = {name: value.clone() for name, value in learner.teacher.state_dict().items()}
    for number in range(3):
        learner.step(batch, number, learning_rate=1e-3)
    assert all(torch.equal(before[name], value) for name, value in learner.teacher.state_dict().items())
    assert learner.losses(batch, learner.draw(batch, 3))["loss"].max() > 0


def test_mixture_and_critic_have_no_momentum(learner):
    groups = [group for trained in learner().networks.values() for group in trained.optimizer.param_groups]
    assert [group["betas"][0] for group in groups] == [0.0, 0.0]


def test_all_random_numbers_of_a_step_are_independent(learner):
    learner = learner(SIMULATED)
    batch, rows, timesteps = learner.run.batches().batch_at(0), [], []
    for images_seen, number in ((0, 0), (0, 1), (8, 0)):
        noise = learner.draw(batch, images_seen, number)
        rows += [
            noise.posterior,
            noise.eps,
            noise.second_eps,
            noise.eta[:, 0],
            noise.first,
            noise.etas[:, 0],
            noise.noises[:, 0],
        ]
        timesteps += [tuple(noise.t.tolist()), tuple(noise.r.tolist())]
    correlations = torch.corrcoef(torch.stack(rows).flatten(1))
    assert (correlations - torch.eye(21)).abs().max() < 0.15 and len(set(timesteps)) == 6


def test_a_fraction_of_the_images_of_every_step_is_pure_noise(learner):
    """Not the same ones in all steps."""
    learner = learner("objective.distillation.pure_noise_fraction=0.3")
    batch = learner.run.batches().batch_at(0)
    pure = torch.stack([learner.draw(batch, images_seen).t == learner.process.last for images_seen in range(0, 800, 8)])
    assert pure.double().mean() == pytest.approx(0.3, abs=0.06) and len(pure.unique(dim=0)) > 20


def test_teacher_and_guide_are_in_evaluation_mode(learner, gaussian_folder):
    """The networks that learn are not."""
    guide = f"objective.distillation.guide={gaussian_folder / 'unet'}"
    learner = learner("objective.distillation.guidance_scale=3", guide)
    assert not learner.teacher.training and not learner.distillation_losses.guide.training and learner.model.network.training


def test_the_gradients_of_both_networks_are_clipped(learner):
    """After some steps. In the first one, that of the mixture is zero."""
    learner = learner("gradient_clip=1e-3")
    for number in range(3):
        learner.step(learner.run.batches().batch_at(0), number, learning_rate=1e-3)
    for trained in learner.networks.values():
        gradients = [parameter.grad.square().sum() for parameter in trained.network.parameters() if parameter.grad is not None]
        assert torch.stack(gradients).sum().sqrt().item() == pytest.approx(1e-3, rel=0.01)


def test_pure_noise_has_the_given_frequency(learner):
    found = {}
    for fraction in (0.0, 1.0):
        chosen = learner(f"objective.distillation.pure_noise_fraction={fraction}")
        draws = chosen.draw(chosen.run.batches().batch_at(0), 0)
        found[fraction] = draws.t
        assert draws.r.min() >= 20 and draws.r.max() <= 979 and draws.second_eps.shape == draws.eps.shape
    assert (found[1.0] == 999).all() and (found[0.0] < 999).all()


def test_a_shift_makes_the_second_view_noisier_and_changes_nothing_else(learner):
    same, shifted = (learner(f"objective.distillation.second_view_shift={shift}") for shift in (1, 4))
    batch = same.run.batches().batch_at(0)
    before, after = same.draw(batch, 0), shifted.draw(batch, 0)
    assert (after.r > before.r).all() and torch.equal(before.t, after.t)
    assert torch.equal(before.second_eps, after.second_eps)


@pytest.mark.parametrize("views", ["conditional", "joined"])
def test_draws_for_nearly_pure_noise_are_compared_without_it(learner, views):
    """The view of the draw is x_r, and the critic does not see x_t. Below that noise level, nothing changes."""
    plain, chosen = (learner(f"objective.distillation.views={views}", *more) for more in ([], [ABOVE]))
    t = torch.tensor([0, 200, 800, 999])
    x, x_t, eps, other = torch.randn(4, 4, 4, 8, 8).unbind()
    r = torch.tensor([100, 500, 100, 500])
    marginal = chosen.distillation_losses.is_marginal(t)
    assert marginal.tolist() == [False, False, True, True]
    found = {}
    for name, each, first in (("plain", plain, x_t), ("chosen", chosen, x_t), ("another x_t", chosen, other)):
        losses = each.distillation_losses
        seen = losses.is_marginal(t)
        view, u = losses.view(x, first, t, r, eps, seen)
        inputs, known = losses.critic_inputs(each.critic.network, view, first, t, {"class_labels": None}, seen)
        found[name] = [view, u, inputs, *([known["image_embeds"]] if views == "conditional" else [])]
    for before, after, unseen in zip(*found.values()):
        assert torch.equal(before[~marginal], after[~marginal]) and not torch.equal(before[marginal], after[marginal])
        assert torch.equal(after[marginal], unseen[marginal])
    view, u, *_ = found["chosen"]
    assert torch.equal(view[marginal], plain.process.noise(x, eps, r)[marginal]) and torch.equal(u[marginal], r[marginal].to(u))


def test_simulated_images_are_from_the_own_sampling_and_have_marginal_views(learner):
    """The critic is told t, unlike that of nearly pure noise, but not x_t. Pure noise is not sampled."""
    learner = learner(SIMULATED, "objective.distillation.pure_noise_fraction=0.5", ABOVE)
    batch, losses = learner.run.batches().batch_at(0), learner.distillation_losses
    found = {}
    for images_seen in range(0, 80, 8):
        noise = learner.draw(batch, images_seen)
        found.setdefault(noise.etas.shape[1], noise)
    assert found.keys() == {1, 2, 4}
    noise = found[1]
    noise.drop_label[:] = False
    assert noise.chosen.tolist() == [False, True] * 4
    assert torch.equal(noise.simulated, noise.chosen & (noise.t < learner.process.last)) and noise.simulated.any()

    rows, x_t = learner.sampled(noise, {"class_labels": batch.labels})
    assert rows.tolist() == [1, 3, 5, 7]
    first, eta, t = noise.first[rows], noise.etas[rows, 0], noise.t[rows]
    with torch.no_grad():
        predicted = learner.model.network(first, 999, batch.labels[rows], eta=eta, return_dict=False)[0]
    last = torch.full_like(t, 999)
    mean, variance = learner.process.posterior(first, learner.process.to_x0(predicted, first, last, "v_prediction"), last, t)
    assert torch.allclose(x_t, mean + variance.clamp_min(0).sqrt() * noise.noises[rows, 0], atol=1e-5)

    seen = []
    losses.losses = lambda *given: seen.append(given[4]) or {"loss": torch.zeros(8)}
    learner.losses(batch, noise)
    [given] = seen
    assert torch.equal(given[noise.simulated], x_t[noise.simulated[rows]])
    x0 = learner.run.autoencoder.normalise(sample_latents(batch.moments, noise=noise.posterior))
    assert torch.equal(given[~noise.simulated], learner.process.noise(x0, noise.eps, noise.t)[~noise.simulated])

    t, simulated = torch.tensor([200, 200, 800]), torch.tensor([False, True, False])
    x, x_t, eps, other = torch.randn(4, 3, 4, 8, 8).unbind()
    marginal, r = losses.is_marginal(t, simulated), torch.tensor([100, 100, 100])
    assert marginal.tolist() == [False, True, True]
    view, u = losses.view(x, x_t, t, r, eps, marginal)
    assert torch.equal(view[marginal], learner.process.noise(x, eps, r)[marginal]) and u[1] == u[2] == 100 != u[0]
    first, second = (
        losses.critic_inputs(learner.critic.network, view, each, t, {"class_labels": None}, marginal) for each in (x_t, other)
    )
    for a, b in ((first[0], second[0]), (first[1]["image_embeds"], second[1]["image_embeds"])):
        assert torch.equal(a[marginal], b[marginal])
    assert not torch.equal(first[0][0], second[0][0])
    embeds = first[1]["image_embeds"]
    assert torch.equal(embeds[0], embeds[1]) and not torch.equal(embeds[1], embeds[2])


def test_images_of_the_own_sampling_are_spaced_evenly_over_all_processes():
    """A process without any samples one image anyway, because FSDP's processes wait for one another."""
    for fraction, count in ((0.0, 0), (0.3, 9), (0.5, 16), (1.0, 32)):
        parts = [evenly_spaced(fraction, range(start, start + 4)) for start in range(0, 32, 4)]
        assert torch.equal(torch.cat(parts), evenly_spaced(fraction, range(32))) and torch.cat(parts).sum() == count
        assert max(map(sum, parts)) - min(map(sum, parts)) <= 1


def test_a_process_without_chosen_images_samples_one(learner):
    learner = learner(SIMULATED)
    batch = learner.run.batches().batch_at(0)
    noise = learner.draw(batch, 0)
    noise.chosen[:] = noise.simulated[:] = False
    rows, x_t = learner.sampled(noise, {"class_labels": batch.labels})
    assert rows.tolist() == [0] and len(x_t) == 1
    kept = learner.losses(batch, noise)
    noise.first += 1.0
    assert torch.equal(learner.losses(batch, noise)["critic_loss"], kept["critic_loss"])


def test_the_critic_has_its_own_learning_rate(learner):
    learner = learner("objective.distillation.critic_learning_rate=0.01", "learning_rate=1e-3")
    learner.step(learner.run.batches().batch_at(0), 0, learning_rate=5e-4)
    rates = {name: trained.optimizer.param_groups[0]["lr"] for name, trained in learner.networks.items()}
    assert rates == {"model": 5e-4, "critic": pytest.approx(5e-3)}


def test_more_critic_updates_give_a_better_critic(learner):
    """At the first update of the model. Its draws are the same for any number of critic updates."""
    found, steps = {}, {}
    for updates in (1, 8):
        torch.manual_seed(0)
        chosen = learner(f"objective.distillation.critic_updates={updates}", "objective.distillation.critic_learning_rate=5e-4")
        found[updates] = chosen.step(chosen.run.batches().batch_at(0), 0, learning_rate=5e-4)
        steps[updates] = {
            name: {int(state["step"]) for state in each.optimizer.state.values()} for name, each in chosen.networks.items()
        }
    assert steps == {1: {"model": {1}, "critic": {1}}, 8: {"model": {1}, "critic": {8}}}
    assert found[8]["teacher_loss"] == found[1]["teacher_loss"] and found[8]["critic_loss"] < found[1]["critic_loss"]


def test_guidance_changes_the_target_only_for_labelled_samples(learner):
    losses, scale = {}, 3.0
    for guidance in (1.0, scale):
        torch.manual_seed(0)
        chosen = learner(f"objective.distillation.guidance_scale={guidance}", "objective.distillation.views=joined")
        for parameter in chosen.teacher.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        chosen.critic.network.load_state_dict(chosen.teacher.state_dict())
        batch = chosen.run.batches().batch_at(0)
        noise = chosen.draw(batch, 0)
        noise.drop_label = torch.arange(8) < 4
        losses[guidance] = chosen.losses(batch, noise)
    plain, guided = losses[1.0], losses[scale]
    assert torch.allclose(plain["critic_loss"], guided["critic_loss"])
    assert torch.allclose(plain["teacher_loss"][:4], guided["teacher_loss"][:4]) and guided["loss"][:4].max() < 1e-10
    assert guided["loss"][4:].min() > 0


def test_a_guide_moves_the_teacher_away_from_it(learner, gaussian_folder):
    """A guide with the weights of the teacher changes nothing. Another one does, for every label and for none."""
    scale, guide = "objective.distillation.guidance_scale=3", f"objective.distillation.guide={gaussian_folder / 'unet'}"
    learner = learner(scale, guide, "objective.distillation.views=joined")
    batch = learner.run.batches().batch_at(0)
    noise = learner.draw(batch, 0)
    noise.drop_label = torch.arange(8) < 4
    same = learner.losses(batch, noise)
    for parameter in learner.distillation_losses.guide.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    away = learner.losses(batch, noise)
    assert torch.allclose(same["critic_loss"], same["teacher_loss"]) and same["loss"].max() < 1e-10
    assert torch.equal(same["critic_loss"], away["critic_loss"]) and away["loss"].min() > 0


def test_the_adversarial_loss_is_zero_until_the_logit_has_learnt(learner):
    learner = learner(ADVERSARIAL)
    batch = learner.run.batches().batch_at(0)
    noise = learner.draw(batch, 0)
    plain = learner.losses(batch, noise)
    assert plain["loss"].abs().max() < 1e-10, "a constant logit has no gradient"
    critic = learner.critic.network
    assert critic.conv_out.weight.shape[0] == learner.model.network.config.out_channels + 1
    assert not critic.conv_out.weight[-1].any() and not critic.conv_out.bias[-1].any()
    for number in range(3):
        learner.step(batch, number, learning_rate=1e-3)
    assert critic.conv_out.weight[-1].abs().max() > 0
    assert learner.losses(batch, noise)["loss"].max() > 0


def test_an_energy_score_is_added_to_the_loss(learner):
    """Initially the loss of distillation is 0, so only the weighted energy score of the draws remains."""
    energy, draws = "objective.distillation.energy_weight=0.5", "objective.draws=3"
    chosen = learner(energy, draws)
    batch = chosen.run.batches().batch_at(0)
    noise = chosen.draw(batch, 0)
    assert noise.eta.shape[1] == 3 and chosen.draw(batch, 0, 1).eta.shape[1] == 1
    losses = chosen.losses(batch, noise)
    assert losses["energy_score"].min() > 0 and torch.allclose(losses["loss"], 0.5 * losses["energy_score"])
    denoising = Denoising(with_objective(chosen.run, "energy"))
    denoising.model = chosen.model
    assert torch.allclose(denoising.losses(batch, noise), losses["energy_score"])
    marginal = learner(energy, draws, ABOVE)
    noise.t = torch.tensor([0, 900] * 4)
    found = marginal.losses(batch, noise)["energy_score"]
    assert found[0::2].min() > 0 and not found[1::2].any(), "draws of marginal views have none"
    only_critic = chosen.losses(batch, chosen.draw(batch, 0, 1), model_learns=False)
    assert only_critic.keys() == {"critic_loss"}
    with pytest.raises(UserError, match=r"objective\.draws: expected at least 2 for the energy score, found 1"):
        learner(energy, "objective.draws=1")


def test_the_teacher_can_differ_from_the_initial_model(distil, train_config, gaussian_folder, model_folder, tmp_path):
    plain = ("objective.name=distillation", "objective.draws=1")
    with pytest.raises(UserError, match=r"objective\.distillation\.teacher: expected .*, found None"):
        train(train_config(*plain))
    with pytest.raises(UserError, match=r"objective\.distillation\.teacher: expected a Gaussian model, found 'a mixture in"):
        train(train_config(*plain, f"init_from={model_folder / 'unet'}"))
    with pytest.raises(UserError, match=r"teacher: expected the folder of one of .*, found 'none in"):
        train(train_config(*plain, f"objective.distillation.teacher={tmp_path / 'nowhere'}"))
    teacher = f"objective.distillation.teacher={gaussian_folder / 'unet'}"
    with pytest.raises(UserError, match=r"teacher: expected num_classes None, like the model, found 2"):
        train(train_config(*plain, teacher, "class_conditional=false"))
    scale = "objective.distillation.guidance_scale=2"
    with pytest.raises(UserError, match=r"distillation\.guide: expected a Gaussian model, found 'a mixture in"):
        train(train_config(*plain, teacher, scale, f"objective.distillation.guide={model_folder / 'unet'}"))
    with pytest.raises(UserError, match=r"distillation\.guide: expected the folder of a denoiser .*, found 'none in"):
        train(train_config(*plain, teacher, scale, f"objective.distillation.guide={tmp_path / 'nowhere'}"))
    for low in (1, 0.5):
        settings = f"objective.distillation.guidance_scale={low}", f"objective.distillation.guide={gaussian_folder / 'unet'}"
        with pytest.raises(UserError, match=rf"guidance_scale: expected a scale above 1 for the guide, found {low}"):
            train(train_config(*plain, teacher, *settings))
    folder = train(train_config(*plain, teacher, f"init_from={model_folder / 'unet'}", "images_total=16"))
    assert any(name.startswith("mixture.") for name in weights(folder / "unet"))
    with pytest.raises(UserError, match=r"objective\.name: expected mse for a Gaussian model"):
        distil("model.z_channels=0")
