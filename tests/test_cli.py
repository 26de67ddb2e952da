"""The command line: the console command and the scripts in tools/, their imports, and shell completion."""

import ast
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ldm_smd.cli import main
from ldm_smd.commands import BY_NAME, COMMANDS, for_console

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted(path for path in (ROOT / "tools").glob("*.py") if not path.name.startswith("make_"))
REQUIRED = {
    "encode": ["images.source=x", "autoencoder=x", "output=x"],
    "verify": ["shards=x"],
    "train": ["shards=x", "autoencoder=x", "output=x"],
    "sample": ["model=x", "output=x"],
    "evaluate": ["output=x", "reference.source=x", "model=x"],
    "explore": ["models.one=x"],
    "average": ["run=x", "sigma_rel=0.1", "output=x"],
    "train-autoencoder": ["images.source=x", "held_out.source=x", "output=x"],
    "train-moments": ["model=x", "shards=x", "output=x"],
    "train-classifier": ["--config", str(ROOT / "configs/classifier.yaml")],
    "fit-gaussian": ["model=x", "shards=x", "output=x"],
    "demo": ["--config", str(ROOT / "configs/demo.yaml")],
}
HEAVY = {"torch", "torchvision", "diffusers", "accelerate", "sklearn", "matplotlib", "argcomplete"}


@pytest.fixture
def console(capsys):
    """A function that runs ldm-smd in this process and returns (exit code, standard output, standard error)."""

    def call(*arguments):
        try:
            code = main(arguments)
        except SystemExit as exit:
            code = exit.code
        return code, *capsys.readouterr()

    return call


def python(program, **environment):
    """Run a program in another process; returns its standard output."""
    return subprocess.run(
        [sys.executable, "-c", program], env=os.environ | environment, cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout


def test_help_lists_every_command_on_one_line(console):
    code, out, _ = console()
    assert (code, out) == console("--help")[:2] and code == 0
    listed = [line.split() for line in out.splitlines() if line.startswith("  ") and not line.strip().startswith("-")]
    assert [words[0] for words in listed] == list(BY_NAME) and all(len(words) > 3 for words in listed)
    assert max(map(len, out.splitlines())) <= 80


def test_an_unknown_command_gives_one_line(console):
    code, out, err = console("trian", "shards=x")
    assert (code, out) == (2, "") and err.count("\n") == 1
    assert err.startswith("ldm-smd: error: ") and err.endswith("'trian'; the nearest known command is 'train'\n")


def test_version_is_printed(console):
    code, out, _ = console("--version")
    assert code == 0 and out.startswith("ldm-smd ") and out[8].isdigit()


def test_every_script_has_a_command_and_every_command_a_script():
    assert {path.relative_to(ROOT).as_posix() for path in SCRIPTS} == {command.script for command in COMMANDS}
    for command in COMMANDS:
        script = (ROOT / command.script).read_text(encoding="utf-8")
        assert ast.get_docstring(ast.parse(script)) == f"{command.summary}."
        assert f'run_command("{command.name}")' in script


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.name)
def test_the_function_of_a_command_exists(command):
    module, _, name = command.function.partition(":")
    assert callable(getattr(importlib.import_module(module), name))


@pytest.mark.parametrize("name", BY_NAME)
def test_help_of_the_console_command_has_its_own_examples(name, console):
    code, out, _ = console(name, "--help")
    assert code == 0 and out.startswith(f"usage: ldm-smd {name} ")
    assert f"  ldm-smd {name} " in out and "tools/" not in out
    assert "".join(for_console(BY_NAME[name].description).split()) in "".join(out.split())


def test_examples_with_launchers_start_the_module():
    launch = "  accelerate launch --num_processes 8 tools/train.py --config my/train.yaml"
    assert for_console(launch) == "  accelerate launch --num_processes 8 -m ldm_smd train --config my/train.yaml"
    for text in ("python tools/make_demo_data.py package", "found no file /home/me/tools/train.py"):
        assert for_console(text) == text


