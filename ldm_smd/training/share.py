"""Machines without a shared disk: before a run goes on, each gets the main process's newest checkpoint.

Only the main process writes checkpoints, and every process reads them. Where the output folder is on a shared disk, all find
the same, and nothing is sent.
"""

from __future__ import annotations

import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast, broadcast_object_list, gather_object

from ..errors import UserError
from ..files import atomic_file, atomic_folder, this_process
from .checkpoint import newest_images

CHUNK_BYTES = 2**26
"""Bytes of a file that are sent at a time."""


def share_checkpoint(output: Path, single_files: tuple[str, ...], accelerator: Accelerator) -> None:
    """Copy the newest checkpoint of the main process, its snapshots of averages and ``single_files`` to the output folders that
    have none of it. For all processes to call, before anything is read of a run.

    Raises UserError where another machine has a newer checkpoint: that of another run, or the main process's was lost.
    """
    if accelerator.num_processes == 1:
        return
    images = newest_images(output / "checkpoints")
    here = things_of(output, images, single_files)
    there, newest = broadcast_object_list([here, images])
    if images > newest:
        raise UserError(
            f"output: expected no checkpoint newer than the main process's, of {newest} images, found one of {images} in "
            f"{output} on {socket.gethostname()}"
        )
    receives = accelerator.is_local_main_process and not accelerator.is_main_process
    missing = [thing for thing, files in there.items() if here.get(thing) != files] if receives else []
    for thing in sorted(set(gather_object(missing))):
        transfer(output, thing, there[thing], thing in missing, accelerator)
    accelerator.wait_for_everyone()


def things_of(output: Path, images: int, single_files: tuple[str, ...]) -> dict[str, dict[str, int]]:
    """List what belongs to the checkpoint of so many images: folders and files, each with its files and their sizes."""
    digits = f"images-{images:012d}"
    things = [output / "checkpoints" / digits, *(output / "averages").glob(f"{digits}*")] if images else []
    found = {}
    for thing in [*things, *(output / name for name in single_files)]:
        files = [thing] if thing.is_file() else sorted(path for path in thing.rglob("*") if path.is_file())
        if files:
            sizes = {path.relative_to(thing).as_posix(): path.stat().st_size for path in files}
            found[thing.relative_to(output).as_posix()] = sizes
    return found


def transfer(output: Path, thing: str, files: dict[str, int], receives: bool, accelerator: Accelerator) -> None:
    """Send a folder or file from the main process; those that receive it write it whole or not at all."""
    if not receives:
        for name, size in files.items():
            for _ in chunks(output / thing / name, size, accelerator):
                pass
    elif list(files) == ["."]:
        with atomic_file(output / thing, this_process()) as path:
            receive(path, files["."], accelerator)
    else:
        if thing.startswith("checkpoints"):  # only the newest is of use here
            for old in (output / thing).parent.glob("images-*"):
                shutil.rmtree(old)
        with atomic_folder(output / thing) as folder:
            for name, size in files.items():
                receive(folder / name, size, accelerator)


def receive(path: Path, size: int, accelerator: Accelerator) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as file:
        for chunk in chunks(None, size, accelerator):
            file.write(chunk.cpu().numpy().tobytes())


def chunks(path: Path | None, size: int, accelerator: Accelerator) -> Iterator[torch.Tensor]:
    """Yield a file of the main process in parts, uint8, on all processes; only the main process reads ``path``."""
    file = open(path, "rb") if path is not None and accelerator.is_main_process else None  # noqa: SIM115
    try:
        for start in range(0, size, CHUNK_BYTES):
            length = min(CHUNK_BYTES, size - start)
            if file is None:
                chunk = torch.empty(length, dtype=torch.uint8)
            else:
                chunk = torch.frombuffer(bytearray(file.read(length)), dtype=torch.uint8)
            yield broadcast(chunk.to(accelerator.device))
    finally:
        if file is not None:
            file.close()
