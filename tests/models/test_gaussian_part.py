"""LatentGaussians: its closed-form probability flow compared with the ODE, and its means with exact posteriors."""

import itertools

import pytest
import torch

from ldm_smd.diffusion.gaussian_mixture import GaussianMixture
from ldm_smd.models.gaussian import LatentGaussians
from tests.rounding import nearly_equal

SHAPE = (2, 2, 2)


def at(sigma):
    """Return (a, s) of a variance-preserving process with s / a = sigma."""
    a = (1.0 + sigma**2) ** -0.5
    return a, sigma * a


def gaussians(classes=2, rank=7):
    """Return random Gaussians, one for each class and one for all classes, and their full covariances."""
    generator = torch.Generator().manual_seed(0)
    part = LatentGaussians(*SHAPE, rank, classes + 1, num_classes=classes).double()
    covariances = []
    for row in range(classes + 1):
        vectors, _ = torch.linalg.qr(torch.randn(8, 8, generator=generator).double())
        variances = 0.05 + torch.rand(rank, generator=generator).double()
        part.log_weights[row, row] = 0.0
        part.means[row] = torch.randn(8, generator=generator).double()
        part.vectors[row], part.variances[row], part.tails[row] = vectors[:, :rank].T, variances, 0.02
        spectrum = torch.cat((variances, torch.full((8 - rank,), 0.02).double()))
        covariances.append(vectors @ torch.diag(spectrum) @ vectors.T)
    return part, torch.stack(covariances)


@pytest.mark.parametrize("rank", [7, 3])
@pytest.mark.parametrize("sigma", [10.0, 1.0, 0.05])
def test_the_flow_solves_the_ode(rank, sigma):
    """The ODE is dy / dsigma = -sigma score(y), for y = x / a. It is solved in 4,000 steps of Heun's method."""
    part, covariances = gaussians(rank=rank)
    labels = torch.tensor([0, 1, 2])
    x_t = torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(1)).double()
    mean, covariance = part.means[labels], covariances[labels]
    start = 80.0
    y = x_t.flatten(1) / at(start)[0]

    def slope(y, sigma):
        noisy = covariance + sigma**2 * torch.eye(8).double()
        return sigma * torch.linalg.solve(noisy, (y - mean)[..., None])[..., 0]

    sigmas = torch.logspace(torch.log10(torch.tensor(start)).item(), torch.log10(torch.tensor(sigma)).item(), 4001).double()
    for this, following in itertools.pairwise(sigmas):
        k = slope(y, this)
        y = y + (following - this) / 2 * (k + slope(y + (following - this) * k, following))
    found = part.transport(x_t, at(start), at(sigma), labels)
    assert torch.allclose(found.flatten(1), at(sigma)[0] * y, atol=1e-5)


def test_equal_noise_levels_give_the_identity_and_no_label_means_all_classes():
    part, _ = gaussians()
    x = torch.randn(2, *SHAPE).double()
    assert torch.allclose(part.transport(x, at(3.0), at(3.0), torch.tensor([0, 1])), x)
    assert nearly_equal(part.transport(x, at(9.0), at(3.0)), part.transport(x, at(9.0), at(3.0), torch.tensor([2, 2])))


def test_a_mixture_transports_samples_between_its_marginals():
    """Samples of one noise level become samples of another, with the weights of the class."""
    centres = torch.tensor([[2.0, 0], [-2, 0], [0, 2.5]]).double()
    part = LatentGaussians(2, 1, 1, rank=2, count=3, shared=True, num_classes=1).double()
    part.log_weights.copy_(torch.tensor([[0.7, 0.1, 0.2], [0.2, 0.4, 0.4]]).log())
    part.means.copy_(centres)
    part.vectors[0], part.variances[0] = torch.eye(2), torch.tensor([0.05, 0.1])
    covariance = torch.diag(part.variances[0]).expand(3, 2, 2)
    generator = torch.Generator().manual_seed(0)
    for row, labels in ((0, torch.zeros(20_000, dtype=torch.long)), (1, None)):
        data = GaussianMixture.from_covariances(part.log_weights[row].exp(), centres, covariance)
        x_t = data.diffused(*at(4.0)).sample(20_000, generator)
        uniform = torch.rand(20_000, generator=generator)
        moved = part.transport(x_t[..., None, None], at(4.0), at(0.5), labels, uniform).flatten(1)
        wanted = data.diffused(*at(0.5)).sample(20_000, generator)
        for direction in torch.tensor([[1.0, 0], [0, 1], [0.7, 0.7]]).double():
            difference = (moved @ direction).sort().values - (wanted @ direction).sort().values
            assert difference.abs().mean() < 0.04
    with pytest.raises(ValueError, match="uniform: expected a number"):
        part.transport(x_t[..., None, None], at(4.0), at(0.5))


def test_saves_and_loads(tmp_path):
    part, _ = gaussians()
    part.save_pretrained(tmp_path)
    again = LatentGaussians.from_pretrained(tmp_path)
    x = torch.randn(2, *SHAPE)
    assert nearly_equal(again.transport(x, at(9.0), at(1.0)), part.float().transport(x, at(9.0), at(1.0)))
    with pytest.raises(ValueError, match=r"expected \(B, 2, 2, 2\).*found \(1, 2, 4, 4\).*fit_gaussian\.py"):
        part.transport(torch.zeros(1, 2, 4, 4), at(9.0), at(1.0))
    with pytest.raises(ValueError, match="count: expected one for each class and one for all, 3, found 2"):
        LatentGaussians(*SHAPE, 3, 2, num_classes=2)


def test_the_expected_x0_is_that_of_the_posterior():
    """Compared with the closed form of diffusion/gaussian_mixture.py, for one Gaussian per class and for a mixture."""
    part, covariances = gaussians()
    x = torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(2)).double()
    found = part.expected_x0(x, at(0.7), torch.tensor([0, 1, 2])).flatten(1)
    for row in range(3):
        data = GaussianMixture.from_covariances(torch.ones(1).double(), part.means[row : row + 1], covariances[row : row + 1])
        assert torch.allclose(found[row : row + 1], data.posterior(x[row : row + 1].flatten(1), *at(0.7)).mean(), atol=1e-10)

    centres = torch.tensor([[2.0, 0], [-2, 0], [0, 2.5]]).double()
    part = LatentGaussians(2, 1, 1, rank=2, count=3, shared=True).double()
    weights = torch.tensor([0.7, 0.1, 0.2]).double()
    part.log_weights[0] = weights.log()
    part.means.copy_(centres)
    part.vectors[0], part.variances[0] = torch.eye(2), torch.tensor([0.05, 0.1])
    data = GaussianMixture.from_covariances(weights, centres, torch.diag(part.variances[0]).expand(3, 2, 2))
    x = data.diffused(*at(0.7)).sample(50, torch.Generator().manual_seed(3))
    found = part.expected_x0(x[..., None, None], at(0.7)).flatten(1)
    assert torch.allclose(found, data.posterior(x, *at(0.7)).mean(), atol=1e-10)
