import pytest
import torch

from ldm_smd.autoencoder import FrozenAutoencoder
from ldm_smd.config import FitGaussianConfig
from ldm_smd.data.shards import Manifest
from ldm_smd.data.stream import LatentStream
from ldm_smd.errors import UserError
from ldm_smd.pipelines import load_pipeline, seeded_generators
from ldm_smd.sampling import make_scheduler
from ldm_smd.training.gaussian import LatentSums, class_gaussians, fit_gaussian


def test_sums_are_the_moments_of_the_draws_and_merge():
    generator = torch.Generator().manual_seed(0)
    means, spread = torch.randn(300, 6, generator=generator), torch.rand(300, 6, generator=generator)
    labels = torch.randint(-1, 2, (300,), generator=generator)
    whole, a, b = (LatentSums.empty(3, 6) for _ in range(3))
    whole.add(means, spread**2, labels)
    a.add(means[:100], spread[:100] ** 2, labels[:100])
    b.add(means[100:], spread[100:] ** 2, labels[100:])
    a.merge(b)
    draws = means + spread * torch.randn(3000, 300, 6, generator=generator)
    for row, chosen in ((0, labels == 0), (2, labels == -1)):
        mean, covariance = whole.moments(row)
        found = draws[:, chosen].reshape(-1, 6).double()
        assert torch.allclose(mean, means[chosen].double().mean(dim=0))
        assert torch.allclose(covariance, torch.cov(found.T, correction=0), atol=0.01)
        assert all(torch.allclose(x, y) for x, y in zip(whole.moments(row), a.moments(row)))
    assert torch.allclose(whole.pooled().moments(0)[0], means.double().mean(dim=0))


def test_class_gaussians_keep_the_leading_directions():
    generator = torch.Generator().manual_seed(0)
    points = torch.randn(500, 8, generator=generator) * torch.tensor([3.0, 2, 1, 0.5, 0.4, 0.3, 0.2, 0.1])
    sums = LatentSums.empty(3, 8)
    sums.add(points, torch.zeros_like(points), torch.arange(500) % 2)
    part = class_gaussians(sums, (2, 2, 2), rank=3, classes=2)
    covariance = torch.cov(points[::2].double().T, correction=0)
    exact = torch.linalg.eigvalsh(covariance).flip(0)
    assert torch.allclose(part.variances[0].double(), exact[:3], rtol=1e-4)
    assert part.tails[0].item() == pytest.approx(exact[3:].mean().item(), rel=1e-4)
    assert torch.allclose(part.means[2], points.mean(dim=0), atol=1e-5)  # no class: all


@pytest.mark.parametrize("components", [1, 2])
def test_fit_end_to_end(model_folder, shards, tmp_path, run, components):
    settings = [f"model={model_folder}", f"shards={shards}", f"output={tmp_path / 'teleport'}", "rank=16", "sigma_skip=2"]
    code, printed, error = run(FitGaussianConfig, fit_gaussian, *settings, f"components={components}")
    assert code == 0, error
    assert f"{3 if components == 1 else 2} Gaussians of 22 latents" in printed
    pipeline = load_pipeline(tmp_path / "teleport")
    manifest = Manifest.load(shards)
    moments = LatentStream(manifest, 22, 22).batch_at(0).moments
    latents = FrozenAutoencoder(pipeline.vae).normalise(moments[:, 0].float()).flatten(1)
    weights = pipeline.gaussian.log_weights.exp()
    assert torch.allclose(weights.sum(dim=1), torch.ones(3))
    if components == 1:
        assert torch.allclose(weights[-1] @ pipeline.gaussian.means, latents.mean(dim=0), atol=1e-4)

    def sample(labels, seeds):
        return pipeline(labels, num_inference_steps=4, generator=seeded_generators(seeds), output_type="pt").images

    together = sample([0, 1, 1], [5, 6, 7])
    assert together.isfinite().all() and torch.allclose(together[1:2], sample([1], [6]), atol=1e-4)
    pipeline.gaussian = None
    with pytest.raises(UserError, match=r"a gaussian part of the model for TeleportScheduler, found none; tools/fit_gaussian"):
        sample([0], [1])
    pipeline.scheduler = make_scheduler("DDIMScheduler", pipeline.scheduler)
    assert sample([0], [1]).isfinite().all()
