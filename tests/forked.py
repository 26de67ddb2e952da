"""Scripts of the repository in processes of their own, forked from one that has imported torch and ldm_smd.

To import them takes six seconds of each process, and most runs of tests less than one.
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
    """A process that runs ``function(*arguments)``, in ``folder``; what it prints goes to ``log``.

    Attributes:
        pid: its process id.
    """

    def __init__(self, function, arguments, log, folder=None, environment=None) -> None:
        self.log = Path(log)
        self.log.touch()
        # The server is started by the first process, and finds ``tests`` by it.
        path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        with mock.patch.dict(os.environ, {"PYTHONPATH": path}):
            forkserver.ensure_running()
            given = dict(os.environ) | (environment or {})
        self.process = CONTEXT.Process(target=inside, args=(function, arguments, str(log), str(folder or Path.cwd()), given))
        self.process.start()
        self.pid = self.process.pid

    @property
    def returncode(self) -> int | None:
        """None while it runs; minus the signal that ended it."""
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
        """With all that it started."""
        if self.process.is_alive():
            for process in (*psutil.Process(self.pid).children(recursive=True), self.process):
                process.kill()
        self.process.join()

    def said(self) -> str:
        """What it printed, when it has ended."""
        self.wait()
        return self.log.read_text()


def inside(function, arguments, log, folder, environment) -> None:
    """What the process does."""
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    function(*arguments)


def script(path, *arguments) -> None:
    """Run a script as Python does, in this process."""
    import torch

    for number, handler in ((signal.SIGTERM, signal.SIG_DFL), (signal.SIGINT, signal.default_int_handler)):
        signal.signal(number, handler)  # not those of the process that this one was forked from
    random.seed()
    np.random.seed()
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    sys.argv = [str(path), *arguments]
    sys.path.insert(0, str(Path(path).parent))
    runpy.run_path(str(path), run_name="__main__")


def launched(processes, path, *arguments) -> subprocess.CompletedProcess[str]:
    """A script under the launcher's own command line, all of whose processes are started and not forked."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1"]
    command += [f"--nproc-per-node={processes}", str(ROOT / path), *map(str, arguments)]
    threads = os.environ.get("OMP_NUM_THREADS", "1")  # as many as here, by which the fitted noise of few images rounds
    environment = os.environ | {"OMP_NUM_THREADS": threads, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, env=environment, stderr=subprocess.PIPE, text=True, timeout=300)


def launcher(*arguments) -> None:
    """What ``python -m torch.distributed.run`` does with these arguments, but that its workers are forks of this process."""
    from torch.distributed import run
    from torch.distributed.launcher.api import elastic_launch

    def forking(config, entrypoint):
        assert entrypoint == sys.executable
        config.start_method = "fork"
        return lambda unbuffered, path, *rest: elastic_launch(config, script)(path, *rest)

    run.elastic_launch = forking
    run.main(list(arguments))
