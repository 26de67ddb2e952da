import pytest
import torch
from diffusers import UNet2DModel

from ldm_smd.models.blocks import repeat
from ldm_smd.models.extended import ExtendedUNet2DModel
from ldm_smd.models.extended_condition import ExtendedUNet2DConditionModel
from ldm_smd.models.widened import widened, with_null_class
from tests.rounding import nearly_equal
from tests.tiny import MIXTURE, diffusers_condition, diffusers_unet


def gaussian(**changes):
    torch.manual_seed(0)
    return diffusers_unet(**{"num_class_embeds": 4, **changes}).eval()


@pytest.fixture
def folder(tmp_path):
    gaussian().save_pretrained(tmp_path / "gaussian")
    return tmp_path / "gaussian"


def inputs(draws=1, side=8):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 4, side, side, generator=generator)
    eta = torch.randn(2 * draws, 4, side, side, generator=generator)
    return x, torch.tensor([900, 20]), torch.tensor([0, 3]), eta


def test_from_unet_adds_only_the_noise_at_first(folder):
    x, t, labels, eta = inputs(draws=3)
    model = ExtendedUNet2DModel.from_unet(folder, **MIXTURE).eval()
    expected = repeat(gaussian()(x, t, labels).sample, 3) + model.mixture.noise(eta, x, t, labels)
    assert nearly_equal(model(x, t, labels, eta).sample, expected)
    assert model.config.num_classes == 3 and model.is_mixture


def test_save_and_load_also_as_a_plain_unet(folder, tmp_path):
    model = ExtendedUNet2DModel.from_unet(folder, **MIXTURE).eval()
    model.save_pretrained(tmp_path / "saved")
    again = ExtendedUNet2DModel.from_pretrained(tmp_path / "saved").eval()
    x, t, labels, eta = inputs()
    assert nearly_equal(again(x, t, labels, eta).sample, model(x, t, labels, eta).sample)
    again.unet.save_pretrained(tmp_path / "plain")
    plain = UNet2DModel.from_pretrained(tmp_path / "plain").eval()
    assert nearly_equal(plain(x, t, labels).sample, gaussian()(x, t, labels).sample)


def test_a_unet_with_another_time_embedding_is_refused(tmp_path):
    gaussian(time_embedding_type="fourier").save_pretrained(tmp_path / "fourier")
    with pytest.raises(ValueError, match="unet: expected positional time embedding"):
        ExtendedUNet2DModel.from_unet(tmp_path / "fourier", **MIXTURE)


@pytest.mark.parametrize("size", [None, (8, 16)])
def test_a_unet_of_any_or_of_another_shape_can_be_extended(tmp_path, size):
    gaussian(sample_size=size).save_pretrained(tmp_path / "gaussian")
    model = ExtendedUNet2DModel.from_unet(tmp_path / "gaussian", **MIXTURE).eval()
    assert model.mixture.noise.side == 8
    x, t, labels, eta = inputs(side=16)
    assert model(x, t, labels, eta).sample.shape == x.shape


def test_a_learned_variance_is_left_out(tmp_path):
    plain = gaussian(out_channels=8)
    plain.save_pretrained(tmp_path / "gaussian")
    model = ExtendedUNet2DModel.from_unet(tmp_path / "gaussian", **MIXTURE).eval()
    x, t, labels, eta = inputs()
    expected = plain(x, t, labels).sample[:, :4] + model.mixture.noise(eta, x, t, labels)
    assert nearly_equal(model(x, t, labels, eta).sample, expected)


def test_the_activation_of_the_time_embedding_is_kept(tmp_path):
    torch.manual_seed(0)
    plain = diffusers_condition(time_embedding_act_fn="silu").eval()
    plain.save_pretrained(tmp_path / "plain")
    model = ExtendedUNet2DConditionModel.from_unet(tmp_path / "plain", **{**MIXTURE, "noise_rank": 0}).eval()
    x, t, _, eta = inputs()
    expected = plain(x, t, model.empty_states.expand(2, -1, -1)).sample
    assert nearly_equal(model(x, t, eta=eta).sample, expected)


def test_copies_with_a_null_class_keep_the_mode_of_the_network():
    for copied in (with_null_class(gaussian(dropout=0.3), 4), widened(gaussian(dropout=0.3), outputs=1)):
        assert not copied.training


def test_an_unconditional_model_refuses_labels(tmp_path):
    gaussian(num_class_embeds=None).save_pretrained(tmp_path)
    model, (x, t, labels, eta) = ExtendedUNet2DModel.from_unet(tmp_path, **MIXTURE), inputs()
    assert model(x, t, None, eta).sample.shape == x.shape
    with pytest.raises(ValueError, match="class_labels: expected None, this model has num_classes=None"):
        model(x, t, labels, eta)
