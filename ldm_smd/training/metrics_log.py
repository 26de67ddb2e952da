"""The log of a run, as JSON lines and for TensorBoard."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

import torch
from accelerate import Accelerator
from torch.utils.tensorboard import SummaryWriter

from ..files import atomic_file

Batch = TypeVar("Batch")


class MetricsLog:
    """Appends to ``folder/metrics.jsonl`` and ``folder/tensorboard``.

    Lines past ``images_seen`` are dropped on opening. They were written after the checkpoint that the run resumes from, and
    will be written again.
    """

    def __init__(self, folder: Path, images_seen: int = 0) -> None:
        self.path = folder / "metrics.jsonl"
        kept = [json.dumps(line) + "\n" for line in read_metrics(self.path) if line["images_seen"] <= images_seen]
        with atomic_file(self.path) as temporary:  # a kill at this point must not lose the log
            temporary.write_text("".join(kept), encoding="utf-8")
        self._file = self.path.open("a", encoding="utf-8")
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=images_seen + 1 if images_seen else 0)

    def log(self, images_seen: int, values: dict[str, float]) -> None:
        self._file.write(json.dumps({"images_seen": images_seen, **values}) + "\n")
        self._file.flush()
        for name, value in values.items():
            self._board.add_scalar(name, value, images_seen)

    def image(self, images_seen: int, name: str, image: torch.Tensor) -> None:
        """Log a float image (3, H, W) in [0, 1] to TensorBoard."""
        self._board.add_image(name, image, images_seen)

    def close(self) -> None:
        self._file.close()
        self._board.close()


class RunningMeans:
    """Means over the steps since the last report, kept on the device, and over the processes of ``accelerator``.

    Args:
        state: ``state()`` of a run that was stopped between two reports.
    """

    def __init__(self, accelerator: Accelerator | None = None, state: dict | None = None) -> None:
        self.accelerator = accelerator
        sums = {"steps": 0} | (state or {})
        self.steps, self._sums = sums.pop("steps"), sums

    def add(self, values: dict[str, torch.Tensor]) -> None:
        """Add the values of a step. The names must be the same at every step."""
        self._sums = {name: value.detach() + self._sums.get(name, 0.0) for name, value in values.items()}
        self.steps += 1

    def read(self) -> dict[str, float]:
        """Return the means and reset them."""
        means = self._reduced(max(self.steps, 1))
        self.steps, self._sums = 0, {name: torch.zeros_like(total) for name, total in self._sums.items()}
        return means

    def state(self) -> dict:
        return {"steps": self.steps, **self._reduced(1)}

    def _reduced(self, steps: int) -> dict[str, float]:
        totals = torch.stack(list(self._sums.values()))
        totals = totals if self.accelerator is None else self.accelerator.reduce(totals, "mean")
        return dict(zip(self._sums, (totals / steps).tolist()))


class DataWaits:
    """Measures for how much of the time a loop waits for its data, by the host's clock: a GPU is not waited for. Near 0 the
    network is the limit, near 1 the loader."""

    def __init__(self) -> None:
        self._waited, self._started = 0.0, time.perf_counter()

    def timed(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """Yield the same batches; time that passes before each is counted."""
        iterator = iter(batches)
        while True:
            before = time.perf_counter()
            try:
                batch = next(iterator)
            except StopIteration:
                return
            self._waited += time.perf_counter() - before
            yield batch

    def share(self) -> float:
        """Return the share of the time since the last call, from 0 to 1."""
        now = time.perf_counter()
        share = self._waited / max(now - self._started, 1e-9)
        self._waited, self._started = 0.0, now
        return share


def read_metrics(path: Path) -> list[dict]:
    """Read a metrics.jsonl. A last line that was cut off by a crash is skipped."""
    lines: list[dict] = []
    with suppress(FileNotFoundError, json.JSONDecodeError):
        lines.extend(json.loads(line) for line in path.read_text(encoding="utf-8").splitlines())
    return lines


def crossed(before: int, after: int, every: int) -> bool:
    """Return whether a multiple of ``every`` lies in (before, after]."""
    return before // every != after // every
