import json

import few_step.contest
import few_step.flow_maps as flow_maps
import few_step.jobs
import pytest
import rivals
import torch
from few_step import METHODS, known
from few_step.adversarial import trained_levels
from few_step.gaussian import Gaussian
from few_step.jobs import Job, read_settings, searched, step_costs
from few_step.method import Latents, Training, train
from few_step.mixtures import EnergyThenDistillation, mixture
from few_step.moment_matching import kernel_loss, transition
from few_step.network import Critic, denoiser, levels, start_from, trailing
from few_step.report import targets
from rivals import RivalsConfig

from ldm_smd.errors import UserError
from ldm_smd.models.gaussian import LatentGaussians
from ldm_smd.models.unet import SMDUNet2DModel


def tiny_unet(side=4, channels=3):
    torch.manual_seed(0)
    unet = SMDUNet2DModel(
        sample_size=side,
        in_channels=channels,
        out_channels=channels,
        block_out_channels=(16, 16),
        layers_per_block=1,
        attention_levels=(),
        attention_head_dim=8,
        num_classes=2,
        norm_num_groups=4,
        z_channels=0,
    )
    for parameter in unet.parameters():  # weights that are initially zero would hide errors
        torch.nn.init.normal_(parameter, std=0.1)
    return unet


@pytest.fixture
def latents():
    generator = torch.Generator().manual_seed(0)
    moments = torch.randn(40, 2, 3, 4, 4, generator=generator)
    return Latents(moments, torch.arange(40) % 2, 2)


@pytest.fixture
def start(latents):
    start = start_from(tiny_unet())
    start.latents, start.labels = latents.moments[:, 0], latents.labels
    return start


def batch(count=8):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, 3, 4, 4, generator=generator), torch.arange(count) % 3


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
    method = Job("ect", {"schedule": "2, 8"}).make(start)
    assert method.lower_level(torch.tensor([1e-3, 0.1]))[0] == 0  # training begins with denoising
    x0, labels = batch()
    found = method.denoise(method.networks["model"], x0, torch.randn(x0.shape), torch.zeros(8), labels)
    torch.testing.assert_close(found, x0)
    method.progress = 0.99
    t = torch.tensor([0.5, 5.0, 50.0])
    assert (method.lower_level(t) / t > 0.95).all()


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


@pytest.mark.parametrize("name", sorted(METHODS.keys() - {"folder"}))
def test_every_method_trains_and_samples(start, latents, name):
    job = Job(name)
    method = job.make(start)
    before = {key: [value.clone() for value in network.parameters()] for key, network in method.networks.items()}
    network = train(method, latents, Training(64, batch=16, warmup_images=16))
    for key, values in before.items():
        changed = [not torch.equal(old, new) for old, new in zip(values, method.networks[key].parameters())]
        assert any(changed), key
    trained = getattr(network, "unet", network).state_dict()
    assert any(
        not torch.equal(value, trained[key])
        for key, value in start.unet.state_dict().items()
        if value.shape == trained[key].shape
    )
    noise, labels = batch(3)
    for steps in (1, 2, 4, 8, 16):
        found = method.sample(network, noise, labels, steps, torch.Generator().manual_seed(0))
        assert found.shape == noise.shape and found.isfinite().all()
        again = method.sample(network, noise, labels, steps, torch.Generator().manual_seed(0))
        torch.testing.assert_close(found, again)
        from_draft = method.sample(network, noise, labels, steps, torch.Generator().manual_seed(0), 1.5)
        assert from_draft.isfinite().all() and not torch.allclose(from_draft, found)
    assert set(METHODS[name].SEARCH) <= set(vars(method.settings))


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


def test_training_stops_at_a_non_finite_loss(start, latents):
    method = Job("gaussian").make(start)
    torch.nn.init.constant_(method.networks["model"].unet.conv_out.bias, torch.nan)
    with pytest.raises(FloatingPointError, match="Gaussian: expected a finite loss"):
        train(method, latents, Training(32, batch=16))


def test_batches_share_labels_in_groups(latents):
    x0, labels = latents.batch(64, 4, 0.25, torch.Generator().manual_seed(0))
    groups = labels.view(16, 4)
    assert (groups == groups[:, :1]).all() and x0.shape == (64, 3, 4, 4)
    assert set(labels.tolist()) == {0, 1, 2}


def test_settings_are_read_and_jobs_of_a_search_are_different():
    assert read_settings(["ect.c=1", "ddgan.steps=8"]) == {"ect": {"c": 1.0}, "ddgan": {"steps": 8}}
    with pytest.raises(UserError, match=r"expected METHOD\.setting=value"):
        read_settings(["ect.steps=8"])
    jobs = searched("ect", 20, 100)
    assert len({job.name for job in jobs}) == 20 and jobs[0].settings == {}


