"""Initial weights of a training: init_from and its checks."""

import json

import pytest
import torch

from ldm_smd.errors import UserError
from ldm_smd.models.hub import network_folder
from ldm_smd.pipelines import load_pipeline
from ldm_smd.training import build
from ldm_smd.training.build import initial_model, noise_modes
from ldm_smd.training.fit_gaussian import FITTING_LATENTS, LATENTS_PER_COMPONENT
from ldm_smd.training.loop import train
from tests.tiny import diffusers_unet
from tests.training.results import weights


def test_init_from_loads_weights_but_fits_new_noise(train_config, model_folder, tmp_path):
    """The noise is fitted to the latents of this run, here with fewer modes."""
    still = ("images_total=8", "learning_rate=1e-12", "weight_decay=0", "model.noise_modes=1")
    before = weights(model_folder / "unet")
    after = weights(train(train_config(f"init_from={model_folder / 'unet'}", *still)) / "unet")
    trained = [name for name in before if not name.startswith("mixture.noise.")]
    assert all(torch.allclose(before[name], after[name], atol=1e-6) for name in trained)
    assert len(before["mixture.noise.means"]) > len(after["mixture.noise.means"]) == 1
    with pytest.raises(UserError, match="init_from: expected the weights of the configured model"):
        train(train_config(f"init_from={model_folder / 'unet'}", "model.z_channels=6", f"output={tmp_path / 'other'}"))
    with pytest.raises(UserError, match="init_from: expected a model folder"):
        train(train_config(f"init_from={model_folder / 'vae'}-not-there", f"output={tmp_path / 'other'}"))


def test_init_from_accepts_the_folder_of_a_pipeline(model_folder):
    assert network_folder(model_folder, "init_from") == model_folder / "unet"
    assert network_folder(model_folder / "unet", "init_from") == model_folder / "unet"


def test_pickled_weights_are_refused(train_config, tmp_path):
    diffusers_unet().save_pretrained(tmp_path / "pipeline/unet", safe_serialization=False)
    with pytest.raises(UserError, match=r"^init_from: expected a network with safetensors weights in .*pipeline, found none"):
        train(train_config(f"init_from={tmp_path / 'pipeline'}"))


def test_a_mixture_can_start_from_a_gaussian_model(train_config, tmp_path):
    gaussian = ("model.z_channels=0", "objective.name=mse", f"output={tmp_path / 'gaussian'}", "images_total=8")
    start = train(train_config(*gaussian)) / "unet"
    still = ("learning_rate=1e-12", "weight_decay=0", "images_total=8")
    after = weights(train(train_config(f"init_from={start}", *still)) / "unet")
    before = weights(start)
    assert all(torch.allclose(before[name], after[name], atol=1e-6) for name in before)
    assert {name.split(".")[0] for name in after.keys() - before.keys()} == {"mixture"}
    assert after["mixture.noise.alphas_cumprod"].any()


@pytest.mark.slow
def test_a_mixture_can_start_from_a_diffusers_unet(train_config, tmp_path):
    """It is trained, resumed and sampled, and another training starts from it."""
    diffusers_unet().save_pretrained(tmp_path / "unet")
    start = f"init_from={tmp_path / 'unet'}"
    train(train_config(start, "images_total=32"))
    folder = train(train_config(start, "images_total=64"))
    assert json.loads((folder / "unet/config.json").read_text())["_class_name"] == "ExtendedUNet2DModel"
    assert load_pipeline(folder)([0, 1], num_inference_steps=2, output_type="pt").images.isfinite().all()
    train(train_config(f"init_from={folder / 'unet'}", f"output={tmp_path / 'again'}", "images_total=8"))
    gaussian = (f"init_from={folder / 'unet'}", "model.z_channels=0", "objective.name=mse", f"output={tmp_path / 'x'}")
    with pytest.raises(UserError, match=r"model\.z_channels: expected more than 0 for the mixture .*unet, found 0"):
        train(train_config(*gaussian))
    with pytest.raises(UserError, match=r"init_from: expected model\.z_channels > 0"):
        train(train_config(start, "model.z_channels=0", "objective.name=mse", f"output={tmp_path / 'x'}"))


def test_a_unet_without_a_null_class_gets_one(train_config, tmp_path, caplog):
    """Such a UNet can be the initial model and the teacher. As a teacher it has no predictions without labels."""
    unet = diffusers_unet(num_class_embeds=2)
    unet.save_pretrained(tmp_path / "unet")
    start, still = f"init_from={tmp_path / 'unet'}", ("images_total=8", "learning_rate=1e-12", "weight_decay=0")
    trained = weights(train(train_config(start, *still)) / "unet")["unet.class_embedding.weight"]
    classes = unet.class_embedding.weight.detach()
    assert torch.allclose(trained, torch.cat((classes, classes.mean(dim=0, keepdim=True))), atol=1e-6)
    [warning] = [record.message for record in caplog.records if "null class" in record.message]
    expected = "the UNet2DModel has an embedding for each of the 2 classes and none for the null class: added one"
    assert warning.startswith(expected)
    distilled = (start, *still, "objective.name=distillation", "objective.draws=1", f"output={tmp_path / 'distilled'}")
    with pytest.raises(UserError, match=r"^label_dropout: expected 0, since the teacher in .* without labels, found 0\.1"):
        train(train_config(*distilled))
    with pytest.raises(UserError, match=r"^objective\.distillation\.guidance_scale: expected 1, .* labels, found 2"):
        train(train_config(*distilled, "label_dropout=0", "objective.distillation.guidance_scale=2"))
    assert load_pipeline(train(train_config(*distilled, "label_dropout=0"))).unet.config.num_classes == 2


@pytest.mark.parametrize("mirror", [False, True])
def test_the_noise_is_fitted_to_the_latents_of_the_training(open_run, monkeypatch, mirror):
    """Half of them mirrored with ``mirror``, in the order of the seed."""
    seen, real = [], build.fitting_latents
    monkeypatch.setattr(build, "fitting_latents", lambda *given: seen.append(given[2:]) or real(*given))
    initial_model(open_run(f"mirror={str(mirror).lower()}", "seed=3"))
    assert seen == [(3, mirror)]


def test_another_number_of_classes_is_refused(train_config, tmp_path):
    diffusers_unet(num_class_embeds=5).save_pretrained(tmp_path / "unet")
    with pytest.raises(UserError, match=r"^init_from: expected 3 class embeddings, for 2 classes and the null class, found 5"):
        train(train_config(f"init_from={tmp_path / 'unet'}"))


def test_the_fitted_noise_has_no_more_modes_than_latents_to_fit_them_to(open_run):
    run = open_run("model.noise_modes=20000")
    run.manifest.shards[0]["count"] = 1_300_000
    assert noise_modes(run.config, run.manifest) == FITTING_LATENTS // LATENTS_PER_COMPONENT
