import pytest
import torch

from ldm_smd.models.noise import PosteriorNoise
from ldm_smd.models.unet import SMDUNet2DModel

ALPHAS_CUMPROD = torch.tensor([0.99, 0.5, 0.01])


def correlated(count, channels, side, dtype=torch.float64):
    """Latents with a full covariance: white noise through a random matrix."""
    generator = torch.Generator().manual_seed(0)
    numbers = channels * side**2
    mixing = torch.randn(numbers, numbers, generator=generator, dtype=dtype) / numbers**0.5
    return (torch.randn(count, numbers, generator=generator, dtype=dtype) @ mixing).view(count, channels, side, side)


def as_matrix(noise, channels, side, t):
    """The matrix B of e = B eta."""
    units = torch.eye(channels * side**2).view(-1, channels, side, side)
    return noise(units, torch.full((len(units),), t)).flatten(1).T.double()


@pytest.mark.parametrize("t", [0, 1, 2])
def test_it_has_the_covariance_of_the_posterior(t):
    """s_t^2 B B^T = s_t^2 Sigma (a_t^2 Sigma + s_t^2)^-1, Sigma the covariance of the latents."""
    latents = correlated(5000, 2, 4)
    noise = PosteriorNoise(2, 4, rank=32, timesteps=3)
    noise.fit(latents, ALPHAS_CUMPROD)
    flat = latents.flatten(1)
    sigma = torch.cov(flat.T, correction=0)
    alphabar = float(ALPHAS_CUMPROD[t])
    exact = sigma @ torch.linalg.inv(alphabar * sigma + (1 - alphabar) * torch.eye(32, dtype=torch.float64))
    b = as_matrix(noise, 2, 4, t)
    assert torch.allclose(b @ b.T, exact, atol=1e-5)


def test_a_low_rank_takes_the_leading_components():
    latents = correlated(5000, 2, 4)
    noise = PosteriorNoise(2, 4, rank=3, timesteps=3)
    noise.fit(latents, ALPHAS_CUMPROD)
    leading = torch.linalg.eigvalsh(torch.cov(latents.flatten(1).T, correction=0)).flip(0)[:3]
    assert torch.allclose(noise.variances.double(), leading, rtol=1e-5)
    assert torch.linalg.matrix_rank(as_matrix(noise, 2, 4, 1), atol=1e-5) == 3


def test_larger_latents_get_the_same_picture():
    """The mean of 2 x 2 places has the covariance that the latents averaged so have, in noise a quarter as large."""
    small = correlated(5000, 2, 8)
    noise = PosteriorNoise(2, 8, rank=128, timesteps=3)
    noise.fit(small, ALPHAS_CUMPROD)
    eta = torch.randn(4000, 2, 16, 16)
    e = noise(eta, torch.full((4000,), 1))
    assert e.shape == eta.shape
    sigma = torch.cov(small.flatten(1).T, correction=0)
    exact = sigma @ torch.linalg.inv(4 * 0.5 * sigma + 0.5 * torch.eye(128, dtype=torch.float64))
    # Bilinear interpolation averages neighbours, which takes some of the variance.
    assert 0.3 * exact.trace() < torch.nn.functional.avg_pool2d(e, 2).flatten(1).var(dim=0).sum() < exact.trace()


def test_draws_of_a_picture_are_in_consecutive_rows():
    noise = PosteriorNoise(2, 4, rank=5, timesteps=3)
    noise.fit(correlated(100, 2, 4), ALPHAS_CUMPROD)
    eta, t = torch.randn(6, 2, 4, 4), torch.tensor([0, 2])
    assert torch.allclose(noise(eta, t)[3:], noise(eta[3:], t[1:]), atol=1e-6)


def test_rank_zero_is_white():
    eta = torch.randn(4, 2, 4, 4)
    assert PosteriorNoise(2, 4, rank=0, timesteps=3)(eta, torch.zeros(2, dtype=torch.long)) is eta


def test_a_model_keeps_what_was_fitted(tmp_path):
    model = SMDUNet2DModel(4, 2, 2, (8, 8), norm_num_groups=4, attention_head_dim=8, latent_channels=4, noise_timesteps=3)
    assert not model.hyper["noise"].is_fitted
    model.hyper["noise"].fit(correlated(100, 2, 4), ALPHAS_CUMPROD)
    model.save_pretrained(tmp_path)
    again = SMDUNet2DModel.from_pretrained(tmp_path).hyper["noise"]
    assert again.is_fitted and torch.equal(again.basis, model.hyper["noise"].basis)
