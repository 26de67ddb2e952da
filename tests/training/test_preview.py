import pytest
import torch

from ldm_smd.diffusion.process import DiffusionProcess
from ldm_smd.diffusion.settings import DiffusionConfig, DistillationConfig
from ldm_smd.evaluation.diagnostics import DIAGNOSTIC_TIMESTEPS, Spread
from ldm_smd.schedulers.schedule import build_scheduler
from ldm_smd.training import preview
from ldm_smd.training.build import initial_model
from ldm_smd.training.distillation import Distillation
from ldm_smd.training.distillation_losses import DistillationLosses
from ldm_smd.training.loop import train
from ldm_smd.training.metrics_log import MetricsLog, read_metrics
from ldm_smd.training.watch import REPORTS, CriticWatch


def last(folder, name):
    return [line[name] for line in read_metrics(folder / "metrics.jsonl") if name in line][-1]


def test_a_collapsed_mixture_gives_a_warning(train_config, tmp_path, caplog):
    train(train_config("objective.name=mse", "model.noise_rank=0", "images_total=16"))
    assert any("the mixture has collapsed" in record.message for record in caplog.records)
    assert last(tmp_path / "run", "nearest_neighbour_ratio") < 0.1
    train(train_config("images_total=16", f"output={tmp_path / 'fitted'}"))
    assert last(tmp_path / "fitted", "nearest_neighbour_ratio") > 0.5


@pytest.mark.parametrize("ratio, warned", [(0.4, True), (0.6, False)])
def test_draws_with_a_small_spread_give_a_warning(open_run, distillation, monkeypatch, caplog, tmp_path, ratio, warned):
    run = open_run(*distillation)
    found = {t: Spread(1.0, ratio if t == 999 else 0.9, 1.0) for t in DIAGNOSTIC_TIMESTEPS}
    monkeypatch.setattr(preview, "spread_over_eta", lambda *_: found)
    preview.log_spread(run, Distillation(run).model.network, 0, MetricsLog(tmp_path))
    messages = [record.getMessage() for record in caplog.records]
    assert any("spread at t = 999 is 40 % of the posterior's" in message for message in messages) == warned


def test_the_spread_is_measured_on_normalised_latents(open_run, monkeypatch, tmp_path):
    run, seen = open_run(), []
    same = {t: Spread(1.0, 1.0, 1.0) for t in DIAGNOSTIC_TIMESTEPS}
    monkeypatch.setattr(preview, "spread_over_eta", lambda *given: seen.append(given[3]) or same)
    preview.log_spread(run, initial_model(run), 0, MetricsLog(tmp_path))
    means = run.batches().batch_at(0).moments[:, 0].float()
    assert torch.allclose(seen[0], (means - 0.1) * 0.7, atol=1e-5)  # the constants of the autoencoder


def test_a_collapsed_distillation_gives_a_warning(caplog):
    """For data N(0, 1), with a perfect teacher and a perfect critic, of a mixture that gives the data or only one sample."""
    torch.manual_seed(0)
    settings, path = DistillationConfig(), DiffusionProcess(build_scheduler(DiffusionConfig()).alphas_cumprod)
    shape, sample = (256, 4, 4, 4), torch.randn(1, 4, 4, 4)
    t, r = torch.full(shape[:1], 700), torch.randint(20, 980, shape[:1])

    def teacher(x_u, u, *_, **__):
        return (torch.zeros_like(x_u[:, :4]),)  # v = 0 means x_0 = a x_u, the mean of N(0, 1) given x_u

    def critic_of_sample(x_u, u, *_, **__):
        a, s = path.signal_and_noise(u, x_u)
        return ((a * x_u[:, :4] - sample) / s,)

    def ratio(critic, draws):
        watch = CriticWatch()
        for _ in range(REPORTS):
            x0, eps, second = torch.randn(3, *shape)
            losses = DistillationLosses(path, "v_prediction", settings).losses(
                teacher, critic, draws(x0), x0, path.noise(x0, eps, t), t, r, second, {}
            )
            found = watch.ratio({name: float(loss.mean()) for name, loss in losses.items()})
        return found["critic_ratio"]

    assert ratio(teacher, lambda x0: torch.randn_like(x0)) == 1 and not caplog.records
    assert ratio(critic_of_sample, lambda x0: sample.expand_as(x0)) < 0.01
    assert ["far from the teacher's" in record.message for record in caplog.records] == [True]


@pytest.mark.parametrize("ratio, words", [(0.3, "far from the teacher's"), (3.0, "does not follow the draws"), (0.9, "")])
def test_a_critic_unlike_the_teacher_gives_one_warning(caplog, ratio, words):
    watch = CriticWatch()
    watch.ratio({"critic_loss": 10.0, "teacher_loss": 1.0})  # a single report gives no warning
    assert watch.ratio({"loss": 1.0}) == {}
    assert watch.ratio({"critic_loss": 1.0, "teacher_loss": 1.0}) == {"critic_ratio": 1.0}
    for _ in range(REPORTS - 1):
        watch.ratio({"critic_loss": 2 * ratio, "teacher_loss": 2.0})
    assert not caplog.records
    for _ in range(3):
        watch.ratio({"critic_loss": 2 * ratio, "teacher_loss": 2.0})
    assert [words in record.message for record in caplog.records] == [True] * bool(words)
