"""Untrusted tars: nothing in them is executed or written, and each error is one line."""

import io
import json
import pickle
import shutil
import tarfile

import numpy as np
import pytest

from ldm_smd.data.settings import ImagesConfig
from ldm_smd.data.shards import Manifest
from ldm_smd.data.sources import list_images
from ldm_smd.data.stream import LatentStream
from ldm_smd.errors import UserError

GOOD = np.zeros((2, 4, 8, 8), dtype=np.float16)


@pytest.fixture
def folder(shards, tmp_path):
    """A folder whose manifest lists one shard with one sample. The tests write the shard."""
    folder = tmp_path / "shards"
    folder.mkdir()
    content = json.loads((shards / "manifest.json").read_text())
    content["shards"] = [content["shards"][0] | {"count": 1}]
    (folder / "manifest.json").write_text(json.dumps(content))
    return folder


def npy(array, allow_pickle=False):
    file = io.BytesIO()
    np.save(file, array, allow_pickle=allow_pickle)
    return file.getvalue()


def add(tar, name, data, **header):
    member = tarfile.TarInfo(name)
    member.size = len(data)
    for key, value in header.items():
        setattr(member, key, value)
    tar.addfile(member, io.BytesIO(data))


def assert_refused(folder, message):
    with pytest.raises(UserError, match=message):
        LatentStream(Manifest.load(folder), 1, 1).batch_at(0)


class Touch:
    """Creates a file if it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_pickles_are_not_loaded(folder, tmp_path):
    evil = tmp_path / "evil"
    array = np.array([Touch(evil)], dtype=object)
    for data in (npy(array, allow_pickle=True), pickle.dumps(Touch(evil))):
        with tarfile.open(folder / "latents-00000.tar", "w") as tar:
            add(tar, "a.moments.npy", data)
        assert_refused(folder, "shards: expected a tar of moments")
    assert not evil.exists()


@pytest.mark.parametrize("name", ["../../evil.moments.npy", "{}/evil.moments.npy", "..moments.npy", "a/../../evil.png"])
def test_member_names_cannot_leave_the_folder(folder, name, tmp_path):
    """The shards are two folders below the one that is searched, and an absolute name is in it too."""
    folder, name = shutil.move(folder, tmp_path / "a/b/shards"), name.format(tmp_path)
    before = set(tmp_path.rglob("*"))
    with tarfile.open(folder / "latents-00000.tar", "w") as tar:
        add(tar, name, npy(GOOD))
    try:
        LatentStream(Manifest.load(folder), 1, 1).batch_at(0)
    except UserError as error:
        assert str(error).startswith(("shards: expected", "mirror: expected"))
    assert set(tmp_path.rglob("*")) - before == {folder / "latents-00000.tar"}
    entries = images_of_tar(tmp_path, name)
    assert not any("." in entry.key for entry in entries)


def images_of_tar(folder, name):
    """List the images of a tar with a member of this name; [] if it is refused."""
    with tarfile.open(folder / "images.tar", "w") as tar:
        add(tar, name.replace("moments.npy", "png"), b"not an image")
    try:
        return list_images(ImagesConfig(source=str(folder / "images.tar")))
    except UserError:
        return []


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (npy(GOOD[:1]), r"is \(1, 4, 8, 8\) float16"),
        (npy(GOOD.astype(np.float32)), "float32"),
        (npy(np.asfortranarray(GOOD)), "a.moments.npy is"),
        (npy(GOOD)[:-2], "bytes instead of"),
        (npy(GOOD) + b"more", "bytes instead of"),
        (b"", "expected a tar of moments"),
        (b"\x93NUMPY\x01\x00\xff\xff{" + b" " * 2000, "expected a tar of moments"),
        (b"\x93NUMPY\x02\x00\xff\xff\xff\x7f{", "expected a tar of moments"),
        (b"\x93NUMPY\x01\x00\x10\x00" + b"__import__(1)\n  ", "expected a tar of moments"),
    ],
)
def test_unexpected_arrays_are_refused(folder, data, message):
    with tarfile.open(folder / "latents-00000.tar", "w") as tar:
        add(tar, "a.moments.npy", data)
    assert_refused(folder, message)


def test_links_duplicates_and_bad_labels_are_refused(folder):
    path = folder / "latents-00000.tar"
    with tarfile.open(path, "w") as tar:
        add(tar, "a.moments.npy", b"", type=tarfile.SYMTYPE, linkname="/etc/passwd")
    assert_refused(folder, "a.moments.npy is not a regular file")
    with tarfile.open(path, "w") as tar:
        add(tar, "a.moments.npy", npy(GOOD))
        add(tar, "a.moments.npy", npy(GOOD))
    assert_refused(folder, "a.moments.npy occurs twice")
    for label in (b"one", b"9" * 10_000, b"\xff"):
        with tarfile.open(path, "w") as tar:
            add(tar, "a.moments.npy", npy(GOOD))
            add(tar, "a.mirror.npy", npy(GOOD))
            add(tar, "a.cls", label)
        assert_refused(folder, "shards: expected")


@pytest.mark.parametrize("with_record", [True, False])
def test_a_shard_truncated_at_any_block_is_refused(shards, tmp_path, with_record):
    """It can still be read if only the zeros after the last sample are missing."""
    folder = shutil.copytree(shards, tmp_path / "copy")
    path = folder / "latents-00002.tar"
    if not with_record:
        path.with_suffix(".json").unlink()
    data = path.read_bytes()
    expected = LatentStream(Manifest.load(folder), 22, 22).batch_at(0).moments
    with tarfile.open(path) as tar:
        end = max(member.offset_data + member.size for member in tar)
    for size in range(0, len(data), 512):
        path.write_bytes(data[:size])
        if size < end:
            assert_refused(folder, "(shards|mirror): expected")
        else:
            assert LatentStream(Manifest.load(folder), 22, 22).batch_at(0).moments.equal(expected)


@pytest.mark.parametrize(
    "index",
    [
        None,
        {},
        {"keys": ["a"], "labels": [0], "offsets": [[-1, 0]]},
        {"keys": ["a"], "labels": [0], "offsets": [[10**9, 0]]},
        {"keys": ["a"], "labels": [0], "offsets": [[10**99, 0]]},
        {"keys": ["a"], "labels": ["one"], "offsets": [[0, 0]]},
        {"keys": ["a"], "labels": [0, 1], "offsets": [[0, 0]]},
        {"keys": ["a"], "labels": [7], "offsets": [[0, 0]]},
    ],
)
def test_a_record_with_a_wrong_index_is_refused(shards, folder, index):
    shutil.copy(shards / "latents-00000.tar", folder)
    content = json.loads((folder / "manifest.json").read_text())
    (folder / "latents-00000.json").write_text(json.dumps({"shard": content["shards"][0], "index": index}))
    assert_refused(folder, "shards: expected")
