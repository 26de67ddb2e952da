"""The files in configs/accelerate, as accelerate reads them; and the job of configs/slurm, as bash runs it."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from torch.distributed.run import parse_args

CONFIGS = Path(__file__).parents[1] / "configs"
FILES = sorted((CONFIGS / "accelerate").glob("*.yaml"))


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


@pytest.fixture
def job(tmp_path):
    """The job as SLURM would start it, where its commands write down how they are called; srun runs until it gets a SIGTERM."""
    asked = tmp_path / "asked"
    programs = {
        "scontrol": f'echo scontrol "$@" >>{asked}; echo node-a; echo node-b',
        "srun": f'echo "$@" >>{asked}; trap "exit 143" TERM; echo $$ >{tmp_path / "pid"}; while :; do sleep 0.01; done',
        "scancel": f'echo scancel "$@" >>{asked}; kill -TERM "$(cat {tmp_path / "pid"})"',
    }
    for name, program in programs.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{program}\n")
        (tmp_path / name).chmod(0o755)
    given = {
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NODELIST": "node-[a-b]",
        "SLURM_NNODES": "2",
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
    }
    script = [CONFIGS / "slurm/train.sbatch", "--config", "my/train.yaml"]
    process = subprocess.Popen(["bash", *script], env=os.environ | given, stdout=subprocess.DEVNULL)
    while not (tmp_path / "pid").exists() and process.poll() is None:
        time.sleep(0.01)
    yield process, asked
    process.kill()


def test_a_slurm_job_starts_torchrun_and_goes_back_into_the_queue(job):
    process, asked = job
    process.send_signal(signal.SIGTERM)
    process.wait(timeout=30)
    hosts, started, cancelled, requeued = asked.read_text().splitlines()
    assert hosts == "scontrol show hostnames node-[a-b]"
    assert (cancelled, requeued) == ("scancel --signal TERM 7", "scontrol requeue 7")
    program, *arguments = started.split()
    found = parse_args(arguments)
    assert program == "torchrun" and (found.nnodes, found.nproc_per_node, found.rdzv_endpoint) == ("2", "8", "node-a:29500")
    assert [found.training_script, *found.training_script_args] == ["tools/train.py", "--config", "my/train.yaml"]
