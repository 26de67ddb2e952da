"""Every setting of tools/train.py has the effect that its documentation states."""

import dataclasses
import functools

import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import DDPMScheduler
from safetensors.torch import load_file

from ldm_smd.data.shards import Manifest
from ldm_smd.data.stream import LatentStream
from ldm_smd.diffusion.settings import DiffusionConfig
from ldm_smd.models import attention
from ldm_smd.pipelines import SMDPipeline, load_pipeline
from ldm_smd.schedulers.schedule import build_scheduler
from ldm_smd.training import loop
from ldm_smd.training.checkpoint import checkpoints
from ldm_smd.training.loop import train
from ldm_smd.training.metrics_log import read_metrics
from ldm_smd.training.rates import warmup_cooldown
from ldm_smd.training.settings import TrainConfig
from ldm_smd.training.step import Denoising
from ldm_smd.training.step_noise import draw_step_noise

WEIGHTS = "diffusion_pytorch_model.safetensors"
OTHERS = {
    "batch_size": 4,
    "class_conditional": False,
    "cooldown_images": 64,
    "diffusion.beta_schedule": "linear",
    "diffusion.path": "flow",
    "diffusion.num_train_timesteps": 500,
    "diffusion.prediction_type": "epsilon",
    "gradient_clip": 1e-3,
    "images_total": 24,
    "label_dropout": 0.9,
    "learning_rate": 1e-4,
    "mirror": True,
    "model.attention_head_dim": 16,
    "model.attention_levels": [0, 1],
    "model.block_out_channels": [8, 32],
    "model.dropout": 0.5,
    "model.hypernetwork_width": 4,
    "model.identifier_channels": 4,
    "model.z_channels": 4,
    "model.layers_per_block": 2,
    "model.noise_modes": 1,
    "model.noise_rank": 4,
    "model.norm_num_groups": 2,
    "model.placement": "all",
    "model.up_layers_per_block": 2,
    "objective.beta": 0.5,
    "objective.diversity": 0.5,
    "objective.draws": 3,
    "objective.name": "mixture_nll",
    "objective.patch_sizes": [0],
    "objective.weighting": "epsilon",
    "precision": "bf16",
    "seed": 1,
    "timestep_shift": 4.0,
    "warmup_images": 64,
    "weight_decay": 0.5,
}
"""Values that differ from those of the tiny run. Each changes the weights after two steps."""
NEEDS = {"model.up_layers_per_block": ["model.layers_per_block=2"], "objective.bandwidth": ["objective.name=mixture_nll"]}
OTHERS["objective.bandwidth"] = 0.5
ELSEWHERE = {
    "micro_batches",  # test_step.py
    "attention",
    "autoencoder",  # test_loop.py
    "checkpoint_every_images",
    "compile",  # test_loop.py
    "ema_halflife_images",
    "ema_widths",  # test_average.py
    "gradient_checkpointing",  # test_loop.py
    "image_conditional",
    "init_from",  # test_build.py
    "keep_checkpoints",
    "log_every_images",
    "model.tail_blocks",  # test_dit.py
    "num_workers",
    "objective.distillation.critic_learning_rate",  # test_distillation.py, like those below
    "objective.distillation.adversarial_weight",
    "objective.distillation.critic_updates",
    "objective.distillation.marginal_above",
    "objective.distillation.energy_weight",
    "objective.distillation.guidance_scale",
    "objective.distillation.guide",
    "objective.distillation.backward_simulation_fraction",
    "objective.distillation.pure_noise_fraction",
    "objective.distillation.second_view_shift",
    "objective.distillation.teacher",
    "objective.distillation.views",
    "objective.teacher_steps",  # test_regression.py
    "output",
    "resume_changed",  # test_record.py
    "sample_every_images",
    "sample_steps",
    "sampling_shift",  # test_loop.py
    "shards",
    "coarse_label_fraction",  # test_coarse_labels.py
    "diffusion.beta_start",  # test_same_process.py, like the next one
    "diffusion.beta_end",
    "shards_cache.folder",  # test_remote_shards.py, like the next one
    "shards_cache.gigabytes",
}
"""Settings that change no weights, or have a separate test: in the named file, or else in this one."""


def settings_of(schema, prefix=""):
    for field in dataclasses.fields(schema):
        inner = field.default_factory
        if dataclasses.is_dataclass(inner):
            yield from settings_of(inner, f"{prefix}{field.name}.")
        else:
            yield prefix + field.name


def test_every_setting_has_a_test():
    assert set(settings_of(TrainConfig)) == OTHERS.keys() | ELSEWHERE


@pytest.fixture
def trained(train_config, tmp_path, monkeypatch):
    """A function that trains for two steps with the given settings and returns the weights."""
    monkeypatch.setattr(loop, "preview", lambda *_: None)
    monkeypatch.setattr(loop, "save_model_folder", lambda *_: None)
    runs = iter(range(100))

    def build(*settings):
        run = tmp_path / f"run-{next(runs)}"
        AcceleratorState._reset_state(reset_partial_state=True)  # otherwise it keeps the precision of earlier runs
        train(train_config("images_total=16", *settings, f"output={run}"))
        return load_file(checkpoints(run / "checkpoints")[-1] / "model" / WEIGHTS)

    yield build
    AcceleratorState._reset_state(reset_partial_state=True)


