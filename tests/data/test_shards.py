import hashlib
import io
import json
import tarfile

import numpy as np
import pytest
import torch
import webdataset as wds
from PIL import Image

from ldm_smd.autoencoder import FrozenAutoencoder
from ldm_smd.config import EncodeConfig, ImagesConfig, load_config
from ldm_smd.data.images import load_pixels
from ldm_smd.data.shards import Manifest, encode
from ldm_smd.errors import UserError


@pytest.fixture
def encode_to(pictures, vae_folder, tmp_path):
    def call(name, *overrides):
        settings = [
            f"images.source={pictures}",
            "images.resolution=16",
            f"autoencoder={vae_folder}",
            f"output={tmp_path / name}",
            "shard_size=8",
            "batch_size=4",
            "num_workers=0",
        ]
        return encode(load_config(EncodeConfig, None, settings + list(overrides)))

    return call


def test_shards_hold_what_the_encoder_said(shards, pictures, vae_folder):
    """Read back by webdataset: keys in order, moments of each picture and of its mirror, labels."""
    vae = FrozenAutoencoder.from_pretrained(vae_folder)
    pixels, labels, classes = load_pixels(ImagesConfig(source=str(pictures), resolution=16))
    paths = sorted(str(path) for path in shards.glob("*.tar"))
    samples = list(wds.WebDataset(paths, shardshuffle=False).decode())
    assert len(samples) == 22 and len({sample["__key__"] for sample in samples}) == 22
    moments = torch.from_numpy(np.stack([sample["moments.npy"] for sample in samples]))
    mirrors = torch.from_numpy(np.stack([sample["mirror.npy"] for sample in samples]))
    assert moments.dtype == torch.float16 and moments.shape == (22, 2, 4, 8, 8)
    assert torch.allclose(moments.float(), vae.encode_moments(pixels), atol=2e-2)
    assert torch.allclose(mirrors.float(), vae.encode_moments(pixels.flip(3)), atol=2e-2)
    assert [sample["cls"] for sample in samples] == labels
    manifest = Manifest.load(shards)
    assert manifest.classes == classes == ["disc", "square"] and manifest.latent_shape == (4, 8, 8)


def test_manifest_describes_every_shard(shards):
    content = json.loads((shards / "manifest.json").read_text())
    assert [item["count"] for item in content["shards"]] == [8, 8, 6]
    values = []
    for item in content["shards"]:
        data = (shards / item["name"]).read_bytes()
        assert item["sha256"] == hashlib.sha256(data).hexdigest()
        with tarfile.open(shards / item["name"]) as tar:
            assert all(member.mtime == 0 for member in tar)
            names = [name for name in tar.getnames() if name.endswith("moments.npy")]
            moments = np.stack([np.load(io.BytesIO(tar.extractfile(name).read()), allow_pickle=False) for name in names])
        moments = moments.astype(np.float64)
        assert item["min"] == moments.min() and item["max"] == moments.max() and item["nonfinite"] == 0
        assert item["mean"] == pytest.approx(moments.mean()) and item["std"] == pytest.approx(moments.std())
        values.append(moments)
    moments = np.concatenate(values)
    metadata = content["metadata"]
    assert np.allclose(metadata["channel_mean"], moments[:, 0].mean(axis=(0, 2, 3)))
    second = (moments[:, 0] ** 2 + np.exp(moments[:, 1])).mean(axis=(0, 2, 3))
    assert np.allclose(metadata["channel_std"], np.sqrt(second - moments[:, 0].mean(axis=(0, 2, 3)) ** 2))


def test_same_input_same_bytes_at_any_number_of_workers(shards, encode_to, tmp_path):
    encode_to("again", "num_workers=2")
    for path in shards.glob("*.tar"):
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()


def test_unreadable_pictures_are_skipped_counted_and_listed(encode_to, tmp_path, capsys):
    folder = tmp_path / "mixed"
    folder.mkdir()
    Image.new("RGB", (16, 16), "red").save(folder / "a.png")
    (folder / "b.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    manifest = encode_to("out", f"images.source={folder}")
    content = json.loads((tmp_path / "out/manifest.json").read_text())
    assert manifest.count == 1 and manifest.classes == []
    assert [item["name"] for item in content["skipped"]] == [str(folder / "b.png")]
    out, err = capsys.readouterr()
    assert "1 skipped" in out and f"skipped {folder / 'b.png'}" in err


def test_nothing_half_written_after_an_error(encode_to, tmp_path):
    folder = tmp_path / "broken"
    folder.mkdir()
    (folder / "b.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match="expected readable pictures"):
        encode_to("out", f"images.source={folder}")
    with pytest.raises(UserError, match="strict"):
        encode_to("out", f"images.source={folder}", "images.strict=true")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken"]


def test_an_output_in_use_is_refused(encode_to, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/keep.txt").write_text("mine")
    with pytest.raises(UserError, match="output: expected a new or empty folder"):
        encode_to("out")
    assert (tmp_path / "out/keep.txt").read_text() == "mine"


def test_bad_manifests_are_named(tmp_path):
    with pytest.raises(UserError, match=r"expected a folder with manifest\.json"):
        Manifest.load(tmp_path)
    for content in ("", "{}", '{"format": "other", "metadata": {}, "shards": []}'):
        (tmp_path / "manifest.json").write_text(content)
        with pytest.raises(UserError, match="shards: expected"):
            Manifest.load(tmp_path)
