"""The package installed from its wheel, outside the repository: console command, files and dependencies.

LDM_SMD_WHEEL_PYTHON is the Python of an environment with the wheel and its dependencies (`make test-wheel`). Without it, the
wheel is installed in a new environment that uses the dependencies of this one.
"""

import ast
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

from .conftest import TINY_MODEL

ROOT = Path(__file__).parents[1]
ENVIRONMENT = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
"""Without PYTHONPATH, which may contain the repository."""
WITH_FALLBACK = {"xformers"}
"""Optional packages for which there is a fallback."""


@pytest.fixture(scope="module")
def wheel_python(tmp_path_factory):
    """The Python of an environment in which ldm_smd was installed from its wheel."""
    if given := os.environ.get("LDM_SMD_WHEEL_PYTHON"):
        return Path(given)
    folder = tmp_path_factory.mktemp("wheel")
    source, environment = folder / "source", folder / "environment"
    # Files that an earlier build left in the repository would be added to the wheel, so it is built from a copy.
    shutil.copytree(ROOT / "ldm_smd", source / "ldm_smd", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)

    def pip(*arguments):
        subprocess.run([sys.executable, "-m", "pip", "--quiet", *arguments], env=ENVIRONMENT, check=True)

    pip("wheel", "--no-deps", "--no-index", "--no-build-isolation", "--wheel-dir", folder, source)
    (wheel,) = folder.glob("*.whl")
    venv.create(environment, symlinks=True)
    python = environment / "bin" / "python"
    pip("--python", python, "install", "--no-deps", "--no-index", wheel)
    # The .pth files of the other environment are not read, so an editable install of ldm_smd there has no effect.
    own = Path(sysconfig.get_path("purelib", "venv", {"base": str(environment), "platbase": str(environment)}))
    (own / "borrowed.pth").write_text("\n".join(sorted({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")})))
    return python


@pytest.fixture
def outside(wheel_python, tmp_path):
    """A function that runs a program of that environment outside the repository and returns its standard output."""

    def call(program, *arguments):
        command = [wheel_python.parent / program, *map(str, arguments)]
        done = subprocess.run(command, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return call


def test_the_wheel_contains_version_type_marker_and_template(outside):
    program = "import sys, json, ldm_smd; print(json.dumps([sys.prefix, ldm_smd.__file__, ldm_smd.__version__]))"
    prefix, file, version = json.loads(outside("python", "-c", program))
    package = Path(file).parent
    assert package.is_relative_to(prefix) and not package.is_relative_to(ROOT / "ldm_smd")
    assert (package / "py.typed").is_file() and (package / "apps/report.html.j2").is_file()
    assert version == tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    assert outside("ldm-smd", "--version") == f"ldm-smd {version}\n"


def test_encode_train_and_sample_with_the_console_command(outside, image_folder, vae_folder, tmp_path):
    encoding = ["images.resolution=16", "shard_size=8", "batch_size=4", "num_workers=0", "output=latents"]
    outside("ldm-smd", "encode", f"images.source={image_folder}", f"autoencoder={vae_folder}", *encoding)
    training = ["images_total=16", "batch_size=8", "objective.draws=2", "sample_steps=2", "output=run", *TINY_MODEL]
    outside("ldm-smd", "train", "shards=latents", f"autoencoder={vae_folder}", *training)
    outside("ldm-smd", "sample", "model=run/model", "per_class=2", "steps=2", "output=samples")
    assert len(list((tmp_path / "samples").glob("class*.png"))) == 4 and (tmp_path / "samples-grid.png").is_file()


def imports():
    """Yield (package, file and line, whether it is optional) of every import in ldm_smd outside the standard library.

    An import is optional if it is in a ``try`` in a function, whose ``except ImportError`` raises a UserError.
    """
    for path in sorted((ROOT / "ldm_smd").rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        guarded = {
            id(node)
            for function in ast.walk(tree)
            if isinstance(function, ast.FunctionDef)
            for attempt in ast.walk(function)
            if isinstance(attempt, ast.Try)
            for handler in attempt.handlers
            if handler.type is not None and "ImportError" in ast.unparse(handler.type) and "UserError" in ast.unparse(handler)
            for node in attempt.body
        }
        for_types = {
            id(node)
            for block in ast.walk(tree)
            if isinstance(block, ast.If) and "TYPE_CHECKING" in ast.unparse(block.test)
            for node in block.body
        }
        for node in ast.walk(tree):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module]
            for name in names:
                package = name.partition(".")[0]
                if id(node) not in for_types and package != "ldm_smd" and package not in sys.stdlib_module_names:
                    yield package, f"{path.relative_to(ROOT)}:{node.lineno}", id(node) in guarded


def test_imported_packages_are_declared():
    """As dependencies; or as extras, if a UserError says what is missing."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]

    def names(requirements):
        return {re.match(r"[\w-]+", requirement)[0].lower().replace("_", "-") for requirement in requirements}

    needed = names(project["dependencies"])
    extras = {name: some for name, some in project["optional-dependencies"].items() if name != "dev"}
    extra = names(itertools.chain.from_iterable(extras.values()))
    distributions = packages_distributions()
    found = list(imports())
    assert {"torch", "yaml", "gradio", "xformers"} <= {package for package, _, _ in found}
    for package, where, optional in found:
        owners = {name.lower().replace("_", "-") for name in distributions.get(package, [package])}
        declared = owners & needed or (owners & extra and (optional or package in WITH_FALLBACK))
        assert declared, f"{where}: {package} is neither a dependency nor an extra whose absence is a UserError"
