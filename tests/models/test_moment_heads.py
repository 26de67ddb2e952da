import pytest
import torch

from ldm_smd.models.moments import MomentHeads
from ldm_smd.models.unet import SMDUNet2DModel
from tests.rounding import nearly_equal
from tests.tiny import diffusers_unet


def smd_unet():
    return SMDUNet2DModel(4, 2, 2, (8, 16), num_classes=3, norm_num_groups=4, attention_head_dim=8, z_channels=0)


def plain_unet():
    return diffusers_unet(sample_size=4, in_channels=2, out_channels=2, num_class_embeds=4)


@pytest.mark.parametrize("build", [smd_unet, plain_unet])
def test_one_pass_gives_the_prediction_and_two_moments(build):
    torch.manual_seed(0)
    unet = build()
    heads = MomentHeads.for_unet(unet)
    x, t, labels = torch.randn(3, 2, 4, 4), torch.tensor([1, 500, 999]), torch.tensor([0, 1, 2])
    calls = []
    unet.conv_out.register_forward_hook(lambda *_: calls.append(1))
    output = heads.predict(unet, x, t, labels)
    assert len(calls) == 1 and output.shape == (3, 6, 4, 4)
    assert nearly_equal(output[:, :2], unet(x, t, labels).sample)
    # Untrained heads predict the variance of v for white data, and no skewness.
    assert torch.allclose(output[:, 2:4], torch.ones(3, 2, 4, 4)) and not output[:, 4:].any()
    assert not unet.conv_out._forward_pre_hooks


def test_saves_and_loads(tmp_path):
    heads = MomentHeads.for_unet(smd_unet())
    torch.nn.init.normal_(heads.conv_out.weight)
    heads.save_pretrained(tmp_path)
    again = MomentHeads.from_pretrained(tmp_path)
    features, t = torch.randn(2, 8, 4, 4), torch.tensor([3, 700])
    assert all(map(nearly_equal, heads(features, t), again(features, t)))
    other = SMDUNet2DModel(4, 2, 2, (16, 16), norm_num_groups=4, attention_head_dim=8, z_channels=0)
    with pytest.raises(
        ValueError, match=r"of \(8, 2\) channels, found \(16, 2\); train heads for another with tools/train_moments\.py"
    ):
        heads.predict(other, torch.zeros(1, 2, 4, 4), 5)
