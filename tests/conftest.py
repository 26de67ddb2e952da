"""Shared fixtures: tiny images, an autoencoder, latent shards, trained models, processes and an object store."""

import json
import logging
import os
import random
import socket
import sys

import open_clip
import pytest
import s3fs
import torch
from diffusers import AutoencoderKL
from faulty_store import LOOPBACK, FaultyProxy
from PIL import Image, ImageDraw
from safetensors.torch import save_file

from ldm_smd.cli import run_tool
from ldm_smd.config import load_config
from ldm_smd.data import store
from ldm_smd.data.cache import FileCache
from ldm_smd.data.encode import encode
from ldm_smd.data.settings import EncodeConfig
from ldm_smd.pipelines import load_pipeline
from ldm_smd.training.loop import train
from ldm_smd.training.settings import TrainConfig
from tests.forked import ROOT, Forked, launcher
from tests.tiny import TINY_MODEL, training

WORKER = "PYTEST_XDIST_WORKER" in os.environ
"""Whether this is one of several processes, which inherit the number of threads of the first one."""
if WORKER or "OMP_NUM_THREADS" not in os.environ:
    threads = 1 if WORKER else 2
    os.environ["OMP_NUM_THREADS"] = str(threads)  # processes started by tests must round as this one
    torch.set_num_threads(threads)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Run all tests that fork processes in the same worker, so that it starts the fork server (forked.py) only once."""
    for item in items:
        if "fork" in item.fixturenames:
            item.add_marker(pytest.mark.xdist_group("fork"))


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory):
    """A folder with 22 images in two classes: discs and squares of different colours and sizes."""
    folder = tmp_path_factory.mktemp("images")
    for index in range(22):
        name = "disc" if index % 2 else "square"
        image = Image.new("RGB", (40 + index, 48), "white")
        draw = ImageDraw.Draw(image)
        shape = draw.ellipse if name == "disc" else draw.rectangle
        shape((8, 8 + index % 5, 30 + index % 7, 40), fill=(11 * index, 255 - 9 * index, 60 + 5 * index))
        (folder / name).mkdir(exist_ok=True)
        image.save(folder / name / f"{index:02d}.png")
    return folder


@pytest.fixture(scope="session")
def vae_folder(tmp_path_factory):
    """An untrained AutoencoderKL, 16x16 pixels -> 4x8x8 latents."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("vae") / "vae"
    AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=4,
        sample_size=16,
        scaling_factor=0.7,
        shift_factor=0.1,
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def shards(tmp_path_factory, image_folder, vae_folder):
    """Latent shards of the images, with mirrored encodings. The last of the three shards is smaller."""
    output = tmp_path_factory.mktemp("latents") / "shards"
    encode(
        load_config(
            EncodeConfig,
            None,
            [
                f"images.source={image_folder}",
                "images.resolution=16",
                "mirror=true",
                f"autoencoder={vae_folder}",
                f"output={output}",
                "shard_size=8",
                "batch_size=4",
                "num_workers=0",
            ],
        )
    )
    return output


