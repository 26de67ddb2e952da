"""Every kind of source gives the same images and labels."""

import http.server
import io
import json
import re
import shutil
import tarfile
import threading
import zipfile
from functools import partial

import datasets
import fsspec
import pytest
import torch
import webdataset as wds
from datasets import ClassLabel, Dataset, Features, Value
from PIL import Image

from ldm_smd.config import load_config
from ldm_smd.data.encode import encode
from ldm_smd.data.entries import open_local_copy
from ldm_smd.data.images import load_pixels, read_images
from ldm_smd.data.settings import EncodeConfig, ImagesConfig, VerifyConfig
from ldm_smd.data.sources import list_images
from ldm_smd.data.stream import LatentStream
from ldm_smd.data.verify import verify
from ldm_smd.errors import UserError


def test_every_kind_of_source_gives_the_same_images(image_folder, tmp_path):
    files = sorted(image_folder.rglob("*.png"))
    with zipfile.ZipFile(tmp_path / "all.zip", "w") as archive:
        for file in files:
            archive.write(file, file.relative_to(image_folder).as_posix())
    with wds.TarWriter(str(tmp_path / "part-0.tar")) as tar:
        for file in files:
            label = ("disc", "square").index(file.parent.name)
            tar.write({"__key__": f"{file.parent.name}/{file.stem}", "png": file.read_bytes(), "cls": str(label)})
    (tmp_path / "classes.json").write_text('["disc", "square"]')
    columns = {"number": range(len(files)), "photo": [str(file) for file in files]}
    columns["kind"] = [("disc", "square").index(file.parent.name) for file in files]
    features = {"number": Value("int32"), "photo": datasets.Image(), "kind": ClassLabel(names=["disc", "square"])}
    Dataset.from_dict(columns, features=Features(features)).save_to_disk(tmp_path / "saved")
    results = [
        load_pixels(ImagesConfig(source=str(source), resolution=16))
        for source in (image_folder, tmp_path / "all.zip", tmp_path / "part-*.tar", f"datasets:{tmp_path / 'saved'}")
    ]
    for pixels, labels, classes in results:
        assert torch.equal(pixels, results[0][0])
        assert labels == results[0][1] and classes == ["disc", "square"]


def test_hidden_and_empty_folders_are_no_classes_but_linked_ones_are(image_folder, tmp_path):
    tree = tmp_path / "tree"
    for name in (".cache", "disc", "empty"):
        (tree / name).mkdir(parents=True)
    for hidden in (tree / ".cache/hidden.png", tree / "disc/._shown.png"):
        Image.new("RGB", (16, 16)).save(hidden)
    Image.new("RGB", (16, 16)).save(tree / "disc/shown.png")
    (tree / "square").symlink_to(image_folder / "square")
    with zipfile.ZipFile(tmp_path / "tree.zip", "w") as archive:
        for file in sorted([*tree.rglob("*.png"), *(tree / "square").glob("*.png")]):
            archive.write(file, file.relative_to(tree).as_posix())
    for source in (tree, tmp_path / "tree.zip"):
        entries = list_images(ImagesConfig(source=str(source)))
        assert entries.classes == ["disc", "square"]
        assert [entry.label for entry in entries] == [0] + 11 * [1]


def test_images_beside_the_folders_of_classes_have_no_label(image_folder, vae_folder, tmp_path, capsys):
    shutil.copytree(image_folder, tmp_path / "images")
    Image.new("RGB", (16, 16)).save(tmp_path / "images/loose.png")
    entries = list_images(ImagesConfig(source=str(tmp_path / "images")))
    assert entries.classes == ["disc", "square"] and entries[0].label is None and entries[1].label == 0
    options = [f"images.source={tmp_path / 'images'}", "images.resolution=16", f"autoencoder={vae_folder}"]
    manifest = encode(load_config(EncodeConfig, None, [*options, f"output={tmp_path / 'latents'}", "device=cpu"]))
    assert re.search("1 of 23 images have no class, first .*loose.png: they train without", capsys.readouterr().err)
    verify(load_config(VerifyConfig, None, [f"shards={tmp_path / 'latents'}", "device=cpu"]))
    labels = LatentStream(manifest, batch_size=23, images_total=23).batch_at(0).labels
    assert sorted(labels.tolist()) == [-1] + 11 * [0] + 11 * [1]


