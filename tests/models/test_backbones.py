"""Contracts of every backbone with a mixture (ldm_smd/models/backbone.py)."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from ldm_smd.models import backbone
from ldm_smd.models.blocks import repeat
from ldm_smd.models.denoiser import predict
from ldm_smd.training.checkpoint import load_weights
from ldm_smd.training.trained import TrainedNetwork
from tests.forked import run_launcher
from tests.models.backbones import BACKBONES, gaussian, inputs, mixture, perturbed
from tests.rounding import nearly_equal

every_backbone = pytest.mark.parametrize("name", BACKBONES)


@every_backbone
@pytest.mark.parametrize("noise_rank", [0, 5])
def test_a_new_mixture_predicts_as_its_gaussian_model(name, noise_rank):
    """With white noise, the predictions are equal. With fitted noise, the noise is added, whose mean is 0."""
    x, t, labels, eta = inputs(draws=3)
    model = mixture(name, noise_rank=noise_rank)
    expected = repeat(predict(gaussian(name), x, t, labels), 3)
    if noise_rank:
        expected = expected + model.mixture.noise(eta, x, t, labels)
    assert nearly_equal(model(x, t, labels, eta).sample, expected)
    assert model.is_mixture and model.config.num_classes == 3


@every_backbone
def test_draws_share_the_trunk(name):
    """One call with M draws per image gives the predictions of M calls, and its trunk runs on B rows only."""
    model = perturbed(mixture(name))
    x, t, labels, eta = inputs(draws=3)
    together = model(x, t, labels, eta).sample
    one_by_one = model(repeat(x, 3), repeat(t, 3), repeat(labels, 3), eta).sample
    assert together.shape == (6, 4, 8, 8)
    assert nearly_equal(together, one_by_one)
    assert (together[0] - together[1]).abs().max() > 1e-3
    assert len(model.trunk(x, t, labels, None).features) == 2


@every_backbone
def test_the_tail_can_run_several_times_on_one_trunk(name):
    model = perturbed(mixture(name))
    x, t, labels, eta = inputs(draws=2)
    trunk = model.trunk(x, t, labels, None)
    predictions = []
    for one_eta in (eta[::2], eta[1::2]):
        draws = model.mixture.draw(one_eta, x, t, labels, trunk.features, trunk.embedding)
        predictions.append(model.mixture.gated(model.tail(trunk, draws), draws, trunk.embedding))
    assert nearly_equal(torch.stack(predictions, dim=1).flatten(0, 1), model(x, t, labels, eta).sample)


@every_backbone
def test_no_label_is_the_null_class_and_labels_change_the_prediction(name):
    model = perturbed(mixture(name))
    x, t, labels, eta = inputs()
    null = torch.full_like(labels, 3)
    assert nearly_equal(model(x, t, null, eta).sample, model(x, t, None, eta).sample)
    assert not torch.allclose(model(x, t, labels, eta).sample, model(x, t, None, eta).sample)
    one_t = model(x, 20, labels, eta).sample
    assert nearly_equal(one_t, model(x, torch.tensor([20, 20]), labels, eta).sample)


@every_backbone
def test_every_parameter_has_a_gradient(name):
    model = perturbed(mixture(name)).train()
    x, t, labels, eta = inputs(draws=2)
    model(x, t, labels, eta).sample.square().mean().backward()
    without = [key for key, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    # The last block of SD3 does not use the text queries, in the plain network either.
    assert all("transformer_blocks.2.attn.add_q_proj" in key for key in without) and (name == "sd3" or not without)


@every_backbone
def test_gradient_checkpointing_gives_the_same_gradients(name, monkeypatch):
    gradients, entered = [], []
    for checkpointing in (False, True):
        model = perturbed(mixture(name)).train()
        if checkpointing:
            model.enable_gradient_checkpointing()
            for module in model.modules():
                if hasattr(module, "_gradient_checkpointing_func"):
                    inner = module._gradient_checkpointing_func
                    monkeypatch.setattr(
                        module, "_gradient_checkpointing_func", lambda *a, inner=inner: (entered.append(1), inner(*a))[1]
                    )
        x, t, labels, eta = inputs(draws=2)
        model(x, t, labels, eta).sample.square().mean().backward()
        gradients.append({key: p.grad for key, p in model.named_parameters()})
    assert entered
    assert all(nearly_equal(gradients[1][key], value) for key, value in gradients[0].items())


@every_backbone
def test_bf16_autocast_is_close_to_float32(name):
    model = perturbed(mixture(name))
    x, t, labels, eta = inputs(draws=2)
    exact = model(x, t, labels, eta).sample
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = model(x, t, labels, eta).sample
    rough.float().square().mean().backward()
    assert (rough.float() - exact).abs().max() < 0.1 * exact.abs().max()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@every_backbone
def test_float16_weights_predict_nearly_the_same(name, tmp_path):
    """Pipelines on GPUs are often loaded as float16."""
    model = perturbed(mixture(name))
    model.save_pretrained(tmp_path)
    x, t, labels, eta = inputs(draws=2)
    expected = model(x, t, labels, eta).sample
    half = type(model).from_pretrained(tmp_path, torch_dtype=torch.float16).eval()
    found = half(x.half(), t, labels, eta.half()).sample
    assert found.dtype == torch.float16
    assert (found.float() - expected).abs().max() < 0.05 * expected.abs().max()


@every_backbone
@pytest.mark.slow
def test_a_compiled_model_predicts_the_same(name):
    model = perturbed(mixture(name))
    x, t, labels, eta = inputs(draws=2)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=name not in ("unet2d", "condition"))
    assert nearly_equal(compiled(x, t, labels, eta).sample, model(x, t, labels, eta).sample)


@pytest.mark.slow
def test_a_saved_model_predicts_the_same_in_another_process(tmp_path):
    x, t, labels, eta = inputs()
    for name in BACKBONES:
        model = perturbed(mixture(name))
        model.save_pretrained(tmp_path / name)
        tensors = {"x": x, "t": t, "labels": labels, "eta": eta, "expected": model(x, t, labels, eta).sample.detach()}
        save_file(tensors, tmp_path / f"{name}.safetensors")
        assert {path.name for path in (tmp_path / name).iterdir()} == {"config.json", "diffusion_pytorch_model.safetensors"}
    program = f"""
