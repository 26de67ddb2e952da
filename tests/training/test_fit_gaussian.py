import pytest
import torch
from accelerate import PartialState

from ldm_smd.autoencoder import FrozenAutoencoder
from ldm_smd.data.shards import Manifest
from ldm_smd.data.stream import LatentStream
from ldm_smd.errors import UserError
from ldm_smd.pipelines import load_pipeline, seeded_generators
from ldm_smd.schedulers import make_scheduler
from ldm_smd.training import fit_gaussian as gaussian
from ldm_smd.training.fit_gaussian import (
    LatentSums,
    class_gaussians,
    coarse_members,
    fit_gaussian,
    fitting_latents,
    latent_sums,
)
from ldm_smd.training.settings import FitGaussianConfig


def test_sums_give_the_moments_of_latents():
    """Compared with many draws of the latents from their means and standard deviations."""
    generator = torch.Generator().manual_seed(0)
    means, spread = torch.randn(300, 6, generator=generator), torch.rand(300, 6, generator=generator)
    labels = torch.randint(-1, 2, (300,), generator=generator)
    sums = LatentSums.empty(3, 6)
    sums.add(means, spread**2, labels)
    draws = means + spread * torch.randn(3000, 300, 6, generator=generator)
    for row, chosen in ((0, labels == 0), (2, labels == -1)):
        mean, vectors, variances, tail = sums.principal(row, 5)
        found = draws[:, chosen].reshape(-1, 6).double()
        assert torch.allclose(mean, means[chosen].double().mean(dim=0))
        covariance = torch.cov(found.T, correction=0)
        assert torch.allclose((vectors @ covariance * vectors).sum(dim=1), variances, atol=0.01)
        assert variances.sum() + tail == pytest.approx(covariance.trace().item(), rel=0.01)
    assert torch.allclose(sums.pooled().principal(0, 5)[0], means.double().mean(dim=0))


def test_a_sketch_is_exact_for_a_covariance_of_low_rank_and_close_otherwise():
    generator = torch.Generator().manual_seed(0)
    few = torch.randn(500, 4, generator=generator).double() @ torch.randn(4, 40, generator=generator).double() + 1.0
    decay = torch.randn(2000, 40, generator=generator).double() * 0.7 ** torch.arange(40)
    for points, spread, tolerance in ((few, 0.0, 1e-8), (decay, 0.01, 0.05)):
        exact, sketched = LatentSums.empty(1, 40), LatentSums.empty(1, 40, sketch=16)
        for sums in (exact, sketched):
            sums.add(points[:100], torch.full_like(points[:100], spread), torch.full((100,), -1))
            sums.add(points[100:], torch.full_like(points[100:], spread), torch.full((len(points) - 100,), -1))
        (mean, vectors, variances, tail), found = exact.principal(0, 4), sketched.principal(0, 4)
        assert torch.allclose(found[0], mean)
        assert torch.allclose(found[2], variances, rtol=tolerance)
        assert (found[1] * vectors).sum(dim=1).abs().min() > 1 - tolerance
        assert found[3].item() == pytest.approx(tail.item(), rel=tolerance, abs=1e-9)


@pytest.mark.parametrize("count", [1, 2])
def test_a_class_of_equal_latents_has_a_sketch(count):
    """Its covariance is zero."""
    sums, point = LatentSums.empty(1, 40, sketch=16), torch.randn(40, generator=torch.Generator().manual_seed(0)).double()
    sums.add(point.repeat(count, 1), torch.full((count, 40), 0.01).double(), torch.full((count,), -1))
    mean, vectors, variances, tail = sums.principal(0, 4)
    assert torch.allclose(mean, point) and torch.allclose(vectors @ vectors.T, torch.eye(4).double(), atol=1e-6)
    assert torch.allclose(variances, torch.full_like(variances, 0.01), atol=1e-6) and float(tail) == pytest.approx(
        0.01, rel=1e-3
    )


