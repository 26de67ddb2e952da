import pytest
import torch

from ldm_smd.diffusion.gaussian_mixture import GaussianMixture
from ldm_smd.diffusion.process import DiffusionProcess, RectifiedFlow, x0_per_prediction
from ldm_smd.models.fit import FLOOR, fit_posterior_noise
from ldm_smd.models.noise import PosteriorNoise, between
from ldm_smd.models.unet import SMDUNet2DModel
from tests.diffusion.paths import KINDS
from tests.rounding import nearly_equal

ALPHAS_CUMPROD = torch.tensor([0.99, 0.5, 0.01])
PROCESS = DiffusionProcess(ALPHAS_CUMPROD)


def correlated(count, channels, side, dtype=torch.float64):
    """Return latents with a full covariance matrix: white noise times a random matrix."""
    generator = torch.Generator().manual_seed(0)
    dimensions = channels * side**2
    mixing = torch.randn(dimensions, dimensions, generator=generator, dtype=dtype) / dimensions**0.5
    return (torch.randn(count, dimensions, generator=generator, dtype=dtype) @ mixing).view(count, channels, side, side)


def unlabelled(latents):
    return torch.full((len(latents),), -1)


def fitted(latents, rank, modes=1, num_classes=None, labels=None, path=PROCESS, prediction_type="v_prediction"):
    noise = PosteriorNoise(latents.shape[1], latents.shape[2], rank, modes, num_classes, timesteps=path.last + 1)
    fit_posterior_noise(noise, latents, unlabelled(latents) if labels is None else labels, path, prediction_type)
    return noise


def as_matrix(noise, channels, side, t):
    """Return the matrix B of e = B eta. The noise is linear in eta if the mixture has one component."""
    units = torch.eye(channels * side**2).view(-1, channels, side, side)
    return noise(units, torch.zeros_like(units), torch.full((len(units),), t)).flatten(1).T.double()


@pytest.mark.parametrize("t", [0, 1, 2])
def test_one_mode_has_the_covariance_of_the_gaussian_posterior(t):
    """s_t^2 B B^T = s_t^2 Sigma (a_t^2 Sigma + s_t^2)^-1 in the kept principal components, for latents of covariance Sigma."""
    latents = correlated(5000, 2, 4)
    noise = fitted(latents, rank=31)
    variances, basis = torch.linalg.eigh(torch.cov(latents.flatten(1).T, correction=0))
    alphabar = float(ALPHAS_CUMPROD[t])
    variances += FLOOR * variances[1:].mean()
    variances[0] = 0.0  # the component that is not kept
    exact = basis @ torch.diag(variances / (alphabar * variances + 1 - alphabar)) @ basis.T
    b = as_matrix(noise, 2, 4, t)
    assert torch.allclose(b @ b.T, exact, atol=1e-3)


