import math

import pytest

from ldm_smd.training.rates import warmup_cooldown, warmup_then_cosine, warmup_times_cosine


def test_learning_rate(train_config):
    config = train_config("images_total=100", "batch_size=10", "warmup_images=20", "cooldown_images=40", "learning_rate=1")
    rates = [round(warmup_cooldown(config, seen), 3) for seen in range(0, 100, 10)]
    assert rates == [0.5, 1, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25]


def test_a_learning_rate_rises_and_falls():
    done = (0.0, 0.05, 0.1, 0.55, 1.0)
    assert [warmup_then_cosine(2.0, share, 0.1) for share in done] == pytest.approx([0, 1, 2, 1, 0], abs=1e-12)


def test_the_autoencoders_rate_warms_up_and_falls_to_zero(vae_config):
    settings = vae_config("images_total=80", "batch_size=10", "warmup_images=40", "learning_rate=0.2")
    found = [warmup_times_cosine(settings, seen) for seen in (0, 20, 40, 80)]
    half = 1 + math.cos(math.pi / 4)
    assert found == pytest.approx([0.2 * 0.25, 0.075 * half, 0.1, 0])