def test_step_costs_are_measured_once_for_each_cost_key(start, latents, capsys):
    costs = step_costs([Job("gaussian"), Job("ect"), Job("ect", {"c": 1.0})], start, latents, 8)
    assert len(costs) == 2 and all(cost > 0 for cost in costs.values())


def test_the_cost_of_a_training_has_all_its_parts(start, latents, monkeypatch):
    """On this clock a step of distillation takes five times as long as others."""
    clock = [0.0]
    monkeypatch.setattr(few_step.jobs, "synchronised", lambda device: clock[0])

    def took(seconds):
        clock[0] += seconds
        return {}

    monkeypatch.setattr(Gaussian, "step", lambda *_: took(1))
    monkeypatch.setattr(EnergyThenDistillation, "step", lambda self, *_: took(5 if self.progress >= 0.95 else 1))
    [cost] = step_costs([Job("energy-distillation", {"energy_first": 0.95})], start, latents, 8).values()
    assert cost == pytest.approx(0.95 * 1 + 0.05 * 5)


def test_the_moving_average_follows_each_schedule(start):
    """A short second part would otherwise keep weights of the first."""
    training = Training(400_000)
    method = Job("energy-distillation", {"energy_first": 0.5, "separate_schedules": True}).make(start)
    assert training.halflife(method.schedule) == 4000
    assert training.halflife((0.9, 1.0)) == 2000 and Training(400_000, ema_halflife_images=7).halflife((0.9, 1.0)) == 7


@pytest.mark.slow
def test_known_answers_end_to_end(tmp_path, monkeypatch):
    for name, value in {"POINTS": 500, "SAMPLES": 64, "SETS": 1, "UPDATES": 2, "START_UPDATES": 2, "BATCH": 16}.items():
        monkeypatch.setattr(known, name, value)
    path = tmp_path / "rivals-known.json"
    known.check_known(path, ["ect"])
    known.check_known(path, ["imm"])  # adds to the file
    content = json.loads(path.read_text())
    assert set(content) == {"ring of 8", "one Gaussian"}
    assert {"ect", "imm", "start, DDIM"} <= set(content["ring of 8"])
    assert "| one Gaussian | 1 steps |" in path.with_suffix(".md").read_text()


@pytest.mark.slow
def test_rivals_end_to_end(shards, vae_folder, image_folder, yardstick_settings, tmp_path, monkeypatch, run):
    monkeypatch.setattr(rivals, "RESULTS", tmp_path)
    monkeypatch.setattr(few_step.contest, "SHEET_STEPS", (1, 2))
    (features,) = (setting.partition("=")[2] for setting in yardstick_settings if setting.startswith("features"))
    unet = tiny_unet(8, 4)
    unet.save_pretrained(tmp_path / "start")
    mixture(start_from(unet), fitted=False).save_pretrained(tmp_path / "mixture")
    common = [
        *(setting for setting in yardstick_settings if not setting.startswith(("sampling", "features"))),
        f"features=[{features}]",
        f"start={tmp_path / 'start'}",
        f"shards={shards}",
        f"autoencoder={vae_folder}",
        f"folder={tmp_path / 'rivals'}",
        "samples=32",
        "batch=8",
        "steps=[1,2]",
        "budget=16",
        "search_budget=16",
        "tries=2",
        "seeds=1",
        "methods=[distillation,gaussian]",
        "keep=[distillation]",
        f"measured=[{tmp_path / 'mixture'}]",
        "start_steps=[1,2]",
        "device=cpu",
    ]
    for part in ("costs", "search", "contest"):
        code, _, error = run(RivalsConfig, rivals.rivals, *common, f"part={part}")
        assert code == 0, error
    content = json.loads((tmp_path / "rivals-shapes.json").read_text())
    assert 4 <= len(content["search"]) <= 6 and len(content["contest"]) == 6
    (cell,) = content["contest"][0]["steps"]["2"]["features"].values()
    assert cell["frechet"] > 0 and cell["frechet_held_out"] > 0
    assert len(list((tmp_path / "rivals" / "contest").glob("*.png"))) == 6
    assert "| distillation |" in (tmp_path / "rivals-shapes.md").read_text()


