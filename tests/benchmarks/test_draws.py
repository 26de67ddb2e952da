"""Spread ratio and gain of trained models."""

import re

from draws import DrawsConfig, draws

from ldm_smd.config import load_config


def test_the_table_has_a_row_for_each_model(model_folder, gaussian_folder, image_folder, capsys):
    models = f"models=[{model_folder},{gaussian_folder}]"
    images = [f"images.source={image_folder}", "images.resolution=16"]
    draws(load_config(DrawsConfig, None, [models, *images, "timesteps=[249,999]", "draws=2"]))
    head, _, mixture, gaussian = capsys.readouterr().out.splitlines()
    assert head == "| spread ratio, gain | t = 249 | t = 999 |"
    ratios = [float(value) for value in re.findall(r"\| ([\d.]+), -?[\d.]+", mixture)]
    assert mixture.startswith(f"| {model_folder} |") and len(ratios) == 2 and min(ratios) > 0
    assert gaussian == f"| {gaussian_folder} | 0.00, 1.00 | 0.00, 1.00 |"
