"""The index of all images of a source, in memory and on disk."""

import io
import multiprocessing
import os
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from ldm_smd.data import index as index_module
from ldm_smd.data import keys as keys_module
from ldm_smd.data import pieces as pieces_module
from ldm_smd.data.index import PiecesOnDisk
from ldm_smd.data.keys import find_repeated_keys
from ldm_smd.data.pieces import Piece, key_hash
from ldm_smd.data.settings import ImagesConfig
from ldm_smd.data.sources import list_images
from ldm_smd.errors import UserError


def encoded(colour):
    file = io.BytesIO()
    Image.new("RGB", (8, 8), colour).save(file, "PNG")
    return file.getvalue()


def write_tar(path, names, colour="red"):
    with tarfile.open(path, "w") as tar:
        for number, name in enumerate(names):
            for member_name, content in ((f"{name}.png", encoded(colour)), (f"{name}.cls", str(number % 3).encode())):
                member = tarfile.TarInfo(member_name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


@pytest.fixture
def tars(tmp_path):
    (tmp_path / "source").mkdir()
    for number in range(6):
        write_tar(tmp_path / f"source/{number}.tar", [f"{number}-{each}" for each in range(5)])
    return tmp_path / "source"


@pytest.fixture
def listed(monkeypatch):
    """The names of all parts that have been listed."""
    found, real = [], index_module.make_piece
    monkeypatch.setattr(index_module, "make_piece", lambda part: found.append(part.name) or real(part))
    return found


def config_of(tars):
    return ImagesConfig(source=f"{tars}/*.tar")


def test_the_index_on_disk_equals_the_one_in_memory_and_is_reused(tars, tmp_path, listed):
    config, folder = config_of(tars), tmp_path / "index"
    in_memory = list_images(config)
    assert len(in_memory) == 30 and in_memory.classes == ["0", "1", "2"]
    first = list(list_images(config, folder))
    assert first == list(in_memory)
    assert [entry.read() for entry in first] == [encoded("red")] * 30
    assert first[7] == in_memory[7] == in_memory[-23] and in_memory[3:6] == first[3:6]
    listed.clear()
    again = list_images(config, folder)
    assert list(again) == first and listed == []
    assert (again.images_sha256, again.files_sha256()) == (in_memory.images_sha256, in_memory.files_sha256())


def test_only_changed_parts_are_listed_again(tars, tmp_path, listed):
    config, folder = config_of(tars), tmp_path / "index"
    before = list_images(config, folder)
    write_tar(tars / "2.tar", ["other"])
    listed.clear()
    after = list_images(config, folder)
    assert listed == [str(tars / "2.tar")] and len(after) == 26
    assert after.files_sha256() != before.files_sha256() and after.images_sha256 != before.images_sha256
    os.utime(tars / "3.tar", ns=(1, 1))
    touched = list_images(config, folder)
    assert touched.files_sha256() != after.files_sha256() and touched.images_sha256 == after.images_sha256


def test_an_image_rewritten_in_place_is_detected(image_folder, tmp_path):
    config = ImagesConfig(source=str(image_folder))
    before = list_images(config, tmp_path / "index")
    assert list(before) == list(list_images(config)) == list(list_images(config, tmp_path / "index"))
    file = next(image_folder.rglob("*.png"))
    status = file.stat()
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns + 10**6))
    after = list_images(config, tmp_path / "index")
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert after.files_sha256() != before.files_sha256() and after.images_sha256 == before.images_sha256


def list_in(folder, config, worker):
    """List the 30 images of the tars, with the index in ``folder``."""
    index = list_images(config, folder, worker)
    assert len(list(index)) == 30


def test_processes_share_the_work_and_start_with_different_parts(tars, tmp_path, listed):
    folder = tmp_path / "index"
    list_images(config_of(tars), folder, (1, 2))
    assert [os.path.basename(name) for name in listed] == ["3.tar", "4.tar", "5.tar", "0.tar", "1.tar", "2.tar"]
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=list_in, args=(tmp_path / "shared", config_of(tars), (i, 3))) for i in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert sorted(path.name for path in (tmp_path / "shared").iterdir()) == sorted(path.name for path in folder.iterdir())


def test_the_piece_of_a_killed_process_is_made_by_another(tars, tmp_path, monkeypatch):
    folder = tmp_path / "index"
    context = multiprocessing.get_context("fork")
    real = index_module.make_piece

    def stuck(part):
        if part.path.endswith("2.tar"):
            (tmp_path / "stuck").touch()
            time.sleep(600)
        return real(part)

    with monkeypatch.context() as patch:
        patch.setattr(index_module, "make_piece", stuck)
        process = context.Process(target=list_images, args=(config_of(tars), folder))
        process.start()
    while not (tmp_path / "stuck").exists():
        assert process.is_alive()
        time.sleep(0.01)
    process.kill()
    process.join()
    list_in(folder, config_of(tars), (0, 1))
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]


