"""Pipelines are saved and loaded, and made from components of others."""

import json
import subprocess
import sys

import diffusers
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiffusionPipeline, DiTPipeline

from ldm_smd.errors import UserError
from ldm_smd.models.gaussian import LatentGaussians
from ldm_smd.models.moments import MomentHeads
from ldm_smd.pipelines import SMDPipeline, load_pipeline
from ldm_smd.pipelines.loading import NETWORKS, model_folder, weight_files
from ldm_smd.sampling.settings import SampleConfig
from ldm_smd.sampling.tool import sample
from ldm_smd.schedulers import GMSScheduler
from ldm_smd.training.fit_gaussian import fit_gaussian
from ldm_smd.training.settings import FitGaussianConfig, TrainMomentsConfig
from ldm_smd.training.train_moments import train_moments
from tests.rounding import nearly_equal
from tests.sampled import latents
from tests.tiny import diffusers_condition, diffusers_dit, diffusers_unet


def test_a_folder_or_id_without_a_model_gives_one_line(tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"model: expected a model folder .* or a hub id, found none of them at"):
        load_pipeline(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        UserError,
        match=r"model: expected a model folder \(RUN/model\) or a hub id, found no folder someone/none, and on the hub: ",
    ):
        load_pipeline("someone/none")


@pytest.mark.slow
def test_a_saved_pipeline_gives_the_same_images_in_another_process(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path / "model")
    program = f"""
import torch
from ldm_smd.pipelines import SMDPipeline, seeded_generators
pipeline = SMDPipeline.from_pretrained({str(tmp_path / "model")!r})
assert pipeline.label_of("square") == 1
images = pipeline([0, 1], num_inference_steps=3, generator=seeded_generators([1, 2]), output_type="pt").images
torch.save(images, {str(tmp_path / "out.pt")!r})
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)
    here = latents(pipeline, [0, 1], [1, 2], output_type="pt")
    assert torch.allclose(torch.load(tmp_path / "out.pt", weights_only=True), here, atol=1e-4)


def test_from_pipe_variants_and_sharded_weights_work_as_in_diffusers(pipeline, gaussian_folder, tmp_path):
    """With all optional components."""
    gaussian = load_pipeline(gaussian_folder)
    gaussians = LatentGaussians(4, 8, 8, rank=2, count=3, num_classes=2)
    components = {
        "unet": gaussian.unet,
        "moments": MomentHeads.for_unet(gaussian.unet),
        "gaussian": gaussians,
        "guide": pipeline.unet,
    }
    made = SMDPipeline.from_pipe(pipeline, **components)
    again = SMDPipeline.from_pipe(made)
    assert again.id2label == pipeline.id2label
    assert all(again.components[name] is component for name, component in made.components.items())
    expected = latents(pipeline, [0, 1], [1, 2])
    for name, options in (("variant", {"variant": "fp16"}), ("shards", {"max_shard_size": "40KB"})):
        pipeline.save_pretrained(tmp_path / name, **options)
        loaded = SMDPipeline.from_pretrained(tmp_path / name, variant=options.get("variant"))
        assert nearly_equal(latents(loaded, [0, 1], [1, 2]), expected)
    assert len(list((tmp_path / "shards" / "unet").glob("*.safetensors"))) > 1


@pytest.fixture
def dit_folder(vae_folder, tmp_path):
    """The folder of a DiTPipeline with two named classes."""
    torch.manual_seed(0)
    dit = diffusers_dit(out_channels=8, num_embeds_ada_norm=2)
    for parameter in dit.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    vae, scheduler = AutoencoderKL.from_pretrained(vae_folder), DDIMScheduler(clip_sample=False)
    DiTPipeline(transformer=dit, vae=vae, scheduler=scheduler).save_pretrained(tmp_path / "dit")
    index = tmp_path / "dit/model_index.json"
    names = {"id2label": {"0": "disc, circle", "1": "square, box"}}
    index.write_text(json.dumps(json.loads(index.read_text()) | names))  # as in facebook/DiT-XL-2-256
    return tmp_path / "dit"


def test_a_diffusers_pipeline_loads_with_its_schedule_and_class_names(dit_folder):
    """It gives the same samples as a pipeline made from its components."""
    loaded, original = load_pipeline(dit_folder), DiTPipeline.from_pretrained(dit_folder)
    made = SMDPipeline(original.transformer, original.vae, original.scheduler)
    assert nearly_equal(latents(loaded, [0, 1], [1, 2]), latents(made, [0, 1], [1, 2]))
    assert loaded.id2label == {0: "disc, circle", 1: "square, box"}
    assert loaded.scheduler.config.beta_schedule == "linear"


def test_tools_fit_and_sample_a_diffusers_pipeline(dit_folder, shards, tmp_path, run):
    """They write an SMDPipeline."""
    folder = model_folder(dit_folder)
    assert {path.parent.name for path in weight_files(folder, (*NETWORKS, "vae"))} == {"transformer", "vae"}
    fitted, samples = tmp_path / "fitted", tmp_path / "samples"
    fit = [f"model={dit_folder}", f"shards={shards}", f"output={fitted}", "components=2", "rank=4"]
    assert run(FitGaussianConfig, fit_gaussian, *fit)[0] == 0
    assert SMDPipeline.from_pretrained(fitted).id2label == {0: "disc, circle", 1: "square, box"}
    for model in (dit_folder, fitted):
        settings = [f"model={model}", f"output={samples / model.name}", "classes=[box]", "steps=2", "per_class=2"]
        code, _, error = run(SampleConfig, sample, *settings)
        assert code == 0, error
        assert len(list((samples / model.name).glob("class0001-*.png"))) == 2


def test_shards_with_more_classes_than_the_model_are_refused(vae_folder, shards, tmp_path, run):
    """Here the UNet has an embedding for each class but none for the null class."""
    vae = AutoencoderKL.from_pretrained(vae_folder)
    for name, component in {"unet": diffusers_unet(num_class_embeds=2), "vae": vae, "scheduler": DDIMScheduler()}.items():
        component.save_pretrained(tmp_path / "pipeline" / name)
    settings = [f"model={tmp_path / 'pipeline'}", f"shards={shards}", f"output={tmp_path / 'out'}"]
    for schema, tool in ((FitGaussianConfig, fit_gaussian), (TrainMomentsConfig, train_moments)):
        code, _, error = run(schema, tool, *settings)
        assert code == 2 and not (tmp_path / "out").exists()
        assert error.endswith("model: expected a model of 2 classes and the null class, as in the shards, found 1")


def test_a_folder_of_components_without_an_index_loads(vae_folder, tmp_path):
    vae = AutoencoderKL.from_pretrained(vae_folder)
    for name, component in {"unet": diffusers_unet(), "vae": vae, "scheduler": DDIMScheduler()}.items():
        component.save_pretrained(tmp_path / name)
    assert latents(load_pipeline(tmp_path), [0, 1], [1, 2]).shape == (2, 4, 8, 8)


def test_a_pipeline_with_other_components_is_refused(dit_folder, tmp_path):
    (dit_folder / "vae/config.json").write_text('{"_class_name": "VQModel"}')
    with pytest.raises(UserError, match=r"^model: expected .*, found DiTTransformer2DModel, VQModel, DDIMScheduler in .*dit$"):
        load_pipeline(dit_folder)
    diffusers_unet().save_pretrained(tmp_path / "pixels/unet")
    with pytest.raises(UserError, match=r"^model: expected .*, found UNet2DModel, none, none in "):
        load_pipeline(tmp_path / "pixels")


def test_denoisers_with_other_inputs_are_refused(vae_folder, tmp_path):
    """One has other channels, as for inpainting. The other needs more conditions than a text, like that of SDXL."""
    AutoencoderKL.from_pretrained(vae_folder).save_pretrained(tmp_path / "vae")
    DDIMScheduler().save_pretrained(tmp_path / "scheduler")
    diffusers_condition(in_channels=9).save_pretrained(tmp_path / "unet")
    with pytest.raises(UserError, match=r"^model: expected a denoiser of 4 channels, like the latents, found 9 in "):
        load_pipeline(tmp_path)
    two = {"addition_embed_type": "text_time", "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 60}
    diffusers_condition(**two).save_pretrained(tmp_path / "unet")
    with pytest.raises(UserError, match=r"^model: expected a readable model folder, .* cross-attention as its only condition"):
        load_pipeline(tmp_path)


def test_a_network_without_an_embedding_of_each_class_is_refused(vae_folder, tmp_path):
    AutoencoderKL.from_pretrained(vae_folder).save_pretrained(tmp_path / "vae")
    DDIMScheduler().save_pretrained(tmp_path / "scheduler")
    diffusers_unet(num_class_embeds=None, class_embed_type="timestep").save_pretrained(tmp_path / "unet")
    with pytest.raises(UserError, match=r"^model: expected .* found class_embed_type=timestep in "):
        load_pipeline(tmp_path)


def test_a_pipeline_is_loaded_in_the_given_precision(dit_folder, model_folder):
    for folder in (dit_folder, model_folder):
        assert load_pipeline(folder, torch.bfloat16).unet.dtype == torch.bfloat16


def test_diffusion_pipeline_finds_the_class(pipeline, tmp_path):
    """diffusers looks for the class of a pipeline in its own module. Importing SMDPipeline adds it there."""
    pipeline.save_pretrained(tmp_path / "model")
    assert diffusers.SMDPipeline is SMDPipeline
    loaded = DiffusionPipeline.from_pretrained(tmp_path / "model")
    assert type(loaded) is SMDPipeline
    assert nearly_equal(latents(loaded, [0, 1], [1, 2]), latents(pipeline, [0, 1], [1, 2]))


def test_components_can_be_replaced_when_loading(pipeline, tmp_path):
    """Also those of this package, by ones of diffusers."""
    gaussian = SMDPipeline.from_pipe(pipeline, scheduler=GMSScheduler.from_config(pipeline.scheduler.config))
    gaussian.save_pretrained(tmp_path / "gms")
    unet = diffusers_unet()
    loaded = SMDPipeline.from_pretrained(tmp_path / "gms", scheduler=DDIMScheduler(), unet=unet)
    assert type(loaded.scheduler) is DDIMScheduler and loaded.unet is unet
    assert type(SMDPipeline.from_pretrained(tmp_path / "gms").scheduler) is GMSScheduler
    with pytest.raises(ValueError, match="should be"):
        SMDPipeline.from_pretrained(tmp_path / "gms", scheduler=unet)


def test_a_scheduler_with_a_learned_variance_is_loaded_without_it(dit_folder):
    learned = diffusers.DDPMScheduler(variance_type="learned_range")
    learned.save_pretrained(dit_folder / "scheduler")
    pipeline = load_pipeline(dit_folder)
    assert latents(pipeline, [0, 1], [1, 2]).isfinite().all()
    saved = SMDPipeline(pipeline.unet, pipeline.vae, pipeline.scheduler, training_scheduler=learned)  # as earlier versions did
    assert not saved.training_scheduler.config.variance_type.startswith("learned")


def test_classes_without_names_are_given_by_number(vae_folder):
    pipeline = SMDPipeline(diffusers_unet(), AutoencoderKL.from_pretrained(vae_folder), DDIMScheduler())
    assert pipeline.label_of("1") == 1
    with pytest.raises(UserError, match="classes: expected one of none, found '2'"):
        pipeline.label_of("2")