def test_images_in_other_formats_are_skipped_with_a_warning(image_folder, tmp_path, caplog):
    shutil.copytree(image_folder, tmp_path / "tree")
    for name in ("disc/photo.HEIC", "disc/deeper/photo.heic", "disc/notes.txt", "disc/.hidden.heic", "square/drawing.svg"):
        (tmp_path / "tree" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "tree" / name).write_bytes(b"")
    with zipfile.ZipFile(tmp_path / "tree.zip", "w") as archive:
        for file in sorted(path for path in (tmp_path / "tree").rglob("*") if path.is_file()):
            archive.write(file, file.relative_to(tmp_path / "tree").as_posix())
    with wds.TarWriter(str(tmp_path / "tree.tar")) as tar:
        for number, file in enumerate(sorted(image_folder.rglob("*.png"))):
            tar.write({"__key__": f"{number:03d}", "png": file.read_bytes(), "cls": "0"})
        tar.write({"__key__": "photo", "heic": b"", "cls": "0"})
    for name, warnings in (
        ("tree.tar", ["skipped 1 images in formats that are not read (.heic)"]),
        ("tree", ["/disc: skipped 2 images in formats that are not read (.heic)", "skipped 1 images in formats that are not"]),
        ("tree.zip", ["skipped 3 images in formats that are not read (.heic, .svg)"]),
    ):
        caplog.clear()
        assert len(list_images(ImagesConfig(source=str(tmp_path / name)))) == 22
        assert len(caplog.messages) == len(warnings)
        assert all(warning in message for warning, message in zip(warnings, caplog.messages))


def test_keys_are_unique_and_without_dots(tmp_path):
    for name in ("a.b.png", "a_b.png", "c.png", "c.jpg"):
        Image.new("RGB", (16, 16)).save(tmp_path / name)
    keys = [entry.key for entry in list_images(ImagesConfig(source=str(tmp_path)))]
    assert len(set(keys)) == 4 and not any("." in key for key in keys)


def test_missing_and_empty_sources_give_one_line(tmp_path):
    for source, message in (
        (tmp_path / "none", "found nothing at"),
        (tmp_path / "none.zip", "found no file"),
        (tmp_path, "found none in"),
    ):
        with pytest.raises(UserError, match=message):
            list_images(ImagesConfig(source=str(source)))


def test_labels_outside_the_classes_are_refused(tmp_path):
    with wds.TarWriter(str(tmp_path / "a.tar")) as tar:
        tar.write({"__key__": "one", "png": encoded(Image.new("RGB", (8, 8))), "cls": "7"})
    (tmp_path / "classes.json").write_text('["a", "b"]')
    with pytest.raises(UserError, match="expected a label from 0 to 1"):
        list_images(ImagesConfig(source=str(tmp_path / "a.tar")))


def labelled_tar(path, labels):
    """Write a tar with an image for each label, all with the key "one", which TarWriter would refuse."""
    with tarfile.open(path, "w") as tar:
        for label in labels:
            for name, content in (("one.png", encoded(Image.new("RGB", (8, 8)))), ("one.cls", label)):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return path


@pytest.mark.parametrize("label", [b"999999999999999999999", b"-1", b"1e3", b"1_0", b"", b"\xff", b"9" * 70])
def test_labels_that_are_not_class_numbers_are_refused(tmp_path, label):
    with pytest.raises(UserError, match=r"expected a label from 0 to 999999999 in .*a\.tar:one\.cls, found b'"):
        list_images(ImagesConfig(source=str(labelled_tar(tmp_path / "a.tar", [label]))))


def test_a_stray_label_does_not_make_a_billion_classes(tmp_path):
    stray = labelled_tar(tmp_path / "stray.tar", [b"0", b"999999999"])
    with pytest.raises(UserError, match=r"images\.classes: expected .* for 2 different labels up to 999999999, found no file"):
        list_images(ImagesConfig(source=str(stray)))
    few = labelled_tar(tmp_path / "few.tar", [b"2", b"999"])
    assert list_images(ImagesConfig(source=str(few))).classes == [str(number) for number in range(1000)]