def test_errors_name_the_console_command(console, tmp_path):
    code, _, err = console("sample", "model=x", "output=y", "stpes=3")
    assert code == 2 and err == "ldm-smd sample: error: stpes=3: unknown key 'stpes'; the nearest known key is 'steps'\n"
    code, _, err = console("train", f"shards={tmp_path}", "autoencoder=x", f"output={tmp_path / 'run'}")
    assert code == 2 and err.count("\n") == 1 and "ldm-smd encode writes it" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["demo", "--config", "configs/demo.yaml"], "--config: expected a YAML file, found no file configs/demo.yaml"),
        (["demo", *REQUIRED["demo"]], "encode: expected an existing path (run the demo from the root of the repository)"),
        (
            ["evaluate", *REQUIRED["evaluate"]],
            "features: expected a FeatureNetwork folder (the repository has checkpoints/classifier)",
        ),
        (["explore"], "models: expected at least one"),
        (["explore", "models.mixture=outputs/demo/smd/model"], "outputs/demo/smd/model"),
    ],
)
def test_outside_the_repository_missing_files_give_one_line(arguments, message, console, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _, err = console(*arguments)
    assert code == 2 and err.count("\n") == 1 and message in err
    assert list(tmp_path.iterdir()) == []


def test_help_and_dry_run_import_nothing_heavy():
    """For every command, in one new process."""
    program = f"""
import contextlib, io, sys
from ldm_smd.cli import main
for name, required in {REQUIRED}.items():
    for arguments in (["--help"], [*required, "--dry-run"]):
        with contextlib.redirect_stdout(io.StringIO()):
            try:
                code = main([name, *arguments])
            except SystemExit as ended:
                code = ended.code
        print(name, arguments, code, *sorted({HEAVY} & set(sys.modules)), sep="|")
"""
    lines = python(program).splitlines()
    assert len(lines) == 2 * len(COMMANDS) and set(REQUIRED) == set(BY_NAME)
    assert [line for line in lines if not line.endswith("]|0")] == []


def test_importing_the_package_imports_nothing_heavy():
    program = f"""
import json, sys
import ldm_smd
known = dir(ldm_smd)
light = sorted({HEAVY} & set(sys.modules))
import ldm_smd.models.unet
networks = "omegaconf" in sys.modules
from ldm_smd import *
print(json.dumps([light, known, networks, SMDPipeline.__module__, ldm_smd.__all__, "torch" in sys.modules, __version__]))
"""
    light, known, networks_read_settings, home, names, heavy_now, version = json.loads(python(program))
    assert light == [] and not networks_read_settings and heavy_now and set(names) <= set(known)
    assert home == "ldm_smd.pipelines.smd"
    assert {"SMDPipeline", "SMDUNet2DModel", "ExtendedUNet2DModel", "SMDScheduler", "TeleportScheduler"} <= set(names)
    assert version


def test_a_source_tree_that_is_not_installed_has_a_version(tmp_path):
    """It can be imported without site-packages, so without any dependency."""
    (tmp_path / "ldm_smd").symlink_to(ROOT / "ldm_smd")
    command = [sys.executable, "-E", "-S", "-c", "import ldm_smd; print(ldm_smd.__version__)"]
    assert subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True).stdout == "0+source\n"


def test_an_unknown_name_is_an_attribute_error():
    import ldm_smd

    with pytest.raises(AttributeError, match="has no attribute 'SMDPipelines'"):
        _ = ldm_smd.SMDPipelines


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ("ldm-smd train-", {"train-autoencoder", "train-moments", "train-classifier"}),
        ("ldm-smd train --dr", {"--dry-run "}),
        ("ldm-smd train --config my.yaml model.pl", {"model.placement="}),
        ("ldm-smd train model.placement=", {"in_out", "up", "all"}),
        ("ldm-smd encode mirror=t", {"true "}),
        ("ldm-smd train-classifier sets", {"sets="}),
        ("ldm-smd sample nothing=", set()),
    ],
)
def test_completion(typed, expected, tmp_path):
    """With the variables that the shell function of argcomplete sets."""
    variables = {
        "_ARGCOMPLETE": "1",
        "_ARGCOMPLETE_IFS": "\n",
        "_ARGCOMPLETE_COMP_WORDBREAKS": " \t\n\"'><=;|&(:",
        "_ARGCOMPLETE_STDOUT_FILENAME": str(tmp_path / "answer"),
        "COMP_LINE": typed,
        "COMP_POINT": str(len(typed)),
    }
    out = python("import sys; from ldm_smd.cli import main; sys.exit(main())", **variables)
    assert out == "" and set((tmp_path / "answer").read_text().split("\n")) - {""} == expected
