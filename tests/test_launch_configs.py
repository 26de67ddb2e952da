"""accelerate reads the files of configs/accelerate, and bash runs the job of configs/slurm."""

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
def test_accelerate_reads_a_config(path):
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
    """The running job and the log of its commands. SLURM's commands are replaced: srun runs until it receives SIGTERM."""
    calls = tmp_path / "calls"
    programs = {
        "scontrol": f'echo scontrol "$@" >>{calls}; echo node-a; echo node-b',
        "srun": f'echo "$SRUN_CPUS_PER_TASK $@" >>{calls}; trap "exit 143" TERM; echo $$ >{tmp_path / "pid"};'
        " while :; do sleep 0.01; done",
        "scancel": f'echo scancel "$@" >>{calls}; kill -TERM "$(cat {tmp_path / "pid"})"',
    }
    for name, program in programs.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{program}\n")
        (tmp_path / name).chmod(0o755)
    variables = {
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NODELIST": "node-[a-b]",
        "SLURM_NNODES": "2",
        "SLURM_CPUS_PER_TASK": "64",
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
    }
    script = [CONFIGS / "slurm/train.sbatch", "--config", "my/train.yaml"]
    process = subprocess.Popen(["bash", *script], env=os.environ | variables, stdout=subprocess.DEVNULL)
    while not (tmp_path / "pid").exists() and process.poll() is None:
        time.sleep(0.01)
    yield process, calls
    process.kill()


def test_a_slurm_job_starts_torchrun_and_is_requeued(job):
    process, calls = job
    process.send_signal(signal.SIGTERM)
    process.wait(timeout=30)
    hosts, started, cancelled, requeued = calls.read_text().splitlines()
    assert hosts == "scontrol show hostnames node-[a-b]"
    assert (cancelled, requeued) == ("scancel --signal TERM 7", "scontrol requeue 7")
    cpus, program, *arguments = started.split()
    found = parse_args(arguments)
    assert (cpus, program) == ("64", "torchrun")
    assert (found.nnodes, found.nproc_per_node, found.rdzv_endpoint) == ("2", "8", "node-a:29500")
    assert [found.training_script, *found.training_script_args] == ["tools/train.py", "--config", "my/train.yaml"]


def test_each_slurm_job_of_an_array_encodes_its_part(tmp_path):
    (tmp_path / "python").write_text('#!/bin/bash\necho "$@"\n')
    (tmp_path / "python").chmod(0o755)
    numbers = {"SLURM_ARRAY_TASK_ID": "5", "SLURM_ARRAY_TASK_COUNT": "64", "SLURM_CPUS_PER_TASK": "8"}
    variables = {name: value for name, value in os.environ.items() if name != "WORKERS"}
    variables |= numbers | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    script = ["bash", CONFIGS / "slurm/encode.sbatch", "--config", "my/encode.yaml"]
    found = subprocess.run(script, env=variables, capture_output=True, text=True, check=True).stdout.split()
    assert found == ["tools/encode.py", "--config", "my/encode.yaml", "device=cuda", "num_workers=8", "worker=5/64"]
    again = variables | {"SLURM_ARRAY_TASK_COUNT": "1", "WORKERS": "64"}
    assert subprocess.run(script, env=again, capture_output=True, text=True, check=True).stdout.split() == found
