"""Imports of ldm_smd go one way, from upper floors to lower ones, and its settings load nothing heavy."""

import ast
import sys
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "ldm_smd").rglob("*.py"))
MODULES = {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in FILES}
FLOORS = (
    "errors < schema progress files device deprecation < diffusion < models < autoencoder schedulers < pipelines < data"
    " < sampling < evaluation < config < training < apps < commands < cli < completion __main__"
)
"""Packages and modules of ldm_smd, which itself is below all. Each imports from lower floors, and a package from itself."""
FLOOR = {"": 0} | {name: number for number, floor in enumerate(FLOORS.split("<"), 1) for name in floor.split()}
DEFERRED = {("ldm_smd.cli", "ldm_smd.completion")}
"""Imported upwards, inside a function: the console command completes only when a shell asks."""


def imports(module, deferred=True):
    """Modules of ldm_smd that a module imports, and other packages; ``deferred``: also inside functions."""
    package = ["ldm_smd", *MODULES[module].relative_to(ROOT).parts[1:-1]]
    found, nodes = set(), [ast.parse(MODULES[module].read_text(encoding="utf-8"))]
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            nodes += node.orelse
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = [*package[: len(package) + 1 - node.level], node.module] if node.level else [node.module]
            found |= {".".join(filter(None, [*base, alias.name])) for alias in node.names}
        elif deferred or not isinstance(node, ast.FunctionDef):
            nodes += ast.iter_child_nodes(node)
    prefixes = ([name.rsplit(".", cut)[0] for cut in range(name.count(".") + 1)] for name in found)
    return {next((name for name in names if name in MODULES), names[-1]) for names in prefixes}


def loads(module):
    """Packages beside Python's own that are loaded with a module."""
    seen, waiting = set(), {module}
    while waiting:
        seen.add(name := waiting.pop())
        if name in MODULES:
            waiting |= ({name.rpartition(".")[0] or name} | imports(name, deferred=False)) - seen
    return seen - MODULES.keys() - sys.stdlib_module_names


def top(module):
    return f"{module}.".split(".")[1]


ARROWS = {(module, name) for module in MODULES for name in imports(module) if name in MODULES} - DEFERRED


def test_imports_go_to_lower_floors():
    TopologicalSorter({module: {to for start, to in ARROWS if start == module} for module in MODULES}).prepare()  # no cycle
    assert set(map(top, MODULES)) == FLOOR.keys()
    assert [(start, to) for start, to in ARROWS if top(start) != top(to) and FLOOR[top(start)] <= FLOOR[top(to)]] == []
    assert {to for start, to in ARROWS if (top(start), top(to)) == ("data", "models")} == {"ldm_smd.models.clip"}
    from_above = {(start, to) for start, to in ARROWS if top(to) == "apps" != top(start)}
    assert from_above == {("ldm_smd.commands", "ldm_smd.apps.settings")}


def test_settings_and_the_command_line_are_light():
    light = [module for module in MODULES if module.endswith(".settings") or module == "ldm_smd.commands"]
    assert "ldm_smd.training.settings" in light
    assert {module: loads(module) for module in light if loads(module)} == {}
    assert loads("ldm_smd.cli") == loads("ldm_smd.config") == {"omegaconf", "yaml"} and "torch" in loads("ldm_smd.device")


def test_scikit_learn_is_in_one_place():
    assert [module for module in MODULES if "sklearn" in imports(module)] == ["ldm_smd.models.fit"]


def test_files_are_short_enough_to_read_alone():
    assert {str(path): lines for path in FILES if (lines := path.read_text(encoding="utf-8").count("\n")) > 350} == {}
