"""Machines without a shared disk: before a run goes on, each gets the main process's newest checkpoint.

Only the main process writes checkpoints. Where the output folder is on a shared disk, all processes find them there, and nothing
is sent.
"""

from __future__ import annotations

import shutil
import socket
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast, broadcast_object_list, gather_object

from ..errors import UserError
from ..files import atomic_folder
from .checkpoint import checkpoints, newest_images

CHUNK_BYTES = 2**26


def share_checkpoint(output: Path, single_files: tuple[str, ...], accelerator: Accelerator) -> None:
    """Copy the newest checkpoint of the main process, its snapshots of averages and ``single_files`` to the output folders that
    have none of it. For all processes to call, before anything is read.

    Raises UserError where another machine has a newer checkpoint, from another run.
    """
    if accelerator.num_processes == 1:
        return
    images = newest_images(output / "checkpoints")
    folders = [path for path in (*checkpoints(output / "checkpoints")[-1:], *(output / "averages").glob(f"images-{images:012d}*"))]
    files = [path for folder in folders for path in sorted(folder.rglob("*")) if path.is_file()]
    files += [path for name in single_files if (path := output / name).is_file()]
    mine = {path.relative_to(output).as_posix(): path.stat().st_size for path in files}
    theirs, wanted_images = broadcast_object_list([mine, images])
    if images > wanted_images:
        raise UserError(
            f"output: expected no checkpoint newer than the main process's, of {wanted_images} images, found one of {images} in "
            f"{output} on {socket.gethostname()}"
        )
    receives = accelerator.is_local_main_process and not accelerator.is_main_process
    missing = [name for name, size in theirs.items() if mine.get(name) != size] if receives else []
    sent = sorted(set(gather_object(missing)))
    if not sent:
        return
    with atomic_folder(output / f".shared-{accelerator.process_index}") as received:
        for name in sent:
            content = send(output / name, theirs[name], accelerator)
            if name in missing:
                write(received / name, content)
            else:
                for _ in content:
                    pass
        accept(received, output)
    shutil.rmtree(output / f".shared-{accelerator.process_index}")
    accelerator.wait_for_everyone()