def test_images_with_the_same_key_keep_their_labels(tmp_path):
    entries = list_images(ImagesConfig(source=str(labelled_tar(tmp_path / "a.tar", [b"2", b"0", b"1"]))))
    assert [(entry.key, entry.label) for entry in entries] == [("one", 2), ("one-2", 0), ("one-3", 1)]


def test_braces_for_too_many_tars_are_refused(tmp_path):
    with pytest.raises(UserError, match="expected braces for at most 1,000,000 tars, found more"):
        list_images(ImagesConfig(source=f"{tmp_path}/{{000000000..999999999}}.tar"))
    with pytest.raises(UserError, match="expected balanced braces"):
        list_images(ImagesConfig(source=f"{tmp_path}/{{0..9.tar"))


@pytest.fixture
def tar(tmp_path):
    """A tar with three images, outside the cache."""
    path = tmp_path / "source" / "train-0.tar"
    path.parent.mkdir()
    with wds.TarWriter(str(path)) as writer:
        for name in "abc":
            writer.write({"__key__": name, "png": encoded(Image.new("RGB", (8, 8)))})
    return path


def keys(tmp_path, source, **options):
    config = ImagesConfig(source=source, cache=str(tmp_path / "cache"), **options)
    return [entry.key for entry in list_images(config)]


def cached(tmp_path):
    return sorted(path.name.partition("-")[2] for path in (tmp_path / "cache/tars").glob("*.tar"))


def test_tars_at_a_url_are_fetched_once(tar, tmp_path):
    requests = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_request(self, *arguments):
            requests.append(f"{self.command} {self.path}")

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=tar.parent)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/train-{{0..0}}.tar"
        for _ in range(2):
            assert keys(tmp_path, url) == ["a", "b", "c"]
        with pytest.raises(UserError, match=r"images\.source: expected a tar at http.*train-1\.tar, found none"):
            keys(tmp_path, url.replace("0..0", "0..1"))
        server.shutdown()
    # One request may be for the size of the tar.
    assert requests.count("GET /train-0.tar") <= 2 and cached(tmp_path) == ["train-0.tar"]


@pytest.fixture
def bucket(tar):
    """An in-memory store with two copies of the tar and another file."""
    store = fsspec.filesystem("memory")
    for name in ("train-0.tar", "train-1.tar"):
        store.pipe_file(f"/bucket/some/{name}", tar.read_bytes())
    store.pipe_file("/bucket/some/other.txt", b"")
    yield store
    store.rm("/bucket", recursive=True)


def test_tars_in_a_store_are_found_by_patterns_and_read_from_copies(bucket, tmp_path):
    for pattern in ("train-*.tar", "train-{0..1}.tar", "train-[01].tar"):
        assert keys(tmp_path, f"memory://bucket/some/{pattern}") == ["a", "b", "c", "a-2", "b-2", "c-2"]
    assert cached(tmp_path) == ["train-0.tar", "train-1.tar"]
    for name, message in (
        ("train-{0..2}.tar", r"a tar at memory://bucket/some/train-2\.tar, found none"),
        ("no*.tar", "found nothing"),
    ):
        with pytest.raises(UserError, match=rf"images\.source: expected .*{message}"):
            keys(tmp_path, f"memory://bucket/some/{name}")
    with pytest.raises(UserError, match=r"images\.source: expected a URL without user, password or query string"):
        keys(tmp_path, "s3://key:secret@bucket/some/train.tar")


def test_a_tar_replaced_in_its_store_is_listed_again(bucket, tar, tmp_path):
    config = ImagesConfig(source="memory://bucket/some/train-*.tar", cache=str(tmp_path / "cache"))
    before = list_images(config, tmp_path / "index")
    with wds.TarWriter(str(tar)) as writer:
        writer.write({"__key__": "new", "png": encoded(Image.new("RGB", (8, 8)))})
    bucket.pipe_file("/bucket/some/train-1.tar", tar.read_bytes())
    after = list_images(config, tmp_path / "index")
    assert [entry.key for entry in after] == ["a", "b", "c", "new"]
    assert after.files_sha256() != before.files_sha256()


