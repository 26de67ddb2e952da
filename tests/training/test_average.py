import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from ldm_smd.errors import UserError
from ldm_smd.pipelines import load_pipeline
from ldm_smd.training.average import Snapshot, average, coefficients, inner_product, save_snapshot, snapshots
from ldm_smd.training.checkpoint import checkpoints
from ldm_smd.training.ema import PowerEMA, gamma_of
from ldm_smd.training.loop import train
from ldm_smd.training.settings import AverageConfig


def test_gamma_of_a_width():
    """As in the EDM2 paper, widths of 0.05 and 0.1 have gamma 16.97 and 6.94."""
    for width, gamma in ((0.05, 16.97), (0.10, 6.94)):
        found = gamma_of(width)
        assert found == pytest.approx(gamma, abs=0.005)
        assert ((found + 1) / ((found + 2) ** 2 * (found + 3))) ** 0.5 == pytest.approx(width, rel=1e-9)


def test_inner_product_is_the_integral_of_the_profiles():
    tau = np.linspace(0, 1, 200_001)[1:]
    profiles = [np.where(tau <= t, (g + 1) * tau**g / t ** (g + 1), 0.0) for t, g in ((0.6, 3.0), (1.0, 7.0))]
    found = inner_product(np.array([0.6]), np.array([3.0]), np.array([1.0]), np.array([7.0]))
    assert found == pytest.approx(np.mean(profiles[0] * profiles[1]), rel=1e-3)


def random_walk(widths, steps, batch=10):
    """Yield images seen, the weight of a random walk, and its PowerEMAs by width, after each step."""
    generator = torch.Generator().manual_seed(0)
    model = torch.nn.Linear(1, 50, bias=False)
    averages = {width: PowerEMA(model, width) for width in widths}
    for step in range(1, steps + 1):
        with torch.no_grad():
            model.weight += 0.1 * torch.randn(model.weight.shape, generator=generator) + 0.01
        for each in averages.values():
            each.update(model, batch, batch * step)
        yield batch * step, model.weight.detach().clone(), {w: each.model.weight.clone() for w, each in averages.items()}


def test_the_average_has_its_power_function_profile():
    """It is the integral of tau^gamma times the weights, up to the step size. The initial weights are forgotten."""
    gamma = gamma_of(0.1)
    ends, weights, averages = zip(*random_walk([0.1], 300))
    profile = torch.tensor([end ** (gamma + 1) - (end - 10) ** (gamma + 1) for end in ends])
    expected = (torch.stack(weights) * (profile / profile.sum())[:, None, None]).sum(dim=0)
    assert torch.allclose(averages[-1][0.1], expected, atol=1e-4)


def test_another_width_is_reconstructed_from_snapshots():
    """The result is closer to the average kept during training than any of the combined averages."""
    kept, values = [], []
    for end, _, averages in random_walk([0.05, 0.1, 0.07], 1000):
        if end % 1000 == 0:
            for width in (0.05, 0.1):
                kept.append(Snapshot(None, end, width))
                values.append(averages[width])
    found = coefficients(kept, 10_000, 0.07)
    assert found.sum() == pytest.approx(1, abs=0.01)
    combined = sum(float(coefficient) * value for coefficient, value in zip(found, values))
    error, others = (combined - averages[0.07]).norm(), [(averages[w] - averages[0.07]).norm() for w in (0.05, 0.1)]
    assert error < 0.1 * min(others)
    # A width that was kept gives its own snapshot.
    assert coefficients(kept, 10_000, 0.1) == pytest.approx([0.0] * 19 + [1.0], abs=1e-6)


@pytest.mark.parametrize(("width", "wanted"), [(0.05, 0.1), (0.1, 0.05), (0.05, 0.28)])
def test_an_average_of_few_snapshots_keeps_the_size_of_the_weights(width, wanted):
    """Least squares alone would scale all weights by 0.6 to 1.3, because one snapshot cannot form another width."""
    assert coefficients([Snapshot(None, 10_000, width)], 10_000, wanted) == pytest.approx([1.0])


@pytest.mark.slow
def test_a_run_saves_and_resumes_snapshots_and_can_be_averaged(run, train_config, tmp_path):
    widths = ("ema_widths=[0.05,0.1]", "checkpoint_every_images=16", "keep_checkpoints=1")
    train(train_config(f"output={tmp_path / 'straight'}", *widths))
    train(train_config(f"output={tmp_path / 'run'}", "images_total=32", *widths))
    train(train_config(f"output={tmp_path / 'run'}", *widths))
    kept = snapshots(tmp_path / "run", None)
    assert [(each.images, each.sigma_rel) for each in kept] == [(n, w) for n in (16, 32, 48, 64) for w in (0.05, 0.1)]
    assert len(checkpoints(tmp_path / "run/checkpoints")) == 1
    for one, other in zip(kept, snapshots(tmp_path / "straight", None)):
        a, b = (load_file(each.path / "diffusion_pytorch_model.safetensors") for each in (one, other))
        assert all(torch.equal(a[name], b[name]) for name in a)
    options = [f"run={tmp_path / 'run'}", "sigma_rel=0.1"]
    code, out, _ = run(AverageConfig, average, *options, f"output={tmp_path / 'average'}")
    assert code == 0 and "8 snapshots, 64 images" in out
    made, last = (
        load_pipeline(tmp_path / "average").unet.state_dict(),
        load_file(kept[-1].path / "diffusion_pytorch_model.safetensors"),
    )
    assert all(torch.allclose(made[name], last[name], atol=1e-5) for name in last)
    code, _, error = run(AverageConfig, average, *options, f"output={tmp_path / 'average'}")
    assert code == 2 and "output: expected a new or empty folder" in error
    code, out, _ = run(AverageConfig, average, *options, f"output={tmp_path / 'early'}", "images=32")
    assert code == 0 and "4 snapshots, 32 images" in out


def test_wrong_widths_and_missing_snapshots_give_one_line(run, train_config, tmp_path):
    train(train_config("images_total=16", "checkpoint_every_images=16"))
    with pytest.raises(UserError, match="found: ema_widths was"):
        train(train_config("images_total=32", "ema_widths=[0.1]"))
    with pytest.raises(UserError, match="ema_widths: expected a model folder"):  # there is no snapshot at that number of images
        train(train_config("images_total=32", "ema_widths=[0.1]", "resume_changed=true"))
    with pytest.raises(UserError, match=r"ema_widths: expected a number from 0\.001 to 0\.28, found 0\.5"):
        train_config("ema_widths=[0.5]")
    code, _, err = run(AverageConfig, average, f"run={tmp_path / 'run'}", "sigma_rel=0.1", f"output={tmp_path / 'x'}")
    assert code == 2 and "run: expected a run with EMA snapshots" in err
    unwritable = tmp_path / "file"
    unwritable.write_text("")
    with pytest.raises(UserError, match="output: expected to write"):
        save_snapshot(unwritable, 1, PowerEMA(torch.nn.Linear(1, 1), 0.1))