def test_a_coarse_class_has_the_latents_of_its_members():
    names = ["noto, flags", "noto, food", "fluent, flags"]
    members = coarse_members(names, dict(enumerate([*names, "noto", "fluent", "food", "absent"])))
    assert members == {3: [0, 1], 4: [2], 5: [1], 6: []}
    points = torch.randn(300, 8, generator=torch.Generator().manual_seed(0)) + torch.arange(3).repeat(100)[:, None]
    sums = LatentSums.empty(8, 8)
    sums.add(points, torch.zeros_like(points), torch.arange(300) % 3)
    found = class_gaussians(sums, (2, 2, 2), 3, 7, members)
    labels = torch.arange(300) % 3
    for row, chosen in ((3, labels < 2), (4, labels == 2), (5, labels == 1), (6, labels >= 0), (7, labels >= 0)):
        assert torch.allclose(found.means[row], points[chosen].mean(dim=0), atol=1e-5)


def test_class_gaussians_keep_the_leading_principal_components():
    generator = torch.Generator().manual_seed(0)
    points = torch.randn(500, 8, generator=generator) * torch.tensor([3.0, 2, 1, 0.5, 0.4, 0.3, 0.2, 0.1])
    sums = LatentSums.empty(3, 8)
    sums.add(points, torch.zeros_like(points), torch.arange(500) % 2)
    part = class_gaussians(sums, (2, 2, 2), rank=3, classes=2)
    covariance = torch.cov(points[::2].double().T, correction=0)
    exact = torch.linalg.eigvalsh(covariance).flip(0)
    assert torch.allclose(part.variances[0].double(), exact[:3], rtol=1e-4)
    assert part.tails[0].item() == pytest.approx(exact[3:].mean().item(), rel=1e-4)
    assert torch.allclose(part.means[2], points.mean(dim=0), atol=1e-5)  # the null class: all images


def shared_fit(latents, shards, monkeypatch, **sizes):
    """Fit Gaussians with a shared covariance to latents (N, 256) without labels."""
    labels, sums = torch.full((len(latents),), -1), LatentSums.empty(1, 256)
    sums.add(latents, torch.zeros_like(latents), labels)
    monkeypatch.setattr(gaussian, "fitting_latents", lambda *_: (latents.view(-1, 4, 8, 8), labels))
    config = FitGaussianConfig(model="x", shards="x", output="x", **sizes)
    return gaussian.shared_gaussians(config, sums, Manifest.load(shards), None, classes=0, members={})


