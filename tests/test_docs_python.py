"""Python blocks in README and docs run with the shipped checkpoints.

A block that needs more than the repository has a comment before it: <!-- not run: needs ... --> Its names and arguments are
checked instead.
"""

import ast
import builtins
import inspect
import re
import typing
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"(?:<!-- not run: needs ([^>]+) -->\n\n)?^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)
OPENING = re.compile(r"^```python$", re.MULTILINE)


def blocks(page):
    """Return (what it needs or "", code) for each block of a page."""
    return BLOCK.findall(page.read_text(encoding="utf-8"))


WITH_PYTHON = [page for page in PAGES if OPENING.search(page.read_text(encoding="utf-8"))]
RUN = [page for page in WITH_PYTHON if any(not needs for needs, _ in blocks(page))]
NOT_RUN = [(page, number) for page in WITH_PYTHON for number, (needs, _) in enumerate(blocks(page)) if needs]


class Instance(typing.NamedTuple):
    """A value whose class is known."""

    cls: object


UNKNOWN = Instance(object)


class Names(ast.NodeVisitor):
    """Executes the imports of a block, and asserts that attributes exist and that arguments of calls match signatures."""

    def __init__(self):
        self.known = dict(vars(builtins))

    def visit_Import(self, node):
        exec(compile(ast.Module([node], []), "docs", "exec"), self.known)

    visit_ImportFrom = visit_Import

    def visit_Assign(self, node):
        self.generic_visit(node)
        if isinstance(node.targets[0], ast.Name):
            self.known[node.targets[0].id] = self.value(node.value)

    def visit_Attribute(self, node):
        self.generic_visit(node)
        self.value(node)

    def visit_Call(self, node):
        self.generic_visit(node)
        function, given = self.value(node.func), [None] * len(node.args)
        if isinstance(function, Instance):
            methods = [vars(cls)["__call__"] for cls in function.cls.__mro__ if "__call__" in vars(cls)]
            if not methods:
                return
            function, given = methods[0], [None, *given]  # with self
        try:
            signature = inspect.signature(function)
        except ValueError:  # some builtins have none
            return
        signature.bind(*given, **{keyword.arg: None for keyword in node.keywords if keyword.arg})

    def value(self, node):
        """Return the value of an expression as far as it is known without running it."""
        if isinstance(node, ast.Name):
            return self.known.get(node.id, UNKNOWN)
        if isinstance(node, ast.Attribute):
            owner = self.value(node.value)
            if isinstance(owner, Instance):
                return UNKNOWN
            assert hasattr(owner, node.attr), f"{owner} has no {node.attr}"
            return getattr(owner, node.attr)
        if isinstance(node, ast.Call):
            function = self.value(node.func)
            if isinstance(function, type):
                return Instance(function)
            if getattr(function, "__name__", "") == "from_pretrained":
                return Instance(function.__self__)
            if inspect.isfunction(function) and isinstance(hint := typing.get_type_hints(function).get("return"), type):
                return Instance(hint)
        return UNKNOWN


def test_every_block_is_found():
    for page in WITH_PYTHON:
        assert len(blocks(page)) == len(OPENING.findall(page.read_text(encoding="utf-8"))), page
    assert len(RUN) >= 2 and len(NOT_RUN) >= 3


@pytest.mark.slow
@pytest.mark.parametrize("page", RUN, ids=lambda page: page.stem)
def test_the_python_of_a_page_runs(page, tmp_path, monkeypatch):
    """In a folder with only the checkpoints, with two sampling steps. Blocks of a page share their variables."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "checkpoints").symlink_to(ROOT / "checkpoints")
    names = {}
    for needs, code in blocks(page):
        if not needs:
            shorter = re.sub(r"num_inference_steps=\d+", "num_inference_steps=2", code)
            exec(compile(shorter, str(page), "exec"), names)
    saved = re.findall(r'\.save\("([^"]+)"\)', "".join(code for needs, code in blocks(page) if not needs))
    sizes = {name: Image.open(tmp_path / name).size for name in saved}
    if page.stem == "README":
        assert sizes == {"face.png": (64, 64), "large.png": (256, 256)}
    assert sizes and all(side >= 64 for size in sizes.values() for side in size)


@pytest.mark.parametrize("page, number", NOT_RUN, ids=lambda each: getattr(each, "stem", str(each)))
def test_names_and_arguments_of_other_blocks_exist(page, number):
    Names().visit(ast.parse(blocks(page)[number][1], str(page)))


@pytest.mark.parametrize(
    "code",
    [
        "from ldm_smd import SMDPipelines",
        "import ldm_smd\nldm_smd.schedulers.nothing",
        "from ldm_smd import SMDPipeline\nSMDPipeline.from_pretrain('x')",
        "from ldm_smd import SMDPipeline\npipeline = SMDPipeline.from_pretrained('x')\npipeline([0], steps=4)",
        "from ldm_smd import load_pipeline\npipeline = load_pipeline('x')\npipeline([0], steps=4)",
        "from ldm_smd import make_scheduler\nmake_scheduler()",
    ],
)
def test_wrong_names_and_arguments_are_found(code):
    with pytest.raises((ImportError, AssertionError, AttributeError, TypeError)):
        Names().visit(ast.parse(code))