def test_a_damaged_index_gives_one_line(tars, tmp_path):
    folder = tmp_path / "index"
    list_images(config_of(tars), folder)
    for path in folder.glob("index-*"):
        path.write_text("not JSON")
    assert len(list_images(config_of(tars), folder)) == 30
    piece = sorted(folder.glob("piece-*"))[0]
    piece.write_bytes(piece.read_bytes()[:100])
    for path in folder.glob("index-*"):
        path.unlink()
    pieces_module._load.cache_clear()  # as in another process
    with pytest.raises(UserError, match=r"images\.source: expected an intact index in .*index, found piece-.*; remove it"):
        list_images(config_of(tars), folder)


def test_keys_repeated_in_several_tars_are_renamed(tmp_path):
    for number in range(3):
        write_tar(tmp_path / f"{number}.tar", ["a", "b", f"only-{number}"])
    write_tar(tmp_path / "3.tar", ["a-2", "a"])
    expected = ["a", "b", "only-0", "a-2-2", "b-2", "only-1", "a-3", "b-3", "only-2", "a-2", "a-4"]
    for folder in (None, tmp_path / "index", tmp_path / "index"):
        assert [entry.key for entry in list_images(config_of(tmp_path), folder)] == expected


class Keys:
    """Keys in parts, with the methods of an index."""

    def __init__(self, parts):
        self.parts = [[key for key in part] for part in parts]

    def hashes(self):
        return (np.array([key_hash(key) for key in part], np.uint64) for part in self.parts)

    def key(self, number):
        return [key for part in self.parts for key in part][number]


few_keys = st.lists(st.lists(st.sampled_from(["a", "a-2", "a-2-2", "a-3", "b", "b-2", "c"]), max_size=8), max_size=5)


@given(few_keys, st.sampled_from([1, 4, 2**22]), st.sampled_from([1, 3, 2**22]))
def test_new_keys_are_unique_and_the_first_image_keeps_its_key(parts, bucket_size, run_size):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(keys_module, "BUCKET_SIZE", bucket_size)
        patch.setattr(keys_module, "RUN_SIZE", run_size)
        repeated = find_repeated_keys(Keys(parts))
    old = [key for part in parts for key in part]
    new = [repeated.renamed(number, key) for number, key in enumerate(old)]
    assert len(set(new)) == len(new)
    for number, key in enumerate(old):
        assert (new[number] == key) == (key not in old[:number])


def test_the_hashes_of_a_source_are_read_once():
    """Reading them again for each bucket would take hours with hundreds of thousands of tars."""
    keys, reads = Keys([[f"{part}-{number}" for number in range(9)] for part in range(5)]), []
    hashes = keys.hashes
    keys.hashes = lambda: (reads.append(1) or part for part in hashes())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(keys_module, "BUCKET_SIZE", 4)
        assert not len(find_repeated_keys(keys).numbers)
    assert len(reads) == 5


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_few_files_are_open_while_keys_are_compared(tmp_path):
    """A system allows 1,024 open files by default. Each memory-mapped part holds one."""
    for part in range(50):
        np.save(tmp_path / f"{part}.npy", np.arange(2 * part, 2 * part + 2, dtype=np.uint64))
    most = []

    def hashes():
        for part in range(50):
            yield np.load(tmp_path / f"{part}.npy", mmap_mode="r")
            most.append(Path("/proc/self/maps").read_text().count(str(tmp_path)))

    numbers, _ = keys_module.repeated_hashes(hashes())
    assert not len(numbers) and max(most) <= 2


def test_many_images_with_one_key():
    keys = Keys([["one"] * 20_000, ["one-7"]])
    flat = keys.parts[0] + keys.parts[1]
    keys.key = flat.__getitem__
    repeated = find_repeated_keys(keys)
    new = [repeated.renamed(number, key) for number, key in enumerate(flat)]
    assert new[:3] == ["one", "one-2", "one-3"] and new[-1] == "one-7" and len(set(new)) == len(new)


def test_pieces_are_memory_mapped(tars, tmp_path):
    index = list_images(config_of(tars), tmp_path / "index")
    assert isinstance(index.pieces, PiecesOnDisk)
    piece = Piece.load(tmp_path / "index" / index.pieces.names[index.parts[0]])
    assert all(isinstance(column, np.memmap) for column in piece.columns.values())


def test_damaged_tars_are_named(tars, tmp_path):
    (tars / "4.tar").write_bytes(b"not a tar" * 500)
    with pytest.raises(UserError, match=r"images\.source: expected an uncompressed tar, found .*4\.tar"):
        list_images(config_of(tars), tmp_path / "index")
