"""Posterior distillation (NCVSD, arXiv 2506.09416) for points instead of images, see ldm_smd/training/distillation.py.

A mixture learns from a teacher, which is a Gaussian model or the exact posterior mean, and from a critic that is trained on the
mixture's own draws."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from gmm_cells import GAUSSIAN, SMD, Budget, Distilled
from gmm_data import Problem
from gmm_models import PointDenoiser
from gmm_training import WARMUP_UPDATES, train
from torch import nn

from ldm_smd.diffusion.gaussian_mixture import GaussianMixture
from ldm_smd.diffusion.objectives import energy
from ldm_smd.diffusion.process import DiffusionProcess
from ldm_smd.diffusion.two_views import joined_view, posterior_flow
from ldm_smd.progress import progress

LEVELS = 1000
"""Steps of the process that adds noise to the second view. The student's T steps are a subset, so T must divide LEVELS."""
MIN_NOISE = 0.03
"""Smallest s_r / a_r of the second view, which is log-uniform. Modes have a deviation of about 0.06."""
FLOW_STEPS = 16
MIN_SCALE = 1e-4
"""Smallest normaliser of the gradient."""
ENERGY_BETA = 0.25
EMA_DECAY = 0.998

Denoiser = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass
class Views:
    """Inputs of teacher and critic for a draw x of q(x_0 | x_t): rows (N, D) and timesteps (N,) of the fine process.

    Attributes:
        x_t, t: the student's input.
        x_r, r: its draw with fresh noise, the second view.
        x_u, u: the view equivalent to both, or x_r alone for marginal views.
    """

    x_t: torch.Tensor
    t: torch.Tensor
    x_r: torch.Tensor
    r: torch.Tensor
    x_u: torch.Tensor
    u: torch.Tensor


def fine_process() -> DiffusionProcess:
    """Return the process of gmm_data.Problem with LEVELS steps."""
    return Problem("one Gaussian", LEVELS).process


def second_view(
    path: DiffusionProcess, x: torch.Tensor, x_t: torch.Tensor, t: torch.Tensor, model: Distilled, generator: torch.Generator
) -> Views:
    """Add fresh noise of random levels r to the draws x of x_t."""
    logarithm = torch.empty(len(x)).uniform_(math.log(MIN_NOISE), math.log(model.max_noise), generator=generator)
    r = path.timestep_of((-2 * logarithm).exp())
    x_r = path.noise(x, torch.randn(x.shape, generator=generator), r)
    return Views(x_t, t, x_r, r, *(joined_view(path, x_t, t, x_r, r) if model.conditional else (x_r, r)))


