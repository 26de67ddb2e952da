"""The page of tools/explore.py shows the samples of the pipelines, also in a real browser."""

import io
import math
import re
import shutil
import socket
import time
import urllib.parse

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image
from playwright.sync_api import expect, sync_playwright

from ldm_smd.apps.explore import explore
from ldm_smd.apps.explorer import DRAWS, FILMSTRIP_FRAMES, Explorer, Frame, Request, spaced, thumbnails
from ldm_smd.apps.settings import ExploreConfig
from ldm_smd.config import load_config
from ldm_smd.errors import UserError
from ldm_smd.pipelines import load_pipeline, seeded_generators
from ldm_smd.schedulers import make_scheduler
from tests.forked import ROOT, script

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
# The root user has no sandbox. The browser's own services would connect to other hosts.
BROWSER_ARGUMENTS = ["--no-sandbox", "--disable-background-networking", "--disable-component-update", "--disable-sync"]


@pytest.fixture
def explorer(model_folder, gaussian_folder):
    return Explorer(load_config(ExploreConfig, None, [f"models.smd={model_folder}", f"models.plain={gaussian_folder}"]))


def nearly_equal(a, b):
    """Return whether images are equal up to rounding to eight bits."""
    return np.abs(np.asarray(a, dtype=int) - np.asarray(b, dtype=int)).max() <= 1


def check_progress(fraction):
    assert 0 < fraction <= 1


def test_images_equal_those_of_the_pipeline(explorer, model_folder, gaussian_folder):
    request = Request(1, 2, 3, "EulerDiscreteScheduler", 5, guidance_scale=2.0, interval=(0.5, 1000.0), timestep_shift=2.0)
    by_model = explorer.sample(request, check_progress)
    assert list(by_model) == ["smd", "plain"]
    for name, samples in by_model.items():
        assert [frame.number for frame in samples.frames] == [1, 2, 3] and samples.frames[0].sample.shape == (1, 4, 8, 8)
        assert explorer.filmstrip(name, samples.frames).height == 2 * (16 + 2)
    options = {"num_inference_steps": 3, "guidance_scale": 2.0, "guidance_interval": (0.5, 1000.0), "timestep_shift": 2.0}
    for name, folder in (("smd", model_folder), ("plain", gaussian_folder)):
        pipeline = load_pipeline(folder)
        pipeline.scheduler = make_scheduler("EulerDiscreteScheduler", pipeline.scheduler)
        images = pipeline([1, 1], generator=seeded_generators([5, 6]), **options).images
        assert all(nearly_equal(a, b) for a, b in zip(by_model[name].images, images))
    # Without a scheduler in the request, the model's own is used again.
    explorer.sample(Request(label=None, count=1, steps=1), check_progress)
    assert type(explorer.first.scheduler).__name__ == "DDPMScheduler"


def test_draws_differ_for_a_mixture_and_a_gaussian_model_has_one(explorer, loud_pipeline, model_folder, monkeypatch):
    monkeypatch.setitem(explorer.pipelines, "smd", loud_pipeline(model_folder))
    request = Request(steps=2)
    frames = explorer.sample(request, check_progress)["smd"].frames
    drawn = np.array(explorer.draws(frames[0], request))
    side, margin = 16 + 2, drawn.shape[1] - DRAWS * (16 + 2)
    rows = drawn[:, margin:].reshape(2, side, DRAWS, side, 3).swapaxes(1, 2)[:, :, :16, :16]
    assert len({image.tobytes() for image in rows[0]}) == DRAWS
    assert (rows[1, 1:] == 255).all() and (rows[1, 0] != 255).any()


def test_the_scheduler_of_a_request_is_its_own(explorer):
    """It is not left behind, also not by one that fails, and the draws use it for all models."""
    request, own = Request(count=1, steps=2, scheduler="EulerDiscreteScheduler"), dict(explorer.own)
    assert request.interval == (0, math.inf), "as in tools/sample.py"
    frame = explorer.sample(request, check_progress)["smd"].frames[0]
    with pytest.raises(UserError, match="scheduler: expected a model with a moments component"):
        explorer.sample(Request(scheduler="GMSScheduler"), check_progress)
    used = []
    for pipeline in explorer.pipelines.values():
        predict = pipeline.pred_original_sample
        pipeline.pred_original_sample = lambda *given, pipe=pipeline, predict=predict, **more: (
            used.append(pipe.scheduler) or predict(*given, **more)
        )
    explorer.draws(frame, request)
    assert [type(scheduler).__name__ for scheduler in used] == 2 * ["EulerDiscreteScheduler"]
    assert {name: pipeline.scheduler for name, pipeline in explorer.pipelines.items()} == own


def test_thumbnails_of_large_latents_are_decoded_at_a_lower_resolution(explorer, monkeypatch):
    decoded = []
    decode = explorer.first.decode_latents
    monkeypatch.setattr(explorer.first, "decode_latents", lambda latents: decoded.append(latents.shape[2:]) or decode(latents))
    monkeypatch.setattr("ldm_smd.apps.explorer.DECODED", 64)
    [image] = thumbnails(explorer.first, torch.randn(1, 4, 64, 48))
    assert decoded == [(32, 24)] and image.size == (48, 64)