def override(setting):
    return f"{setting}={str(OTHERS[setting]).replace('True', 'true').replace('False', 'false')}"


@pytest.fixture
def usual(trained):
    """A function that returns the weights of the tiny run, with some settings. They are computed once per session."""
    return lambda *settings: usual_weights(trained, settings)


kept = {}


def usual_weights(trained, settings):
    if settings not in kept:
        kept[settings] = trained(*settings)
    return kept[settings]


@pytest.mark.slow
@pytest.mark.parametrize("setting", OTHERS)
def test_a_setting_changes_the_weights(trained, usual, setting):
    needs = NEEDS.get(setting, [])
    before, after = usual(*needs), trained(*needs, override(setting))
    assert before.keys() != after.keys() or not all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.slow
def test_the_optimizer_gets_learning_rates_weight_decay_and_clipped_gradients(trained, train_config, monkeypatch):
    steps, real = [], torch.optim.AdamW.step

    def step(self, *arguments, **options):
        [group] = self.param_groups
        norm = torch.stack([p.grad.square().sum() for p in group["params"] if p.grad is not None]).sum().sqrt()
        steps.append((group["lr"], group["weight_decay"], float(norm)))
        return real(self, *arguments, **options)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    settings = ["images_total=48", "warmup_images=24", "cooldown_images=16", "learning_rate=1e-3", "weight_decay=0.3"]
    trained(*settings, "gradient_clip=0.01")
    expected = [warmup_cooldown(train_config(*settings), seen) for seen in range(0, 48, 8)]
    rates, decays, norms = zip(*steps)
    assert list(rates) == expected and 0 < expected[0] < max(expected) == 1e-3 and expected[-1] == 5e-4
    assert set(decays) == {0.3} and all(norm == pytest.approx(0.01, rel=1e-3) for norm in norms)
    steps.clear()
    trained(*settings, "gradient_clip=1e9")
    assert min(norm for *_, norm in steps) > 0.02


def test_the_ema_has_its_half_life(train_config, model_folder, tmp_path, trained):
    """With init_from: EMA = start + (1 - 0.5^(batch / half-life)) (weights - start) after one step."""
    start = load_file(model_folder / "unet" / WEIGHTS)
    settings = [f"init_from={model_folder / 'unet'}", "images_total=8", "ema_halflife_images=16", "learning_rate=1e-2"]
    weights = trained(*settings)
    average = load_file(checkpoints(tmp_path / "run-0/checkpoints")[-1] / "ema" / WEIGHTS)
    moved = [name for name in weights if not name.startswith("mixture.noise.") and not torch.equal(weights[name], start[name])]
    assert len(moved) > 10
    for name in moved:
        expected = start[name] + (1 - 0.5**0.5) * (weights[name] - start[name])
        assert torch.allclose(average[name], expected, atol=1e-6), name


@pytest.fixture
def network_inputs(monkeypatch):
    """For every training call of the network: its arguments, its keyword arguments, and the dtype of its first features."""
    calls, real = [], Denoising.losses

    def losses(self, *arguments):
        network = self.model.network
        hooks = [
            network.register_forward_pre_hook(lambda _, given, named: calls.append((*given, named)), with_kwargs=True),
            network.conv_in.register_forward_hook(lambda *given: calls.append((*calls.pop(), given[-1].dtype))),
        ]
        try:
            return real(self, *arguments)
        finally:
            for hook in hooks:
                hook.remove()

    monkeypatch.setattr(Denoising, "losses", losses)
    return calls


@pytest.mark.parametrize("dropout", [0, 1])
def test_labels_and_embeddings_are_dropped_at_the_given_rate(trained, embedded, network_inputs, dropout):
    trained(f"shards={embedded}", "image_conditional=true", f"label_dropout={dropout}")
    for *_, named, _ in network_inputs:
        assert set(named["class_labels"].tolist()) == ({2} if dropout else {0, 1})
        norms = named["image_embeds"].norm(dim=1)
        assert torch.allclose(norms, torch.full_like(norms, 1 - dropout), atol=1e-2)
    assert len(network_inputs) == 2


def test_labels_and_embeddings_are_dropped_independently(trained, embedded, network_inputs):
    trained(f"shards={embedded}", "image_conditional=true", "label_dropout=0.5", "images_total=64")
    without_label = torch.cat([call[-2]["class_labels"] == 2 for call in network_inputs])
    without_embedding = torch.cat([call[-2]["image_embeds"].norm(dim=1) < 0.5 for call in network_inputs])
    counts = [int((without_label == a).logical_and(without_embedding == b).sum()) for a in (0, 1) for b in (0, 1)]
    assert len(without_label) == 64 and min(counts) > 5


@pytest.mark.parametrize("setting, expected", [(["class_conditional=false"], None), (["class_conditional=true"], "labels")])
def test_a_network_without_classes_gets_no_labels(trained, network_inputs, setting, expected):
    trained(*setting)
    assert all((call[-2]["class_labels"] is None) == (expected is None) for call in network_inputs) and len(network_inputs) == 2


