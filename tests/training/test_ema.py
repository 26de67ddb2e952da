import pytest
import torch

from ldm_smd.training.ema import EMA


def test_ema_follows_its_formula():
    torch.manual_seed(0)
    model = torch.nn.Linear(2, 2)
    ema = EMA(model, halflife_images=8, ramp=False)
    start = model.weight.detach().clone()
    with torch.no_grad():
        model.weight.add_(1.0)
    ema.update(model, batch_images=8, images_seen=8)
    assert torch.allclose(ema.model.weight, start + 0.5)
    ema.update(model, batch_images=16, images_seen=24)
    assert torch.allclose(ema.model.weight, start + 0.875)


def test_ema_forgets_random_initial_weights_and_copies_buffers():
    """Early in a training the half-life is a twentieth of the images seen."""
    model = torch.nn.BatchNorm1d(2)
    ema = EMA(model, halflife_images=1000)
    start = model.weight.detach().clone()
    with torch.no_grad():
        model.weight.add_(1.0)
        model.running_mean.fill_(7.0)
    ema.update(model, batch_images=8, images_seen=160)
    assert torch.allclose(ema.model.weight, start + 0.5) and (ema.model.running_mean == 7).all()
    assert ema.rate(1000, 1_000_000) == pytest.approx(0.5)
    assert not ema.model.training and not any(parameter.requires_grad for parameter in ema.model.parameters())
