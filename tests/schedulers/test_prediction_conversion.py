"""A network that was trained on one process is sampled by schedulers of another."""

import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler

from ldm_smd.diffusion.process import RectifiedFlow
from ldm_smd.diffusion.settings import PREDICTION_TYPES, DiffusionConfig
from ldm_smd.schedulers import make_scheduler
from ldm_smd.schedulers.conversion import Process, path_of, prediction_conversions, process_of
from ldm_smd.schedulers.schedule import build_scheduler
from ldm_smd.schedulers.timesteps import begin_run, first_sample, network_input, noised

TABLE, FLOW = (build_scheduler(DiffusionConfig(path=path)) for path in ("variance_preserving", "flow"))
PATHS = [path_of(TABLE), path_of(DDIMScheduler()), RectifiedFlow(1000)]
FLOW_NAMES = ["FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler"]
DEVICE = torch.device("cpu")
MEAN, DEVIATION = torch.tensor([0.5, -1.0, 0.0]), torch.tensor([0.6, 0.9, 1.2])


def exact(process, x_t, t):
    """Return the exact prediction for independent x_0 ~ N(MEAN, DEVIATION^2) at one t."""
    t = torch.as_tensor(t).reshape(1)
    a, s = process.path.signal_and_noise(t, x_t)
    x0 = MEAN + a * DEVIATION**2 / (a**2 * DEVIATION**2 + s**2) * (x_t - a * MEAN)
    eps = (x_t - a * x0) / s
    return process.path.target(x0, eps, t, process.prediction_type)


@pytest.mark.parametrize("kind", PREDICTION_TYPES)
@pytest.mark.parametrize("own_kind", PREDICTION_TYPES)
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("own_path", PATHS)
def test_converted_predictions_are_exact_for_the_other_process(own_path, path, own_kind, kind):
    own, other = Process(own_path, own_kind), Process(path, kind)
    x_t = torch.randn(16, 3, generator=torch.Generator().manual_seed(0))
    timesteps = torch.tensor([950, 700, 300, 50])
    for t, conversion in zip(timesteps, prediction_conversions(own, other, timesteps, DEVICE)):
        found = conversion.to_scheduler(exact(own, *conversion.network_inputs(x_t)), x_t)
        assert torch.allclose(found, exact(other, x_t, t), rtol=2e-3, atol=2e-3)


def test_nothing_is_converted_for_the_same_process():
    x_t = torch.randn(2, 3)
    for scheduler in (TABLE, FLOW):
        ddim = make_scheduler("DDIMScheduler", scheduler) if scheduler is TABLE else FLOW
        [conversion] = prediction_conversions(process_of(scheduler), process_of(ddim), torch.tensor([400]), DEVICE)
        network_x_t, t = conversion.network_inputs(x_t)
        assert network_x_t is x_t and t == 400 and conversion.to_scheduler(x_t, network_x_t) is x_t


def test_processes_are_compared_by_value():
    assert process_of(TABLE) == process_of(make_scheduler("UniPCMultistepScheduler", TABLE))
    assert process_of(FLOW) == process_of(FlowMatchHeunDiscreteScheduler()) != process_of(TABLE)
    assert process_of(TABLE) != process_of(DDIMScheduler())
    assert process_of(FLOW) != process_of(FlowMatchEulerDiscreteScheduler(500))
    assert Process(PATHS[0], "epsilon") != Process(PATHS[0], "sample") and Process(PATHS[0], "epsilon") != "epsilon"


def test_signal_to_noise_ratios_outside_the_noise_schedule():
    """Pure noise gets the last timestep of a noise schedule. Nearly clean latents get the first."""
    first, last = prediction_conversions(process_of(TABLE), process_of(FLOW), torch.tensor([1000.0, 1e-3]), DEVICE)
    assert first.timestep == 999 and last.timestep == 0
    x_t = torch.randn(4, 3)
    assert torch.allclose(first.to_scheduler(exact(process_of(TABLE), *first.network_inputs(x_t)), x_t), x_t - MEAN, atol=5e-3)


def test_moments_are_not_converted():
    [conversion] = prediction_conversions(process_of(FLOW), process_of(TABLE), torch.tensor([500]), DEVICE)
    x_t = torch.randn(2, 3)
    output = torch.randn(2, 9)
    found = conversion.to_scheduler(output, x_t)
    assert torch.equal(found[:, 3:], output[:, 3:]) and not torch.allclose(found[:, :3], output[:, :3])


@pytest.mark.parametrize("start", ["noise", "data"])
@pytest.mark.parametrize("own", [TABLE, FLOW])
@pytest.mark.parametrize(
    "name",
    ["FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler", "UniPCMultistepScheduler", "EulerDiscreteScheduler"],
)
def test_models_of_either_path_sample_the_data_with_schedulers_of_either(name, own, start):
    scheduler = make_scheduler(name, own)
    timesteps = begin_run(scheduler, 40, None if start == "noise" else 0.5)
    generator = torch.Generator().manual_seed(0)
    x = first_sample(scheduler, torch.randn(4000, 3, generator=generator))
    if start == "data":
        clean = MEAN + DEVIATION * torch.randn(4000, 3, generator=generator)
        x = noised(scheduler, clean, torch.randn(4000, 3, generator=generator), timesteps[0])
    for t, conversion in zip(timesteps, prediction_conversions(process_of(own), process_of(scheduler), timesteps, DEVICE)):
        x_t = network_input(scheduler, x, t)
        prediction = exact(process_of(own), *conversion.network_inputs(x_t))
        x = scheduler.step(conversion.to_scheduler(prediction, x_t), t, x).prev_sample
    assert (x.mean(dim=0) - MEAN).abs().max() < 0.06 and (x.std(dim=0) / DEVIATION - 1).abs().max() < 0.06


def test_flow_matching_models_get_our_default_noise_schedule():
    """A flow has no noise schedule, and 'linear', the default of diffusers, does not suit latents."""
    for name in ("DDIMScheduler", "TeleportScheduler", "GMSScheduler", "EulerDiscreteScheduler"):
        made = make_scheduler(name, FLOW)
        assert torch.equal(made.alphas_cumprod, TABLE.alphas_cumprod) and made.config.prediction_type == "v_prediction"
    shifted = make_scheduler("FlowMatchEulerDiscreteScheduler:shift=3.0", EulerDiscreteScheduler.from_config(TABLE.config))
    assert shifted.config.shift == 3.0 and begin_run(shifted, 2).tolist() == [1000, 750]
