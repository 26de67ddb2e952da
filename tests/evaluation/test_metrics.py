import pytest
import torch

from ldm_smd.diffusion.process import DiffusionProcess
from ldm_smd.evaluation.diagnostics import spread_over_eta
from ldm_smd.evaluation.metrics import PixelPCA, frechet_distance


def test_frechet_distance_of_commuting_gaussians():
    """For diagonal covariances: |m_a - m_b|^2 + sum (sd_a - sd_b)^2, with the sample's own moments."""
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(500, 5, generator=generator).double()).Q
    basis = torch.linalg.qr(basis - basis.mean(dim=0)).Q * 499**0.5  # exact mean 0, covariance I
    a = basis * torch.tensor([1.0, 2, 3, 4, 5]) + 1.0
    b = basis * torch.tensor([2.0, 2, 1, 4, 9]) - 1.0
    assert frechet_distance(a, b) == pytest.approx(5 * 4 + 1 + 0 + 4 + 0 + 16, rel=1e-9)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)


def test_frechet_distance_is_symmetric_and_survives_singular_covariances():
    a, b = torch.randn(10, 30).double(), torch.randn(12, 30).double() * 2
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-6)


def test_pixel_pca_finds_the_directions_of_variance():
    torch.manual_seed(0)
    directions = torch.linalg.qr(torch.randn(48, 3).double()).Q
    x = 0.5 + (torch.randn(400, 3).double() * torch.tensor([0.3, 0.2, 0.1])) @ directions.T
    pictures = x.view(400, 3, 4, 4)
    features = PixelPCA.fit(pictures, components=3)(pictures)
    assert features.var(dim=0).sum().item() == pytest.approx(x.var(dim=0).sum().item(), rel=1e-6)
    as_bytes = (pictures.clamp(0, 1) * 255).round().to(torch.uint8)
    assert torch.allclose(PixelPCA.fit(pictures, 3)(as_bytes), PixelPCA.fit(pictures, 3)(as_bytes / 255.0), atol=1e-6)


class KnownMixture(torch.nn.Module):
    """Predicts x_0 = eta / 2."""

    is_mixture = True

    def forward(self, x, t, labels, eta):
        return type("Output", (), {"sample": eta / 2})


def test_spread_is_the_deviation_over_eta():
    process = DiffusionProcess(torch.linspace(0.99, 0.01, 10))
    spread = spread_over_eta(KnownMixture(), process, "sample", torch.randn(64, 4, 8, 8), None, [0, 9], draws=16)
    assert spread == {0: pytest.approx(0.5, rel=0.05), 9: pytest.approx(0.5, rel=0.05)}
