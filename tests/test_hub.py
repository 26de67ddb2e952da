"""Push models to a hub and load them, with diffusers and huggingface_hub and a small hub on this machine."""

import base64
import json
import os
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline

from ldm_smd.files import sha256
from ldm_smd.pipelines import load_pipeline, seeded_generators
from tests.tiny import diffusers_dit, training

REPOSITORY, COMMIT = "someone/emoji", "0123456789abcdef0123456789abcdef01234567"
OTHER = "someone/other"
"""Another repository. This hub has the same files in all."""


class Hub(BaseHTTPRequestHandler):
    """Serves a repository from a folder: creates it, commits files in one request, lists them, and serves them."""

    def log_message(self, *_):
        pass

    def do_GET(self):
        folder, parts = self.server.folder, self.path.split("?")[0].strip("/").split("/")
        files = {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*")) if path.is_file()}
        name = "/".join(parts[4:])  # someone/emoji/resolve/COMMIT/NAME
        if parts[0] == "api" and "tree" in parts:
            self.json(
                [{"type": "file", "path": name, "size": path.stat().st_size, "oid": name} for name, path in files.items()]
            )
        elif parts[0] == "api":
            self.json({"id": REPOSITORY, "sha": COMMIT, "siblings": [{"rfilename": name} for name in files]})
        elif name in files:
            self.answer(200, files[name].read_bytes(), {"ETag": f'"{sha256(files[name])}"', "X-Repo-Commit": COMMIT})
        else:
            self.answer(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})

    do_HEAD = do_GET

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if "/preupload/" in self.path:
            files = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False} for file in json.loads(body)["files"]
            ]
            self.json({"files": files})
        elif "/commit/" in self.path:
            for entry in map(json.loads, body.splitlines()):
                if entry["key"] == "file":
                    path = self.server.folder / entry["value"]["path"]
                    path.parent.mkdir(exist_ok=True)
                    path.write_bytes(base64.b64decode(entry["value"]["content"]))
            self.json({"success": True, "commitOid": COMMIT, "commitUrl": f"{self.server.url}/{REPOSITORY}/commit/{COMMIT}"})
        else:  # creates the repository, or checks the card
            self.json({"url": f"{self.server.url}/{REPOSITORY}", "errors": [], "warnings": []})

    def json(self, content):
        self.answer(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def answer(self, status, data, headers):
        self.send_response(status)
        for key, value in (headers | {"Content-Length": str(len(data))}).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


@pytest.fixture
def hub(tmp_path):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.folder, server.url = tmp_path / "hub", f"http://127.0.0.1:{server.server_port}"
    server.folder.mkdir()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


@pytest.mark.slow
def test_a_pushed_pipeline_is_loaded_from_the_hub(model_folder, hub, tmp_path):
    """push_to_hub runs in one process, and from_pretrained with the repository's name in another."""
    environment = os.environ | {
        "HF_ENDPOINT": hub.url,
        "HF_TOKEN": "hf_none",
        "HF_HUB_DISABLE_XET": "1",
        "NO_PROXY": "127.0.0.1",
    }
    push = f"load_pipeline({str(model_folder)!r}).push_to_hub({REPOSITORY!r})"
    load = f"""
pipeline = SMDPipeline.from_pretrained({REPOSITORY!r})
assert load_pipeline({REPOSITORY!r}).unet.num_parameters() == pipeline.unet.num_parameters()
images = pipeline([0, 1], num_inference_steps=2, generator=seeded_generators([1, 2]), output_type="pt").images
torch.save(images, {str(tmp_path / "out.pt")!r})
"""
    imports = "import torch\nfrom ldm_smd.pipelines import SMDPipeline, load_pipeline, seeded_generators\n"
    for name, program in (("push", push), ("load", load)):
        home = {"HF_HOME": str(tmp_path / name)}
        subprocess.run([sys.executable, "-c", imports + program], check=True, timeout=120, env=environment | home)
        assert (hub.folder / "README.md").is_file() and (hub.folder / "unet/diffusion_pytorch_model.safetensors").is_file()
    options = {"num_inference_steps": 2, "generator": seeded_generators([1, 2]), "output_type": "pt"}
    expected = load_pipeline(model_folder)([0, 1], **options).images
    assert torch.allclose(torch.load(tmp_path / "out.pt", weights_only=True), expected, atol=1e-4)


@pytest.mark.slow
def test_a_mixture_can_start_from_a_network_on_the_hub(hub, shards, vae_folder, tmp_path):
    """With the name of the repository of a pipeline, which also has the autoencoder. Pickled weights are refused."""
    diffusers_dit(num_embeds_ada_norm=2).save_pretrained(hub.folder / "transformer")
    shutil.copytree(vae_folder, hub.folder / "vae")
    environment = os.environ | {
        "HF_ENDPOINT": hub.url,
        "HF_HUB_DISABLE_XET": "1",
        "NO_PROXY": "127.0.0.1",
        "HF_HOME": str(tmp_path / "home"),
    }
    settings = training(
        shards, REPOSITORY, tmp_path / "run", f"init_from={REPOSITORY}", "model.tail_blocks=1", "images_total=8"
    )
    program = f"""
import sys
from pathlib import Path
from ldm_smd.cli import run_command
if run_command("train", {settings}):
    sys.exit("not trained")
weights = Path({str(hub.folder)!r}) / "transformer/diffusion_pytorch_model.safetensors"
weights.rename(weights.with_name("diffusion_pytorch_model.bin"))
sys.exit(run_command("train", {settings} + ["init_from={OTHER}", "output={tmp_path / "refused"}"]))
"""
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert load_pipeline(tmp_path / "run/model").unet.config.num_classes == 2, done.stderr
    assert done.returncode == 2 and not (tmp_path / "refused").exists()
    assert done.stderr.strip().endswith(f"init_from: expected a network with safetensors weights in {OTHER}, found none")


@pytest.mark.slow
def test_a_diffusers_pipeline_is_sampled_from_the_hub(hub, vae_folder, tmp_path):
    """Unused components are not downloaded."""
    vae = AutoencoderKL.from_pretrained(vae_folder)
    DiTPipeline(transformer=diffusers_dit(), vae=vae, scheduler=DDIMScheduler()).save_pretrained(hub.folder)
    (hub.folder / "text_encoder").mkdir()
    (hub.folder / "text_encoder/model.safetensors").write_bytes(b"large")
    environment = os.environ | {
        "HF_ENDPOINT": hub.url,
        "HF_HUB_DISABLE_XET": "1",
        "NO_PROXY": "127.0.0.1",
        "HF_HOME": str(tmp_path / "home"),
    }
    command = [sys.executable, "tools/sample.py", f"model={REPOSITORY}", f"output={tmp_path / 'samples'}", "steps=2"]
    subprocess.run(command, check=True, timeout=120, env=environment)
    assert len(list((tmp_path / "samples").glob("class*.png"))) == 3 * 8
    [snapshot] = (tmp_path / "home").rglob(f"snapshots/{COMMIT}")
    assert {path.name for path in snapshot.iterdir()} == {"model_index.json", "scheduler", "transformer", "vae"}
