import io
import json
import shutil

import numpy as np
import pytest
import torch
import webdataset as wds
from PIL import Image

from ldm_smd.autoencoder import FrozenAutoencoder
from ldm_smd.data.settings import VerifyConfig
from ldm_smd.data.verify import verify
from ldm_smd.files import sha256


@pytest.fixture
def copy(shards, tmp_path):
    return shutil.copytree(shards, tmp_path / "copy")


def rewrite(folder, change):
    """Change the samples of the first shard by ``change(number, sample)``, and update its hash in the manifest."""
    path = folder / "latents-00000.tar"
    samples = [change(number, sample) for number, sample in enumerate(list(wds.WebDataset(str(path), shardshuffle=False)))]
    with wds.TarWriter(str(path), mtime=0) as tar:
        for sample in samples:
            tar.write({key: value for key, value in sample.items() if not key.startswith("__") or key == "__key__"})
    content = json.loads((folder / "manifest.json").read_text())
    content["shards"][0]["sha256"] = sha256(path)
    (folder / "manifest.json").write_text(json.dumps(content))


def test_valid_shards_pass_and_a_sheet_is_written(run, shards, tmp_path):
    code, out, _ = run(VerifyConfig, verify, f"shards={shards}", f"sheet={tmp_path / 'sheet.png'}", "pictures=9")
    assert code == 0 and "22 samples in 3 shards match their manifest" in out
    assert Image.open(tmp_path / "sheet.png").size == (3 * 18 + 2, 3 * 18 + 2)


def test_the_sheet_shows_evenly_spaced_latents_in_order(shards, vae_folder, tmp_path):
    """Four of 22 samples in two rows: the first, the last, and two between them."""
    verify(VerifyConfig(shards=str(shards), sheet=str(tmp_path / "sheet.png"), pictures=4))
    sheet = np.asarray(Image.open(tmp_path / "sheet.png")).astype(int)
    paths = sorted(str(path) for path in shards.glob("*.tar"))
    samples = list(wds.WebDataset(paths, shardshuffle=False).decode())
    autoencoder = FrozenAutoencoder.from_pretrained(vae_folder)
    for number, position in enumerate((0, 7, 14, 21)):
        latents = torch.from_numpy(samples[position]["moments.npy"])[:1].float()
        expected = (autoencoder.decode(autoencoder.normalise(latents))[0] + 1) * 127.5
        top, left = (2 + 18 * part for part in divmod(number, 2))
        found = sheet[top : top + 16, left : left + 16]
        assert np.abs(found - expected.permute(1, 2, 0).numpy()).max() <= 1
    assert (sheet[0] == 255).all()


def test_every_difference_is_listed(run, copy):
    duplicate = json.loads((copy / "latents-00002.json").read_text())["index"]["keys"][0]

    def damage(number, sample):
        moments = np.load(io.BytesIO(sample["moments.npy"]))
        if number == 1:
            moments[0, 0, 0, 0] = np.nan
        if number == 2:
            sample["cls"] = b"7"
        if number == 3:
            sample["__key__"] = duplicate  # a key of another shard
        return sample | {"moments.npy": moments}

    rewrite(copy, damage)
    (copy / "latents-00001.tar").unlink()
    shutil.copy(copy / "latents-00002.tar", copy / "latents-00003.tar")
    code, out, error = run(VerifyConfig, verify, f"shards={copy}")
    assert code == 2 and "differences" in error
    for finding in (
        "latents-00000.tar: nonfinite is 1, but 0 in the manifest",
        "latents-00000.tar: 1 values are not finite",
        "latents-00000.tar: 1 labels are outside the 2 classes",
        f"{duplicate}: occurs 2 times in the shards",
        "latents-00001.tar",
        "latents-00003.tar: not in the manifest",
    ):
        assert finding in out, finding
    assert "sha256 differs" not in out


def test_a_changed_byte_is_detected(run, copy):
    data = bytearray((copy / "latents-00002.tar").read_bytes())
    data[-2000] ^= 1
    (copy / "latents-00002.tar").write_bytes(data)
    code, out, _ = run(VerifyConfig, verify, f"shards={copy}")
    assert code == 2 and "latents-00002.tar: sha256 differs" in out
