import pytest
import torch

from ldm_smd.diffusion.central_moments import moments_of
from ldm_smd.schedulers.kernel_fit import fit_two_gaussians


@pytest.mark.slow
def test_the_fit_of_the_paper_needs_separated_initial_means():
    """Otherwise both components stay equal, without skewness."""
    first, second = torch.tensor([1.0, -0.8, 0.5]), torch.tensor([-0.2, 0.4, 0.1])
    wanted = moments_of(first, second, torch.tensor(0.3))
    floor = torch.tensor(0.01)
    found = moments_of(*fit_two_gaussians(wanted, floor, iterations=2000, separation=1.0))
    for name in ("mean", "variance", "third"):
        assert torch.allclose(getattr(found, name), getattr(wanted, name), atol=2e-2), name
    stuck = moments_of(*fit_two_gaussians(wanted, floor))
    assert stuck.third.abs().max() < 1e-3 < 0.1 * wanted.third.abs().max()
