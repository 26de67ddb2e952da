"""Two nodes that share only a store of latent shards. Each has its own folder, cache and checkpoints."""

import http.server
import threading
import time
from functools import partial

import pytest

from ldm_smd.config import dump_config
from ldm_smd.data.shards import Manifest
from ldm_smd.data.stream import LatentStream
from ldm_smd.training.checkpoint import checkpoints
from ldm_smd.training.loop import train
from tests.forked import ROOT, launcher
from tests.training.results import assert_same_losses

pytestmark = pytest.mark.distributed


@pytest.fixture
def served(shards):
    """The URL of a web server with the shards."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=shards)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


class Node:
    """A launcher with two processes and its own folder."""

    def __init__(self, fork, folder, config, is_host):
        self.fork, self.folder, self.is_host = fork, folder, is_host
        folder.mkdir()
        (folder / "run.yaml").write_text(dump_config(config))

    def start(self, port):
        options = ["--nnodes=2", "--nproc-per-node=2", "--max-restarts=0", "--rdzv-backend=c10d", "--rdzv-id=run"]
        options += [f"--rdzv-endpoint=127.0.0.1:{port}", "--local-addr=127.0.0.1", f"--rdzv-conf=is_host={int(self.is_host)}"]
        command = [ROOT / "tools/train.py", "--config", "run.yaml"]
        self.process = self.fork(launcher, *options, *command, folder=self.folder, log=self.folder / "log")

    def wait(self):
        code = self.process.wait(240)
        assert code == 0, self.process.output()[-6000:]


def start(nodes, port):
    for node in nodes:
        node.start(port)


def test_a_run_on_two_nodes_resumes_after_one_is_killed(train_config, served, tmp_path, free_port, fork):
    """Four processes on two nodes are started again, then one process resumes alone. Losses equal those of one process."""
    one = train_config(f"output={tmp_path / 'one'}", "images_total=96", "log_every_images=16", "checkpoint_every_images=16")
    train(one)
    settings = ["output=run", "log_every_images=16", "checkpoint_every_images=16"]
    remote = train_config(*settings, f"shards={served}", "shards_cache.folder=cache", "images_total=80")
    nodes = [Node(fork, tmp_path / name, remote, is_host=name == "first") for name in ("first", "second")]
    start(nodes, free_port())
    deadline = time.monotonic() + 120
    while not checkpoints(tmp_path / "first/run/checkpoints") and time.monotonic() < deadline:
        time.sleep(0.02)
    nodes[1].process.kill()
    assert nodes[0].process.wait(120) != 0  # it cannot continue alone
    start(nodes, free_port())
    for node in nodes:
        node.wait()
    assert list((tmp_path / "second/cache").glob("*.tar")) and list((tmp_path / "first/cache").glob("*.tar"))
    received = checkpoints(tmp_path / "second/run/checkpoints")
    assert len(received) == 1  # the checkpoint that it resumed from; only the main process saves others
    alone = train_config(*settings, "images_total=96", f"output={tmp_path / 'first/run'}")
    train(alone)
    assert_same_losses(tmp_path / "one", tmp_path / "first/run")


def test_the_order_of_samples_does_not_depend_on_the_number_of_processes(shards):
    """Also if it changes on a resume."""
    manifest = Manifest.load(shards)

    def keys(world, start, stop):
        streams = [LatentStream(manifest, 8, 64, images_seen=start, rank=rank, world_size=world) for rank in range(world)]
        return [[key for stream in streams for key in stream.keys_at(at)] for at in range(start, stop, 8)]

    expected = keys(1, 0, 64)
    for before, after in ((2, 4), (4, 1), (1, 8)):
        assert keys(before, 0, 24) + keys(after, 24, 64) == expected
