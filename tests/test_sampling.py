import shutil

import pytest
import torch
from diffusers import DDPMScheduler
from PIL import Image, ImageChops, ImageStat

from ldm_smd.sampling import tool
from ldm_smd.sampling.batches import SamplingOptions, sample_batches
from ldm_smd.sampling.grid import labelled_grid
from ldm_smd.sampling.settings import SampleConfig
from ldm_smd.sampling.tool import sample


def pixels(path):
    return Image.open(path).tobytes()


def difference(first, second):
    """Return the mean difference of two images, from 0 to 255."""
    return ImageStat.Stat(ImageChops.difference(Image.open(first), Image.open(second))).mean[0]


@pytest.mark.slow
def test_sample_writes_images_and_refuses_wrong_settings(run, model_folder, tmp_path):
    options = [f"model={model_folder}", "per_class=3", "steps=2"]
    code, out, _ = run(SampleConfig, sample, *options, f"output={tmp_path / 'a'}", "classes=[square,0]", "batch_size=2")
    assert code == 0 and "6 images" in out
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert len(names) == 6 and names[0] == "class0000-seed00000003.png" and names[-1].startswith("class")
    code, _, _ = run(SampleConfig, sample, *options, f"output={tmp_path / 'unlabelled'}", "classes=[]")
    assert code == 0 and len(list((tmp_path / "unlabelled").glob("picture-*.png"))) == 3
    sketch = [f"image={tmp_path / 'a' / names[0]}", "strength=0.5"]
    code, _, _ = run(SampleConfig, sample, *options, *sketch, f"output={tmp_path / 'sketch'}", "classes=[0]")
    assert code == 0 and len(list((tmp_path / "sketch").glob("class0000-*.png"))) == 3
    guided = [f"guide={model_folder / 'unet'}", "guidance_scale=2", "guidance_interval=[0.1,10]", "height=24", "width=16"]
    code, _, _ = run(SampleConfig, sample, *options, *guided, f"output={tmp_path / 'guided'}", "classes=[0]")
    assert code == 0 and Image.open(tmp_path / "guided/class0000-seed00000000.png").size == (16, 24)
    code, _, _ = run(SampleConfig, sample, *options, f"output={tmp_path / 'noisier'}", "classes=[square,0]", "timestep_shift=4")
    assert code == 0 and pixels(tmp_path / "noisier" / names[0]) != pixels(tmp_path / "a" / names[0])
    code, _, _ = run(SampleConfig, sample, *options, f"output={tmp_path / 'half'}", "classes=[square,0]", "precision=bf16")
    assert code == 0 and 0 < difference(tmp_path / "half" / names[0], tmp_path / "a" / names[0]) < 5
    for setting, message in (
        ("timestep_shift=2 scheduler=DDIMScheduler", "timestep_shift: expected 1 for DDIMScheduler, which takes no timesteps"),
        ("guide=nowhere", "guide: expected the folder of a denoiser"),
        ("steps=1001", "num_inference_steps: expected 1 to 1000, found 1001"),
        ("steps=61", "num_inference_steps: expected a number at which no timestep is rounded to -1, found 61"),
        ("scheduler=FlowMatchLCMScheduler", "scheduler: expected a scheduler with a noise schedule"),
        ("scheduler=DPMSolverMultistepScheduler:algorithm_type=none", "scheduler: DPMSolverMultistepScheduler: none is not"),
        ("height=23", "height: expected a multiple of 2, found 23"),
        ("guidance_interval=[1]", "guidance_interval: expected [low, high]"),
    ):
        code, _, err = run(SampleConfig, sample, *options, *setting.split(), f"output={tmp_path / 'b'}")
        assert code == 2 and message in err
    code, _, err = run(SampleConfig, sample, *options, f"image={tmp_path / 'none.png'}", f"output={tmp_path / 'b'}")
    assert code == 2 and "image: expected an image file, found" in err
    code, _, err = run(SampleConfig, sample, *options, f"output={tmp_path / 'a'}")
    assert code == 2 and "output: expected a new or empty folder" in err
    code, _, err = run(SampleConfig, sample, *options, f"output={tmp_path / 'b'}", "classes=[cat]")
    assert code == 2 and "found 'cat'" in err and not (tmp_path / "b").exists()


class Recorder:
    """A pipeline that keeps the arguments of its calls."""

    def __init__(self):
        self.calls = []

    def set_progress_bar_config(self, **options):
        pass

    def __call__(self, labels, **options):
        self.calls.append((labels, options))
        return (torch.zeros(options["batch_size"], 3, 2, 2),)


