import sys
import types

import pytest
import torch

from ldm_smd.models.attention import attention, set_attention_backend, xformers_runs
from ldm_smd.models.blocks import AttentionBlock
from ldm_smd.models.hypernetwork import HyperNetwork, MixtureIdentifier
from ldm_smd.models.unet import SMDUNet2DModel
from tests.rounding import nearly_equal
from tests.tiny import SIZES

TINY = {"sample_size": 8, "in_channels": 4, "out_channels": 4, "num_classes": 3, **SIZES}


def model(**changes):
    """Build a model and add noise to all weights, because some are initially zero."""
    torch.manual_seed(0)
    unet = SMDUNet2DModel(**{**TINY, **changes})
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return unet.eval()


def inputs(batch=2, draws=1, side=(8, 8)):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, 4, *side, generator=generator)
    eta = torch.randn(batch * draws, 4, *side, generator=generator)
    return x, torch.tensor([900, 20])[:batch], torch.tensor([0, 2])[:batch], eta


@pytest.mark.parametrize("side", [(8, 8), (7, 9), (5, 5), (1, 3), (16, 12)])
@pytest.mark.parametrize("z_channels", [0, 8])
def test_latents_of_any_size(side, z_channels):
    x, t, labels, eta = inputs(side=side)
    assert model(z_channels=z_channels)(x, t, labels, eta).sample.shape == x.shape


def test_a_gaussian_model_ignores_eta():
    unet = model(z_channels=0)
    x, t, labels, eta = inputs()
    assert not unet.is_mixture
    assert nearly_equal(unet(x, t, labels, eta).sample, unet(x, t, labels).sample)


def test_an_unconditional_model_refuses_labels():
    x, t, labels, eta = inputs()
    with pytest.raises(ValueError, match="class_labels: expected None"):
        model(num_classes=None)(x, t, labels, eta)


def test_embeddings_have_unit_variance_for_the_network():
    """Those of OpenCLIP have length 1."""
    unet, seen = model(embedding_dimensions=16), []
    unet.image_embedding.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    x, t, labels, eta = inputs()
    unet(x, t, labels, eta, image_embeds=torch.nn.functional.normalize(torch.randn(2, 16)))
    assert torch.allclose(seen[0].square().mean(dim=1), torch.ones(2))


def test_a_wrong_shape_of_eta_or_placement_is_refused():
    x, t, labels, eta = inputs()
    with pytest.raises(ValueError, match="eta: expected"):
        model()(x, t, labels, eta[:1])
    with pytest.raises(ValueError, match="placement: expected one of"):
        SMDUNet2DModel(**TINY, placement="middle")


@pytest.mark.parametrize("stride", [1, 2])
def test_the_mixture_identifier_computes_its_formula(stride):
    """For two draws of each image, and features and noise of different sizes."""
    torch.manual_seed(0)
    network = MixtureIdentifier(6, stride, noise_channels=4, embedding_dim=5, channels=8, z_channels=3)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    noise, features, embedding = torch.randn(4, 4, 8, 8), torch.randn(2, 6, 4, 4), torch.randn(2, 5)
    side = 4 // stride
    small_noise, small_features = (torch.nn.functional.adaptive_avg_pool2d(each, side) for each in (noise, features))
    by_position = small_features.permute(0, 2, 3, 1) @ network.from_features.weight.T + network.from_features.bias
    h = network.from_noise(small_noise) + by_position.permute(0, 3, 1, 2).repeat_interleave(2, dim=0)
    h = (h - h.mean(dim=(1, 2, 3), keepdim=True)) / h.var(dim=(1, 2, 3), correction=0, keepdim=True).sqrt()
    scale, shift = network.modulation(embedding).repeat_interleave(2, dim=0)[..., None, None].chunk(2, dim=1)
    h = torch.nn.functional.silu(h * (1 + scale) + shift).permute(0, 2, 3, 1)
    expected = (h @ network.linear_out.weight.T + network.linear_out.bias).permute(0, 3, 1, 2)
    assert nearly_equal(network(noise, features, embedding), expected)


def test_the_hypernetwork_computes_its_formula():
    """At one position, with explicit matrices W_l = v_l v_l^T / sqrt(width) + softplus(c_l) I."""
    torch.manual_seed(0)
    network = HyperNetwork(channels=6, z_channels=5, width=4, groups=2).double()
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter)
    h, z = torch.randn(1, 6, 3, 3).double(), torch.randn(1, 5, 3, 3).double()
    at = (0, slice(None), 1, 2)
    y = network.linear_in(network.norm(h))[at]
    for v, c in zip(network.linear_v(z)[at].chunk(2), torch.nn.functional.softplus(network.c)):
        y = (torch.outer(v, v) / 2.0 + c * torch.eye(4)) @ y
    expected = h[at] + network.linear_out.weight @ y + network.linear_out.bias
    assert torch.allclose(network(h, z)[at], expected)


