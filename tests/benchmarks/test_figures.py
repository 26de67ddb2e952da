import re

import figures
import pytest
import torch
from drawing import style
from drawing.architecture import architecture
from drawing.contest import contest, interval
from drawing.images import frames
from drawing.ring import ring
from few_step.report import NOISE, Row
from rivals import RESULTS

from ldm_smd.sampling.batches import SamplingOptions


def colours(path):
    """Return the colours of text and shapes of an SVG."""
    return set(re.findall(r"(?:fill|stroke): (#[0-9a-f]{6})", path.read_text(encoding="utf-8")))


def brightness(colour):
    """Return the relative luminance, as defined by the Web Content Accessibility Guidelines."""
    channels = [int(colour[start : start + 2], 16) / 255 for start in (1, 3, 5)]
    linear = [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def illegible(path):
    """Return the colours with a contrast below 2.5 to white or to the background of the dark theme.

    Black is left out: it is the default outline of markers, which is never drawn.
    """
    dark = brightness("#1e2129")
    found = {each: brightness(each) for each in colours(path) - {"#000000"}}
    return {each for each, own in found.items() if 1.05 / (own + 0.05) < 2.5 or (own + 0.05) / (dark + 0.05) < 2.5}


@pytest.mark.slow
@pytest.mark.parametrize(
    "draw, texts",
    [
        (lambda path: ring(path, updates=2), ["exact posterior", "after step 3"]),
        (architecture, ["UNet encoder", "Gaussian mixture"]),
        (lambda path: contest(RESULTS / "rivals-emoji.json", path), ["imm (3 seeds)", "Gaussian model, best scheduler"]),
    ],
    ids=["ring", "architecture", "few steps"],
)
def test_a_figure_is_legible_on_white_and_dark_backgrounds(draw, texts, tmp_path):
    path = draw(tmp_path / "folder/figure.svg")
    text = path.read_text(encoding="utf-8")
    assert all(each in text for each in texts)
    assert style.INK in colours(path) and not illegible(path)
    assert "<dc:date>" not in text


def test_the_interval_is_over_seeds_if_they_differ_more_than_samples():
    def result(value):
        measured = {"features": {"network": {"frechet": value, "frechet_sd": 0.1}}}
        return {"method": "m", "settings": {}, "images": 1, "cost": 1.0, NOISE: {"2": measured}}

    assert interval(Row([result(1.0)]), 2, "network") == pytest.approx((1.0, 0.196))
    assert interval(Row([result(1.0), result(3.0)]), 2, "network") == pytest.approx((2.0, 1.96 * 2**0.5))


def test_frames_are_the_noise_and_the_given_steps(loud_pipeline, model_folder):
    pipeline = loud_pipeline(model_folder)
    found = frames(pipeline, [0, 1], [5, 6], SamplingOptions(3, 1.0), (0, 2, 3))
    assert len(found) == 3 and all(each.shape == found[0].shape for each in found)
    last = pipeline(
        [0, 1], num_inference_steps=3, generator=[torch.Generator().manual_seed(n) for n in (5, 6)], output_type="pt"
    )
    torch.testing.assert_close(found[-1], last.images, atol=1e-4, rtol=0)
    assert (found[0] - found[1]).abs().max() > 0.01


def test_an_unknown_figure_is_refused(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["figures.py", "plot"])
    with pytest.raises(SystemExit) as raised:
        figures.main()
    assert raised.value.code == 2 and "expected some of ring, architecture" in capsys.readouterr().err
