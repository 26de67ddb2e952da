import pytest
import torch

from ldm_smd.diffusion.objectives import EPSILON, energy, mse, objective


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def test_mse_is_the_mean_over_draws():
    predictions, target = draw(2, 3, 4, 5, 5), draw(2, 4, 5, 5, seed=1)
    expected = ((predictions - target[:, None]) ** 2).mean(dim=(1, 2, 3, 4))
    assert torch.allclose(mse(predictions, target), expected)


@pytest.mark.parametrize("beta", [0.5, 1.0, 1.5])
@pytest.mark.parametrize("diversity", [0.0, 0.6, 1.0])
def test_energy_is_its_formula(beta, diversity):
    predictions, target = draw(2, 4, 3, 5, 5), draw(2, 3, 5, 5, seed=1)

    def d(a, b):
        return ((a - b).square().mean(dim=(1, 2, 3)) + EPSILON) ** (beta / 2)

    near = sum(d(predictions[:, j], target) for j in range(4)) / 4
    pairs = sum(d(predictions[:, j], predictions[:, k]) for j in range(4) for k in range(4) if j != k)
    expected = near - diversity / (2 * 4 * 3) * pairs
    assert torch.allclose(energy(predictions, target, beta, diversity), expected)


def test_energy_over_patches_is_the_mean_over_windows():
    predictions, target = draw(1, 2, 3, 4, 4), draw(1, 3, 4, 4, seed=1)
    windows = [(slice(None), slice(None), slice(i, i + 3), slice(j, j + 3)) for i in range(2) for j in range(2)]
    expected = sum(energy(predictions[(slice(None), *w)], target[w]) for w in windows) / 4
    assert torch.allclose(energy(predictions, target, patches=[3]), expected)
    both = (expected + energy(predictions, target)) / 2
    assert torch.allclose(energy(predictions, target, patches=[3, 0]), both)
    assert torch.isfinite(energy(predictions, target, patches=[9])).all()  # larger than the picture: the whole picture


@pytest.mark.parametrize("name", ["mse", "energy"])
def test_gradients(name):
    loss = objective(name, beta=1.0, diversity=1.0, patches=[0, 2])
    predictions, target = draw(2, 3, 2, 3, 3).requires_grad_(), draw(2, 2, 3, 3, seed=1)
    assert torch.autograd.gradcheck(lambda p: loss(p, target), predictions, eps=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_energy_is_stable_where_draws_agree(dtype):
    predictions = torch.zeros(1, 2, 4, 4, 4, dtype=dtype, requires_grad=True)
    loss = energy(predictions, torch.zeros(1, 4, 4, 4, dtype=dtype), patches=[0, 1])
    loss.sum().backward()
    assert loss.dtype == torch.float32 and torch.isfinite(predictions.grad).all()


def test_energy_prefers_the_mixture_and_mse_its_mean():
    """Data at -1 or +1: the score of draws from it is below that of its mean; squared error says the reverse."""
    target = torch.tensor([-1.0, 1.0]).repeat(500).view(1000, 1, 1, 1).double()
    generator = torch.Generator().manual_seed(0)
    mixture = torch.randint(0, 2, (1000, 2, 1, 1, 1), generator=generator).double() * 2 - 1
    collapsed = torch.zeros_like(mixture)
    assert energy(mixture, target).mean() < energy(collapsed, target).mean() - 0.3
    assert mse(collapsed, target).mean() < mse(mixture, target).mean() - 0.5


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="draws: expected at least 2"):
        energy(draw(1, 1, 2, 3, 3), draw(1, 2, 3, 3))
    with pytest.raises(ValueError, match="objective: expected one of mse, energy"):
        objective("likelihood")
