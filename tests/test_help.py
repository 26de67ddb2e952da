from pathlib import Path

from ldm_smd.cli import all_help
from ldm_smd.config import settings
from ldm_smd.training.settings import ClassifierSetConfig, TrainClassifierConfig, TrainConfig

ROOT = Path(__file__).parents[1]


def test_docs_have_the_current_help_of_every_tool():
    """`python -m ldm_smd.cli > docs/tools.md` writes it."""
    found = all_help(ROOT / "tools")
    assert all(f"## {path.name}\n\n```\nusage: {path.name}" in found for path in (ROOT / "tools").glob("*.py"))
    assert found == (ROOT / "docs" / "tools.md").read_text(encoding="utf-8")


def test_settings_have_names_defaults_and_docstrings():
    found = {setting.name: setting for setting in settings(TrainConfig)}
    assert found["shards"].default is None and found["shards"].text.startswith("Folder with latent shards")
    assert found["batch_size"].default == str(TrainConfig(shards="x", autoencoder="x", output="x").batch_size)
    assert found["model.block_out_channels"].default == "[128, 256]" and found["init_from"].default == "null"
    nested = {setting.name: setting for setting in settings(TrainClassifierConfig)}
    assert nested["sets"].default == "[...]"
    of_entry = {setting.name for setting in settings(ClassifierSetConfig)}
    assert {f"sets[].{name}" for name in of_entry} <= nested.keys()
