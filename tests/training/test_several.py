"""Posterior distillation on several processes, in less memory, in less time and in bf16."""

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
PARTS = ["micro_batches=2", "objective.distillation.critic_updates=2"]
SHORT = ["images_total=16", "log_every_images=8"]


@pytest.mark.distributed
def test_two_processes_distil_as_one_does(distil, tmp_path, launch):
    """With whole networks (DDP) and with divided ones (FSDP), all in one group of processes; a divided run is gone on with."""

    def settings(kind, name, *changed):
        given = [ADVERSARIAL] if "adversarial" in name else []
        given += PARTS[kind == "one" :] if "parts" in name else []
        return [*SHORT, "checkpoint_every_images=8", *given, f"output={tmp_path / kind / name}", *changed]

    runs, paths = ("parts", "adversarial", "adversarial-parts"), []
    for kind in ("whole", "divided"):
        chosen = [(name, settings(kind, name)) for name in runs]
        if kind == "divided":
            chosen.insert(1, ("adversarial", settings(kind, "adversarial", "images_total=8")))
            chosen.append(("bf16", settings(kind, "adversarial-bf16", "precision=bf16")))
        for name, given in chosen:
            paths.append(tmp_path / f"{kind}-{len(paths)}-{name}.yaml")
            paths[-1].write_text(dump_config(distil(*given)))
    process = launch(2, "tests/training/fsdp_run.py", *paths)
    for name in runs[:2]:
        train(distil(*settings("one", name)))
    error = process.said()
    assert process.returncode == 0, error[-6000:]
    for kind in ("whole", "divided"):
        for name in runs[:2]:
            # After one update of the critic the difference of two denoisers is small, and rounding a larger part of it.
            assert_same_losses(tmp_path / "one" / name, tmp_path / kind / name, rel=2e-3)
    # The term's scale is that of a part, and one process has other parts.
    assert_same_losses(*(tmp_path / kind / "adversarial-parts" for kind in ("whole", "divided")))
    assert_same_losses(*(tmp_path / f"divided/adversarial{precision}" for precision in ("", "-bf16")), rel=0.02)

    first, second = (checkpoints(tmp_path / kind / "adversarial/checkpoints")[-1] for kind in ("one", "divided"))
    for path in first.rglob("*.safetensors"):
        one, divided = load_file(path), load_file(second / path.relative_to(first))
        assert {name: value.shape for name, value in one.items()} == {name: value.shape for name, value in divided.items()}
        # Without momentum a weight whose gradient is rounding goes either way: so all together, of 0.05 that a step moves them.
        apart = torch.stack([(one[name].float() - divided[name].float()).norm() for name in one]).norm()
        assert apart < 1e-3, path.name


@pytest.mark.slow
def test_the_same_in_less_memory(distil, tmp_path):
    train(distil(*SHORT, ADVERSARIAL, f"output={tmp_path / 'plain'}"))
    train(distil(*SHORT, ADVERSARIAL, f"output={tmp_path / 'other'}", "gradient_checkpointing=true"))
    assert_same_losses(tmp_path / "plain", tmp_path / "other")


@pytest.mark.slow
def test_the_same_in_less_time(distil, tmp_path, monkeypatch):
    """Also where a compiled critic's graph is gone back through twice, which torch may free the first time."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    monkeypatch.setattr("torch._functorch.config.donated_buffer", True)
    train(distil(*SHORT, ADVERSARIAL, f"output={tmp_path / 'plain'}"))
    assert torch._functorch.config.donated_buffer
    train(distil(*SHORT, ADVERSARIAL, f"output={tmp_path / 'other'}", "compile=true"))
    assert not torch._functorch.config.donated_buffer
    assert_same_losses(tmp_path / "plain", tmp_path / "other")


@pytest.mark.slow
def test_nearly_the_same_in_bf16(distil, tmp_path):
    for precision in ("no", "bf16"):
        AcceleratorState._reset_state(reset_partial_state=True)  # it keeps the precision of a process
        train(distil(*SHORT, ADVERSARIAL, f"output={tmp_path / precision}", f"precision={precision}"))
    AcceleratorState._reset_state(reset_partial_state=True)
    assert logged(tmp_path / "no") != logged(tmp_path / "bf16")
    assert_same_losses(tmp_path / "no", tmp_path / "bf16", rel=0.02)