def test_sampling_can_be_stopped(explorer):
    fractions = []

    def stop_at_third(fraction):
        fractions.append(fraction)
        if len(fractions) == 3:
            explorer.stop()

    by_model = explorer.sample(Request(count=1, steps=20), stop_at_third)
    assert [len(samples.frames) for samples in by_model.values()] == [3, 1]
    assert by_model["smd"].summary.endswith("s, stopped after step 3 of 20")
    assert len(explorer.sample(Request(count=1, steps=4), check_progress, "another browser")["plain"].frames) == 4
    explorer.begin()
    assert len(explorer.sample(Request(count=1, steps=4), check_progress)["plain"].frames) == 4


def test_a_filmstrip_contains_the_first_and_last_frames():
    frames = [Frame(number, None, None, None) for number in range(1, 98)]
    numbers = [frame.number for frame in spaced(frames, FILMSTRIP_FRAMES)]
    assert numbers[0] == 1 and numbers[-1] == 97 and len(numbers) == FILMSTRIP_FRAMES == len(set(numbers))


@pytest.mark.slow
def test_wrong_settings_give_one_line(run, model_folder, tmp_path):
    other = load_pipeline(model_folder)
    other.register_modules(vae=AutoencoderKL.from_config(other.vae.config))
    other.save_pretrained(tmp_path / "other")
    with socket.socket() as occupied:
        occupied.bind(("127.0.0.1", 0))
        occupied.listen()
        port = occupied.getsockname()[1]
        for settings, message in (
            ([], "models: expected at least one, models.NAME=FOLDER, found 'none'"),
            (["models.a=nowhere"], "model: expected a model folder"),
            (["models.v1.5=nowhere"], "models.v1: expected a folder or hub id, and a name without dots"),
            ([f"models.a={model_folder}", f"models.b={tmp_path / 'other'}"], "models.b: expected autoencoder"),
            ([f"models.a={model_folder}", "clip=open_clip:ViT-B-32:openai"], "is not conditioned on embeddings"),
            ([f"models.a={model_folder}", f"port={port}"], f"port: expected a free port, found {port}"),
        ):
            code, _, error = run(ExploreConfig, explore, *settings)
            assert code == 2 and message in error


@pytest.mark.browser
@pytest.mark.skipif(BROWSER is None, reason="needs chromium")
def test_the_page_works_in_a_browser(model_folder, gaussian_folder, free_port, fork):
    port = free_port()
    models = [f"models.smd={model_folder}", f"models.plain={gaussian_folder}"]
    server = fork(script, ROOT / "tools/explore.py", *models, f"port={port}")
    deadline = time.monotonic() + 120
    while (
        server.poll() is None and time.monotonic() < deadline and f"open http://127.0.0.1:{port}" not in server.log.read_text()
    ):
        time.sleep(0.05)
    assert server.poll() is None, server.output()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=BROWSER_ARGUMENTS)
        page = browser.new_page()
        hosts: set[str] = set()
        page.on("request", lambda request: hosts.add(urllib.parse.urlsplit(request.url).netloc))
        page.goto(f"http://127.0.0.1:{port}")
        use_page(page, model_folder)
        browser.close()
    assert hosts - {""} == {f"127.0.0.1:{port}"}


def use_page(page, model_folder):
    """Choose settings, sample, show the draws of another step, and enter a wrong scheduler."""
    page.get_by_label("Class").click()
    page.get_by_role("option", name="square").click()
    settings = {"number input for Images": 2, "number input for Steps": 3, "number input for Shift": 2, "Seed of the first": 5}
    for name, value in settings.items():
        page.get_by_label(name).fill(str(value))
        page.get_by_label(name).press("Tab")
    page.get_by_role("button", name="Sample").click()
    expect(page.get_by_text(re.compile(r"^smd \d+\.\d s, plain \d+\.\d s$"))).to_be_visible(timeout=60_000)

    shown = page.locator("button.thumbnail-item img")
    expect(shown).to_have_count(4)
    images = load_pipeline(model_folder)(
        [1, 1], num_inference_steps=3, timestep_shift=2, generator=seeded_generators([5, 6])
    ).images
    for index, image in enumerate(images):
        found = Image.open(io.BytesIO(page.request.get(shown.nth(index).get_attribute("src")).body()))
        assert nearly_equal(found.convert("RGB"), image)

    strips = page.locator(".image-frame img")
    expect(strips).to_have_count(3)
    before = strips.last.get_attribute("src")
    page.get_by_label(re.compile(r"2 \(t = \d+\)")).check()
    expect(strips.last).not_to_have_attribute("src", before, timeout=30_000)

    scheduler = page.get_by_role("combobox", name="Scheduler")
    scheduler.fill("Nope")
    scheduler.press("Enter")
    page.get_by_role("button", name="Sample").click()
    expect(page.get_by_text(re.compile("scheduler: expected a scheduler class"))).to_be_visible(timeout=30_000)
