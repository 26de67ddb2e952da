"""Posterior distillation on several processes, with gradient checkpointing, compiled, and in bf16."""

import functools

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from ldm_smd.config import dump_config
from ldm_smd.training.checkpoint import checkpoints
from ldm_smd.training.loop import train
from tests.training.results import assert_same_losses, logged

ADVERSARIAL = "objective.distillation.adversarial_weight=0.3"
SIMULATED = "objective.distillation.backward_simulation_fraction=0.15"
"""One of eight images. A process with the other half of the batch has none."""
MICRO_BATCHES = ["micro_batches=2", "objective.distillation.critic_updates=2"]
SHORT = ["images_total=16", "log_every_images=8"]


@pytest.mark.distributed
def test_two_processes_give_the_losses_of_one(distil, tmp_path, launch):
    """With DDP and with FSDP. All runs share one group of processes, and one FSDP run is resumed."""

    def settings(kind, name, *changed):
        given = [ADVERSARIAL, SIMULATED] if "adversarial" in name else []
        given += MICRO_BATCHES[kind == "one" :] if "micro-batches" in name else []
        return [*SHORT, "checkpoint_every_images=8", *given, f"output={tmp_path / kind / name}", *changed]

    runs, paths = ("micro-batches", "adversarial", "adversarial-micro-batches"), []
    for kind in ("ddp", "fsdp"):
        chosen = [(name, settings(kind, name)) for name in runs]
        if kind == "fsdp":
            chosen.insert(1, ("adversarial", settings(kind, "adversarial", "images_total=8")))
            chosen.append(("bf16", settings(kind, "adversarial-bf16", "precision=bf16")))
        for name, given in chosen:
            paths.append(tmp_path / f"{kind}-{len(paths)}-{name}.yaml")
            paths[-1].write_text(dump_config(distil(*given)))
    process = launch(2, "tests/training/fsdp_run.py", *paths)
    for name in runs[:2]:
        train(distil(*settings("one", name)))
    error = process.output()
    assert process.returncode == 0, error[-6000:]
    for kind in ("ddp", "fsdp"):
        for name in runs[:2]:
            # After one update of the critic, the two denoisers differ little, so rounding is a larger part of the difference.
            assert_same_losses(tmp_path / "one" / name, tmp_path / kind / name, rel=2e-3)
    # The adversarial loss is scaled for each micro-batch, and one process has other micro-batches.
    assert_same_losses(*(tmp_path / kind / "adversarial-micro-batches" for kind in ("ddp", "fsdp")))
    assert_same_losses(*(tmp_path / f"fsdp/adversarial{precision}" for precision in ("", "-bf16")), rel=0.02)

    first, second = (checkpoints(tmp_path / kind / "adversarial/checkpoints")[-1] for kind in ("one", "fsdp"))
    for path in first.rglob("*.safetensors"):
        one, fsdp = load_file(path), load_file(second / path.relative_to(first))
        assert {name: value.shape for name, value in one.items()} == {name: value.shape for name, value in fsdp.items()}
        # A weight whose gradient is only rounding may move either way, so all weights are compared together. A step moves them
        # by 0.05.
        difference = torch.stack([(one[name].float() - fsdp[name].float()).norm() for name in one]).norm()
        assert difference < 1e-3, path.name


@pytest.mark.slow
def test_gradient_checkpointing_gives_the_same_losses(distil, tmp_path):
    train(distil(*SHORT, ADVERSARIAL, f"output={tmp_path / 'plain'}"))
    train(distil(*SHORT, ADVERSARIAL, f"output={tmp_path / 'other'}", "gradient_checkpointing=true"))
    assert_same_losses(tmp_path / "plain", tmp_path / "other")


@pytest.mark.slow
def test_a_compiled_model_gives_the_same_losses(distil, tmp_path, monkeypatch):
    """Two backward passes go through the graph of the compiled critic, although torch may free its buffers in the first."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    monkeypatch.setattr("torch._functorch.config.donated_buffer", True)
    train(distil(*SHORT, ADVERSARIAL, SIMULATED, f"output={tmp_path / 'plain'}"))
    assert torch._functorch.config.donated_buffer
    train(distil(*SHORT, ADVERSARIAL, SIMULATED, f"output={tmp_path / 'other'}", "compile=true"))
    assert not torch._functorch.config.donated_buffer
    assert_same_losses(tmp_path / "plain", tmp_path / "other")


@pytest.mark.slow
def test_bf16_gives_nearly_the_same_losses(distil, tmp_path):
    for precision in ("no", "bf16"):
        AcceleratorState._reset_state(reset_partial_state=True)  # otherwise it keeps the precision of earlier runs
        train(distil(*SHORT, ADVERSARIAL, f"output={tmp_path / precision}", f"precision={precision}"))
    AcceleratorState._reset_state(reset_partial_state=True)
    assert logged(tmp_path / "no") != logged(tmp_path / "bf16")
    assert_same_losses(tmp_path / "no", tmp_path / "bf16", rel=0.02)