@pytest.mark.parametrize("precision, dtype", [("no", torch.float32), ("bf16", torch.bfloat16)])
def test_the_network_runs_in_the_given_precision(trained, network_inputs, precision, dtype):
    trained(f"precision={precision}")
    assert {call[-1] for call in network_inputs} == {dtype}


@pytest.mark.parametrize("name", ["auto", "sdpa", "xformers"])
def test_the_attention_backend_is_set(trained, name, monkeypatch):
    monkeypatch.setattr(attention, "_backend", "none")
    trained(f"attention={name}")
    assert attention._backend == name


@pytest.fixture
def step_inputs(monkeypatch):
    """(batch, draws, global random seed) of every step."""
    found, real = [], Denoising.losses

    def losses(self, batch, draws):
        found.append((batch, draws, torch.initial_seed()))
        return real(self, batch, draws)

    monkeypatch.setattr(Denoising, "losses", losses)
    return found


def test_every_step_and_seed_has_its_own_random_numbers(trained, step_inputs):
    for seed in (0, 1):
        trained(f"seed={seed}")
    for numbers in ([draws.eps.sum().item() for _, draws, _ in step_inputs], [seed for *_, seed in step_inputs]):
        assert len(numbers) == len(set(numbers)) == 4


def test_the_seed_determines_the_initial_weights(trained):
    still = ("learning_rate=1e-12", "weight_decay=0", "images_total=8")
    a, b = (trained(f"seed={seed}", *still)["conv_in.weight"] for seed in (0, 1))
    assert (a - b).abs().max() > 0.01


def test_a_weighting_has_the_power_of_the_objective(open_run, shards):
    """The energy score has power beta, the others power 2."""
    batch = LatentStream(Manifest.load(shards), 8, 8).batch_at(0)
    for objective, power in ((["objective.beta=0.5"], 0.5), (["objective.name=mse"], 2), (["objective.name=mixture_nll"], 2)):
        losses = []
        for weighting in ("prediction", "x0"):
            run = open_run(*objective, f"objective.weighting={weighting}")
            torch.manual_seed(0)
            draws = draw_step_noise(torch.Generator().manual_seed(0), (8, 4, 8, 8), 2, run.process(), 0.1)
            losses.append(Denoising(run).losses(batch, draws))
        _, s = run.process().signal_and_noise(draws.t, draws.t)
        assert torch.allclose(losses[1], losses[0] * s**power, rtol=1e-4)


def test_the_model_has_the_scheduler_of_the_training(train_config):
    folder = train(train_config("images_total=8", "diffusion.prediction_type=epsilon", "diffusion.num_train_timesteps=500"))
    found = load_pipeline(folder).scheduler
    assert (found.config.prediction_type, len(found.alphas_cumprod), found.config.num_train_timesteps) == ("epsilon", 500, 500)
    linear = build_scheduler(DiffusionConfig(beta_schedule="linear")).alphas_cumprod
    assert torch.allclose(linear, DDPMScheduler(beta_schedule="linear").alphas_cumprod)


@pytest.mark.parametrize("mirror", [False, True])
def test_training_uses_the_batches_of_the_stream(trained, shards, step_inputs, mirror):
    trained(f"mirror={mirror}".lower(), "seed=3")
    stream = LatentStream(Manifest.load(shards), 8, 16, seed=3, mirror=mirror)
    for position, (batch, _, _) in zip((0, 8), step_inputs, strict=True):
        assert torch.equal(batch.moments, stream.batch_at(position).moments)


@pytest.mark.slow
def test_batches_come_from_workers(trained, monkeypatch):
    loaders, real = [], loop.latent_loader
    monkeypatch.setattr(loop, "latent_loader", lambda *given: loaders.append(real(*given)) or loaders[-1])
    assert trained("num_workers=1").keys() == trained().keys()
    assert [loader.num_workers for loader in loaders] == [1, 0]


@pytest.mark.slow
def test_reports_samples_and_checkpoints_have_the_given_intervals(train_config, tmp_path, monkeypatch):
    steps, real = [], SMDPipeline.__call__

    @functools.wraps(real)
    def call(self, labels, batch_size, num_inference_steps, **options):
        steps.append(num_inference_steps)
        return real(self, labels, batch_size, num_inference_steps, **options)

    monkeypatch.setattr(SMDPipeline, "__call__", call)
    often = ["log_every_images=24", "sample_every_images=40", "checkpoint_every_images=16", "keep_checkpoints=3"]
    train(train_config(*often, "sample_steps=3"))
    run = tmp_path / "run"
    assert [line["images_seen"] for line in read_metrics(run / "metrics.jsonl") if "loss" in line] == [24, 48, 64]
    assert sorted(path.stem for path in (run / "samples").iterdir()) == ["000000000040", "000000000064"]
    assert [path.name for path in checkpoints(run / "checkpoints")] == [f"images-{n:012d}" for n in (32, 48, 64)]
    assert steps == [3, 3]
