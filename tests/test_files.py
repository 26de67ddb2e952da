"""Files written with a library that hides them from other users can be read by them."""

import os
import stat
from types import SimpleNamespace

import numpy as np
import pytest
from safetensors.numpy import save_file

from ldm_smd.errors import UserError
from ldm_smd.files import atomic_file, atomic_folder, makes_folder


@pytest.fixture(params=[0o022, 0o027, 0o007, 0o077], ids=oct)
def umask(request):
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def permissions(path):
    return stat.S_IMODE(path.stat().st_mode)


def test_weights_can_be_read_by_those_who_may_read_other_new_files(umask, tmp_path):
    tensors = {"weight": np.zeros(3, np.float32)}
    with atomic_file(tmp_path / "file.safetensors") as temporary:
        save_file(tensors, temporary)
    with atomic_folder(tmp_path / "folder") as temporary:
        save_file(tensors, temporary / "weights.safetensors")
        (temporary / "config.json").write_text("{}")
    expected = 0o666 & ~umask
    paths = [tmp_path / "file.safetensors", *(tmp_path / "folder").iterdir()]
    assert len(paths) == 3 and all(permissions(path) == expected for path in paths)


def test_wider_permissions_are_kept(tmp_path):
    with atomic_file(tmp_path / "script") as temporary:
        temporary.write_text("")
        temporary.chmod(0o755)
    assert permissions(tmp_path / "script") == 0o755


def test_a_file_that_was_not_written_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError), atomic_file(tmp_path / "nothing"):
        pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("distributed", [False, True])
def test_tools_that_do_not_share_their_work_refuse_several_processes(distributed, tmp_path, monkeypatch):
    tool = makes_folder(distributed)(lambda config: "done")
    config = SimpleNamespace(output=tmp_path / "output")
    assert tool(config) == "done"
    monkeypatch.setenv("WORLD_SIZE", "2")
    if distributed:
        assert tool(config) == "done"
        return
    with pytest.raises(UserError, match="expected one process, found 2"):
        tool(config)
