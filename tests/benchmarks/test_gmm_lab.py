import json

import gmm_cells
import gmm_lab
import gmm_measures
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from gmm_cells import EXACT, Budget, Distilled, Model, components
from gmm_data import Problem
from gmm_distill import LEVELS, distil, exact_teacher, fine_process, mean_of_draws, posterior_mean, second_view, student_loss
from gmm_measures import energy_distance, kernel, modes, sample, sliced_w2
from gmm_models import PointDenoiser
from gmm_report import distill_targets
from gmm_training import train

from ldm_smd.diffusion.gaussian_mixture import GaussianMixture


class Oracle:
    """Draws from the exact posterior q(x_0 | x_t)."""

    models = 2

    def __init__(self, problem):
        self.problem = problem

    def draw(self, x_t, time, draws, generator):
        t = round(float(time.flatten()[0]) * (self.problem.steps - 1))
        a, s = (float(v) for v in self.problem.process.signal_and_noise(torch.tensor([t]), torch.zeros(1)))
        posterior = self.problem.normalised.posterior(x_t.flatten(0, 1).double(), a, s)
        return posterior.sample(draws, generator).float().view(len(x_t), -1, self.problem.dimensions)


@pytest.mark.slow
@pytest.mark.parametrize("data", ["ring of 8", "mixture in 16-D"])
def test_the_exact_posterior_is_perfect_in_every_measure(data):
    """So neither the sampler nor the distances nor the spread are biased."""
    problem = Problem(data, 3)
    distances, spread_shares = kernel(problem, Oracle(problem))
    assert max(map(abs, distances)) < 5e-3
    assert spread_shares == pytest.approx([1, 1], abs=0.02)
    generator = torch.Generator().manual_seed(0)
    samples = sample(problem, Oracle(problem), 4000, generator)[0]
    data = problem.mixture.sample(4000, generator)
    assert abs(float(energy_distance(samples, data))) < 0.01
    found = modes(problem.mixture, samples)
    assert found["in_mode"] > 0.995 and found["modes_covered"] == len(problem.mixture.weights)
    assert found["worst_mode"] < 0.3


@pytest.mark.parametrize("scheduler", [DDPMScheduler, DDIMScheduler])
def test_ddpm_and_ddim_sample_the_data_from_exact_draws(scheduler):
    """DDIM does too: if x_0 is a draw of q(x_0 | x_t), (x_t - a_t x_0) / s_t is independent noise."""
    problem = Problem("ring of 8", 3)
    alphas = problem.process.alphas_cumprod
    betas = 1 - alphas / torch.cat((torch.ones(1), alphas[:-1]))
    sampler = scheduler(3, trained_betas=betas.tolist(), prediction_type="sample", clip_sample=False)
    sampler.set_timesteps(3)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4000, 2, generator=generator)
    for t in sampler.timesteps:
        x0 = Oracle(problem).draw(x[None].expand(2, -1, -1), problem.times(t[None]), 1, generator)[0]
        x = sampler.step(x0, t, x, generator=generator).prev_sample
    samples = x.double() * problem.scale + problem.mean
    assert abs(float(energy_distance(samples, problem.mixture.sample(4000, generator)))) < 0.01
    assert modes(problem.mixture, samples)["in_mode"] > 0.995


def test_sliced_w2_of_a_shift():
    """In two dimensions, a shift of length 1 has a mean squared projection of 1/2."""
    x = torch.randn(500, 2, dtype=torch.float64)
    assert sliced_w2(x, x + torch.tensor([1.0, 0.0], dtype=torch.float64), 4000) == pytest.approx(0.5**0.5, rel=0.03)


@pytest.mark.parametrize(
    "model",
    [
        gmm_cells.GAUSSIAN,
        gmm_cells.PAPER,
        gmm_cells.FROZEN,
        Model("nll", "mixture_nll", 2),
        Model("energy", draws=2),
        components(3),
    ],
    ids=lambda model: model.name,
)
def test_every_model_trains(model):
    problem = Problem("ring of 8", 2)
    network = train(problem, model, Budget(5, batch=16), seeds=2)
    samples = sample(problem, network, 10, torch.Generator().manual_seed(0))
    assert samples.shape == (2, 10, 2) and samples.isfinite().all()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"joint": False, "conditional": False, "critic_updates": 2},
        {"residual": True, "start": "energy", "teacher": "learned"},
        {"draws": 3, "others": True},
        {"draws": 3, "critic_updates": 0, "start": "Gaussian"},
        {"identity": 1.0},
        {"regression": 1.0, "draws": 2},
        {"regression": 0.5, "teacher": "learned"},
        {"energy": 0.1, "draws": 2, "normalise": "level", "pure_noise": 0.5},
    ],
    ids=str,
)
def test_every_variant_of_distillation_trains(options):
    problem = Problem("ring of 8", 2)
    network = distil(problem, Distilled("tiny", first_updates=3, **options), Budget(3, batch=8), seeds=2)
    samples = sample(problem, network, 10, torch.Generator().manual_seed(0))
    assert samples.shape == (2, 10, 2) and samples.isfinite().all()