def test_the_critic_learns_only_after_training_with_the_energy_score(start):
    """Such a job has its own cost."""
    method = Job("distillation", {"energy_first": 0.5}).make(start)
    x0, labels = batch()

    def changed(progress):
        method.progress = progress
        before = {name: [p.clone() for p in network.parameters()] for name, network in method.networks.items()}
        method.step(x0, labels, torch.Generator().manual_seed(0), 1.0)
        after = {name: network.parameters() for name, network in method.networks.items()}
        return {name for name in before if not all(map(torch.equal, before[name], after[name]))}

    assert changed(0.49) == {"model"}
    assert "critic" in changed(0.5)
    assert Job("distillation", {"energy_first": 0.5}).cost_key != Job("distillation").cost_key


def test_each_part_of_a_training_can_have_its_own_schedule(start):
    """At a progress of 0.75 the second part is in its middle, before its cool-down."""
    training, used = Training(1_000_000, warmup_images=50_000), []

    def rate(progress, **settings):
        method = Job("energy-distillation", {"energy_first": 0.5} | settings).make(start)
        method.descend, method.progress = lambda name, loss, rate: used.append(rate), progress
        factor = training.factor(round(progress * training.images), method.schedule)
        method.step(*batch(), torch.Generator().manual_seed(0), factor)
        assert used[-1] == factor
        return factor

    assert rate(0.75) == 0.5
    found = [rate(progress, separate_schedules=True) for progress in (0.0, 0.25, 0.375, 0.4999, 0.5, 0.75, 0.9999)]
    assert found == pytest.approx([0, 1, 0.5, 0, 0, 1, 0], abs=1e-3)


def test_a_training_uses_the_current_schedule(start, latents):
    method = Job("energy-distillation", {"energy_first": 0.5, "separate_schedules": True}).make(start)
    rates, step = [], method.step
    method.step = lambda x0, labels, generator, rate: rates.append(rate) or step(x0, labels, generator, rate)
    train(method, latents, Training(64, batch=8, warmup_images=8))
    assert rates == [1.0, 1.0, 1.0, 0.5] * 2


def test_the_energy_score_beside_a_distillation(start):
    """Before the first update nothing else contributes to the loss. Such a job has its own cost."""
    x0, labels = batch()
    plain, scored = Job("distillation"), Job("distillation", {"energy_weight": 0.5})
    loss, with_score = (
        job.make(start).losses(x0, labels, torch.Generator().manual_seed(0), True)["loss"] for job in (plain, scored)
    )
    assert loss.abs().max() < 1e-8 and with_score.min() > 0
    assert plain.cost_key != scored.cost_key


def test_a_method_must_be_well_ahead_at_three_of_four_numbers_of_steps():
    """A target of the contest: at most 0.9 of the best rival at three of four, which is the third lowest ratio."""

    def result(method, *distances, images=10):
        cells = {
            str(steps): {"features": {"one": {"frechet": distance, "recall": 0.5, "coverage": 0.5}}}
            for steps, distance in zip((1, 2, 4, 8, 16), distances)
        }
        return {"method": method, "settings": {}, "images": images, "cost": 2.0, "seed": 0, "steps": cells}

    start = result("gaussian", 9.0, 8.0, 4.0, 2.0, 2.0, images=0)
    ours = result("energy-distillation", 2.0, 0.89, 0.89, 0.8, 0.8)
    rivals = [result("dmd2", 1.0, 2.0, 1.0, 1.0, 1.0), result("imm", 3.0, 1.0, 2.0, 1.0, 1.0)]
    found = {each["name"]: each for each in targets({"contest": [start, ours, *rivals]})}
    at_one = found["energy-distillation, at most 1 steps / best rival, `one`, noise"]
    three = found["energy-distillation / best rival, third lowest of the four ratios, `one`, noise"]
    further = result("gaussian", 9.0, 8.0, 4.0, 2.0, 1.6)
    best = {each["name"]: each["measured"] for each in targets({"contest": [start, ours, further]})}
    assert best["energy-distillation, 4 steps / Gaussian at any, `one`, noise"] == 0.556, "of the one trained further"
    assert at_one["measured"] == 2.0 and not at_one["holds"]
    assert three["measured"] == 0.89 and three["target"] == "<= 0.9" and three["holds"]


def test_a_method_takes_no_steps_at_levels_that_it_was_not_trained_at(start):
    network = Job("dmd2").make(start).networks["model"]
    known = trailing(network, 4)
    assert torch.equal(trained_levels(network, 16, 4, None), known)
    assert torch.equal(trained_levels(network, 2, 4, None), known[[0, 2]])
    from_draft = trained_levels(network, 4, 4, 2.5)
    assert from_draft[0] == 2.5 and set(from_draft[1:].tolist()) <= set(known.tolist()) and from_draft[1] < 0.9 * 2.5
