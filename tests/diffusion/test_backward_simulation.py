"""Backward simulation."""

import pytest
import torch

from ldm_smd.diffusion.backward_simulation import simulate_backward
from ldm_smd.diffusion.process import DiffusionProcess, RectifiedFlow
from ldm_smd.diffusion.settings import DiffusionConfig
from ldm_smd.schedulers.schedule import build_scheduler

ENDS = torch.tensor([999, 700, 300, 50])
COUNT = 20_000


@pytest.mark.parametrize("flow", [False, True])
@pytest.mark.parametrize("steps", [1, 2, 4])
def test_exact_draws_give_the_noised_data_at_every_timestep(flow, steps):
    """For data of variance 4, with draws from the exact q(x_0 | x_t)."""
    path = RectifiedFlow() if flow else DiffusionProcess(build_scheduler(DiffusionConfig()).alphas_cumprod)
    t = (ENDS.float() if flow else ENDS).repeat_interleave(COUNT)
    seen = []

    def draw(x, now, eta):
        seen.append(now[::COUNT])
        a, s = path.signal_and_noise(now, x)
        variance = 1 / (1 / 4 + a**2 / s**2)
        return variance * a / s**2 * x + variance.sqrt() * eta

    generator = torch.Generator().manual_seed(0)
    first, etas, noises = (torch.randn(len(t), *more, 1, generator=generator) for more in ((), (steps,), (steps,)))
    x_t = simulate_backward(draw, path, first, t, etas, noises, steps)
    a, s = path.signal_and_noise(ENDS, ENDS.float())
    assert torch.allclose(x_t.view(4, COUNT).var(dim=1), 4 * a**2 + s**2, rtol=0.05)
    for number, now in enumerate(seen):
        even = path.last - (path.last - ENDS) * number / steps
        assert torch.allclose(now.float(), even, atol=1.1), "evenly spaced, from the last timestep"
    assert len(seen) == steps
