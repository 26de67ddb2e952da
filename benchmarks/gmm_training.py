"""Training of the models of the Gaussian mixture lab."""

from __future__ import annotations

import copy
import math

import numpy as np
import torch
from gmm_cells import Budget, Model
from gmm_data import Problem
from gmm_models import PointDenoiser, parameters_per_model
from sklearn.cluster import kmeans_plusplus

from ldm_smd.diffusion.objectives import energy, mixture_nll, mse, timestep_weight
from ldm_smd.progress import progress

CENTRE_POINTS = 2000
"""Data points that the centres of the components are chosen from."""
FIXED_CENTRES = 0.2
"""Fraction of the updates, at the start, in which the components keep their centres. Otherwise they all follow x_t before the
network has learned their weights, and few of them end up with all the weight."""
WARMUP_UPDATES = 200


def train(problem: Problem, model: Model, budget: Budget, seeds: int, network: PointDenoiser | None = None) -> PointDenoiser:
    """Train ``seeds`` independent models, each on its own fresh samples; returns their EMA weights.

    Args:
        network: initial network, in place of a new one.
    """
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    network = network or build(problem, model, seeds)
    if model.components > 1:
        points = problem.sample(CENTRE_POINTS, generator).numpy()
        centres = [kmeans_plusplus(points, model.components, random_state=seed)[0] for seed in range(seeds)]
        network.centre.data = torch.from_numpy(np.stack(centres))
    ema = copy.deepcopy(network).requires_grad_(False)
    moving = network.displacement_parameters()
    others = [p for p in network.parameters() if all(p is not each for each in moving)]
    optimizer = torch.optim.AdamW([{"params": others}, {"params": moving}], betas=(0.9, 0.99), weight_decay=0, fused=True)
    bar = progress(budget.updates, 0, model.name)
    for update in range(budget.updates):
        rate = min(1.0, (update + 1) / WARMUP_UPDATES) * 0.5 * (1 + math.cos(math.pi * update / budget.updates))
        for group in optimizer.param_groups:
            group["lr"] = budget.learning_rate * rate
        if update < FIXED_CENTRES * budget.updates:
            optimizer.param_groups[1]["lr"] = 0.0
        losses = batch_losses(problem, model, network, budget.batch, generator)
        optimizer.zero_grad(set_to_none=True)
        # The models share no parameters, so the sum of their losses trains each by its own loss.
        (seeds * losses.mean()).backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), math.sqrt(seeds))
        optimizer.step()
        decay = min(0.999, (update + 1) / (update + 10))
        torch._foreach_lerp_(list(ema.parameters()), [p.detach() for p in network.parameters()], 1 - decay)
        bar.update()
    bar.close()
    return ema


def build(problem: Problem, model: Model, seeds: int) -> PointDenoiser:
    """Build the networks of a model. A Gaussian one is widened to about as many parameters as a mixture."""
    shape = {"models": seeds, "dimensions": problem.dimensions}
    mixture = {"eta_dimensions": max(8, problem.dimensions), "components": model.components}
    if model.mixture:
        return PointDenoiser(**shape, **mixture)
    wanted = parameters_per_model(PointDenoiser(**shape, **mixture))
    widths = range(64, 128)
    width = min(widths, key=lambda w: abs(parameters_per_model(PointDenoiser(**shape, width=w)) - wanted))
    return PointDenoiser(**shape, width=width)


def batch_losses(
    problem: Problem, model: Model, network: PointDenoiser, batch: int, generator: torch.Generator
) -> torch.Tensor:
    """Return the weighted losses of ``batch`` new samples for each of E models: (E * batch,)."""
    shape = (network.models, batch)
    x0 = problem.sample(math.prod(shape), generator)
    t = torch.randint(problem.steps, (len(x0),), generator=generator)
    x_t = problem.process.noise(x0, torch.randn(x0.shape, generator=generator), t).view(*shape, -1)
    features = network.features(x_t, problem.times(t).view(shape))
    eta, component, log_weights = None, None, None
    if model.mixture:
        eta = torch.randn(network.models, batch * model.draws * model.components, network.eta_dimensions, generator=generator)
        eta = torch.zeros_like(eta) if model.frozen else eta
    if model.components > 1:
        component = torch.arange(model.components).repeat_interleave(model.draws).repeat(shape)
        log_weights = network.log_weights(x_t, features).flatten(0, 1)
    predictions = network.predict(features, eta, component).view(len(x0), -1, problem.dimensions, 1, 1)
    exponent = model.beta if model.objective == "energy" else 2.0
    weight = timestep_weight("v", exponent, problem.process, t, "sample")
    return weight * loss(model, predictions, x0[..., None, None], log_weights)


def loss(model: Model, predictions: torch.Tensor, target: torch.Tensor, log_weights: torch.Tensor | None) -> torch.Tensor:
    if model.objective == "mse":
        return mse(predictions, target)
    if model.objective == "mixture_nll":
        return mixture_nll(predictions, target, model.bandwidth, log_weights=log_weights)
    return energy(predictions, target, model.beta, log_weights=log_weights)
