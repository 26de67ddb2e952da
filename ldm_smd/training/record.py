"""What a run was made from: run.json in its folder, compared whenever the run is resumed.

A resumed run equals an undisturbed one only if it continues with the same data and settings; where it does not, its model card
tells so.
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
"""Settings of tools/train.py that are paths, whose contents are compared, or change how and not what is computed."""
MAY_CHANGE = (
    "images_total", "learning_rate", "warmup_images", "cooldown_images", "weight_decay", "gradient_clip",
    "ema_halflife_images", "precision", "log_every_images", "sample_every_images", "sample_steps",
    "checkpoint_every_images", "keep_checkpoints",
)  # fmt: skip
"""Settings of tools/train.py that a resumed run may change, which is logged and told in the model card."""


@dataclass
class RunRecord:
    """What a run was made from.

    Attributes:
        made_from: hashes of the data and networks that it reads, and its settings by their full names, as of the last start.
        changes: one dict for each resumption with other ones: ``images`` seen until then, and ``changed``, name -> [before,
            after].
    """

    made_from: dict
    changes: list[dict]

    def history(self) -> str:
        """Return the changes as Markdown, for the model card; empty where there are none."""
        lines = [
            f"* until {change['images']:,} images `{name}` was {_short(before)}, then {_short(after)}\n"
            for change in self.changes
            for name, (before, after) in change["changed"].items()
        ]
        return f"Changed while it was trained:\n\n{''.join(lines)}\n" if lines else ""

    def save(self, folder: Path) -> None:
        with atomic_file(folder / RECORD) as temporary:
            temporary.write_text(json.dumps(asdict(self), indent=1), encoding="utf-8")


def open_record(
    folder: Path, hashes: dict[str, str], config: Config, not_compared: tuple[str, ...], may_change: tuple[str, ...]
) -> RunRecord:
    """Make the record of the run in ``folder``, to be saved when it starts; with checkpoints, compare it with the one there.
    UserError where more than ``may_change`` has changed without ``config.resume_changed``.

    Args:
        hashes: of the data and networks that it reads now.
        not_compared: how the names of settings begin that are left out.
        may_change: names of settings that a user may sensibly change; such changes are logged.
    """
    settings = {name: value for name, value in flat(config_as_dict(config)).items() if not name.startswith(not_compared)}
    made_from = json.loads(json.dumps(hashes | settings))  # as it is read back
    images_seen = newest_images(folder / "checkpoints")
    if not images_seen:
        return RunRecord(made_from, [])
    if not (folder / RECORD).is_file():
        logger.warning("%s has no %s: whether it goes on with the data and settings it began with is not known", folder, RECORD)
        return RunRecord(made_from, [])
    try:
        before = RunRecord(**json.loads((folder / RECORD).read_text(encoding="utf-8")))
        before.made_from = {current_name(type(config), name): value for name, value in before.made_from.items()}
        changed = {
            name: [before.made_from[name], made_from[name]]
            for name in sorted(before.made_from.keys() & made_from.keys())  # not what another version has besides
            if before.made_from[name] != made_from[name]
        }
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"output: expected the record of a run in {folder / RECORD}, found: {error}") from error
    told = {name: (_short(old), _short(new)) for name, (old, new) in changed.items()}
    refused = [f"{name} was {old} and is {new}" for name, (old, new) in told.items() if name not in may_change]
    if refused and not config.resume_changed:
        raise UserError(
            f"output: expected what the {images_seen:,} images in {folder} were seen with (resume_changed=true goes on with "
            f"other data and settings), found: {'; '.join(refused)}"
        )
    for name, (old, new) in told.items():
        logger.warning("%s: %s until %d images, %s from here on", name, old, images_seen, new)
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
