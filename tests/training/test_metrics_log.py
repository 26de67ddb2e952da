from ldm_smd.training.metrics_log import MetricsLog, read_metrics


def test_log_lines_after_the_checkpoint_are_dropped(tmp_path):
    log = MetricsLog(tmp_path)
    for images in (10, 20, 30):
        log.log(images, {"loss": images / 10})
    log.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"images_seen": 40, "lo')
    log = MetricsLog(tmp_path, images_seen=20)
    log.log(30, {"loss": 9.0})
    log.close()
    assert [line["loss"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [1.0, 2.0, 9.0]
