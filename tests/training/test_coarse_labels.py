"""Coarse classes: each part of a class name, such as "noto" and "disc" of "noto, disc", is a class too."""

import json
import shutil

import pytest
import torch

from ldm_smd.errors import UserError
from ldm_smd.pipelines import load_pipeline
from ldm_smd.training.build import build_model, fit_noise
from ldm_smd.training.loop import train
from ldm_smd.training.step import Denoising, model_conditions

COARSE = "coarse_label_fraction=0.4"


@pytest.fixture
def named(shards, tmp_path):
    """A function that returns a setting of shards whose two classes have the given names."""

    def build(*names):
        folder = tmp_path / "named"
        shutil.copytree(shards, folder)
        manifest = json.loads((folder / "manifest.json").read_text())
        manifest["metadata"]["classes"] = list(names)
        (folder / "manifest.json").write_text(json.dumps(manifest))
        return f"shards={folder}"

    return build


def test_labels_are_replaced_at_the_given_rate(named, open_run):
    run = open_run(named("noto, disc", "noto, square"), COARSE, "label_dropout=0.2")
    assert run.coarse.tolist() == [[2, 3], [2, 4]], "noto, then disc and square"
    learner = Denoising(run)
    null = learner.model.network.config.num_classes
    assert null == 5
    batch = run.batches().batch_at(0)
    counts = torch.zeros(2, 6)
    for number in range(500):
        found = model_conditions(run, batch, learner.draw(batch, number), null)["class_labels"]
        counts.index_put_((batch.labels, found), torch.ones(()), accumulate=True)
    fractions = counts / counts.sum(dim=1, keepdim=True)
    expected = torch.tensor([[0.48, 0, 0.16, 0.16, 0, 0.2], [0, 0.48, 0.16, 0, 0.16, 0.2]])
    assert torch.allclose(fractions, expected, atol=0.04)


def test_images_without_a_label_have_no_coarse_label_either(named, open_run):
    run = open_run(named("noto, disc", "noto, square"), COARSE)
    learner, batch = Denoising(run), run.batches().batch_at(0)
    batch.labels[:] = -1
    for number in range(10):
        assert (model_conditions(run, batch, learner.draw(batch, number), 5)["class_labels"] == 5).all()


def test_coarse_labels_do_not_change_the_other_random_numbers(named, open_run):
    shards = named("noto, disc", "noto, square")
    plain, coarse = (Denoising(open_run(shards, *more)) for more in ([], [COARSE]))
    batch = plain.run.batches().batch_at(0)
    first, second = plain.draw(batch, 0), coarse.draw(batch, 0)
    assert torch.equal(first.eps, second.eps) and torch.equal(first.drop_label, second.drop_label)
    assert plain.run.coarse is None and plain.model.network.config.num_classes == 2


def test_the_fitted_noise_has_coarse_classes(named, open_run):
    """The component weights of a coarse class are between those of its classes."""
    run = open_run(named("noto, disc", "noto, square"), COARSE)
    noise = build_model(run.config, run.manifest).mixture
    fit_noise(noise, run)
    weights = noise.noise.log_weights.exp()
    disc, square, noto, only_disc, only_square = weights[:5]
    assert torch.equal(disc, only_disc) and torch.equal(square, only_square)
    low, high = torch.minimum(disc, square), torch.maximum(disc, square)
    assert ((noto >= low - 1e-5) & (noto <= high + 1e-5)).all()


def test_a_model_has_names_for_its_coarse_classes(named, train_config, tmp_path):
    train(train_config(named("noto, disc", "twemoji, square"), COARSE, "images_total=8", f"output={tmp_path / 'run'}"))
    pipeline = load_pipeline(tmp_path / "run/model")
    names = ["noto, disc", "twemoji, square", "noto", "twemoji", "disc", "square"]
    assert [pipeline.config.id2label[str(number)] for number in range(6)] == names
    assert pipeline([5], num_inference_steps=1, output_type="pt").images.shape[0] == 1


@pytest.mark.parametrize("names", [("disc", "square"), ("noto, disc", "square")])
def test_class_names_with_different_numbers_of_parts_are_refused(named, open_run, names):
    with pytest.raises(UserError, match=r"coarse_label_fraction: expected .* the same number of parts.*, or 0, found"):
        open_run(named(*names), COARSE)


def test_coarse_labels_without_classes_are_refused(open_run):
    with pytest.raises(UserError, match=r"coarse_label_fraction: expected .* found 'no classes'"):
        open_run(COARSE, "class_conditional=false")