def two_classes(count=4000):
    """Return latents (N, 1, 2, 2), each around one of three centres. Class 0 has the first two centres, class 1 the last."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.tensor([[2.0, 1, 0, 0], [-2, 1, 0, 0], [0, -2, 0, 0]]).double()
    which = torch.randint(3, (count,), generator=generator)
    spread = torch.tensor([0.4, 0.3, 0.2, 0.1]).double()
    points = centres[which] + spread * torch.randn(count, 4, generator=generator).double()
    return points.view(-1, 1, 2, 2), (which == 2).long(), centres, spread


@pytest.mark.parametrize("path, kind", [(PROCESS, "v_prediction"), (RectifiedFlow(4), "flow_prediction")])
@pytest.mark.parametrize("t, label", [(1, 0), (2, 0), (2, 1), (1, None), (2, None)])
def test_fitted_noise_samples_the_posterior_of_the_mixture(t, label, path, kind):
    """Over eta it has mean 0 and the standard deviation of the exact posterior, at an x_t with several possible modes."""
    latents, labels, centres, spread = two_classes()
    noise = fitted(latents, 3, modes=3, num_classes=2, labels=labels, path=path, prediction_type=kind)
    weights = {None: [1 / 3] * 3, 0: [0.5, 0.5, 1e-9], 1: [1e-9, 1e-9, 1.0]}[label]
    weights = torch.tensor(weights).double() / sum(weights)
    floor = FLOOR * torch.linalg.eigvalsh(torch.cov(latents.flatten(1).T))[1:].mean()
    exact = GaussianMixture.from_covariances(weights, centres, torch.diag(spread**2 + floor).expand(3, 4, 4))
    a, s = (value.item() for value in path.signal_and_noise(torch.tensor([t]), torch.zeros(1)))
    x_t = torch.tensor([[0.05, 0.1, 0.0, 0.0]]).double()
    posterior = exact.posterior(x_t, a, s)
    class_labels = None if label is None else torch.tensor([label])
    eta = torch.randn(40_000, 1, 2, 2, generator=torch.Generator().manual_seed(1))
    e = noise(eta, x_t.float().view(1, 1, 2, 2), torch.tensor([t]), class_labels).flatten(1).double()
    e = e * x0_per_prediction(kind, torch.tensor(a), torch.tensor(s)) / s  # x_0 in units of s
    drawn = posterior.sample(40_000, torch.Generator().manual_seed(2))[0]
    assert e.mean(dim=0).abs().max() < 0.02 * drawn.std(dim=0).max() / s
    assert torch.allclose(s * e.std(dim=0)[:3], drawn.std(dim=0)[:3], rtol=0.05, atol=0.01)
    # The 1-Wasserstein distance along the axis of the modes shows more than the moments.
    centred = drawn[:, 0] - posterior.mean()[0, 0]
    assert (s * e[:, 0].sort().values - centred.sort().values).abs().mean() < 0.08


def test_a_low_rank_keeps_the_leading_principal_components():
    latents = correlated(5000, 2, 4)
    noise = fitted(latents, rank=3)
    leading = torch.linalg.eigvalsh(torch.cov(latents.flatten(1).T, correction=0)).flip(0)[:3]
    assert torch.allclose(noise.variances.flip(0).double(), leading + FLOOR * leading.mean(), rtol=0.01)
    assert torch.linalg.matrix_rank(as_matrix(noise, 2, 4, 1), atol=1e-5) == 3


def test_larger_latents_get_the_same_layout():
    """The mean over 2 x 2 positions has nearly the variance of the posterior of averaged latents, with a quarter of the noise
    variance."""
    small = correlated(5000, 2, 8)
    noise = fitted(small, rank=127)
    eta = torch.randn(4000, 2, 16, 16)
    e = noise(eta, torch.zeros_like(eta), torch.full((4000,), 1))
    assert e.shape == eta.shape
    sigma = torch.cov(small.flatten(1).T, correction=0)
    exact = sigma @ torch.linalg.inv(4 * 0.5 * sigma + 0.5 * torch.eye(128, dtype=torch.float64))
    # Bilinear interpolation averages neighbours and removes some of the variance. FLOOR adds a little.
    assert 0.3 * exact.trace() < torch.nn.functional.avg_pool2d(e, 2).flatten(1).var(dim=0).sum() < 1.05 * exact.trace()


@pytest.mark.parametrize("size", [(4, 4), (4, 2), (2, 8)])
@pytest.mark.parametrize("t", [1, 2])
def test_larger_latents_have_the_posterior_of_their_means(t, size):
    """For several modes: the mean of n positions has noise of the standard deviation s_t / n^(1/2)."""
    latents, labels, centres, spread = two_classes()
    noise = fitted(latents, 3, modes=3, num_classes=2, labels=labels)
    floor = FLOOR * torch.linalg.eigvalsh(torch.cov(latents.flatten(1).T))[1:].mean()
    exact = GaussianMixture.from_covariances(
        torch.full((3,), 1 / 3).double(), centres, torch.diag(spread**2 + floor).expand(3, 4, 4)
    )
    a, s = (value.item() for value in PROCESS.signal_and_noise(torch.tensor([t]), torch.zeros(1)))
    means = torch.tensor([[0.05, 0.1], [0.0, 0.0]])
    x_t = means.repeat_interleave(size[0] // 2, dim=0).repeat_interleave(size[1] // 2, dim=1).view(1, 1, *size)
    pooled_s = s / (size[0] * size[1] / 4) ** 0.5
    drawn = exact.posterior(means.view(1, 4).double(), a, pooled_s).sample(20_000, torch.Generator().manual_seed(2))[0]
    eta = torch.randn(20_000, 1, *size, generator=torch.Generator().manual_seed(1))
    e = noise(eta, x_t, torch.tensor([t]))
    corners = e[..., :: size[0] - 1, :: size[1] - 1].flatten(1).double()  # equal to the means, before interpolation
    assert torch.allclose(s * corners.std(dim=0)[:3], drawn.std(dim=0)[:3], rtol=0.07, atol=0.01)
    centred = -drawn[:, 0] + drawn[:, 0].mean()  # v has the opposite sign of x_0
    assert (s * corners[:, 0].sort().values - centred.sort().values).abs().mean() < 0.08


def test_the_deviation_within_a_mode_does_not_depend_on_the_choice_of_the_mode():
    """Each of two distant modes has the whole posterior variance of its own, in all directions."""
    generator = torch.Generator().manual_seed(0)
    latents = 0.5 * torch.randn(4000, 4, generator=generator).double()
    latents[:, 0] += torch.where(torch.arange(4000) < 2000, 3.0, -3.0)
    noise = fitted(latents.view(-1, 1, 2, 2), 3, modes=2)
    eta = torch.randn(20_000, 1, 2, 2, generator=generator)
    e = noise(eta, torch.zeros(1, 1, 2, 2), torch.tensor([2])).flatten(1)
    alphabar = ALPHAS_CUMPROD[2]
    expected = (noise.variances / (alphabar * noise.variances + 1 - alphabar)).sqrt()
    chosen = e[:, 0] > 0
    assert chosen.double().mean() == pytest.approx(0.5, abs=0.03)
    for draws in (e[chosen], e[~chosen]):
        assert torch.allclose((draws @ noise.basis.T).std(dim=0), expected, rtol=0.05)


def test_draws_of_an_image_are_in_consecutive_rows():
    latents, labels, _, _ = two_classes(500)
    noise = fitted(latents, 3, modes=3, num_classes=2, labels=labels)
    eta, x_t, t, y = torch.randn(6, 1, 2, 2), torch.randn(2, 1, 2, 2), torch.tensor([0, 2]), torch.tensor([0, 1])
    assert nearly_equal(noise(eta, x_t, t, y)[3:], noise(eta[3:], x_t[1:], t[1:], y[1:]))


def test_one_timestep_applies_to_all_images():
    latents, labels, _, _ = two_classes(500)
    noise = fitted(latents, 3, modes=3, num_classes=2, labels=labels)
    eta, x_t, y = torch.randn(6, 1, 2, 2), torch.randn(2, 1, 2, 2), torch.tensor([0, 1])
    assert nearly_equal(noise(eta, x_t, torch.tensor([1]), y), noise(eta, x_t, torch.tensor([1, 1]), y))
    for classes in (None, 2):
        torch.manual_seed(0)
        model = SMDUNet2DModel(4, 2, 2, (8, 8), num_classes=classes, norm_num_groups=4, attention_head_dim=8, noise_modes=2)
        eta, x_t, labels = torch.randn(6, 2, 4, 4), torch.randn(2, 2, 4, 4), None if classes is None else y
        one, each = model(x_t, 500, labels, eta).sample, model(x_t, torch.tensor([500, 500]), labels, eta).sample
        assert nearly_equal(one, each)


def test_rank_zero_gives_white_noise():
    eta = torch.randn(4, 2, 4, 4)
    noise = PosteriorNoise(2, 4, 0, 1, None, timesteps=3)
    assert torch.equal(noise(eta, eta[:2], torch.zeros(2, dtype=torch.long)), eta)


def test_a_saved_model_contains_its_fitted_noise(tmp_path):
    model = SMDUNet2DModel(
        4, 2, 2, (8, 8), norm_num_groups=4, attention_head_dim=8, z_channels=4, noise_modes=2, noise_timesteps=3
    )
    assert not model.mixture.noise.is_fitted
    latents = correlated(100, 2, 4)
    fit_posterior_noise(model.mixture.noise, latents, unlabelled(latents), PROCESS, "v_prediction")
    model.save_pretrained(tmp_path)
    again = SMDUNet2DModel.from_pretrained(tmp_path).mixture.noise
    assert again.is_fitted
    for name, buffer in model.mixture.noise.named_buffers():
        assert torch.equal(dict(again.named_buffers())[name], buffer), name


def test_float16_noise_is_close_to_float32():
    latents = correlated(100, 2, 4)
    noise = fitted(latents, 3, modes=2)
    eta, x_t, t = torch.randn(4, 2, 4, 4), torch.randn(2, 2, 4, 4), torch.tensor([1, 2])
    exact = noise(eta, x_t, t)
    half = noise.half()(eta.half(), x_t.half(), t)
    assert half.dtype == torch.float16 and torch.allclose(half.float(), exact, atol=0.05)


@pytest.mark.parametrize("prediction_type", KINDS)
def test_noise_adds_the_same_to_x0_for_every_prediction_type(prediction_type):
    """And for every path with the same signal-to-noise ratios, with x_t scaled to its units."""
    latents = correlated(200, 2, 4)
    flow = RectifiedFlow(4)
    a, s = (value[1:4] for value in flow.signal_and_noise(torch.arange(5), torch.zeros(1)))
    preserving = DiffusionProcess(a**2 / (a**2 + s**2))
    eta, x_t, t = torch.randn(3, 2, 4, 4), torch.randn(3, 2, 4, 4), torch.tensor([0, 1, 2])
    norm = torch.hypot(a, s).view(-1, 1, 1, 1)
    wanted = fitted(latents, 3, modes=2, path=preserving)(eta, x_t, t)
    wanted = wanted * -preserving.signal_and_noise(t, wanted)[1]
    for path, x, step in ((preserving, x_t, t), (flow, norm * x_t, t + 1)):
        e = fitted(latents, 3, modes=2, path=path, prediction_type=prediction_type)(eta, x, step)
        x0 = path.to_x0(e, x, step, prediction_type) - path.to_x0(torch.zeros_like(e), x, step, prediction_type)
        assert nearly_equal(x0, wanted)


def test_tables_of_a_variance_preserving_process():
    """Its norms are 1 up to rounding. Older weights have no norms and rely on this."""
    noise = fitted(correlated(100, 2, 4), 3)
    assert torch.allclose(noise.norms, torch.ones(3), rtol=2e-7, atol=0.0)
    assert torch.allclose(noise.alphas_cumprod, ALPHAS_CUMPROD, rtol=2e-7, atol=0.0)
    assert torch.allclose(noise.scale, -torch.ones(3), rtol=2e-7, atol=0.0)


def test_a_path_with_other_timesteps_is_refused():
    noise = PosteriorNoise(2, 4, 3, 1, None, timesteps=4)
    with pytest.raises(ValueError, match="timesteps: expected 5, 0 to the last of the path, found 4"):
        fit_posterior_noise(noise, correlated(100, 2, 4), torch.full((100,), -1), RectifiedFlow(4), "flow_prediction")


def test_fractional_timesteps_are_interpolated():
    """Schedulers that space their steps by sigma use such timesteps."""
    assert torch.equal(
        between(torch.tensor([1.0, 3.0, 7.0]), torch.tensor([0.0, 0.5, 1.25, 2.0])), torch.tensor([1, 2, 4, 7.0])
    )
    latents = correlated(100, 2, 4)
    noise = fitted(latents, 3, modes=2)
    eta, x_t = torch.randn(3, 2, 4, 4), torch.randn(1, 2, 4, 4).expand(3, -1, -1, -1)
    e = noise(eta[:1].expand(3, -1, -1, -1), x_t, torch.tensor([1.0, 1.001, 1.999]))
    assert torch.equal(e[:1], noise(eta[:1], x_t[:1], torch.tensor([1])))
    assert torch.allclose(e[0], e[1], atol=0.01) and not torch.allclose(e[0], e[2], atol=0.01)


def test_fewer_latents_than_modes_are_refused():
    with pytest.raises(ValueError, match="at least one for each of 5 modes, found 4"):
        fitted(correlated(4, 2, 4), 3, modes=5)
