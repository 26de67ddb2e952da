"""run.json: the data and settings of a run, checked whenever it is resumed.

A resumed run equals an uninterrupted one only with the same data and settings. Otherwise its model card lists the changes.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from ..config import config_as_dict, current_name
from ..errors import UserError, shortened
from ..files import atomic_file
from .checkpoint import newest_images
from .settings import TrainAutoencoderConfig, TrainConfig

logger = logging.getLogger(__name__)

Config = TrainConfig | TrainAutoencoderConfig
RECORD = "run.json"
NOT_COMPARED = (
    "shards", "autoencoder", "output", "micro_batches", "gradient_checkpointing", "compile", "attention", "num_workers",
    "resume_changed",
)  # fmt: skip
"""Settings of tools/train.py that are not compared: paths, whose contents are, and settings that do not change the result."""
MAY_CHANGE = (
    "images_total", "learning_rate", "warmup_images", "cooldown_images", "weight_decay", "gradient_clip",
    "ema_halflife_images", "precision", "log_every_images", "sample_every_images", "sample_steps",
    "sampling_shift", "checkpoint_every_images", "keep_checkpoints",
)  # fmt: skip
"""Settings of tools/train.py that a resumed run may change. Changes are logged and listed in the model card."""


@dataclass
class RunRecord:
    """Data and settings of a run.

    Attributes:
        made_from: hashes of the data and networks that the run reads, and its settings by full name, as of the last start.
        changes: one dict per resumption with changes: ``images`` seen until then, and ``changed``, name -> [before, after].
    """

    made_from: dict
    changes: list[dict]

    def history(self) -> str:
        """Return the changes as Markdown for the model card; empty if there are none."""
        lines = [
            f"* until {change['images']:,} images `{name}` was {_short(before)}, then {_short(after)}\n"
            for change in self.changes
            for name, (before, after) in change["changed"].items()
        ]
        return f"Changes during training:\n\n{''.join(lines)}\n" if lines else ""

    def save(self, folder: Path) -> None:
        with atomic_file(folder / RECORD) as temporary:
            temporary.write_text(json.dumps(asdict(self), indent=1), encoding="utf-8")


def open_record(
    folder: Path, hashes: dict[str, str], config: Config, not_compared: tuple[str, ...], may_change: tuple[str, ...]
) -> RunRecord:
    """Make the record of the run in ``folder``, and compare it with the saved one if the run has checkpoints.

    Raises UserError if settings other than ``may_change`` have changed, unless ``config.resume_changed`` is set.

    Args:
        hashes: hashes of the data and networks that the run reads.
        not_compared: prefixes of settings to leave out.
        may_change: settings that may change; their changes are logged.
    """
    settings = {name: value for name, value in flat(config_as_dict(config)).items() if not name.startswith(not_compared)}
    made_from = json.loads(json.dumps(hashes | settings))  # as it is read back
    images_seen = newest_images(folder / "checkpoints")
    if not images_seen:
        return RunRecord(made_from, [])
    if not (folder / RECORD).is_file():
        logger.warning("%s has no %s: cannot check that the run continues with the same data and settings", folder, RECORD)
        return RunRecord(made_from, [])
    try:
        before = RunRecord(**json.loads((folder / RECORD).read_text(encoding="utf-8")))
        before.made_from = {current_name(type(config), name): value for name, value in before.made_from.items()}
        changed = {
            name: [before.made_from[name], made_from[name]]
            for name in sorted(before.made_from.keys() & made_from.keys())  # not those of another version only
            if before.made_from[name] != made_from[name]
        }
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"output: expected the record of a run in {folder / RECORD}, found: {error}") from error
    told = {name: (_short(old), _short(new)) for name, (old, new) in changed.items()}
    refused = [f"{name} was {old} and is {new}" for name, (old, new) in told.items() if name not in may_change]
    if refused and not config.resume_changed:
        raise UserError(
            f"output: expected the data and settings of the run in {folder} ({images_seen:,} images; resume_changed=true "
            f"resumes with others), found: {'; '.join(refused)}"
        )
    for name, (old, new) in told.items():
        logger.warning("%s: %s until %d images, %s from now on", name, old, images_seen, new)
    if changed:
        before.changes.append({"images": images_seen, "changed": changed})
    return RunRecord(made_from, before.changes)


def flat(settings: Mapping, prefix: str = "") -> dict:
    """Return nested settings by their full names."""
    found: dict = {}
    for name, value in settings.items():
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return found


def _short(value: object) -> str:
    return shortened(json.dumps(value))
