from ldm_smd.training.loop import train


def test_a_collapsed_mixture_is_reported(train_config, caplog):
    train(train_config("objective.name=mse", "model.noise_rank=0", "images_total=16"))
    assert any("the mixture has collapsed" in record.message for record in caplog.records)