@pytest.fixture(scope="session")
def make_clip(tmp_path_factory):
    """A function that saves a tiny untrained OpenCLIP model, initialised with a seed, in OpenCLIP's format for the hub.

    It returns the folder.
    """

    def make(seed):
        folder = tmp_path_factory.mktemp("clip") / "tiny-clip"
        folder.mkdir()
        vision = {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8}
        text = {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
        content = {"model_cfg": {"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}, "preprocess_cfg": {}}
        (folder / "open_clip_config.json").write_text(json.dumps(content))
        torch.manual_seed(seed)
        weights = open_clip.create_model(f"local-dir:{folder}", load_weights=False).state_dict()
        save_file(weights, folder / "open_clip_model.safetensors")
        return folder

    return make


@pytest.fixture(scope="session")
def clip(make_clip):
    """The OpenCLIP model of seed 0, as the value of a setting."""
    return f"open_clip:{make_clip(0)}"


@pytest.fixture(scope="session")
def embedded(tmp_path_factory, image_folder, vae_folder, clip):
    """The same shards as ``shards``, with embeddings."""
    output = tmp_path_factory.mktemp("embedded") / "shards"
    settings = [
        f"images.source={image_folder}",
        "images.resolution=16",
        f"autoencoder={vae_folder}",
        f"output={output}",
        "mirror=true",
    ]
    encode(load_config(EncodeConfig, None, [*settings, "shard_size=8", "batch_size=4", "num_workers=0", f"embedding={clip}"]))
    return output


@pytest.fixture
def conditional_folder(train_config, embedded):
    """The pipeline folder of a model that is conditioned on embeddings, after two training steps."""
    return train(train_config(f"shards={embedded}", "image_conditional=true", "images_total=16"))


@pytest.fixture
def train_config(shards, vae_folder, tmp_path):
    """A function that returns the TrainConfig of a tiny run in tmp_path/run, with overrides."""

    def build(*overrides):
        return load_config(TrainConfig, None, training(shards, vae_folder, tmp_path / "run", *overrides))

    return build


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory, shards, vae_folder):
    """The pipeline folder of a mixture after a short training."""
    settings = [
        f"shards={shards}",
        f"autoencoder={vae_folder}",
        f"output={tmp_path_factory.mktemp('run') / 'run'}",
        "images_total=64",
        "batch_size=16",
        "objective.draws=2",
        "sample_steps=2",
    ]
    return train(load_config(TrainConfig, None, settings + TINY_MODEL))


@pytest.fixture
def gaussian_folder(train_config, tmp_path):
    """The pipeline folder of a Gaussian model after one training step."""
    gaussian = ("model.z_channels=0", "objective.name=mse", f"output={tmp_path / 'gaussian'}", "images_total=8", "seed=1")
    return train(train_config(*gaussian))


@pytest.fixture
def loud_pipeline():
    """A function that loads the pipeline of a model folder and adds noise to its weights.

    The output of a short training is close to zero, so labels, noise and eta would have little effect on it.
    """

    def load(folder):
        pipeline = load_pipeline(folder)
        pipeline.set_progress_bar_config(disable=True)
        torch.manual_seed(0)
        with torch.no_grad():
            for parameter in pipeline.unet.parameters():
                parameter += 0.1 * torch.randn_like(parameter)
        return pipeline

    return load


@pytest.fixture
def free_port():
    """A function that finds a free port, below those that the operating system assigns to other programs."""

    def find():
        port = random.SystemRandom().randrange(15_000, 32_000)
        with socket.socket() as probe:
            try:
                probe.bind(("localhost", port))
            except OSError:
                return find()
        return port

    return find


@pytest.fixture
def fork(tmp_path):
    """A function that runs another function in a new process (forked.py). The process is killed at the end of the test."""
    started = []

    def start(function, *arguments, **options):
        # The same number of threads as here, because rounding decides the principal components without variance.
        environment = {"OMP_NUM_THREADS": str(torch.get_num_threads())}
        log = options.pop("log", tmp_path / f"forked-{len(started)}.log")
        started.append(Forked(function, list(map(str, arguments)), log, environment=environment, **options))
        return started[-1]

    yield start
    for process in started:
        process.kill()


@pytest.fixture
def launch(fork):
    """A function that runs a script of the repository with torch's launcher, in several processes on this machine."""

    def start(processes, script, *arguments):
        options = [f"--nproc-per-node={processes}", "--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0", "--rdzv-id=run"]
        return fork(launcher, *options, "--local-addr=127.0.0.1", ROOT / script, *arguments)

    return start


@pytest.fixture
def run(monkeypatch, capsys):
    """A function that runs a tool in this process and returns (exit code, standard output, last line of standard error)."""

    def call(schema, main, *arguments):
        monkeypatch.setattr(sys, "argv", ["tool", *map(str, arguments)])
        code = run_tool(schema, main, "a tool")
        out, err = capsys.readouterr()
        lines = err.strip().splitlines()
        return code, out, lines[-1] if lines else ""

    return call


@pytest.fixture(scope="session")
def s3_port():
    """The port of an S3 server."""
    from moto.server import ThreadedMotoServer  # here, because it takes a second to import

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address=LOOPBACK, port=0, verbose=False)
    server.start()
    yield server.get_host_and_port()[1]
    server.stop()


@pytest.fixture
def proxy(s3_port, monkeypatch):
    """A proxy in front of the S3 server, used for s3:// URLs. Requests are repeated after short pauses."""
    proxy = FaultyProxy(s3_port)
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "somebody")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "a-very-secret-key")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/nonexistent")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nonexistent")
    s3fs.S3FileSystem.clear_instance_cache()  # they may have another port
    monkeypatch.setattr(s3fs.S3FileSystem, "retries", 2)
    monkeypatch.setattr(store, "RETRIES", store.Retries(attempts=9, first=0.01, longest=0.5))
    yield proxy
    proxy.stop()


@pytest.fixture
def bucket(proxy, request):
    """The URL of a new bucket, s3://NAME."""
    name = f"bucket-{abs(hash(request.node.nodeid))}"
    store.store_of(f"s3://{name}", "test")[0].mkdir(name)
    return f"s3://{name}"


@pytest.fixture
def removed_copies(monkeypatch):
    """Names of removed copies: every copy in a cache is removed once before it is opened, as if others needed the room."""
    fetch, removed = FileCache.fetch, set()

    def fetch_and_remove(self, *args, **options):
        path = fetch(self, *args, **options)
        if path.name not in removed:
            removed.add(path.name)
            path.unlink()
        return path

    monkeypatch.setattr(FileCache, "fetch", fetch_and_remove)
    return removed
