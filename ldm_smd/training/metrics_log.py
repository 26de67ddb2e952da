"""A run's log: one JSON line and one TensorBoard entry per report."""

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

    Lines past ``images_seen`` are dropped on opening: they were written after the checkpoint that the run resumes from,
    and would stand there twice.
    """

    def __init__(self, folder: Path, images_seen: int = 0) -> None:
        self.path = folder / "metrics.jsonl"
        kept = [json.dumps(line) + "\n" for line in read_metrics(self.path) if line["images_seen"] <= images_seen]
        with atomic_file(self.path) as temporary:  # a kill here must not cost the lines of hours
            temporary.write_text("".join(kept), encoding="utf-8")
        self._file = self.path.open("a", encoding="utf-8")
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=images_seen)

    def log(self, images_seen: int, values: dict[str, float]) -> None:
        self._file.write(json.dumps({"images_seen": images_seen, **values}) + "\n")
        self._file.flush()
        for name, value in values.items():
            self._board.add_scalar(name, value, images_seen)

    def image(self, images_seen: int, name: str, image: torch.Tensor) -> None:
        """``image``: float (3, H, W) in [0, 1]; goes to TensorBoard only."""
        self._board.add_image(name, image, images_seen)

    def close(self) -> None:
        self._file.close()
        self._board.close()


class RunningMeans:
    """Means over the steps since the last report, on the device, and over the processes of ``accelerator``; ``state`` is of a
    run that was stopped between two reports."""

    def __init__(self, accelerator: Accelerator | None = None, state: dict | None = None) -> None:
        self.accelerator = accelerator
        sums = {"steps": 0} | (state or {})
        self.steps, self._sums = sums.pop("steps"), sums

    def add(self, values: dict[str, torch.Tensor]) -> None:
        """The same names at every step."""
        self._sums = {name: value.detach() + self._sums.get(name, 0.0) for name, value in values.items()}
        self.steps += 1

    def read(self) -> dict[str, float]:
        """Return the means and start the next ones."""
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
    """Return the lines of a metrics.jsonl; a last line cut short by a crash is left out."""
    lines: list[dict] = []
    with suppress(FileNotFoundError, json.JSONDecodeError):
        lines.extend(json.loads(line) for line in path.read_text(encoding="utf-8").splitlines())
    return lines


def crossed(before: int, after: int, every: int) -> bool:
    """Tell whether a multiple of ``every`` lies in (before, after]: time for what is done every so many images."""
    return before // every != after // every