def test_removed_copies_are_fetched_again(bucket, tmp_path):
    config = ImagesConfig(source="memory://bucket/some/train-*.tar", cache=str(tmp_path / "cache"), resolution=8)
    entries = list_images(config)
    for path in (tmp_path / "cache/tars").glob("*.tar"):
        path.unlink()
    assert len({entry.read() for entry in entries}) == 1
    assert load_pixels(config)[0].shape == (6, 3, 8, 8)


def test_a_copy_removed_before_it_is_listed_is_fetched_again(bucket, tmp_path, removed_copies):
    assert keys(tmp_path, "memory://bucket/some/train-*.tar") == ["a", "b", "c", "a-2", "b-2", "c-2"]
    assert len(removed_copies) == 2


def test_a_missing_tar_is_an_error_instead_of_unreadable_images(bucket, tmp_path):
    config = ImagesConfig(source="memory://bucket/some/train-*.tar", cache=str(tmp_path / "cache"), resolution=8)
    entries = list_images(config)
    open_local_copy.cache_clear()
    for path in (tmp_path / "cache/tars").glob("*.tar"):
        path.unlink()
    bucket.rm("/bucket/some/train-1.tar")
    with pytest.raises(UserError, match=r"images\.source: expected a file at memory://.*train-1\.tar, found none"):
        list(read_images(entries, config, [range(6)]))


def test_a_shell_command_runs_only_if_allowed(tar, tmp_path):
    source = f"pipe:cat {tar}; touch {tmp_path}/ran"
    with pytest.raises(UserError, match=r"found a shell command, .*; images\.allow_pipe=true allows it"):
        keys(tmp_path, source)
    assert not (tmp_path / "ran").exists()
    assert keys(tmp_path, source, allow_pipe=True) == ["a", "b", "c"] and (tmp_path / "ran").exists()


def test_a_configuration_of_a_dataset(image_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    configs = [{"config_name": name, "data_files": f"{name}.parquet"} for name in ("disc", "square")]
    (tmp_path / "README.md").write_text(f"---\nconfigs: {json.dumps(configs)}\n---\n")
    for name in ("disc", "square"):
        columns = {"image": [{"bytes": file.read_bytes(), "path": None} for file in sorted((image_folder / name).iterdir())]}
        saved = Dataset.from_dict(columns, features=Features({"image": datasets.Image()}))
        saved.to_parquet(tmp_path / f"{name}.parquet")
    for name in ("disc", "square"):
        found, _, _ = load_pixels(ImagesConfig(source=f"datasets:{tmp_path}:{name}", resolution=16))
        expected, _, _ = load_pixels(ImagesConfig(source=str(image_folder / name), resolution=16))
        assert torch.equal(found, expected)
    with pytest.raises(UserError, match=r"expected a dataset with the split train, found .*Config name is missing"):
        load_pixels(ImagesConfig(source=f"datasets:{tmp_path}"))


def test_datasets_without_images_or_the_split_are_refused(tmp_path):
    Dataset.from_dict({"text": ["not an image"]}).save_to_disk(tmp_path / "texts")
    with pytest.raises(UserError, match="expected a column of images, found text in"):
        keys(tmp_path, f"datasets:{tmp_path / 'texts'}")
    Image.new("RGB", (8, 8)).save(tmp_path / "texts" / "a.png")
    with pytest.raises(UserError, match="expected a dataset with the split test, found datasets:"):
        keys(tmp_path, f"datasets:{tmp_path / 'none'}", split="test")


def encoded(image):
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def test_a_zip_of_a_folder_has_the_classes_of_the_folder(tmp_path, image_folder):
    """``zip -r`` of the folder itself puts its name before all members."""
    images = sorted(image_folder.rglob("*.png"))

    def classes(name, root, images):
        with zipfile.ZipFile(tmp_path / f"{name}.zip", "w") as archive:
            for path in images:
                archive.write(path, path.relative_to(root))
        return list_images(ImagesConfig(source=str(tmp_path / f"{name}.zip"))).classes

    assert classes("inside", image_folder, images) == ["disc", "square"]
    assert classes("itself", image_folder.parent, images) == ["disc", "square"]
    one = [path for path in images if path.parent.name == "disc"]
    assert classes("one", image_folder, one) == ["disc"]
