"""Run scripts of the repository in processes that are forked from one that has imported torch and ldm_smd.

The imports take six seconds, and most of these scripts run for less than one.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import runpy
import signal
import subprocess
import sys
from multiprocessing import forkserver
from pathlib import Path
from unittest import mock

import numpy as np
import psutil

ROOT = Path(__file__).parents[1]
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    ["tests.forked", "torch.distributed.run", "torch.distributed.fsdp", "accelerate"]
    + [f"ldm_smd.{name}" for name in ("training.loop", "training.fit_gaussian", "evaluation.evaluate", "data.encode")]
)


class Forked:
    """A process that runs ``function(*arguments)`` in ``folder``. Its output is written to the file ``log``."""

    def __init__(self, function, arguments, log, folder=None, environment=None) -> None:
        self.log = Path(log)
        self.log.touch()
        # The first process starts the fork server, which finds ``tests`` through PYTHONPATH.
        path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        with mock.patch.dict(os.environ, {"PYTHONPATH": path}):
            forkserver.ensure_running()
            variables = dict(os.environ) | (environment or {})
        given = (function, arguments, str(log), str(folder or Path.cwd()), variables)
        self.process = CONTEXT.Process(target=run_forked, args=given)
        self.process.start()
        self.pid = self.process.pid

    @property
    def returncode(self) -> int | None:
        """None while the process runs, and minus the signal if one ended it."""
        return self.process.exitcode

    def poll(self) -> int | None:
        return self.process.exitcode

    def wait(self, seconds=None) -> int:
        self.process.join(seconds)
        if self.process.exitcode is None:
            raise TimeoutError(f"process {self.pid} still runs after {seconds} s")
        return self.process.exitcode

    def terminate(self) -> None:
        self.process.terminate()

    def kill(self) -> None:
        """Kill the process and its children."""
        if self.process.is_alive():
            for process in (*psutil.Process(self.pid).children(recursive=True), self.process):
                process.kill()
        self.process.join()

    def output(self) -> str:
        """Wait until the process has ended; returns what it printed."""
        self.wait()
        return self.log.read_text()


def run_forked(function, arguments, log, folder, environment) -> None:
    """Set up the forked process and run the function."""
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    function(*arguments)


def script(path, *arguments) -> None:
    """Run a script in this process, as its main program."""
    import torch

    for number, handler in ((signal.SIGTERM, signal.SIG_DFL), (signal.SIGINT, signal.default_int_handler)):
        signal.signal(number, handler)  # the parent process may have others
    random.seed()
    np.random.seed()
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    sys.argv = [str(path), *arguments]
    sys.path.insert(0, str(Path(path).parent))
    runpy.run_path(str(path), run_name="__main__")


def run_launcher(processes, path, *arguments) -> subprocess.CompletedProcess[str]:
    """Run a script with the command line of torch's launcher, which starts new processes instead of forks."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1"]
    command += [f"--nproc-per-node={processes}", str(ROOT / path), *map(str, arguments)]
    # The same number of threads as here, because the rounding of the fitted noise depends on it.
    threads = os.environ.get("OMP_NUM_THREADS", "1")
    environment = os.environ | {"OMP_NUM_THREADS": threads, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, env=environment, stderr=subprocess.PIPE, text=True, timeout=300)


def launcher(*arguments) -> None:
    """Run ``python -m torch.distributed.run`` with these arguments, with forks of this process as its workers."""
    from torch.distributed import run
    from torch.distributed.launcher.api import elastic_launch

    def launch_forks(config, entrypoint):
        assert entrypoint == sys.executable
        config.start_method = "fork"
        return lambda unbuffered, path, *rest: elastic_launch(config, script)(path, *rest)

    run.elastic_launch = launch_forks
    run.main(list(arguments))
