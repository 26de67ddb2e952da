"""Image and text prompts: OpenCLIP embeddings in shards, training and sampling. The OpenCLIP model is small and untrained."""

import json
import shutil

import numpy as np
import pytest
import torch

from ldm_smd.data.images import load_pixels
from ldm_smd.data.settings import ImagesConfig, VerifyConfig
from ldm_smd.data.shards import Manifest
from ldm_smd.data.stream import LatentStream, latent_loader
from ldm_smd.data.verify import verify
from ldm_smd.errors import UserError
from ldm_smd.models.clip import ClipEncoder
from ldm_smd.pipelines import load_pipeline, seeded_generators
from ldm_smd.pipelines.guidance import Conditions, guided_prediction
from ldm_smd.sampling.settings import SampleConfig
from ldm_smd.sampling.tool import sample
from ldm_smd.training.build import build_model
from ldm_smd.training.loop import train
from tests.rounding import nearly_equal
from tests.tiny import diffusers_unet


def test_shards_contain_embeddings_and_are_otherwise_the_same(embedded, shards, image_folder, clip):
    manifest, plain = Manifest.load(embedded), Manifest.load(shards)
    encoder = ClipEncoder.of(clip, torch.device("cpu"), "clip")
    assert manifest.embedding == {**encoder.identity(), "dimensions": 16} and plain.embedding is None
    stream, without = LatentStream(manifest, 22, 22, embeddings=True), LatentStream(plain, 22, 22)
    batch = stream.batch_at(0)
    assert torch.equal(batch.moments, without.batch_at(0).moments) and without.batch_at(0).embeddings is None
    assert batch.embeddings.shape == (22, 16) and batch.embeddings.dtype == torch.float16
    assert torch.allclose(batch.embeddings.float().norm(dim=1), torch.ones(22), atol=1e-3)
    pixels, _, _ = load_pixels(ImagesConfig(source=str(image_folder), resolution=16))
    by_key = dict(zip(sorted(stream.keys_at(0)), encoder.images(pixels)))
    expected = torch.stack([by_key[key] for key in stream.keys_at(0)])
    assert torch.allclose(batch.embeddings.float(), expected, atol=2e-3)
    verify(VerifyConfig(shards=str(embedded)))
    [loaded] = latent_loader(stream, num_workers=1)
    assert torch.equal(loaded.embeddings, batch.embeddings)
    with pytest.raises(UserError, match="shards: expected embeddings"):
        LatentStream(plain, 22, 22, embeddings=True)


