import hashlib
import io
import json
import tarfile

import numpy as np
import pytest
import torch
import webdataset as wds

from ldm_smd.autoencoder import FrozenAutoencoder
from ldm_smd.data.images import load_pixels
from ldm_smd.data.settings import ImagesConfig
from ldm_smd.data.shards import ChannelStatistics, Manifest
from ldm_smd.data.sources import list_images
from ldm_smd.errors import UserError


def test_shards_contain_the_output_of_the_encoder(shards, image_folder, vae_folder):
    """webdataset reads the moments of each image and of its mirrored version, and the labels. Images are shuffled."""
    vae = FrozenAutoencoder.from_pretrained(vae_folder)
    config = ImagesConfig(source=str(image_folder), resolution=16)
    pixels, labels, classes = load_pixels(config)
    in_order = [entry.key for entry in list_images(config)]
    paths = sorted(str(path) for path in shards.glob("*.tar"))
    samples = list(wds.WebDataset(paths, shardshuffle=False).decode())
    keys = [sample["__key__"] for sample in samples]
    assert sorted(keys) == in_order and keys != in_order
    samples.sort(key=lambda sample: sample["__key__"])
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


def test_without_encoder_variances_statistics_are_those_of_the_means():
    moments = np.random.default_rng(0).normal(2.0, 3.0, (50, 1, 2, 4, 4))
    statistics, merged = ChannelStatistics(), ChannelStatistics()
    for part in (moments[:20], moments[20:]):
        statistics.add(part)
        each = ChannelStatistics()
        each.add(part)
        merged.merge(each.state())
    for found in (statistics, merged):
        assert found.count == 50 and found.shape == [1, 2, 4, 4]
        assert np.allclose(found.mean, moments[:, 0].mean(axis=(0, 2, 3)))
        assert np.allclose(found.std, moments[:, 0].std(axis=(0, 2, 3)))


def test_missing_and_invalid_manifests_give_one_line(tmp_path):
    with pytest.raises(UserError, match=r"expected a folder with manifest\.json"):
        Manifest.load(tmp_path)
    for content in ("", "{}", '{"format": "other", "metadata": {}, "shards": []}'):
        (tmp_path / "manifest.json").write_text(content)
        with pytest.raises(UserError, match="shards: expected"):
            Manifest.load(tmp_path)
