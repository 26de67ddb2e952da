"""Imports within ldm_smd go from upper layers to lower ones only, and its settings load nothing heavy."""

import ast
import sys
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "ldm_smd").rglob("*.py"))
MODULES = {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in FILES}
LAYERS = (
    "errors < schema progress files device memory deprecation rgb < diffusion < models < autoencoder schedulers < pipelines"
    " < data < sampling < evaluation < config < training < apps < commands < cli < completion __main__"
)
"""Packages and modules of ldm_smd. Each imports only from lower layers, and a package also from itself.

ldm_smd/__init__.py is the lowest layer.
"""
LAYER = {"": 0} | {name: number for number, layer in enumerate(LAYERS.split("<"), 1) for name in layer.split()}
DEFERRED = {("ldm_smd.cli", "ldm_smd.completion")}
"""Imports from an upper layer, inside a function: the console command loads shell completion only on request."""


def imports(module, deferred=True):
    """Return the modules of ldm_smd and the other packages that a module imports; with ``deferred`` also inside functions."""
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
    """Return the packages outside the standard library that importing a module loads."""
    seen, waiting = set(), {module}
    while waiting:
        seen.add(name := waiting.pop())
        if name in MODULES:
            waiting |= ({name.rpartition(".")[0] or name} | imports(name, deferred=False)) - seen
    return seen - MODULES.keys() - sys.stdlib_module_names


def top(module):
    return f"{module}.".split(".")[1]


ARROWS = {(module, name) for module in MODULES for name in imports(module) if name in MODULES} - DEFERRED


def test_imports_go_to_lower_layers():
    TopologicalSorter({module: {to for start, to in ARROWS if start == module} for module in MODULES}).prepare()  # no cycle
    assert set(map(top, MODULES)) == LAYER.keys()
    assert [(start, to) for start, to in ARROWS if top(start) != top(to) and LAYER[top(start)] <= LAYER[top(to)]] == []
    assert {to for start, to in ARROWS if (top(start), top(to)) == ("data", "models")} == {"ldm_smd.models.clip"}
    from_above = {(start, to) for start, to in ARROWS if top(to) == "apps" != top(start)}
    assert from_above == {("ldm_smd.commands", "ldm_smd.apps.settings")}


def test_settings_and_the_command_line_import_nothing_heavy():
    light = [module for module in MODULES if module.endswith(".settings") or module == "ldm_smd.commands"]
    assert "ldm_smd.training.settings" in light
    assert {module: loads(module) for module in light if loads(module)} == {}
    assert loads("ldm_smd.cli") == loads("ldm_smd.config") == {"omegaconf", "yaml"} and "torch" in loads("ldm_smd.device")


def test_only_one_module_imports_scikit_learn():
    assert [module for module in MODULES if "sklearn" in imports(module)] == ["ldm_smd.models.fit"]


def test_files_have_at_most_350_lines():
    assert {str(path): lines for path in FILES if (lines := path.read_text(encoding="utf-8").count("\n")) > 350} == {}