import json
import torch
from pathlib import Path
from safetensors.torch import load_file
import ldm_smd
for name in {BACKBONES}:
    cls = getattr(ldm_smd, json.loads((Path({str(tmp_path)!r}) / name / "config.json").read_text())["_class_name"])
    i = load_file(Path({str(tmp_path)!r}) / f"{{name}}.safetensors")
    found = cls.from_pretrained(Path({str(tmp_path)!r}) / name)(i["x"], i["t"], i["labels"], i["eta"]).sample
    assert (found - i["expected"]).abs().max() <= 1e-4 * i["expected"].abs().max(), name
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)


@pytest.mark.slow
@pytest.mark.distributed
def test_fsdp_gives_the_predictions_and_gradients_of_one_process():
    done = run_launcher(2, "tests/models/fsdp_backbones.py")
    assert done.returncode == 0, done.stderr[-6000:]


OLD_PREFIXES = {
    "mixture.identifier.": "identifier.",
    "mixture.noise_skip.": "hyper.draft.",
    "mixture.hypernetworks.": "hyper.",
    "mixture.noise.": "hyper.noise.",
    "mixture.gate.": "hyper.gate.",
}


def old_name(name, backbone_name):
    """Return the name of a weight in version 0.1."""
    shift = "hyper.embedding." if backbone_name == "unet2d" else "hyper.modulation."
    for new, old in {**OLD_PREFIXES, "mixture.modulation.": shift}.items():
        if name.startswith(new):
            return old + name.removeprefix(new)
    return name


@pytest.fixture(params=BACKBONES)
def old_folder(request, tmp_path):
    """A backbone's name, its mixture, and a folder with the mixture as version 0.1 wrote it."""
    model = perturbed(mixture(request.param))
    model.save_pretrained(tmp_path / "unet")
    path = tmp_path / "unet/diffusion_pytorch_model.safetensors"
    weights = {old_name(name, request.param): value for name, value in load_file(path).items()}
    del weights["hyper.noise.norms"]
    assert not any(name.startswith("mixture.") for name in weights)
    save_file(weights, path, metadata={"format": "pt"})
    config = json.loads((tmp_path / "unet/config.json").read_text())
    config["latent_channels"] = config.pop("z_channels")
    (tmp_path / "unet/config.json").write_text(json.dumps(config))
    return request.param, model, tmp_path / "unet"


def test_a_folder_of_version_0_1_loads(old_folder):
    name, model, folder = old_folder
    x, t, labels, eta = inputs(draws=2)
    expected = model(x, t, labels, eta).sample
    again = type(model).from_pretrained(folder).eval()
    assert torch.equal(again(x, t, labels, eta).sample, expected)
    assert again.config.z_channels == 8
    resumed = mixture(name)
    load_weights(resumed, folder, "output")
    assert torch.equal(resumed(x, t, labels, eta).sample, expected)


def test_weights_in_several_files_load(tmp_path):
    """As save_pretrained writes large networks."""
    model = perturbed(mixture("dit"))
    model.save_pretrained(tmp_path, max_shard_size="50KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    again = mixture("dit")
    load_weights(again, tmp_path, "output")
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), model.state_dict().values(), strict=True))


@every_backbone
def test_an_optimizer_of_version_0_1_loads(name):
    x, t, labels, eta = inputs(draws=2)
    model = perturbed(mixture(name))
    trained = TrainedNetwork(model, torch.optim.AdamW(model.parameters()))
    model(x, t, labels, eta).sample.square().mean().backward()
    trained.descend(1e-3, gradient_clip=1.0)
    now = trained.optimizer_tensors()
    again = TrainedNetwork(model, torch.optim.AdamW(model.parameters()))
    again.load_optimizer({old_name(key, name): tensor for key, tensor in now.items()})
    loaded = again.optimizer_tensors()
    assert loaded.keys() == now.keys() and all(torch.equal(loaded[key], tensor) for key, tensor in now.items())


def test_weights_of_other_networks_keep_their_names():
    assert backbone.current_name("decoder.mid_block.hyper.weight") == "decoder.mid_block.hyper.weight"
