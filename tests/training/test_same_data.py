"""A teacher of other latents or classes is refused. An initial model of others is used, with a warning."""

import json
import logging

import pytest
import torch

from ldm_smd.autoencoder import FrozenAutoencoder
from ldm_smd.errors import UserError
from ldm_smd.training.build import initial_model
from ldm_smd.training.teacher import load_teacher


@pytest.fixture
def warnings(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("ldm_smd.training.build"), "propagate", True)
    return lambda: [record.getMessage() for record in caplog.records if "init_from" in record.getMessage()]


def rename_class(pipeline):
    """Classes are numbered by their sorted names, so that a renamed folder can change the number of every class."""
    path = pipeline / "model_index.json"
    index = json.loads(path.read_text())
    index["id2label"] = {"0": "square", "1": "disc"}
    path.write_text(json.dumps(index))


def train_encoder_further(pipeline):
    vae = FrozenAutoencoder.from_pretrained(pipeline / "vae").model
    torch.nn.init.normal_(vae.encoder.conv_in.bias)
    vae.save_pretrained(pipeline / "vae")


@pytest.mark.parametrize(
    "change, message",
    [
        (rename_class, "other classes: number 0 is 'square', and 'disc' in the shards"),
        (train_encoder_further, "another autoencoder than .*, which encoded the shards"),
    ],
)
def test_models_of_other_classes_or_latents(open_run, distillation, gaussian_folder, warnings, change, message):
    run = open_run(*distillation)
    load_teacher(run, initial_model(run))
    assert not warnings()
    change(gaussian_folder)
    model = initial_model(run)
    [said] = warnings()
    with pytest.raises(UserError, match=f"expected a model of these latents and classes, found in .* {message}") as refused:
        load_teacher(run, model)
    assert str(refused.value).endswith(said.partition(" has ")[2])
