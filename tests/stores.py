"""Checks for every kind of object store, called by the tests of each."""

import pytest
import webdataset as wds
from torch import equal

from ldm_smd.config import load_config
from ldm_smd.data import encode as encode_module
from ldm_smd.data import store
from ldm_smd.data.encode import encode
from ldm_smd.data.images import load_pixels
from ldm_smd.data.settings import CacheConfig, EncodeConfig, ImagesConfig
from ldm_smd.data.shards import Manifest
from ldm_smd.data.stream import LatentStream


def files_of(folder):
    """Return the bytes of the files in a folder, by name."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.startswith(".")}


def check_replacing(url, content, path):
    """Assert that ``url``/x has this content, and another stamp once ``path`` has replaced it. ``url``/y must be missing."""
    assert store.read_bytes(f"{url}/x", "shards") == content and store.stat(f"{url}/y", "shards") is None
    before = store.stat(f"{url}/x", "shards")
    path.write_bytes(content[::-1])
    store.upload(path, f"{url}/x", "output")
    after = store.stat(f"{url}/x", "shards")
    assert before.size == after.size and before.stamp and after.stamp and before.stamp != after.stamp
    with pytest.raises(FileNotFoundError):
        store.read_bytes(f"{url}/y", "shards")


def check_batches(url, shards, cache):
    """Assert that shards at a URL give the batches of the local folder ``shards``."""
    found, expected = (
        list(LatentStream(Manifest.load(folder, CacheConfig(str(cache))), 4, 44, seed=3, mirror=True))
        for folder in (url, shards)
    )
    assert len(found) == len(expected) == 11
    for a, b in zip(found, expected):
        assert equal(a.moments, b.moments) and equal(a.labels, b.labels)


def write_image_tars(image_folder, folder):
    """Write the images to two webdataset tars in ``folder``."""
    for number, files in enumerate((sorted(image_folder.rglob("*.png"))[:11], sorted(image_folder.rglob("*.png"))[11:])):
        with wds.TarWriter(str(folder / f"train-{number}.tar")) as writer:
            for path in files:
                writer.write({"__key__": path.stem, "png": path.read_bytes(), "cls": str(int(path.parent.name == "square"))})


def check_images(url, folder, cache):
    """Assert that the tars of ``write_image_tars`` give the same images at a URL as in a local folder."""
    for names in ("train-*.tar", "train-{0..1}.tar"):
        (pixels, labels, _), (expected, expected_labels, _) = (
            load_pixels(ImagesConfig(source=f"{base}/{names}", cache=str(cache), resolution=16)) for base in (url, folder)
        )
        assert equal(pixels, expected) and labels == expected_labels and len(pixels) == 22


def check_encoding_and_resuming(url, image_folder, autoencoder, shards, contents, remove, monkeypatch):
    """Assert that encoding to ``url`` writes the files of the local folder ``shards``, and missing files on a restart.

    Args:
        contents: a function that returns the bytes of all files at ``url``, by name.
        remove: a function that removes a file there.
    """
    given = [
        f"images.source={image_folder}",
        "images.resolution=16",
        "mirror=true",
        f"autoencoder={autoencoder}",
        f"output={url}",
    ]
    config = load_config(EncodeConfig, None, [*given, "shard_size=8", "batch_size=4", "num_workers=0"])
    written, real = [], encode_module.write_shard
    monkeypatch.setattr(encode_module, "write_shard", lambda *given: written.append(given[2]) or real(*given))
    assert encode(config).count == 22 and contents() == files_of(shards)
    assert written == ["latents-00000.tar", "latents-00001.tar", "latents-00002.tar"]
    for missing, expected in (("latents-00001.json", ["latents-00001.tar"]), ("manifest.json", [])):
        written.clear()
        remove(missing)
        assert encode(config).count == 22 and contents() == files_of(shards) and written == expected
