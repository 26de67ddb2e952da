import pytest
import torch

from ldm_smd.diffusion.objectives import EPSILON, energy, mixture_nll, mse, objective, timestep_weight
from ldm_smd.diffusion.process import DiffusionProcess, RectifiedFlow
from ldm_smd.diffusion.settings import LOSSES, WEIGHTINGS
from tests.diffusion.paths import KINDS


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def test_mse_is_the_mean_over_draws():
    predictions, target = draw(2, 3, 4, 5, 5), draw(2, 4, 5, 5, seed=1)
    expected = ((predictions - target[:, None]) ** 2).mean(dim=(1, 2, 3, 4))
    assert torch.allclose(mse(predictions, target), expected)


@pytest.mark.parametrize("beta", [0.5, 1.0, 1.5])
@pytest.mark.parametrize("diversity", [0.0, 0.6, 1.0])
def test_energy_computes_its_formula(beta, diversity):
    predictions, target = draw(2, 4, 3, 5, 5), draw(2, 3, 5, 5, seed=1)

    def d(a, b):
        return ((a - b).square().mean(dim=(1, 2, 3)) + EPSILON) ** (beta / 2)

    near = sum(d(predictions[:, j], target) for j in range(4)) / 4
    pairs = sum(d(predictions[:, j], predictions[:, k]) for j in range(4) for k in range(4) if j != k)
    expected = near - diversity / (2 * 4 * 3) * pairs
    assert torch.allclose(energy(predictions, target, beta, diversity), expected)


