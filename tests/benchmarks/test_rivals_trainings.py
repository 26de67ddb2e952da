"""Trainings of few-step methods: costs, schedules and networks that learn."""

from types import SimpleNamespace

import few_step.contest
import few_step.jobs
import pytest
import torch
from few_step import METHODS
from few_step.gaussian import Gaussian
from few_step.jobs import Job, step_costs
from few_step.method import Training, train
from few_step.mixtures import EnergyThenDistillation

from ldm_smd.training.ema import EMA
from tests.benchmarks.tiny_start import batch


@pytest.mark.parametrize("name", sorted(METHODS.keys() - {"folder"}))
def test_every_method_trains_and_samples(start, latents, name):
    job = Job(name)
    method = job.make(start)
    before = {key: [value.clone() for value in network.parameters()] for key, network in method.networks.items()}
    network = train(method, latents, Training(64, batch=16, warmup_images=16))
    for key, values in before.items():
        changed = [not torch.equal(old, new) for old, new in zip(values, method.networks[key].parameters())]
        assert any(changed), key
    trained = getattr(network, "unet", network).state_dict()
    assert any(
        not torch.equal(value, trained[key])
        for key, value in start.unet.state_dict().items()
        if value.shape == trained[key].shape
    )
    noise, labels = batch(3)
    for steps in (1, 2, 4, 8, 16):
        if steps < method.evaluations:
            continue
        found = method.sample(network, noise, labels, steps, torch.Generator().manual_seed(0))
        assert found.shape == noise.shape and found.isfinite().all()
        again = method.sample(network, noise, labels, steps, torch.Generator().manual_seed(0))
        torch.testing.assert_close(found, again)
        from_draft = method.sample(network, noise, labels, steps, torch.Generator().manual_seed(0), 1.5)
        assert from_draft.isfinite().all() and not torch.allclose(from_draft, found)
    assert set(METHODS[name].SEARCH) <= set(vars(method.settings))


def test_guidance_moves_predictions_away_from_those_without_a_label(start):
    """A step of a guided Gaussian model takes two evaluations. Teachers of distillations can be guided too."""
    noise, labels = batch(3)
    guided, plain = (Job(name, {"scheduler": "DDIM"}).make(start) for name in ("gaussian-guided", "gaussian"))
    network = plain.networks["model"].eval()
    torch.nn.init.normal_(network.unet.class_embedding.weight)
    null = torch.full_like(labels, start.unet.config.num_classes)
    unet = network.unet

    def by_hand(x, t, labels, eta, return_dict):
        own, other = (unet(x, t, given, return_dict=False)[0] for given in (labels, null))
        return (other + 1.5 * (own - other),)

    generator = torch.Generator()
    found = guided.sample(network, noise, labels, 4, generator)
    expected = plain.sample(SimpleNamespace(unet=by_hand), noise, labels, 2, generator)
    assert torch.allclose(found, expected, atol=1e-5) and guided.evaluations == 2

    sigma = torch.full((len(noise),), 2.0)
    own, other = (network.clean(noise, sigma, given) for given in (labels, null))
    assert torch.allclose(network.guided(noise, sigma, labels, 1.5), other + 1.5 * (own - other), atol=1e-5)
    assert torch.equal(network.guided(noise, sigma, labels, 1.0), own) and not torch.allclose(own, other)
    assert Job("dmd2", {"guidance": 1.5}).cost_key != Job("dmd2").cost_key
    assert Job("distillation", {"guidance": 1.5}).make(start).distillation_losses.settings.guidance_scale == 1.5


def test_training_stops_at_a_non_finite_loss(start, latents):
    method = Job("gaussian").make(start)
    torch.nn.init.constant_(method.networks["model"].unet.conv_out.bias, torch.nan)
    with pytest.raises(FloatingPointError, match="Gaussian: expected a finite loss"):
        train(method, latents, Training(32, batch=16))


def test_batches_share_labels_in_groups(latents):
    x0, labels = latents.batch(64, 4, 0.25, torch.Generator().manual_seed(0))
    groups = labels.view(16, 4)
    assert (groups == groups[:, :1]).all() and x0.shape == (64, 3, 4, 4)
    assert set(labels.tolist()) == {0, 1, 2}


def test_step_costs_are_measured_once_for_each_cost_key(start, latents, capsys):
    costs = step_costs([Job("gaussian"), Job("ect"), Job("ect", {"c": 1.0})], start, latents, 8)
    assert len(costs) == 2 and all(cost > 0 for cost in costs.values())


def test_the_cost_of_a_training_has_all_its_parts(start, latents, monkeypatch):
    """On this clock a step of distillation takes five times as long as others."""
    clock = [0.0]
    monkeypatch.setattr(few_step.jobs, "synchronised", lambda device: clock[0])

    def took(seconds):
        clock[0] += seconds
        return {}

    monkeypatch.setattr(Gaussian, "step", lambda *_: took(1))
    monkeypatch.setattr(EnergyThenDistillation, "step", lambda self, *_: took(5 if self.progress >= 0.95 else 1))
    [cost] = step_costs([Job("energy-distillation", {"energy_first": 0.95})], start, latents, 8).values()
    assert cost == pytest.approx(0.95 * 1 + 0.05 * 5)


