"""The notebook of the documentation runs, and its stored outputs are complete."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "docs/notebook/first-steps.ipynb"
MOST_BYTES = 1_000_000
SHEETS = 6
GAUSSIAN, MIXTURE = "emoji-gaussian, 4 steps: ", "emoji-smd, 4 steps: "


def outputs(notebook):
    return [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]


def images(notebook):
    return [output.data["image/jpeg"] for output in outputs(notebook) if "image/jpeg" in output.get("data", {})]


def distances(notebook):
    """Return the printed distances, by the start of their lines."""
    lines = "".join(output.text for output in outputs(notebook) if output.output_type == "stream").splitlines()
    return {
        start: float(line.removeprefix(start).split()[0]) for line in lines for start in (GAUSSIAN, MIXTURE) if start in line
    }


def check(notebook):
    assert not [output for output in outputs(notebook) if output.output_type == "error"]
    assert len(images(notebook)) == SHEETS and all(len(image) > 5000 for image in images(notebook))
    found = distances(notebook)
    assert found[MIXTURE] < 0.6 * found[GAUSSIAN]


def test_stored_outputs_are_small_and_complete():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    check(notebook)
    assert NOTEBOOK.stat().st_size < MOST_BYTES
    assert all(cell.execution_count for cell in notebook.cells if cell.cell_type == "code")
    assert not [output for output in outputs(notebook) if output.get("name") == "stderr"], "warnings contain local paths"


@pytest.mark.slow
def test_the_notebook_runs(tmp_path, monkeypatch):
    """In another folder with links to the repository, so that it writes nothing there."""
    for name in ("checkpoints", "configs", "data", "tools"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": tmp_path}}).execute()
    check(notebook)
    assert (tmp_path / "outputs/notebook/mixture/model/model_index.json").is_file()