def posterior_mean(prior: GaussianMixture, x: torch.Tensor, a: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
    """Return E[x_0 | x] for x = a x_0 + s eps (N, D), in the dtype of x. Each row has its own a and s (N, 1)."""
    weights, means, variances, bases = (each.to(x.dtype) for each in (prior.weights, prior.means, prior.variances, prior.bases))
    a, s = a[:, None], s[:, None]
    noisy = a**2 * variances + s**2  # (N, K, D)
    rotated = torch.einsum("kde,nkd->nke", bases, x[:, None] - a * means)
    joint = weights.log() - 0.5 * (noisy.log() + rotated.square() / noisy).sum(dim=2)
    each = means + torch.einsum("kde,nke->nkd", bases, a * variances / noisy * rotated)
    return torch.einsum("nk,nkd->nd", joint.softmax(dim=1), each)


def exact_teacher(problem: Problem, path: DiffusionProcess) -> Denoiser:
    return lambda x, u: posterior_mean(problem.normalised, x, *path.signal_and_noise(u, x))


def with_process(problem: Problem, path: DiffusionProcess) -> Problem:
    """Return the same data with a process of LEVELS steps."""
    fine = copy.copy(problem)
    fine.process, fine.steps = path, LEVELS
    return fine


def learned_teacher(problem: Problem, path: DiffusionProcess, budget: Budget, seeds: int) -> Denoiser:
    """Train a Gaussian model with LEVELS steps on samples: one network for each student."""
    network = train(with_process(problem, path), GAUSSIAN, budget, seeds)

    def teacher(x: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        features = network.features(x.view(seeds, -1, x.shape[1]), (u / path.last).float().view(seeds, -1))
        return network.predict(features).flatten(0, 1)

    return teacher


def mean_of_draws(draws: torch.Tensor, x_r: torch.Tensor, a: torch.Tensor, s: torch.Tensor, others: bool) -> torch.Tensor:
    """Estimate E[x | x_r, x_t] from M draws of the student for each x_t: a critic that needs no training.

        sum_j softmax_j(-|x_r - a x_j|^2 / (2 s^2)) x_j

    Args:
        draws: (N, M, D).
        x_r: those draws with noise added, (N * M, D); a and s are (N * M, 1).
        others: leave out the draw that x_r was made from.
    """
    count = draws.shape[1]
    squares = (x_r.view(draws.shape)[:, :, None] - a.view(-1, count, 1, 1) * draws[:, None]).square().sum(dim=3)
    logits = -0.5 * squares / s.view(-1, count, 1) ** 2
    if others:
        logits.diagonal(dim1=1, dim2=2).fill_(-torch.inf)
    return (logits.softmax(dim=2) @ draws).flatten(0, 1)


class Critic(nn.Module):
    """The critic D_critic = base + s_u network(...). The base is the teacher's prediction, the mean of the other draws of the
    same x_t, or a_u x_u, the posterior mean of a unit Gaussian."""

    def __init__(self, models: int, dimensions: int, model: Distilled, path: DiffusionProcess) -> None:
        super().__init__()
        self.model, self.path, self.dimensions = model, path, dimensions
        inputs = dimensions * (1 + 2 * model.joint + model.residual + model.others) + 1 + model.joint
        self.network = PointDenoiser(models, inputs, width=model.critic_width)

    def forward(self, views: Views, true: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
        """Predict x_0, (N * M, D), given the teacher's predictions and the draws (N, M, D)."""
        a_u, s_u = self.path.signal_and_noise(views.u, views.x_u)
        base, columns = a_u * views.x_u, [views.x_u, a_u.log() - s_u.log()]
        if self.model.joint:
            a_t, s_t = self.path.signal_and_noise(views.t, views.x_t)
            columns += [views.x_r, views.x_t, a_t.log() - s_t.log()]
        if self.model.residual:
            base = true
            columns.append(true)
        if self.model.others:
            # The other draws are independent of this draw given x_t, so E[x | x_r, x_t] does not change.
            base = mean_of_draws(draws, views.x_r, *self.path.signal_and_noise(views.r, views.x_r), True)
            columns.append(base)
        stack = torch.cat(columns, dim=1).view(self.network.models, -1, self.network.dimensions)
        time = 0.01 * views.u.float().view(stack.shape[:2]) / self.path.last  # scaled down to few periods: u is continuous
        found = self.network.predict(self.network.features(stack, time))[..., : self.dimensions].reshape(views.x_u.shape)
        return base + s_u * found


def student_loss(model: Distilled, x: torch.Tensor, own: torch.Tensor, true: torch.Tensor, s_u: torch.Tensor) -> torch.Tensor:
    """Return losses (N,) whose gradient in x is that of the KL divergence, or of the Fisher divergence by score identity."""
    scale = (x - true).detach().abs().mean(dim=1, keepdim=True).clamp_min(MIN_SCALE) if model.normalise == "own" else s_u
    if model.identity:
        # SiD (arXiv 2404.04057), with gradients through both denoisers:  <true - own, true - x> - alpha |true - own|^2
        return ((true - own) * (true - x - model.identity * (true - own)) / scale).sum(dim=1)
    goal = (x - (own - true) / scale).detach()
    return 0.5 * (x - goal).square().sum(dim=1)


def starting_student(problem: Problem, model: Distilled, first: Budget, seeds: int) -> PointDenoiser:
    """Build the mixture that distillation starts from."""
    shape = {"models": seeds, "dimensions": problem.dimensions, "head_blocks": model.head_blocks}
    student = PointDenoiser(**shape, eta_dimensions=max(8, problem.dimensions))
    if model.start == "Gaussian":
        gaussian = train(problem, GAUSSIAN, first, seeds, PointDenoiser(**shape))
        student.load_state_dict(gaussian.state_dict(), strict=False)
    elif model.start == "energy":
        student = train(problem, SMD, first, seeds, student).requires_grad_(True)
    if model.spread:
        nn.init.constant_(student.deviation.bias, model.spread)
    return student


def descend(losses: torch.Tensor, network: nn.Module, optimizer: torch.optim.Optimizer, rate: float, seeds: int) -> None:
    """Take one optimizer step. The models share no parameters, so the sum of their losses trains each by its own loss."""
    optimizer.param_groups[0]["lr"] = rate
    network.zero_grad()
    (seeds * losses.mean()).backward()
    torch.nn.utils.clip_grad_norm_(network.parameters(), math.sqrt(seeds))
    optimizer.step()


def distil(problem: Problem, model: Distilled, budget: Budget, seeds: int) -> PointDenoiser:
    """Train ``seeds`` independent students; returns their EMA weights. Raises ValueError if T does not divide LEVELS."""
    if LEVELS % problem.steps:
        raise ValueError(f"T: expected a divisor of {LEVELS}, found {problem.steps}")
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    path = fine_process()
    first = Budget(model.first_updates, learning_rate=2e-3)
    student = starting_student(problem, model, first, seeds)
    teacher = exact_teacher(problem, path) if model.teacher == "exact" else learned_teacher(problem, path, first, seeds)
    critic = Critic(seeds, problem.dimensions, model, path)
    ema = copy.deepcopy(student).requires_grad_(False)
    betas = (model.momentum, 0.99)
    optimizer = torch.optim.AdamW(student.parameters(), lr=0, betas=betas, weight_decay=0, fused=True)
    critic_optimizer = torch.optim.AdamW(critic.parameters(), lr=0, betas=betas, weight_decay=0, fused=True)

    def draws() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return x_0, draws of the student (N, M, D), and x_t, t and eta for every draw."""
        size = seeds * budget.batch
        x0 = problem.sample(size, generator)
        t = torch.randint(problem.steps, (size,), generator=generator)
        t = torch.where(torch.rand(size, generator=generator) < model.pure_noise, problem.steps - 1, t)
        x_t = problem.process.noise(x0, torch.randn(x0.shape, generator=generator), t)
        features = student.features(x_t.view(seeds, budget.batch, -1), problem.times(t).view(seeds, -1))
        eta = torch.randn(seeds, budget.batch * model.draws, student.eta_dimensions, generator=generator)
        x = student.predict(features, eta).view(size, model.draws, -1)
        fine = (t + 1) * LEVELS // problem.steps - 1
        return x0, x, *(each.repeat_interleave(model.draws, dim=0) for each in (x_t, fine)), eta.flatten(0, 1)

    def critic_step(draws: torch.Tensor, x_t: torch.Tensor, t: torch.Tensor, rate: float) -> None:
        x = draws.flatten(0, 1)
        views = second_view(path, x, x_t, t, model, generator)
        with torch.no_grad():
            true = teacher(views.x_u, views.u)
        s_u = path.signal_and_noise(views.u, x)[1]
        losses = ((critic(views, true, draws) - x) / s_u).square().sum(dim=1)
        descend(losses, critic, critic_optimizer, rate, seeds)

    def update_ema(update: int) -> None:
        decay = min(EMA_DECAY, (update + 1) / (update + 10))
        torch._foreach_lerp_(list(ema.parameters()), [p.detach() for p in student.parameters()], 1 - decay)
        bar.update()

    bar = progress(budget.updates, 0, model.name)
    for update in range(budget.updates):
        decayed = 0.5 * (1 + math.cos(math.pi * update / budget.updates)) * min(1.0, (update + 1) / WARMUP_UPDATES)
        rate, critic_rate = budget.learning_rate * decayed, budget.learning_rate * model.critic_rate * decayed
        regresses = update < model.regression * budget.updates
        for _ in range(0 if regresses else model.critic_updates - 1):
            with torch.no_grad():
                _, many, x_t, t, _ = draws()
            critic_step(many, x_t, t, critic_rate)
        x0, many, x_t, t, eta = draws()
        x = many.flatten(0, 1)
        s_t = path.signal_and_noise(t, x)[1]
        if regresses:
            with torch.no_grad():
                goal = posterior_flow(teacher, path, x_t, t, eta[:, : x.shape[1]], FLOW_STEPS)
            descend(((x - goal) / s_t).square().sum(dim=1), student, optimizer, rate, seeds)
            update_ema(update)
            continue
        with torch.set_grad_enabled(model.identity > 0):
            views = second_view(path, x if model.identity else x.detach(), x_t, t, model, generator)
            true = teacher(views.x_u, views.u)
            if model.critic_updates:
                own = critic(views, true, many.detach())
            else:
                own = mean_of_draws(many.detach(), views.x_r, *path.signal_and_noise(views.r, x), False)
        s_u = path.signal_and_noise(views.u, x)[1]
        losses = (s_t[:, 0] * student_loss(model, x, own, true, s_u)).view(-1, model.draws).mean(dim=1)
        if model.energy:
            losses = losses + model.energy * energy(many[..., None, None], x0[..., None, None], ENERGY_BETA)
        descend(losses, student, optimizer, rate, seeds)
        if model.critic_updates:
            critic_step(many.detach(), x_t, t, critic_rate)
        update_ema(update)
    bar.close()
    return ema
