"""Every setting of every tool, set to what no user means: what ``test_hostile_settings.py`` runs.

A case is a tool's working settings with one of them changed. It must end with exit code 2, one line that says what was expected
and found, and nothing written; or with 0, where the tool could do what it was asked.
"""

from __future__ import annotations

import copy
import math
import re
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import yaml

from ldm_smd.cli import run_command
from ldm_smd.commands import BY_NAME
from ldm_smd.config import Setting, settings

SECONDS = 120
"""A case that takes longer hangs."""
NUMBERS = (0, -1, 10**30, 1e30, math.nan, math.inf, -math.inf, "many", [], True)
WRONG_NAMES = ("", "\0", "${nothing}", "x" * 5000)
NAMES = (*WRONG_NAMES, "x" * 300, "nonsense", [1], {"a": 1})
OUTPUTS = ("output", "work", "sheet", "cache", "images.cache", "held_out.cache", "reference.cache")
PATHS = re.compile(
    r"(.*\.)?(source|classes|model|shards|autoencoder|init_from|run|guide|like|image|encode|features|config|checkpoint|models)"
    r"|models\..*"
)


@dataclass(frozen=True)
class Case:
    """One setting of a tool, changed.

    Attributes:
        wrong: no value of the setting can be this one: it must be refused, and at once.
    """

    tool: str
    name: str
    value: object
    wrong: bool

    def __str__(self) -> str:
        return f"{self.tool} {self.name}={str(self.value)[:60]!r}"


def changed(base: dict, name: str, value: object) -> dict:
    """``base`` with the setting of that full name, NAME[].KEY in the first entry of a list."""
    content = copy.deepcopy(base)
    place: dict = content
    *outer, last = name.split(".")
    for part in outer:
        place = place[part[:-2]][0] if part.endswith("[]") else place.setdefault(part, {})
    place[last] = value
    return content


def values_for(setting: Setting, folder: Path) -> Iterator[tuple[object, bool]]:
    """What a setting is tried with, by what it takes, numbers, names or paths; and whether that cannot be right."""
    default = yaml.safe_load(setting.default) if setting.default and setting.default != "[...]" else None
    if setting.default == "[...]":
        yield from ((value, True) for value in ([{}], "nonsense", 7))
        yield [], False
    elif setting.choices:
        yield from ((value, True) for value in ("nonsense", "", 7.5, []))
    elif setting.bounds:
        for number in NUMBERS:
            value = [number] if isinstance(default, list) else number
            yield value, number in (10**30, -math.inf, "many", []) or number != number
        if isinstance(default, list):
            yield [], False
    else:
        for name in NAMES:
            value = [name] if isinstance(default, list) else name
            yield value, name in WRONG_NAMES
        if isinstance(default, list):
            yield [], False
        if setting.name in OUTPUTS:
            for path in (folder / "a-file" / "below", "/proc/nothing", "/proc/nothing/below", "/dev/null/below"):
                yield str(path), "." not in setting.name  # images.cache and its kin are for URLs alone
            for path in (folder / "a-file", "/dev/null"):
                yield str(path), False
        elif PATHS.fullmatch(setting.name):
            wrong = (folder / "nothing", folder / "a-file" / "below")
            for path in (*wrong, folder / "a-file", folder / "empty", "/proc/self/mem", "/"):
                yield ([str(path)] if isinstance(default, list) else str(path)), path in wrong


def cases(tool: str, folder: Path) -> Iterator[Case]:
    """All of a tool."""
    for setting in settings(BY_NAME[tool].schema):
        for value, wrong in values_for(setting, folder):
            yield Case(tool, setting.name, value, wrong)


@contextmanager
def no_longer_than(seconds: int) -> Iterator[None]:
    def stop(*_: object) -> None:
        raise TimeoutError(f"still running after {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def run_case(case: Case, base: dict, folder: Path, read: object) -> str | None:
    """What is wrong with how the case ends; None where nothing is.

    Args:
        base: working settings of the tool; its outputs lie in ``folder``/out.
        read: pytest's ``capfd.readouterr``.
    """
    (folder / "case.yaml").write_text(yaml.safe_dump(changed(base, case.name, case.value)))
    read()
    try:
        with no_longer_than(SECONDS):
            code = run_command(case.tool, ["--config", str(folder / "case.yaml")])
    except BaseException as error:  # SystemExit too
        return f"{type(error).__name__}: {str(error)[:300]}"
    _, said = read()
    # A progress bar may stand before it.
    lines = [line for line in said.replace("\r", "\n").splitlines() if "error: " in line]
    there = sorted(path.relative_to(folder / "out").as_posix() for path in (folder / "out").rglob("*"))
    if code == 0:
        return "was not refused" if case.wrong else None
    if code != 2:
        return f"exit code {code}"
    if len(lines) != 1 or said.rstrip().splitlines()[-1] not in lines[0]:
        return f"not one line: {said[-300:]}"
    if "Traceback" in said:
        return "a traceback"
    if not re.search(r"error: (.{1,80}: )?(expected .*found|unknown key)", lines[0], flags=re.DOTALL):
        return f"does not say what was expected and found: {lines[0][:300]}"
    if len(lines[0]) > 1000:
        return f"a line of {len(lines[0])} characters"
    return f"left {there[:5]}" if there else None