def test_every_batch_gets_its_own_labels_images_embeddings_and_seeds():
    """Here images number 1 to 5 of six, as on one of several processes."""
    given = {"image": torch.arange(6.0).view(6, 1, 1, 1), "image_embeds": torch.arange(6.0).view(6, 1)}
    pipeline, options = Recorder(), SamplingOptions(steps=1, seed=7, batch_size=2, **given)
    assert [len(batch) for batch in sample_batches(pipeline, list("abcdef"), range(1, 6), options, "")] == [2, 2, 1]
    found = [
        (labels, [each.initial_seed() for each in call["generator"]], call["image"].flatten().tolist(), call["image_embeds"])
        for labels, call in pipeline.calls
    ]
    for rows, (labels, seeds, image, embeds) in zip(([1, 2], [3, 4], [5]), found, strict=True):
        assert labels == ["abcdef"[row] for row in rows] and seeds == [7 + row for row in rows]
        assert image == embeds.flatten().tolist() == rows


def test_the_pipeline_gets_all_options():
    same = {"guidance_scale": 2.5, "guidance_interval": (0.1, 9.0), "height": 24, "width": 32, "strength": 0.3}
    pipeline, options = Recorder(), SamplingOptions(steps=3, timestep_shift=2.0, **same)
    list(sample_batches(pipeline, None, range(2), options, ""))
    [(labels, call)] = pipeline.calls
    assert labels is None and call | same == call
    assert (call["num_inference_steps"], call["timestep_shift"], call["image"], call["image_embeds"]) == (3, 2.0, None, None)


@pytest.mark.parametrize("from_image", [False, True])
def test_the_tool_passes_all_its_settings_on_and_names_images_by_their_seeds(
    run, model_folder, tmp_path, monkeypatch, from_image
):
    seen = []

    def sampled(pipeline, labels, indices, options, description):
        seen.append((labels, indices, options))
        return [torch.zeros(len(indices), 3, 16, 16)]

    monkeypatch.setattr(tool, "sample_batches", sampled)
    Image.new("RGB", (16, 16), "red").save(tmp_path / "red.png")
    settings = {"steps": 3, "guidance_scale": 2.5, "guidance_interval": (0.1, 9.0), "seed": 11, "batch_size": 5}
    settings |= {"timestep_shift": 2.0} | ({"strength": 0.3} if from_image else {"height": 24, "width": 32})
    given = [f"{name}={list(value) if isinstance(value, tuple) else value}" for name, value in settings.items()]
    given += [f"model={model_folder}", "classes=[1,0]", "per_class=2", *([f"image={tmp_path / 'red.png'}"] * from_image)]
    code, _, error = run(SampleConfig, sample, *given, f"output={tmp_path / 'out'}")
    assert code == 0, error
    [(labels, indices, options)] = seen
    assert labels == [1, 1, 0, 0] and indices == range(4)
    assert {name: getattr(options, name) for name in settings} == settings
    assert options.image.getpixel((8, 8)) == (255, 0, 0) if from_image else options.image is None
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == [f"class000{label}-seed000000{seed}.png" for label, seed in ((0, 13), (0, 14), (1, 11), (1, 12))]


def test_a_guide_of_another_process_is_refused(run, model_folder, tmp_path):
    """Its predictions would mean something else."""
    shutil.copytree(model_folder, tmp_path / "other")
    DDPMScheduler(prediction_type="epsilon").save_pretrained(tmp_path / "other/scheduler")
    given = [f"model={model_folder}", f"guide={tmp_path / 'other/unet'}", "guidance_scale=2", f"output={tmp_path / 'out'}"]
    code, _, error = run(SampleConfig, sample, *given)
    assert code == 2 and "guide: expected a model with the noise schedule and prediction type of" in error


def test_a_grid_has_a_limited_number_of_images(run, model_folder, tmp_path, monkeypatch):
    monkeypatch.setattr("ldm_smd.sampling.tool.GRID_COLUMNS", 2)
    given = [f"model={model_folder}", f"output={tmp_path / 'many'}", "per_class=5", "steps=1", "batch_size=4", "classes=[0,1]"]
    code, out, _ = run(SampleConfig, sample, *given)
    assert code == 0 and len(list((tmp_path / "many").iterdir())) == 10 and "and 4 of them as a grid" in out
    grid = Image.open(tmp_path / "many-grid.png")
    assert grid.height == 2 * (16 + 2) and grid.width < 5 * (16 + 2) + 60
    for row, seeds in enumerate((("0-seed00000000", "0-seed00000001"), ("1-seed00000005", "1-seed00000006"))):
        for column, name in enumerate(seeds):
            left, top = grid.width - (2 - column) * 18, row * 18
            cell = grid.crop((left, top, left + 16, top + 16))
            assert cell.tobytes() == pixels(tmp_path / f"many/class000{name}.png")


def test_names_in_a_grid_may_have_letters_beyond_ascii():
    image = Image.new("RGB", (8, 16), "white")
    names = ["\u00e9", "\u00fc", "\u03b1", "\u043a"]
    drawn = {labelled_grid([[image]], [name]).tobytes() for name in names}
    assert len(drawn) == len(names)
