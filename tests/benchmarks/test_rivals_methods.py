"""Few-step methods, each where its answer is known."""

import few_step.flow_maps as flow_maps
import pytest
import torch
from few_step.adversarial import trained_levels
from few_step.consistency import consistency_loss, denoise, lower_level
from few_step.jobs import Job
from few_step.moment_matching import kernel_loss, transition
from few_step.network import Critic, denoiser, levels, trailing

from ldm_smd.models.gaussian import LatentGaussians
from tests.benchmarks.tiny_start import batch


def test_networks_predict_as_the_gaussian_model_at_first(start):
    x, labels = batch()
    t = torch.tensor([0, 1, 10, 100, 300, 500, 800, 999])
    sigma = (1 / start.alphas_cumprod[t] - 1).sqrt()
    expected = start.unet(x, t, labels, return_dict=False)[0]
    second = torch.rand(8)
    torch.testing.assert_close(denoiser(start)(x, sigma, labels), expected, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(denoiser(start, second=True)(x, sigma, labels, second), expected, atol=1e-3, rtol=1e-3)
    wide = torch.cat((x, torch.randn(x.shape)), dim=1)
    torch.testing.assert_close(denoiser(start, more_channels=3)(wide, sigma, labels), expected, atol=1e-3, rtol=1e-3)
    a, s = levels(sigma)
    clean, features = denoiser(start).clean_and_features(x, sigma, labels)
    torch.testing.assert_close(clean, a * x - s * expected, atol=1e-3, rtol=1e-3)
    assert features.shape == (8, 16, 2, 2)
    assert Critic(denoiser(start))(x, sigma, labels).shape == (8,)


def test_blurred_time_keeps_slow_features(start):
    smooth = denoiser(start, smooth=True).unet.time_proj
    t = torch.tensor([3.0, 500.0])
    found, sharp = smooth(t), start.unet.time_proj(t)
    torch.testing.assert_close(found[:, [7, 15]], sharp[:, [7, 15]], atol=1e-3, rtol=1e-3)  # the slowest
    assert found[:, [0, 8]].abs().max() < 1e-6  # the fastest


def test_velocity_of_the_straight_path(start):
    """With r = t, the average velocity is eps - x_0 if the v of the Gaussian model is a eps - s x_0."""
    x0, labels = batch()
    eps, t = torch.randn(x0.shape), torch.linspace(0.05, 0.95, 8)
    sigma = t / (1 - t)
    a, s = levels(sigma)
    straight = t.view(-1, 1, 1, 1)

    class Known(torch.nn.Module):
        def forward(self, x_t, sigma, labels, second):
            torch.testing.assert_close(x_t, a * x0 + s * eps)
            return a * eps - s * x0

    found = flow_maps.average_velocity(Known(), (1 - straight) * x0 + straight * eps, t, t, labels)
    torch.testing.assert_close(found, eps - x0, atol=1e-5, rtol=1e-5)


def test_mean_flow_derivative_agrees_with_finite_differences(start):
    method = Job("meanflow").make(start)
    model = method.networks["model"].double()
    torch.nn.init.normal_(model.unet.image_embedding.weight, std=0.1)
    x, labels = batch()
    t = torch.linspace(0.2, 0.9, 8).double()
    r = 0.4 * t
    u, exact = method.derivative(model, x.double(), r, t, labels)
    method.settings.derivative = "difference"
    same, difference = method.derivative(model, x.double(), r, t, labels)
    torch.testing.assert_close(u, same)
    assert (exact - difference).norm() < 1e-2 * exact.norm()
    assert u.requires_grad and not exact.requires_grad


@pytest.mark.parametrize("name", ["meanflow", "alphaflow", "shortcut"])
def test_flow_maps_with_r_equal_to_t_are_flow_matching(start, name):
    method = Job(name, {"share_equal": 1.0}).make(start)
    x0, labels = batch()
    eps, t = torch.randn(x0.shape), torch.linspace(0.1, 0.9, 8)
    straight = t.view(-1, 1, 1, 1)
    z, v = (1 - straight) * x0 + straight * eps, eps - x0
    errors = (flow_maps.average_velocity(method.networks["model"], z, t, t, labels) - v).square().flatten(1).sum(dim=1)
    per_element = errors / x0[0].numel()
    expected = {
        "meanflow": errors / (errors + 0.01),
        "alphaflow": per_element / (per_element + 1e-3),
        "shortcut": per_element,
    }[name]
    torch.testing.assert_close(method.losses(z, v, t, t, labels, 8), expected)


def test_alpha_falls_from_one_to_its_minimum(start):
    method = Job("alphaflow").make(start)
    found = []
    for method.progress in (0.0, 0.5, 0.99):
        found.append(method.alpha())
    assert found == [1.0, 0.5, 0.02]


def test_consistency_target_without_noise_is_the_image(start):
    network, schedule = denoiser(start), "2, 8"
    assert lower_level(torch.tensor([1e-3, 0.1]), schedule, 0.0)[0] == 0  # training begins with denoising
    x0, labels = batch()
    found = denoise(lambda x, sigma: network.clean(x, sigma, labels), x0, torch.randn(x0.shape), torch.zeros(8))
    torch.testing.assert_close(found, x0)
    t = torch.tensor([0.5, 5.0, 50.0])
    assert (lower_level(t, schedule, 0.99) / t > 0.95).all()


def test_a_mixture_begins_with_the_consistency_loss_of_its_gaussian_model(start):
    """Its eta has no effect yet."""
    x0, labels = batch()
    method = Job("consistency-distillation").make(start)
    generator = torch.Generator().manual_seed(0)
    torch.randn(x0.shape, generator=generator)  # eta
    network = denoiser(start, smooth=True)
    expected = consistency_loss(lambda x, sigma: network.clean(x, sigma, labels), x0, method.consistency, 0.0, generator)
    found = method.first_step(x0, labels, torch.Generator().manual_seed(0), 1.0)["loss"]
    torch.testing.assert_close(found, expected.detach())


def test_kernel_loss_of_equal_distributions_is_the_bias_of_the_v_statistic():
    """A V-statistic compares each of M draws with itself too, in both within terms but not in the cross term."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 4000, 8, 5, generator=generator)
    c = torch.ones(4000)
    own = kernel_loss(x, y, c).mean()
    same = kernel_loss(x, x, c)
    torch.testing.assert_close(same, torch.zeros(4000), atol=1e-5, rtol=0)
    shifted = kernel_loss(x, y + 1, c).mean()
    distance = (x[:, 0] - y[:, 0]).norm(dim=1)
    bias = 2 * (1 - (-distance / 5).exp().mean()) / 8  # the kernel of a draw with itself is 1
    torch.testing.assert_close(own, bias, atol=3e-3, rtol=0)
    assert shifted > own + 0.02


def test_transition_is_a_ddim_step(start):
    x0, labels = batch()
    eps, t, s = torch.randn(x0.shape), torch.full((8,), 3.0), torch.full((8,), 0.5)
    (a_t, s_t), (a_s, s_s) = levels(t), levels(s)

    def known(x_t, sigma, labels, second):
        return a_t * eps - s_t * x0

    found, c = transition(known, a_t * x0 + s_t * eps, t, s, labels)
    torch.testing.assert_close(found, a_s * x0 + s_s * eps)
    assert (c > 0).all()


def test_drafts_are_samples_of_the_gaussians_with_noise_of_their_sigma(start):
    start.gaussians = LatentGaussians(3, 4, 4, rank=1, count=1, shared=True, num_classes=2)
    start.gaussians.log_weights.zero_()
    start.gaussians.means.fill_(3.0)
    start.gaussians.variances.fill_(0.01)
    start.gaussians.tails.fill_(0.01)
    noise = torch.randn(64, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    drafts = start.draft(noise, 2.0, torch.arange(64) % 3, torch.Generator().manual_seed(0))
    a = 5**-0.5
    assert drafts.mean() == pytest.approx(3 * a, abs=0.05)
    assert drafts.std() == pytest.approx((4 + 0.01) ** 0.5 * a, abs=0.05)


def test_a_method_takes_no_steps_at_levels_that_it_was_not_trained_at(start):
    network = Job("dmd2").make(start).networks["model"]
    known = trailing(network, 4)
    assert torch.equal(trained_levels(network, 16, 4, None), known)
    assert torch.equal(trained_levels(network, 2, 4, None), known[[0, 2]])
    from_draft = trained_levels(network, 4, 4, 2.5)
    assert from_draft[0] == 2.5 and set(from_draft[1:].tolist()) <= set(known.tolist()) and from_draft[1] < 0.9 * 2.5