def test_the_moving_average_follows_each_schedule(start, latents, monkeypatch):
    """A short second part would otherwise keep weights of the first."""
    training = Training(400_000)
    method = Job("energy-distillation", {"energy_first": 0.5, "separate_schedules": True}).make(start)
    assert training.halflife(method.schedule) == 4000
    assert training.halflife((0.9, 1.0)) == 2000 and Training(400_000, ema_halflife_images=7).halflife((0.9, 1.0)) == 7

    used, update = [], EMA.update
    monkeypatch.setattr(EMA, "update", lambda self, *given: used.append(self.halflife_images) or update(self, *given))
    method = Job("energy-distillation", {"energy_first": 0.75, "separate_schedules": True}).make(start)
    monkeypatch.setattr(Training, "halflife", lambda self, schedule: int(100 * (schedule[1] - schedule[0])))
    train(method, latents, Training(64, batch=8))
    assert used == [75] * 6 + [25] * 2


@pytest.mark.parametrize(
    "job", [Job("distillation", {"energy_first": 0.5}), Job("consistency-distillation", {"consistency_first": 0.5})]
)
def test_the_critic_learns_only_after_the_first_part(start, job):
    """Such a job has its own cost."""
    method = job.make(start)
    x0, labels = batch()

    def changed(progress):
        method.progress = progress
        before = {name: [p.clone() for p in network.parameters()] for name, network in method.networks.items()}
        method.step(x0, labels, torch.Generator().manual_seed(0), 1.0)
        after = {name: network.parameters() for name, network in method.networks.items()}
        return {name for name in before if not all(map(torch.equal, before[name], after[name]))}

    assert changed(0.49) == method.networks.keys() - {"critic"}
    assert "critic" in changed(0.5)
    assert job.cost_key != Job(job.method).cost_key


def test_each_part_of_a_training_can_have_its_own_schedule(start):
    """At a progress of 0.75 the second part is in its middle, before its cool-down."""
    training, used = Training(1_000_000, warmup_images=50_000), []

    def rate(progress, **settings):
        method = Job("energy-distillation", {"energy_first": 0.5} | settings).make(start)
        method.descend, method.progress = lambda name, loss, rate: used.append(rate), progress
        factor = training.factor(round(progress * training.images), method.schedule)
        method.step(*batch(), torch.Generator().manual_seed(0), factor)
        assert used[-1] == factor
        return factor

    assert rate(0.75) == 0.5
    found = [rate(progress, separate_schedules=True) for progress in (0.0, 0.25, 0.375, 0.4999, 0.5, 0.75, 0.9999)]
    assert found == pytest.approx([0, 1, 0.5, 0, 0, 1, 0], abs=1e-3)


def test_a_training_uses_the_current_schedule(start, latents):
    method = Job("energy-distillation", {"energy_first": 0.5, "separate_schedules": True}).make(start)
    rates, step = [], method.step
    method.step = lambda x0, labels, generator, rate: rates.append(rate) or step(x0, labels, generator, rate)
    train(method, latents, Training(64, batch=8, warmup_images=8))
    assert rates == [1.0, 1.0, 1.0, 0.5] * 2


def test_the_energy_score_beside_a_distillation(start):
    """Before the first update nothing else contributes to the loss. Such a job has its own cost."""
    x0, labels = batch()
    plain, scored = Job("distillation"), Job("distillation", {"energy_weight": 0.5})
    loss, with_score = (
        job.make(start).losses(x0, labels, torch.Generator().manual_seed(0), True)["loss"] for job in (plain, scored)
    )
    assert loss.abs().max() < 1e-8 and with_score.min() > 0
    assert plain.cost_key != scored.cost_key


def test_backward_simulation_replaces_images_of_a_distillation(start):
    """In the given fraction of a batch, x_t does not depend on the images. Such a job has its own cost."""
    job, (x0, labels), seen = Job("distillation", {"backward_simulation": 0.5, "pure_noise": 0.0}), batch(), []
    method = job.make(start)
    method.distillation_losses.losses = lambda *given, simulated: seen.append((given[4], simulated)) or {}
    for images in (x0, x0 + 1):
        torch.manual_seed(0)
        method.losses(images, labels, torch.Generator().manual_seed(0), True)
    (first, simulated), (second, _) = seen
    assert simulated.sum() == len(x0) // 2 and torch.equal(first[simulated], second[simulated])
    assert (first[~simulated] != second[~simulated]).flatten(1).any(dim=1).all()
    assert job.cost_key != Job("distillation", {"pure_noise": 0.0}).cost_key
