import pytest
import torch
from safetensors.torch import save_file

from ldm_smd.config import load_config
from ldm_smd.errors import UserError
from ldm_smd.evaluation.features import DINOV2_SIDE, load_extractor
from ldm_smd.models.feature_network import FeatureNetwork
from ldm_smd.training.settings import TrainClassifierConfig
from ldm_smd.training.train_classifier import train_classifier


@pytest.fixture(scope="module")
def classifier(tmp_path_factory, image_folder):
    """The folder of a classifier that was trained on the two shapes at 16 pixels."""
    folder = tmp_path_factory.mktemp("classifier")
    text = f"""\
output: {folder / "model"}
sets:
  - name: shapes
    images: {{source: {image_folder}, resolution: 16}}
    held_out: {{source: {image_folder}, resolution: 16}}
    batch_size: 16
block_out_channels: [8, 16, 16]
images_total: 800
learning_rate: 0.05
"""
    (folder / "classifier.yaml").write_text(text)
    return train_classifier(load_config(TrainClassifierConfig, folder / "classifier.yaml", []))


def test_the_classifier_learns_and_its_card_has_the_accuracy(classifier):
    card = (classifier / "README.md").read_text()
    row = next(line for line in card.splitlines() if line.startswith("| shapes"))
    assert float(row.split("|")[-2].strip().rstrip("%")) >= 80
    assert FeatureNetwork.from_pretrained(classifier).config.classes == {"shapes": 2}


def test_features_do_not_depend_on_the_batch_size(classifier):
    extractor = load_extractor(str(classifier), device="cpu")
    assert extractor.name == "model"
    pixels = torch.randint(256, (7, 3, 24, 24), dtype=torch.uint8)
    features = extractor(pixels)
    assert features.shape == (7, 16) and features.dtype == torch.float64
    assert torch.allclose(extractor(pixels, batch_size=2), features, atol=1e-5)


def test_open_clip_features_from_a_weights_file(tmp_path):
    """With an untrained model of OpenCLIP that was saved before."""
    import open_clip

    torch.manual_seed(0)
    architecture = "ViT-S-32-alt"
    model = open_clip.create_model(architecture).eval()
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    extractor = load_extractor(f"open_clip:{architecture}:{tmp_path / 'weights.safetensors'}", device="cpu")
    pixels = torch.randint(256, (2, 3, 40, 40), dtype=torch.uint8)
    features = extractor(pixels)
    assert torch.allclose(features.norm(dim=1), torch.ones(2).double(), atol=1e-5)
    side = model.visual.image_size[0]
    resized = torch.nn.functional.interpolate(pixels / 255.0, (side, side), mode="bicubic", antialias=True).clamp(0, 1)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (model.visual.image_mean, model.visual.image_std))
    with torch.no_grad():
        expected = model.encode_image((resized - mean) / std, normalize=True)
    assert torch.allclose(features.float(), expected, atol=1e-4)
    assert extractor.name == f"OpenCLIP {architecture}"


def test_dinov2_features_from_a_weights_file(tmp_path):
    """With a small model of timm of the same class, whose position embeddings are of another size of images too."""
    import timm

    torch.manual_seed(0)
    published = timm.create_model("test_vit", num_classes=0).eval()
    save_file(published.state_dict(), tmp_path / "weights.safetensors")
    overlay = {"file": str(tmp_path / "weights.safetensors")}
    model = timm.create_model(
        "test_vit", pretrained=True, pretrained_cfg_overlay=overlay, num_classes=0, img_size=DINOV2_SIDE
    ).eval()
    assert model.pos_embed.shape[1] > published.pos_embed.shape[1]
    extractor = load_extractor(f"dinov2:test_vit:{tmp_path / 'weights.safetensors'}", device="cpu")
    pixels = torch.randint(256, (2, 3, 40, 40), dtype=torch.uint8)
    resized = torch.nn.functional.interpolate(pixels / 255.0, (224, 224), mode="bicubic", antialias=True).clamp(0, 1)
    mean, std = (torch.tensor(model.pretrained_cfg[name]).view(3, 1, 1) for name in ("mean", "std"))
    with torch.no_grad():
        expected = model((resized - mean) / std)
    assert torch.allclose(extractor(pixels).float(), expected, atol=1e-4)
    assert (extractor.name, extractor.resize) == ("DINOv2 test_vit", "antialiased bicubic to 224 pixels")
    assert load_extractor(f"dinov2:test_vit:{tmp_path / 'weights.safetensors'}#{extractor.sha256}", device="cpu")


@pytest.mark.parametrize(
    "weights, message",
    [
        ("nowhere", "features: expected a FeatureNetwork folder"),
        ("open_clip:ViT-B-32:weights.pt", "features: expected a .safetensors file of OpenCLIP ViT-B-32"),
        ("dinov2:vit_small_patch14_dinov2:weights.pth", r"features: expected a .safetensors file of .* or a name .*lvd142m"),
        ("inception:nowhere.pth", "features: expected the"),
    ],
)
def test_wrong_feature_networks_give_one_line(weights, message):
    with pytest.raises(UserError, match=message):
        load_extractor(weights)


def test_images_without_a_class_are_refused(tmp_path, image_folder):
    (tmp_path / "c.yaml").write_text(
        f"output: {tmp_path / 'out'}\nsets:\n- name: x\n  batch_size: 4\n"
        f"  images: {{source: {image_folder / 'disc'}, resolution: 16}}\n"
        f"  held_out: {{source: {image_folder / 'disc'}, resolution: 16}}\n"
    )
    with pytest.raises(UserError, match=r"sets.x.images: expected a class for every image"):
        train_classifier(load_config(TrainClassifierConfig, tmp_path / "c.yaml", []))


class Marker:
    def __reduce__(self):
        return exec, ("raise SystemExit('code of a weights file was run')",)


def test_code_in_a_weights_file_of_inception_is_not_run(tmp_path):
    torch.save(Marker(), tmp_path / "weights.pth")
    with pytest.raises(
        UserError, match=r"features: expected the weights file of torch-fidelity.s Inception, found .*weights.pth"
    ):
        load_extractor(f"inception:{tmp_path / 'weights.pth'}", device="cpu")


@pytest.mark.parametrize("tag, forced", [("openai", True), ("laion2b_s34b_b79k", False)])
def test_published_clip_weights_get_the_activation_they_were_trained_with(tag, forced, monkeypatch):
    import open_clip

    made = {}

    def create_model(architecture, **options):
        made.update(options)
        raise RuntimeError(f"Failed to download weights for tag '{tag}'")

    monkeypatch.setattr(open_clip, "create_model", create_model)
    with pytest.raises(UserError, match=f"expected weights of OpenCLIP ViT-B-32 that can be loaded, found Failed .* '{tag}'"):
        load_extractor(f"open_clip:ViT-B-32:{tag}", device="cpu")
    assert made["pretrained"] == tag and made["force_quick_gelu"] is forced