def test_well_separated_clusters_of_latents_are_found(shards, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    centres = 3 * torch.randn(3, 256, generator=generator)
    counts = torch.tensor([10, 20, 34])
    latents = centres.repeat_interleave(counts, dim=0) + 0.1 * torch.randn(64, 256, generator=generator)
    found = shared_fit(latents, shards, monkeypatch, components=3, rank=8)
    distance = torch.cdist(centres, found.means)
    order = distance.argmin(dim=1)
    assert distance.min(dim=1).values.max() < 1 < 20 < torch.cdist(centres, centres)[0, 1:].min()
    assert torch.allclose(found.log_weights[0].exp()[order], counts / 64, atol=1e-3)


@pytest.mark.parametrize("mirror", [False, True])
@pytest.mark.parametrize("batch_size", [22, 4])
def test_every_latent_is_counted_once_with_the_variance_of_its_encoder(shards, vae_folder, batch_size, mirror):
    """Also if the last batch is not full, and for the mirrored encodings."""
    manifest, autoencoder = Manifest.load(shards), FrozenAutoencoder.from_pretrained(vae_folder)
    config = FitGaussianConfig(model="x", shards="x", output="x", batch_size=batch_size, mirror=mirror)
    sums = latent_sums(config, manifest, autoencoder, 2, PartialState())
    batch = LatentStream(manifest, 22, 22, seed=config.seed, mirror=mirror).batch_at(0)
    mean, logvar = batch.moments.double().flatten(2).unbind(dim=1)
    latents, spreads = (mean - 0.1) * 0.7, logvar.exp() * 0.7**2  # the constants of the autoencoder
    assert sums.counts.tolist() == [11, 11, 0]
    for label in (0, 1):
        chosen = batch.labels == label
        assert torch.allclose(sums.sums[label], latents[chosen].sum(dim=0), atol=1e-4)
        assert torch.allclose(sums.spreads[label], spreads[chosen].sum(dim=0), rtol=1e-4)
        assert torch.allclose(sums.products[label], latents[chosen].T @ latents[chosen], atol=1e-3)


def test_a_mixture_is_fitted_to_normalised_samples(shards, vae_folder):
    manifest, autoencoder = Manifest.load(shards), FrozenAutoencoder.from_pretrained(vae_folder)
    latents, labels = fitting_latents(manifest, autoencoder, seed=0, mirror=False, generator=torch.Generator().manual_seed(0))
    batch = LatentStream(manifest, 22, 22).batch_at(0)
    mean, logvar = batch.moments.float().unbind(dim=1)
    noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(latents, (mean + (0.5 * logvar).exp() * noise - 0.1) * 0.7, atol=1e-5)
    assert torch.equal(labels, batch.labels)


def test_the_shared_covariance_is_that_within_the_clusters(shards, monkeypatch):
    """Its axes differ from the principal axes of all latents."""
    points = 0.01 * torch.randn(4000, 256, generator=torch.Generator().manual_seed(0))
    points[:, :3] *= torch.tensor([100.0, 50.0, 20.0])
    within = torch.cov(points[:, :3].T, correction=0)
    points[:, :3] += torch.where(torch.arange(4000) < 2000, 1.0, -1.0)[:, None] * torch.tensor([3.0, 2.0, 4.0])
    found = shared_fit(points, shards, monkeypatch, components=2, rank=3)
    vectors, variances = found.vectors[0, :, :3], found.variances[0]
    assert torch.allclose(vectors.T @ torch.diag(variances) @ vectors, within, atol=0.02)
    assert found.tails[0].item() == pytest.approx(1e-4, rel=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("components", [1, 2])
def test_fit_end_to_end(model_folder, shards, tmp_path, run, components):
    settings = [f"model={model_folder}", f"shards={shards}", f"output={tmp_path / 'teleport'}", "rank=16", "sigma_skip=2"]
    code, printed, error = run(FitGaussianConfig, fit_gaussian, *settings, f"components={components}")
    assert code == 0, error
    assert f"{3 if components == 1 else 2} Gaussians fitted to 22 latents" in printed
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
    with pytest.raises(UserError, match=r"a model with a gaussian component.*see tools/fit_gaussian"):
        sample([0], [1])
    pipeline.scheduler = make_scheduler("DDIMScheduler", pipeline.scheduler)
    assert sample([0], [1]).isfinite().all()


@pytest.mark.slow
def test_covariances_of_large_latents_are_sketched(model_folder, shards, tmp_path, run, monkeypatch):
    settings = [f"model={model_folder}", f"shards={shards}", "rank=16"]
    fitted = {}
    for name, limit in (("exact", 2**30), ("sketch", 8 * 3 * 256 * 64), ("none", 1000)):
        monkeypatch.setattr(gaussian, "MEMORY_LIMIT", limit)
        code, _, error = run(FitGaussianConfig, fit_gaussian, *settings, f"output={tmp_path / name}")
        if name == "none":
            assert code == 2 and "shards: expected latents for which 64 directions fit" in error
        else:
            assert code == 0, error
            fitted[name] = load_pipeline(tmp_path / name).gaussian
    assert torch.allclose(fitted["exact"].means, fitted["sketch"].means, atol=1e-5)
    # The sketch assumes that the variances of the encoder are the same for all elements, which they are not.
    assert torch.allclose(fitted["exact"].variances[:, :2], fitted["sketch"].variances[:, :2], rtol=0.1)


@pytest.mark.distributed
def test_two_processes_fit_the_same_gaussians_as_one(model_folder, shards, tmp_path, run, launch):
    settings = [f"model={model_folder}", f"shards={shards}", "batch_size=4", "rank=8"]
    code, _, error = run(FitGaussianConfig, fit_gaussian, *settings, f"output={tmp_path / '1'}")
    assert code == 0, error
    process = launch(2, "tools/fit_gaussian.py", *settings, f"output={tmp_path / '2'}")
    error = process.output()
    assert process.returncode == 0, error[-3000:]
    one, two = (load_pipeline(tmp_path / name).gaussian for name in ("1", "2"))
    assert torch.allclose(one.means, two.means, atol=1e-5)
    assert torch.allclose(one.variances, two.variances, rtol=1e-4)