def test_energy_over_patches_is_the_mean_over_windows():
    predictions, target = draw(1, 2, 3, 4, 4), draw(1, 3, 4, 4, seed=1)
    for side in (1, 3):
        corners = range(5 - side)
        windows = [(..., slice(i, i + side), slice(j, j + side)) for i in corners for j in corners]
        expected = sum(energy(predictions[w], target[w]) for w in windows) / len(windows)
        assert torch.allclose(energy(predictions, target, patches=[side]), expected)
    both = (expected + energy(predictions, target)) / 2
    assert torch.allclose(energy(predictions, target, patches=[3, 0]), both)
    assert torch.allclose(energy(predictions, target, patches=[9]), energy(predictions, target))  # larger than the image
    low, low_target = predictions[..., :2, :], target[..., :2, :]  # 2x4: windows of 3x3 become two of 2x3
    expected = sum(energy(low[..., j : j + 3], low_target[..., j : j + 3]) for j in range(2)) / 2
    assert torch.allclose(energy(low, low_target, patches=[3]), expected)
    high, high_target = low.mT, low_target.mT
    assert torch.allclose(energy(high, high_target, patches=[3]), expected)


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_agree_with_finite_differences(name):
    loss = objective(name, beta=1.0, diversity=1.0, patches=[0, 2])
    predictions, target = draw(2, 3, 2, 3, 3).requires_grad_(), draw(2, 2, 3, 3, seed=1)
    assert torch.autograd.gradcheck(lambda p: loss(p, target), predictions, eps=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_energy_has_finite_gradients_if_draws_are_equal(dtype):
    predictions = torch.zeros(1, 2, 4, 4, 4, dtype=dtype, requires_grad=True)
    loss = energy(predictions, torch.zeros(1, 4, 4, 4, dtype=dtype), patches=[0, 1])
    loss.sum().backward()
    assert loss.dtype == torch.float32 and torch.isfinite(predictions.grad).all()


def test_energy_prefers_the_mixture_and_mse_its_mean():
    """For data at -1 or +1, draws from the data have a lower energy score than their mean, but a higher squared error."""
    target = torch.tensor([-1.0, 1.0]).repeat(500).view(1000, 1, 1, 1).double()
    generator = torch.Generator().manual_seed(0)
    mixture = torch.randint(0, 2, (1000, 2, 1, 1, 1), generator=generator).double() * 2 - 1
    collapsed = torch.zeros_like(mixture)
    assert energy(mixture, target).mean() < energy(collapsed, target).mean() - 0.3
    assert mse(collapsed, target).mean() < mse(mixture, target).mean() - 0.5


def test_energy_of_weighted_components_computes_its_formula():
    """For two components with three draws each, with explicit double sums."""
    predictions, target = draw(2, 6, 3, 2, 2), draw(2, 3, 2, 2, seed=1)
    log_weights = draw(2, 2, seed=2).log_softmax(dim=1)
    expected = []
    for p, y, w in zip(predictions, target, log_weights.exp()):

        def d(a, b):
            return ((a - b).square().mean() + EPSILON) ** 0.25

        near = sum(w[j // 3] / 3 * d(p[j], y) for j in range(6))
        far = 0.0
        for j in range(6):
            for k in range(6):
                if j != k:
                    far += w[j // 3] * w[k // 3] * (1 / 6 if j // 3 == k // 3 else 1 / 9) * d(p[j], p[k])
        expected.append(near - 0.4 * far)
    assert torch.allclose(energy(predictions, target, 0.5, 0.8, log_weights=log_weights), torch.stack(expected))


def test_energy_of_components_is_the_expectation_over_draws():
    """The exact sum over components is the expected score of independent draws from the mixture."""
    generator = torch.Generator().manual_seed(0)
    points, target = draw(1, 3, 2, 1, 1), draw(1, 2, 1, 1, seed=1)
    log_weights = torch.tensor([[0.2, 0.3, 0.5]], dtype=torch.float64).log()
    exact = energy(points, target, log_weights=log_weights)
    which = torch.multinomial(log_weights.exp().expand(100_000, -1), 2, replacement=True, generator=generator)
    sampled = energy(points[0, which], target.expand(100_000, -1, -1, -1))
    assert exact.item() == pytest.approx(sampled.mean().item(), abs=4 * sampled.std().item() / 100_000**0.5)


def test_true_weights_minimise_the_energy_score():
    target = torch.tensor([-1.0] * 250 + [1.0] * 750, dtype=torch.float64).view(-1, 1, 1, 1)
    points = torch.tensor([-1.0, 1.0], dtype=torch.float64).view(1, 2, 1, 1, 1).expand(1000, -1, -1, -1, -1)
    logit = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([logit], max_iter=50, tolerance_grad=1e-10)

    def closure():
        optimizer.zero_grad()
        log_weights = torch.cat((-logit, logit)).log_softmax(0).expand(1000, -1)
        value = energy(points, target, log_weights=log_weights).mean()
        value.backward()
        return value

    optimizer.step(closure)
    assert torch.sigmoid(2 * logit).item() == pytest.approx(0.75, abs=1e-4)


def test_mixture_nll_computes_its_formula():
    predictions, target = draw(2, 4, 3, 2, 2), draw(2, 3, 2, 2, seed=1)
    h, n = 0.7, 12
    log_weights = draw(2, 2, seed=2).log_softmax(dim=1)
    squares = (predictions - target[:, None]).square().sum(dim=(2, 3, 4))
    weights = log_weights.exp().repeat_interleave(2, dim=1) / 2
    expected = -(2 * h**2 / n) * (weights * torch.exp(-squares / (2 * h**2))).sum(1).log()
    assert torch.allclose(mixture_nll(predictions, target, h, log_weights=log_weights), expected)
    flat = -(2 * h**2 / n) * torch.exp(-squares / (2 * h**2)).mean(1).log()
    assert torch.allclose(mixture_nll(predictions, target, h), flat)
    assert torch.allclose(mixture_nll(predictions, target, 1e4), mse(predictions, target), rtol=1e-6)
    assert torch.allclose(objective("mixture_nll")(predictions, target), mixture_nll(predictions, target, 0.2))


def test_mixture_nll_is_finite_for_distant_targets_in_half_precision():
    predictions = torch.zeros(1, 2, 16, 8, 8, dtype=torch.bfloat16, requires_grad=True)
    loss = mixture_nll(predictions, torch.full((1, 16, 8, 8), 100.0, dtype=torch.bfloat16), 0.05, patches=[0, 2])
    loss.sum().backward()
    assert torch.isfinite(loss).all() and torch.isfinite(predictions.grad).all()


@pytest.mark.parametrize(
    "path, first", [(DiffusionProcess(torch.tensor([0.9, 0.5, 0.1], dtype=torch.float64)), 0), (RectifiedFlow(4), 1)]
)
@pytest.mark.parametrize("prediction_type", KINDS)
@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_a_weighting_is_the_same_for_every_prediction_type(path, first, weighting, prediction_type):
    """The same error of x_0 has the same weighted loss for every prediction type, except with weighting "prediction"."""
    t = torch.arange(first, first + 3)
    x0, eps, off = draw(3, 4), draw(3, 4, seed=1), 0.3
    x_t = path.noise(x0, eps, t)
    a, s = path.signal_and_noise(t, x0)
    wrong_eps = (x_t - a * (x0 + off)) / s  # consistent with the wrong x_0
    errors = path.target(x0 + off, wrong_eps, t, prediction_type) - path.target(x0, eps, t, prediction_type)
    error = errors.square().mean(dim=1).sqrt()
    weighted = timestep_weight(weighting, 1.5, path, t, prediction_type) * error**1.5
    a, s = a.flatten(), s.flatten()
    expected = {"v": off * (a**2 + s**2) / s, "epsilon": off * a / s, "x0": off * torch.ones(3), "prediction": error}
    expected["min_snr"] = off * (a / s).clamp_max(5**0.5)
    assert torch.allclose(weighted, expected[weighting].double() ** 1.5)


def test_invalid_arguments_are_refused():
    with pytest.raises(ValueError, match="draws: expected at least 2"):
        energy(draw(1, 1, 2, 3, 3), draw(1, 2, 3, 3))
    with pytest.raises(ValueError, match="objective: expected one of mse, energy, mixture_nll"):
        objective("likelihood")
    with pytest.raises(ValueError, match="log_weights: expected"):
        energy(draw(1, 4, 2, 3, 3), draw(1, 2, 3, 3), log_weights=torch.zeros(1, 3))