def test_shards_without_the_promised_embeddings_are_refused(embedded, tmp_path):
    """Also if the record with the index is missing."""
    folder = tmp_path / "copy"
    shutil.copytree(embedded, folder)
    record = json.loads((folder / "latents-00000.json").read_text())
    del record["index"]["embeddings"]
    (folder / "latents-00000.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match=r"expected an index of latents-00000\.tar in its record, found .*0 embeddings of 8"):
        LatentStream(Manifest.load(folder), 22, 22).batch_at(0)
    content = json.loads((folder / "manifest.json").read_text())
    content["metadata"]["embedding"]["dimensions"] = 15
    (folder / "manifest.json").write_text(json.dumps(content))
    (folder / "latents-00000.json").unlink()
    with pytest.raises(UserError, match=r"expected a tar of moments .*clip.npy is \(16,\)"):
        LatentStream(Manifest.load(folder), 22, 22).batch_at(0)


def test_samples_depend_on_the_embedding_and_none_means_zeros(loud_pipeline, conditional_folder):
    pipeline = loud_pipeline(conditional_folder)
    embeds = torch.nn.functional.normalize(torch.randn(2, 16))

    def latents(embeds, labels=(0, 1), **options):
        options = {"num_inference_steps": 2, "output_type": "latent", "generator": seeded_generators([1, 2]), **options}
        return pipeline(labels, image_embeds=embeds, **options).images

    one, other = latents(embeds), latents(embeds.flip(0))
    assert not torch.allclose(one, other, atol=1e-2)
    assert nearly_equal(latents(None), latents(torch.zeros(2, 16)))
    x, t, eta = torch.randn(2, 4, 8, 8), torch.tensor(500), torch.randn(2, 4, 8, 8)
    for labels in (torch.tensor([0, 1]), None):
        with torch.no_grad():
            own, without = (
                pipeline.unet(x, t, given, eta, image_embeds=e).sample for given, e in ((labels, embeds), (None, None))
            )
            guided = guided_prediction(pipeline.unet, x, t, Conditions(labels, embeds), eta, 3.0)
        assert nearly_equal(guided, without + 3 * (own - without))
    assert latents(embeds, labels=None).shape == (2, 4, 8, 8)
    for wrong in (embeds[:1], embeds[:, :7]):
        with pytest.raises(ValueError, match=r"image_embeds: expected \(2, 16\), found"):
            latents(wrong)


def test_embeddings_of_words_have_length_1(clip):
    """As those of images, which models are trained with."""
    embeds = ClipEncoder.of(clip, torch.device("cpu"), "clip").texts(["a disc", "a red square"])
    assert embeds.shape == (2, 16) and torch.allclose(embeds.norm(dim=1), torch.ones(2))


def test_every_embedding_gives_its_number_of_images(loud_pipeline, conditional_folder):
    """Next to each other, with and without labels."""
    pipeline, embeds = loud_pipeline(conditional_folder), torch.nn.functional.normalize(torch.randn(2, 16))
    options = {"num_inference_steps": 2, "output_type": "latent"}
    for labels in (None, [0, 1]):
        twice = None if labels is None else [0, 0, 1, 1]
        found, expected = (
            pipeline(given, image_embeds=each, num_images_per_prompt=count, generator=seeded_generators(range(4)), **options)
            for given, each, count in ((labels, embeds, 2), (twice, embeds.repeat_interleave(2, dim=0), 1))
        )
        assert nearly_equal(found.images, expected.images)


@pytest.mark.slow
def test_a_model_without_embeddings_can_learn_them(train_config, embedded, model_folder):
    """At first its predictions do not depend on the embedding."""
    config = train_config(f"shards={embedded}", "image_conditional=true", f"init_from={model_folder / 'unet'}")
    before, after = load_pipeline(model_folder).unet, build_model(config, Manifest.load(embedded))
    after.mixture.noise.load_state_dict(before.mixture.noise.state_dict())
    x, t, eta, embeds = torch.randn(2, 4, 8, 8), torch.tensor(500), torch.randn(2, 4, 8, 8), torch.randn(2, 16)
    labels = torch.tensor([0, 1])
    with torch.no_grad():
        found = after(x, t, labels, eta, image_embeds=embeds).sample
    assert nearly_equal(found, before(x, t, labels, eta).sample)
    assert load_pipeline(train(config)).unet.image_embedding.weight.any()


@pytest.mark.slow
def test_a_compiled_unet_gives_the_same_samples(loud_pipeline, conditional_folder):
    """`pipe.unet = torch.compile(pipe.unet)` changes the class of the unet."""
    pipeline = loud_pipeline(conditional_folder)
    plain = diffusers_unet()
    embeds = torch.nn.functional.normalize(torch.randn(2, 16))
    for unet, options in ((pipeline.unet, {"image_embeds": embeds}), (plain, {})):
        options |= {"class_labels": [0, 1], "num_inference_steps": 2, "output_type": "latent"}
        samples = []
        for each in (unet, torch.compile(unet, backend="eager")):
            pipeline.unet = each
            with torch.compiler.set_stance("force_eager"):  # only the class counts here
                samples.append(pipeline(generator=seeded_generators([1, 2]), **options).images)
        assert nearly_equal(*samples)


def test_bf16_samples_of_one_prompt_are_finite(conditional_folder):
    pipeline = load_pipeline(conditional_folder).to(torch.bfloat16)
    assert np.isfinite(pipeline(image_embeds=torch.ones(1, 16), num_inference_steps=1, output_type="np").images).all()


@pytest.mark.slow
def test_sample_accepts_image_and_text_prompts(run, conditional_folder, model_folder, image_folder, clip, make_clip, tmp_path):
    options = [f"model={conditional_folder}", "per_class=2", "steps=2", "classes=[]"]
    image = next((image_folder / "disc").iterdir())
    for name, prompt in (("image", f"image_prompt={image}"), ("text", "prompt=a red disc")):
        code, _, err = run(SampleConfig, sample, *options, f"clip={clip}", prompt, f"output={tmp_path / name}")
        assert code == 0 and len(list((tmp_path / name).glob("picture-*.png"))) == 2, err
    (tmp_path / "empty").mkdir()
    shutil.copy(make_clip(2) / "open_clip_config.json", tmp_path / "empty")
    for changed, message in (
        ([f"clip=open_clip:{make_clip(1)}"], "clip: expected the network used in training"),
        ([f"clip=open_clip:{tmp_path / 'empty'}"], "clip: expected a .safetensors file of OpenCLIP empty"),
        ([f"clip={clip}", f"model={model_folder}"], "is not conditioned on embeddings"),
        (["clip=open_clip:ViT-None:x"], "clip: expected an architecture of OpenCLIP"),
        (["clip=ViT-B-32"], "clip: expected open_clip:ARCHITECTURE"),
        ([], "clip: expected an OpenCLIP network if there is a prompt"),
    ):
        code, _, err = run(SampleConfig, sample, *options, "prompt=x", *changed, f"output={tmp_path / 'wrong'}")
        assert code == 2 and message in err
