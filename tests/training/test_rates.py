import logging
import math

import pytest

from ldm_smd.training.rates import warmup_cooldown, warmup_then_cosine, warmup_times_cosine, warn_of_long_ramps


def test_warmup_and_cooldown_are_linear(train_config):
    config = train_config("images_total=100", "batch_size=10", "warmup_images=20", "cooldown_images=40", "learning_rate=1")
    rates = [round(warmup_cooldown(config, seen), 3) for seen in range(0, 100, 10)]
    assert rates == [0.5, 1, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25]


def test_warmup_then_cosine():
    progress = (0.0, 0.05, 0.1, 0.55, 1.0)
    assert [warmup_then_cosine(2.0, done, 0.1) for done in progress] == pytest.approx([0, 1, 2, 1, 0], abs=1e-12)


def test_the_learning_rate_of_the_autoencoder_warms_up_and_falls_to_zero(vae_config):
    settings = vae_config("images_total=80", "batch_size=10", "warmup_images=40", "learning_rate=0.2")
    found = [warmup_times_cosine(settings, seen) for seen in (0, 20, 40, 80)]
    half = 1 + math.cos(math.pi / 4)
    assert found == pytest.approx([0.2 * 0.25, 0.075 * half, 0.1, 0])


def test_a_training_shortened_without_its_cooldown_gives_a_warning(train_config, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("ldm_smd.training.rates"), "propagate", True)
    for cooldown, warned in ((512, 0), (250_000, 1)):
        config = train_config("images_total=1024", "warmup_images=128", f"cooldown_images={cooldown}")
        caplog.clear()
        warn_of_long_ramps(config)
        assert len(caplog.records) == warned
        highest = max(warmup_cooldown(config, seen) for seen in range(0, 1024, config.batch_size)) / config.learning_rate
        assert (highest < 0.5) == bool(warned)
    assert "the learning rate stays below 0.0041 of" in caplog.text
