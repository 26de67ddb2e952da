"""The files in configs/accelerate, as accelerate reads them."""

from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file

FILES = sorted((Path(__file__).parents[1] / "configs" / "accelerate").glob("*.yaml"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_accelerate_reads_it(path):
    found = load_config_from_file(str(path))
    wanted = {
        "one-gpu": (1, 1),
        "eight-gpus": (1, 8),
        "eight-gpus-fsdp": (1, 8),
        "four-nodes": (4, 32),
        "two-cpu-processes": (1, 2),
    }[path.stem]
    assert (found.num_machines, found.num_processes) == wanted
    assert found.use_cpu == (path.stem == "two-cpu-processes")
