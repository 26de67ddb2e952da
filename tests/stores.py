"""What every kind of object store must do, whatever its scheme: checks that tests of each call."""

import webdataset as wds
from torch import equal

from ldm_smd.config import load_config
from ldm_smd.data import encode as encode_module
from ldm_smd.data.encode import encode
from ldm_smd.data.images import load_pixels
from ldm_smd.data.settings import CacheConfig, EncodeConfig, ImagesConfig
from ldm_smd.data.shards import Manifest
from ldm_smd.data.stream import LatentStream


def files_of(folder):
    """Bytes of the files of a folder, by name."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.startswith(".")}


def batches_are_those_of_a_folder(url, shards, cache):
    found, expected = (
        list(LatentStream(Manifest.load(place, CacheConfig(str(cache))), 4, 44, seed=3, mirror=True)) for place in (url, shards)
    )
    assert len(found) == len(expected) == 11
    for a, b in zip(found, expected):
        assert equal(a.moments, b.moments) and equal(a.labels, b.labels)


def tars_of(pictures, folder):
    """Write the pictures to two webdataset tars."""
    for number, files in enumerate((sorted(pictures.rglob("*.png"))[:11], sorted(pictures.rglob("*.png"))[11:])):
        with wds.TarWriter(str(folder / f"train-{number}.tar")) as writer:
            for path in files:
                writer.write({"__key__": path.stem, "png": path.read_bytes(), "cls": str(int(path.parent.name == "square"))})


def pictures_are_those_of_a_folder(url, folder, cache):
    """``url``, ``folder``: places of the tars that ``tars_of`` writes."""
    for names in ("train-*.tar", "train-{0..1}.tar"):
        (pixels, labels, _), (expected, expected_labels, _) = (
            load_pixels(ImagesConfig(source=f"{place}/{names}", cache=str(cache), resolution=16)) for place in (url, folder)
        )
        assert equal(pixels, expected) and labels == expected_labels and len(pixels) == 22


def encoding_goes_on(url, pictures, autoencoder, shards, contents, remove, monkeypatch):
    """Encode to ``url`` what is in the folder ``shards``; again where a file is missing, and where none is.

    Args:
        contents: a function that returns the bytes of all files at ``url``, by name.
        remove: one that removes a file there.
    """
    given = [f"images.source={pictures}", "images.resolution=16", f"autoencoder={autoencoder}", f"output={url}"]
    config = load_config(EncodeConfig, None, [*given, "shard_size=8", "batch_size=4", "num_workers=0"])
    made, real = [], encode_module.write_shard
    monkeypatch.setattr(encode_module, "write_shard", lambda *given: made.append(given[2]) or real(*given))
    assert encode(config).count == 22 and contents() == files_of(shards)
    assert made == ["latents-00000.tar", "latents-00001.tar", "latents-00002.tar"]
    for missing, again in (("latents-00001.json", ["latents-00001.tar"]), ("manifest.json", [])):
        made.clear()
        remove(missing)
        assert encode(config).count == 22 and contents() == files_of(shards) and made == again
