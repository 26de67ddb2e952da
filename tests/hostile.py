"""Invalid and extreme values for every setting of every tool, for ``test_hostile_settings.py``.

A case is the working settings of a tool with one of them changed. It must end with exit code 2, one line that says what was
expected and found, and no files; or with exit code 0 if the tool accepts the value.
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
"""Time limit of a case."""
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
    """A changed setting of a tool.

    Attributes:
        wrong: the value is always invalid and must be refused, before any work is done.
    """

    tool: str
    name: str
    value: object
    wrong: bool

    def __str__(self) -> str:
        return f"{self.tool} {self.name}={str(self.value)[:60]!r}"


def changed(base: dict, name: str, value: object) -> dict:
    """Return ``base`` with another value of the setting. NAME[].KEY is that of the first entry of a list."""
    content = copy.deepcopy(base)
    section: dict = content
    *outer, last = name.split(".")
    for key in outer:
        section = section[key[:-2]][0] if key.endswith("[]") else section.setdefault(key, {})
    section[last] = value
    return content


def values_for(setting: Setting, folder: Path) -> Iterator[tuple[object, bool]]:
    """Yield (value, whether it is always invalid) for a setting, depending on whether it is a number, a name or a path."""
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
                yield str(path), "." not in setting.name  # images.cache and the like are used for URLs only
            for path in (folder / "a-file", "/dev/null"):
                yield str(path), False
        elif PATHS.fullmatch(setting.name):
            wrong = (folder / "nothing", folder / "a-file" / "below")
            for path in (*wrong, folder / "a-file", folder / "empty", "/proc/self/mem", "/"):
                yield ([str(path)] if isinstance(default, list) else str(path)), path in wrong


def cases(tool: str, folder: Path) -> Iterator[Case]:
    """Yield all cases of a tool."""
    for setting in settings(BY_NAME[tool].schema):
        for value, wrong in values_for(setting, folder):
            yield Case(tool, setting.name, value, wrong)


@contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    """Raise TimeoutError in the block after ``seconds``."""

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
    """Run the case; returns what is wrong with its end, or None.

    Args:
        base: working settings of the tool. Its outputs are in ``folder``/out.
        read: pytest's ``capfd.readouterr``.
    """
    (folder / "case.yaml").write_text(yaml.safe_dump(changed(base, case.name, case.value)))
    read()
    try:
        with time_limit(SECONDS):
            code = run_command(case.tool, ["--config", str(folder / "case.yaml")])
    except BaseException as error:  # includes SystemExit
        return f"{type(error).__name__}: {str(error)[:300]}"
    _, printed = read()
    # There may be a progress bar before it.
    lines = [line for line in printed.replace("\r", "\n").splitlines() if "error: " in line]
    files = sorted(path.relative_to(folder / "out").as_posix() for path in (folder / "out").rglob("*"))
    if code == 0:
        return "was not refused" if case.wrong else None
    if code != 2:
        return f"exit code {code}"
    if len(lines) != 1 or printed.rstrip().splitlines()[-1] not in lines[0]:
        return f"not one line: {printed[-300:]}"
    if "Traceback" in printed:
        return "a traceback"
    if not re.search(r"error: (.{1,80}: )?(expected .*found|unknown key)", lines[0], flags=re.DOTALL):
        return f"does not say what was expected and found: {lines[0][:300]}"
    if len(lines[0]) > 1000:
        return f"a line of {len(lines[0])} characters"
    return f"left {files[:5]}" if files else None
