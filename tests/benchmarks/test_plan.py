from functools import partial

import plan
import pytest
import training_costs
from accelerate import Accelerator
from training_costs import Distilled, Model, unet_of

from ldm_smd.diffusion.settings import DistillationConfig
from ldm_smd.training.distillation import Distillation
from ldm_smd.training.run import Run


@pytest.fixture
def config(train_config, gaussian_folder):
    return train_config(f"init_from={gaussian_folder / 'unet'}", "objective.name=distillation", "objective.draws=1")


def test_the_planned_memory_of_a_distillation_is_what_it_uses(config, monkeypatch):
    """After a step: weights, gradients and optimizer states of both networks, the teacher, and the EMA of the loop."""
    monkeypatch.setattr(training_costs, "CLASSES", 2)
    monkeypatch.setattr(training_costs, "LATENT", (4, 8, 8))
    learner = Distillation(Run.open(config, Accelerator()))
    learner.step(learner.run.batches().batch_at(0), 0, learning_rate=1e-3)

    def size(tensors):
        return sum(tensor.nbytes for tensor in tensors)

    held = size(learner.teacher.parameters()) + size(learner.model.network.parameters())
    for trained in learner.networks.values():
        weights = list(trained.network.parameters())
        states = [value for state in trained.optimizer.state.values() for name, value in state.items() if name != "step"]
        held += size(weights) + size(weight.grad for weight in weights) + size(states)
    assert Distilled(partial(unet_of, config), config.objective.distillation).held == held


def test_the_planned_operations_of_a_distillation(config):
    """An adversarial critic learns from twice the images and needs one more backward pass. Another has two updates per step,
    and the additional one needs no teacher."""
    base, adversarial, twice = (
        Distilled(partial(unet_of, config), DistillationConfig(**changed))
        for changed in ({}, {"adversarial_weight": 0.3}, {"critic_updates": 2})
    )
    mixture, gaussian = (Model(partial(unet_of, config), draws) for draws in (config.objective.draws, 0))
    assert base.flops == pytest.approx(mixture.flops + 4 / 3 * gaussian.flops, rel=0.05)
    assert adversarial.flops == pytest.approx(mixture.flops + (4 / 3 + 1 + 2 / 3) * gaussian.flops, rel=0.05)
    assert twice.flops == pytest.approx(base.flops + (mixture.flops + 3 * gaussian.flops) / 3, rel=0.02)
    assert base.activations == pytest.approx(mixture.activations + gaussian.activations, rel=0.05)
    assert adversarial.activations == pytest.approx(mixture.activations + 2 * gaussian.activations, rel=0.05)
    checkpointed = Distilled(partial(unet_of, config), DistillationConfig(adversarial_weight=0.3), checkpointing=True)
    assert checkpointed.activations < 0.6 * adversarial.activations


def test_the_energy_score_beside_a_distillation_needs_its_draws(config):
    build = partial(unet_of, config)
    base, one, four = Distilled(build, DistillationConfig()), Model(build, 1), Model(build, 4)
    scored = Distilled(build, DistillationConfig(energy_weight=0.3), draws=4)
    assert scored.flops == pytest.approx(base.flops + four.flops - one.flops, rel=0.02)
    assert scored.held == base.held


def test_with_other_options_the_file_of_the_repository_is_not_written(tmp_path):
    assert plan.arguments_of([]).output == plan.RESULT
    assert plan.arguments_of(["--gpus", "8"]).output is None
    assert plan.arguments_of(["--price", "2.5", "--output", str(tmp_path / "plan.md")]).output == tmp_path / "plan.md"