# ---------------------------------------------------------------------------------------------------------------------
# Attention


@pytest.fixture
def backend():
    yield set_attention_backend
    set_attention_backend("auto")


def reference(q, k, v):
    weights = torch.einsum("bqhd,bkhd->bhqk", q, k).div(q.shape[-1] ** 0.5).softmax(-1)
    return torch.einsum("bhqk,bkhd->bqhd", weights, v)


def test_attention_computes_its_formula():
    q, k, v = torch.randn(3, 2, 7, 4, 8).unbind(0)
    assert torch.allclose(attention(q, k, v), reference(q, k, v), atol=1e-5)


def test_xformers_falls_back_to_torch_with_one_warning(backend, caplog):
    """Results are the same in both cases. There is no warning if xformers has kernels for this device."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    q, k, v = torch.randn(3, 2, 7, 4, 8, device=device).unbind(0)
    backend("sdpa")
    expected = attention(q, k, v)
    backend("xformers")
    runs = xformers_runs(device, q.dtype, 8)
    assert torch.allclose(attention(q, k, v), expected, atol=1e-4)
    attention(q, k, v)
    assert len([r for r in caplog.records if "xformers does not work here" in r.message]) == (0 if runs else 1)


@pytest.fixture
def xformers_operator(monkeypatch):
    """Replace xformers' attention by a reference of its layout (B, M, H, K). Returns the shapes that it is called with."""
    shapes = []

    def operator(q, k, v):
        shapes.append(tuple(q.shape))
        return reference(q, k, v)

    monkeypatch.setitem(sys.modules, "xformers", types.ModuleType("xformers"))
    operators = types.ModuleType("xformers.ops")
    operators.memory_efficient_attention = operator
    monkeypatch.setitem(sys.modules, "xformers.ops", operators)
    return shapes


@pytest.mark.parametrize("name", ["sdpa", "xformers"])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_an_attention_block_attends_head_by_head(backend, xformers_operator, name, memory_format):
    """Compared with a plain computation for each head on its channels, over the positions of an image that is not square."""
    backend(name)
    torch.manual_seed(0)
    block = AttentionBlock(channels=12, head_dim=4, groups=3)
    torch.nn.init.normal_(block.to_out.weight, std=0.3)
    x = torch.randn(2, 12, 3, 5).to(memory_format=memory_format)
    with torch.no_grad():
        rows = torch.stack([block.norm(x)[:, :, row, column] for row in range(3) for column in range(5)], dim=1)
        heads = []
        for start in range(0, 12, 4):
            q, k, v = (block.to_qkv(rows)[..., part + start : part + start + 4] for part in (0, 12, 24))
            heads.append(((q @ k.mT) / 2.0).softmax(dim=-1) @ v)
        out = block.to_out(torch.cat(heads, dim=-1))
        expected = x + torch.stack([out[:, 5 * row : 5 * row + 5].mT for row in range(3)], dim=2)
        assert torch.allclose(block(x), expected, atol=1e-5)
    assert xformers_operator == ([(1, 4, 1, 4), (2, 15, 3, 4)] if name == "xformers" else [])


def test_xformers_gets_its_own_layout(backend, xformers_operator):
    """An operator with layout (B, M, H, K) gives the same result as torch."""
    backend("xformers")
    q, k, v = torch.randn(3, 2, 7, 4, 8).unbind(0)
    assert xformers_runs("cpu", q.dtype, 8)
    through = attention(q, k, v)
    backend("sdpa")
    assert torch.allclose(through, attention(q, k, v), atol=1e-5)


def test_an_unknown_attention_backend_is_refused():
    with pytest.raises(ValueError, match="attention: expected one of auto, sdpa, xformers"):
        set_attention_backend("flash")


def test_weights_may_be_stored_in_eight_bits():
    """diffusers converts them when a module is called, so none may be used otherwise."""
    smd = model(noise_rank=2, noise_modes=2)
    smd.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    with torch.no_grad():
        prediction = smd(
            torch.randn(2, 4, 8, 8), torch.tensor([5, 7]), torch.tensor([0, 1]), eta=torch.randn(2, 4, 8, 8)
        ).sample
    assert prediction.isfinite().all()
    with pytest.raises(ValueError, match="does not support group offloading"):
        smd.enable_group_offload(torch.device("cpu"))