class Views:
    """Second views of a student's draws, for one x_t of the ring at half the noise levels."""

    def __init__(self, student, count=20_000):
        self.problem, self.path, generator = Problem("ring of 8", 2), fine_process(), torch.Generator().manual_seed(0)
        t = LEVELS // 2 - 1
        x_t = torch.tensor([[0.9, 0.5]])
        self.a, self.s = (float(v) for v in self.path.signal_and_noise(torch.tensor([t]), torch.zeros(1)))
        self.posterior = self.problem.normalised.posterior(x_t.double(), self.a, self.s)
        drawn = self.posterior.sample(count, generator)[0].float()
        self.x = (drawn if student == "posterior" else torch.full_like(drawn, 0.2)).requires_grad_()
        rows = torch.full((count,), t)
        self.seen = second_view(self.path, self.x.detach(), x_t.expand(count, -1), rows, Distilled(""), generator)
        self.true = exact_teacher(self.problem, self.path)(self.seen.x_u, self.seen.u)

    def gradient(self, own, normalise="level"):
        s_u = self.path.signal_and_noise(self.seen.u, self.x)[1]
        student_loss(Distilled("", normalise=normalise), self.x, own, self.true, s_u).sum().backward()
        return self.x.grad


def test_the_gradient_of_a_student_that_samples_the_posterior_vanishes():
    """The critic is computed differently from the teacher: as E[x | x_r], with q(x_0 | x_t), a mixture, as the prior."""
    views = Views("posterior")
    a, s = (each.double() for each in views.path.signal_and_noise(views.seen.r, views.x))
    weights, means = views.posterior.weights[0], views.posterior.means[0]
    prior = GaussianMixture(weights, means, views.posterior.variances, views.posterior.bases)
    own = posterior_mean(prior, views.seen.x_r.double(), a, s).float()
    assert (own - views.true).abs().max() < 0.02 and views.gradient(own).abs().mean() < 2e-3
    # If the draws replace the critic, the mean gradient is 0 too, for any weights.
    views = Views("posterior")
    noise = (views.x - views.true).detach()
    for weight in (torch.ones(len(noise)), views.seen.x_u[:, 0], views.true[:, 1]):
        products = noise * weight[:, None]
        assert (products.mean(dim=0).abs() < 4 * products.std(dim=0) / len(noise) ** 0.5).all()


@pytest.mark.parametrize("normalise", ["own", "level"])
def test_the_gradient_of_a_collapsed_student_points_to_the_posterior_mean(normalise):
    views = Views("point")
    step = -views.gradient(views.x.detach(), normalise).mean(dim=0).double()
    wanted = views.posterior.mean()[0] - views.x[0].detach().double()
    assert torch.cosine_similarity(step, wanted, dim=0) > 0.9


def test_the_mean_of_many_draws_replaces_the_critic():
    """Given a noised draw, it is the mean of the exact posterior."""
    problem, generator = Problem("ring of 8", 2), torch.Generator().manual_seed(0)
    draws = problem.sample(2000, generator)[None]
    a, s = torch.tensor(0.8), torch.tensor(0.6)
    x_r = a * draws[0] + s * torch.randn(draws[0].shape, generator=generator)
    found = mean_of_draws(draws, x_r[:20].repeat(100, 1), *(each.expand(2000, 1) for each in (a, s)), False)[:20]
    exact = posterior_mean(problem.normalised, x_r[:20], *(each.expand(20, 1) for each in (a, s)))
    assert (found - exact).abs().max() < 0.1


@pytest.mark.slow
@pytest.mark.parametrize("part, second, steps", [("objectives", gmm_cells.SMD, 11), ("distill", gmm_cells.BOTH, 20)])
def test_a_part_writes_results_and_keeps_them_on_resume(part, second, steps, tmp_path, monkeypatch):
    cells = [("ring of 8", steps, model, Budget(2, batch=8)) for model in (gmm_cells.GAUSSIAN, second)]
    for name, count in {"PAIRS": 2, "SETS": 1, "KERNEL_POINTS": 4, "KERNEL_DRAWS": 16}.items():
        monkeypatch.setattr(gmm_measures, name, count)
    monkeypatch.setattr(gmm_lab, "RESULTS", tmp_path)
    monkeypatch.setattr(gmm_lab, "cells", lambda part: cells[:1])
    gmm_lab.run(part, 2, resume=False)
    path = tmp_path / f"gmm_lab-{part}.json"
    first = json.loads(path.read_text())["cells"]
    assert [len(values) for values in first[0]["measures"].values()] == [2] * 9
    monkeypatch.setattr(gmm_lab, "cells", lambda part: cells)
    gmm_lab.run(part, 2, resume=True)
    result = json.loads(path.read_text())
    assert result["cells"][:1] == first and result["models"] == ["Gaussian", second.name]
    assert path.with_suffix(".md").read_text().count(f"| ring of 8 | {steps} |") == 2
    assert path.with_suffix(".png").stat().st_size > 1000


def test_distillation_targets_use_the_best_variant_with_the_exact_teacher():
    def entry(model, ratio):
        measures = {"sliced_w2_over_floor": [ratio, ratio], "in_mode": [0.98, 1.0], "worst_mode": [0.1, 0.2]}
        return {"data": "ring of 8", "T": 2, "model": model, "measures": measures}

    found = distill_targets([entry(f"{EXACT}, a", 1.3), entry(f"{EXACT}, b", 1.05), entry("learned teacher", 1.0)])
    assert [(each["measured"], each["holds"]) for each in found] == [(1.05, True), (0.99, True), (0.2, False)]
    assert all(each["name"].startswith(f"ring of 8, T = 2, {EXACT}, b") for each in found)


def test_stacked_models_are_independent():
    torch.manual_seed(0)
    network = PointDenoiser(3, 2, eta_dimensions=4)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    x_t, time, eta = torch.randn(3, 5, 2), torch.rand(3, 5), torch.randn(3, 10, 4)
    network.predict(network.features(x_t, time), eta)[1].sum().backward()
    assert all(p.grad.movedim(1 if p.ndim == 4 else 0, 0)[[0, 2]].abs().sum() == 0 for p in network.parameters())
