"""Callbacks during sampling, and the progress bar."""

import pytest
import torch
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback

from ldm_smd.pipelines import seeded_generators
from ldm_smd.schedulers import make_scheduler
from tests.rounding import nearly_equal
from tests.sampled import SCHEDULERS, latents


def test_a_callback_can_change_the_latents(pipeline):
    seen = []

    def zero(pipe, index, timestep, tensors):
        seen.append((index, int(timestep)))
        return {"latents": torch.zeros_like(tensors["latents"])}

    assert not latents(pipeline, [0], [1], callback_on_step_end=zero).any()
    assert seen[0] == (0, 999) and len(seen) == 3


@pytest.mark.parametrize("name", SCHEDULERS)
def test_callbacks_get_the_input_and_prediction_of_the_network(pipeline, name):
    """The last step has no noise left, so most schedulers return the last prediction."""
    pipeline.scheduler = make_scheduler(name, pipeline.scheduler)
    seen = []

    def keep(pipe, index, timestep, tensors):
        assert set(tensors) == {"sample", "pred_original_sample"}
        seen.append(tensors)
        return {}

    wanted = ["sample", "pred_original_sample"]
    end = latents(pipeline, [0, 1], [1, 2], callback_on_step_end=keep, callback_on_step_end_tensor_inputs=wanted)
    assert len(seen) == pipeline.num_timesteps and seen[0]["sample"].std() == pytest.approx(1, abs=0.15)
    last = seen[-1]["pred_original_sample"]
    if name.partition("Discrete")[0] not in ("Heun", "LMS", "PNDMScheduler"):  # a mean of several evaluations
        assert torch.allclose(last, end, rtol=1e-2, atol=1e-2 * float(end.abs().max()))
    with pytest.raises(ValueError, match="tensor_inputs: expected some of latents, sample, pred_original_sample, found eta"):
        latents(pipeline, [0], [1], callback_on_step_end=keep, callback_on_step_end_tensor_inputs=["eta"])


def test_pred_original_sample_equals_the_prediction_of_the_first_step(pipeline):
    """With the same noise and eta."""
    seen = []

    def keep(pipe, index, timestep, tensors):
        seen.append((timestep, tensors))
        return {}

    start, options = torch.randn(2, 4, 8, 8), {"guidance_scale": 2.0, "guidance_interval": (0.5, 1e9)}
    wanted = ["sample", "pred_original_sample"]
    callback = {"callback_on_step_end": keep, "callback_on_step_end_tensor_inputs": wanted}
    latents(pipeline, [0, 1], [1, 2], latents=start, **options, **callback)
    timestep, tensors = seen[0]
    found = pipeline.pred_original_sample(start, timestep, [0, 1], generator=seeded_generators([1, 2]), **options)
    assert torch.equal(tensors["sample"], start) and nearly_equal(tensors["pred_original_sample"], found)
    assert not torch.allclose(found, pipeline.pred_original_sample(start, timestep, [0, 1], **options), atol=1e-2)


def test_diffusers_callbacks_can_end_guidance_and_sampling(pipeline):
    class Cutoff(PipelineCallback):
        tensor_inputs = ["latents"]

        def callback_fn(self, pipeline, step_index, timestep, callback_kwargs):
            if step_index == int(pipeline.num_timesteps * self.config.cutoff_step_ratio):
                pipeline._guidance_scale = 1.0
            return callback_kwargs

    rows = []
    pipeline.unet.register_forward_pre_hook(lambda _, given: rows.append(len(given[0])))
    both = MultiPipelineCallbacks([Cutoff(cutoff_step_ratio=0.5)])
    latents(pipeline, [0], [1], num_inference_steps=4, guidance_scale=3.0, callback_on_step_end=both)
    assert rows == [2, 2, 2, 1] and pipeline.guidance_scale == 1.0

    def stop(pipe, index, timestep, tensors):
        pipe._interrupt = index == 1
        return tensors

    rows.clear()
    assert latents(pipeline, [0], [1], num_inference_steps=9, callback_on_step_end=stop).isfinite().all()
    assert rows == [1, 1] and pipeline.interrupt
    latents(pipeline, [0], [1], num_inference_steps=2)
    assert rows == [1, 1, 1, 1]


def test_the_progress_bar_is_configured_as_in_diffusers(pipeline, capfd):
    pipeline.set_progress_bar_config(disable=False, desc="two")
    latents(pipeline, [0], [1], num_inference_steps=2)
    assert "two: 100%" in capfd.readouterr().err
    pipeline.set_progress_bar_config(disable=True)
    latents(pipeline, [0], [1], num_inference_steps=2)
    assert not capfd.readouterr().err
