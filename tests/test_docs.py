"""Commands and links in README, CONTRIBUTING and docs/ work."""

import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md")),
    *(path for path in sorted((ROOT / "docs").rglob("*.md")) if path.name != "tools.md"),
]
COMMAND = re.compile(r"\b(tools/\w+\.py)((?: [^#\n]*)?)")


def commands():
    for page in PAGES:
        for block in re.findall(r"```sh\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL):
            for line in block.replace("\\\n", " ").splitlines():
                if (found := COMMAND.search(line)) and not line.startswith("#"):
                    yield pytest.param(found[1], shlex.split(found[2]), id=f"{page.stem}: {' '.join(found[0].split())[:70]}")


@pytest.mark.parametrize("tool, arguments", list(commands()))
def test_a_tool_accepts_the_settings_of_a_command(tool, arguments, monkeypatch, capsys):
    """Config files of the user (my/*.yaml) are replaced by required settings."""
    own = [argument for argument in arguments if argument.startswith("my/") and argument.endswith(".yaml")]
    if own:
        position = arguments.index(own[0]) - 1
        assert arguments[position] == "--config"
        required = {"tools/encode.py": ["images.source=x", "autoencoder=x"], "tools/train.py": ["shards=x", "autoencoder=x"]}[
            tool
        ]
        arguments = arguments[:position] + arguments[position + 2 :] + [*required, "output=x"]
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", [tool, *arguments, "--dry-run"])
    with pytest.raises(SystemExit) as raised:
        runpy.run_path(str(ROOT / tool), run_name="__main__")
    assert raised.value.code in (0, None), capsys.readouterr().err


def anchors(page):
    """Return the anchors of the headings of a page, by GitHub's rules for lower case, punctuation and spaces."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    return {
        re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    }


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_named_files_exist(page):
    named = re.findall(r"\b(?:tests|benchmarks|ldm_smd|tools|configs)/[\w/-]+\.(?:py|yaml)\b", page.read_text(encoding="utf-8"))
    assert [name for name in named if not (ROOT / name).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_have_existing_targets(page):
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text(encoding="utf-8")):
        if "://" not in target:
            path, _, heading = target.partition("#")
            found = (page.parent / path).resolve() if path else page
            assert found.exists(), target
            assert not heading or heading in anchors(found), target
