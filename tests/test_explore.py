"""The page of tools/explore.py: what it shows is what the pipelines make; and in a real browser."""

import io
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

from ldm_smd.apps.explore import DRAWS, FILMSTRIP_FRAMES, Explorer, Frame, Request, explore, spaced, thumbnails
from ldm_smd.apps.settings import ExploreConfig
from ldm_smd.config import load_config
from ldm_smd.pipelines import load_pipeline, seeded_generators
from tests.forked import ROOT, script

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
# No sandbox: as root there is none. No services of the browser's own: they look for hosts elsewhere.
BROWSER_ARGUMENTS = ["--no-sandbox", "--disable-background-networking", "--disable-component-update", "--disable-sync"]


@pytest.fixture
def explorer(model_folder, gaussian_folder):
    return Explorer(load_config(ExploreConfig, None, [f"models.smd={model_folder}", f"models.plain={gaussian_folder}"]))


def alike(a, b):
    """But for rounding to eight bits."""
    return np.abs(np.asarray(a, dtype=int) - np.asarray(b, dtype=int)).max() <= 1


def quiet(share):
    assert 0 < share <= 1


def test_pictures_are_those_of_the_pipeline(explorer, model_folder, gaussian_folder):
    request = Request(label=1, count=2, steps=3, seed=5, guidance_scale=2.0, interval=(0.5, 1000.0), scheduler="DDIMScheduler")
    outcomes = explorer.sample(request, quiet)
    assert list(outcomes) == ["smd", "plain"]
    for name, outcome in outcomes.items():
        assert [frame.number for frame in outcome.frames] == [1, 2, 3] and outcome.frames[0].sample.shape == (1, 4, 8, 8)
        assert explorer.filmstrip(name, outcome.frames).height == 2 * (16 + 2)
    options = {"num_inference_steps": 3, "guidance_scale": 2.0, "guidance_interval": (0.5, 1000.0)}
    for name, folder in (("smd", model_folder), ("plain", gaussian_folder)):
        pipeline = load_pipeline(folder)
        pipeline.scheduler = explorer.pipelines[name].scheduler
        pictures = pipeline([1, 1], generator=seeded_generators([5, 6]), **options).images
        assert all(alike(a, b) for a, b in zip(outcomes[name].pictures, pictures))
    own = Request(label=None, count=1, steps=1)
    explorer.sample(own, quiet)
    assert type(explorer.first.scheduler).__name__ == "DDPMScheduler"


def test_draws_differ_for_a_mixture_and_a_gaussian_model_has_one(explorer, loud_pipeline, model_folder, monkeypatch):
    monkeypatch.setitem(explorer.pipelines, "smd", loud_pipeline(model_folder))
    request = Request(steps=2)
    frames = explorer.sample(request, quiet)["smd"].frames
    drawn = np.array(explorer.draws(frames[0], request))
    side, margin = 16 + 2, drawn.shape[1] - DRAWS * (16 + 2)
    rows = drawn[:, margin:].reshape(2, side, DRAWS, side, 3).swapaxes(1, 2)[:, :, :16, :16]
    assert len({picture.tobytes() for picture in rows[0]}) == DRAWS
    assert (rows[1, 1:] == 255).all() and (rows[1, 0] != 255).any()


def test_thumbnails_of_large_pictures_are_decoded_small(explorer, monkeypatch):
    decoded = []
    decode = explorer.first.decode_latents
    monkeypatch.setattr(explorer.first, "decode_latents", lambda latents: decoded.append(latents.shape[2:]) or decode(latents))
    monkeypatch.setattr("ldm_smd.apps.explore.DECODED", 64)
    [picture] = thumbnails(explorer.first, torch.randn(1, 4, 64, 48))
    assert decoded == [(32, 24)] and picture.size == (48, 64)


def test_it_can_be_stopped(explorer):
    shares = []

    def stop_at_third(share):
        shares.append(share)
        if len(shares) == 3:
            explorer.stop()

    outcomes = explorer.sample(Request(count=1, steps=20), stop_at_third)
    assert [len(outcome.frames) for outcome in outcomes.values()] == [3, 1]
    assert len(explorer.sample(Request(count=1, steps=4), quiet)["plain"].frames) == 4


def test_a_film_has_its_ends():
    frames = [Frame(number, None, None, None) for number in range(1, 98)]
    numbers = [frame.number for frame in spaced(frames, FILMSTRIP_FRAMES)]
    assert numbers[0] == 1 and numbers[-1] == 97 and len(numbers) == FILMSTRIP_FRAMES == len(set(numbers))


@pytest.mark.slow
def test_mistakes_are_named(run, model_folder, tmp_path):
    other = load_pipeline(model_folder)
    other.register_modules(vae=AutoencoderKL.from_config(other.vae.config))
    other.save_pretrained(tmp_path / "other")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        for settings, message in (
            ([], "models: expected at least one, models.NAME=FOLDER, found 'none'"),
            (["models.a=nowhere"], "model: expected a model folder"),
            ([f"models.a={model_folder}", f"models.b={tmp_path / 'other'}"], "models.b: expected autoencoder"),
            ([f"models.a={model_folder}", "clip=open_clip:ViT-B-32:openai"], "is not conditioned on embeddings"),
            ([f"models.a={model_folder}", f"port={port}"], f"port: expected a free port, found {port}"),
        ):
            code, _, error = run(ExploreConfig, explore, *settings)
            assert code == 2 and message in error


@pytest.mark.browser
@pytest.mark.skipif(BROWSER is None, reason="needs chromium")
def test_in_a_browser(model_folder, gaussian_folder, free_port, fork):
    port = free_port()
    models = [f"models.smd={model_folder}", f"models.plain={gaussian_folder}"]
    server = fork(script, ROOT / "tools/explore.py", *models, f"port={port}")
    while server.poll() is None and f"open http://127.0.0.1:{port}" not in server.log.read_text():
        time.sleep(0.05)
    assert server.poll() is None, server.said()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=BROWSER_ARGUMENTS)
        page = browser.new_page()
        asked_for: set[str] = set()
        page.on("request", lambda request: asked_for.add(urllib.parse.urlsplit(request.url).netloc))
        page.goto(f"http://127.0.0.1:{port}")
        walk(page, model_folder)
        browser.close()
    assert asked_for - {""} == {f"127.0.0.1:{port}"}


def walk(page, model_folder):
    """As a user: choose, sample, look at the draws of another step, mistake a scheduler's name."""
    page.get_by_label("Class").click()
    page.get_by_role("option", name="square").click()
    for name, value in (("number input for Images", "2"), ("number input for Steps", "3"), ("Seed of the first", "5")):
        page.get_by_label(name).fill(value)
        page.get_by_label(name).press("Tab")
    page.get_by_role("button", name="Sample").click()
    expect(page.get_by_text(re.compile(r"^smd \d+\.\d s, plain \d+\.\d s$"))).to_be_visible(timeout=60_000)

    shown = page.locator("button.thumbnail-item img")
    expect(shown).to_have_count(4)
    pictures = load_pipeline(model_folder)([1, 1], num_inference_steps=3, generator=seeded_generators([5, 6])).images
    for index, picture in enumerate(pictures):
        found = Image.open(io.BytesIO(page.request.get(shown.nth(index).get_attribute("src")).body()))
        assert alike(found.convert("RGB"), picture)

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
