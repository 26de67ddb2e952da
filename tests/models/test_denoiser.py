"""Functions for any denoiser: an SMDUNet2DModel, or a plain UNet2DModel of diffusers."""

import pytest
import torch

from ldm_smd.models.denoiser import embedding_dimensions, is_mixture, model_labels, null_labels, num_classes, predict
from ldm_smd.models.unet import SMDUNet2DModel
from tests.tiny import SIZES, diffusers_unet


def smd_unet(**changes):
    return SMDUNet2DModel(8, 4, 4, num_classes=2, noise_rank=2, noise_modes=2, **SIZES, **changes)


def test_classes_and_embeddings():
    plain, unlabelled, mixture = diffusers_unet(), diffusers_unet(num_class_embeds=None), smd_unet(embedding_dimensions=5)
    assert [num_classes(unet) for unet in (plain, unlabelled, mixture)] == [2, None, 2]
    assert [embedding_dimensions(unet) for unet in (plain, unlabelled, mixture)] == [None, None, 5]
    assert [is_mixture(unet) for unet in (plain, unlabelled, mixture)] == [False, False, True]
    assert null_labels(plain, torch.zeros(3, 1)).tolist() == null_labels(mixture, torch.zeros(3)).tolist() == [2, 2, 2]
    assert null_labels(unlabelled, torch.zeros(3)) is None and model_labels(torch.tensor([-1]), None) is None
    assert model_labels(torch.tensor([-1, 0, 1]), 2).tolist() == [2, 0, 1]


@pytest.mark.parametrize("compiled", [False, True])
def test_no_label_is_the_null_class(compiled):
    x, t, eta = torch.randn(3, 4, 8, 8), torch.tensor(5), torch.randn(3, 4, 8, 8)
    for unet in (diffusers_unet(), smd_unet()):
        unet = torch.compile(unet, backend="eager") if compiled else unet
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):  # of a compiled network, only its class counts here
            given, default = (predict(unet, x, t, labels, eta) for labels in (torch.full((3,), 2), None))
        assert torch.equal(given, default) and given.shape == x.shape
        with pytest.raises(ValueError, match="image_embeds: expected None, this model is not conditioned on embeddings"):
            predict(unet, x, t, None, eta, torch.ones(3, 5))
