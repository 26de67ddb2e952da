import torch

from ldm_smd.diffusion.gaussian_mixture import GaussianMixture
from ldm_smd.models.fit import fit_shared


def test_em_recovers_a_mixture_with_a_shared_covariance():
    """Its weights, means and covariance, and the responsibilities of the exact mixture."""
    covariance = torch.tensor([[0.05, 0.03], [0.03, 0.04]], dtype=torch.float64)
    centres = torch.tensor([[0.0, 0.0], [1.5, 0.0], [0.0, 1.0]], dtype=torch.float64)
    weights = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    truth = GaussianMixture.from_covariances(weights, centres, covariance.expand(3, -1, -1))
    points = truth.sample(20_000, torch.Generator().manual_seed(0))
    found_weights, means, found, responsibilities = fit_shared(points, 3, floor=0.0, iterations=30)
    order = torch.cdist(centres, means).argmin(dim=1)
    assert torch.allclose(means[order], centres, atol=0.02)
    assert torch.allclose(found_weights[order], weights, atol=0.02)
    assert torch.allclose(found, covariance, atol=0.005)
    assert (responsibilities[:, order] - truth.responsibilities(points)).abs().mean() < 0.01
