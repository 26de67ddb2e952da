"""docs/hooks.py, tested with a small site. make site builds the full one."""

from pathlib import Path

import pytest
from mkdocs.commands.build import build
from mkdocs.config import load_config

import ldm_smd

ROOT = Path(__file__).parents[1]
HOOKS = ROOT / "docs/hooks.py"


@pytest.fixture
def site(tmp_path):
    """A function that builds a site from the given files of a repository and returns its folder."""

    def build_site(files):
        for name, text in {"docs/index.md": "# Home", **files}.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        config = f"site_name: x\nhooks: [{HOOKS}]\nuse_directory_urls: false\n"
        config += "markdown_extensions: [{pymdownx.arithmatex: {generic: true}}]\nvalidation: {links: {anchors: warn}}\n"
        (tmp_path / "mkdocs.yml").write_text(config, encoding="utf-8")
        loaded = load_config(str(tmp_path / "mkdocs.yml"), strict=True)
        loaded.plugins.on_startup(command="build", dirty=False)
        build(loaded)
        return tmp_path / "site"

    return build_site


def test_files_outside_docs_get_pages_if_they_are_linked(site):
    built = site(
        {
            "docs/guide/page.md": "[a](../../configs/a.yaml) [r](../../results/r.md) [c](../../model)\n\n```\n[a](../x)\n```\n",
            "configs/a.yaml": "steps: 8\n",
            "results/r.md": "Measured. [Back](../docs/guide/page.md), ![plot](plot.png)",
            "results/plot.png": "picture",
            "model/README.md": "---\nlicense: x\n---\n# Card",
        }
    )
    page = (built / "guide/page.html").read_text()
    for target in ("configs/a.yaml.html", "results/r.html", "model/index.html"):
        assert f'href="../repository/{target}"' in page and (built / "repository" / target).is_file()
    assert "[a](../x)" in page, "links in code are not changed"
    assert "steps: 8" in (built / "repository/configs/a.yaml.html").read_text()
    result = (built / "repository/results/r.html").read_text()
    assert 'href="../../guide/page.html"' in result and 'src="plot.png"' in result
    assert (built / "repository/results/plot.png").read_text() == "picture"
    assert "license" not in (built / "repository/model/index.html").read_text()


@pytest.mark.parametrize("link", ["nowhere.md", "../configs/nowhere.yaml", "index.md#nowhere"])
def test_a_broken_link_is_an_error(link, site):
    with pytest.raises(SystemExit):
        site({"docs/page.md": f"[x]({link})"})


def test_the_front_page_has_the_beginning_of_the_readme(site):
    built = site(
        {
            "docs/index.md": "<!-- README -->\n\n## Here",
            "README.md": "# Project\n\n[page](docs/page.md) [later](#not-here)\n\n## Not here",
            "docs/page.md": "# Page",
        }
    )
    page = (built / "index.html").read_text()
    assert 'href="repository/README.html#not-here"' in page or 'href="repository/index.html#not-here"' in page
    assert 'href="page.html"' in page and "Project" in page and "Here" in page and "Not here" not in page


def test_formulas_are_mathml(site):
    page = (site({"docs/page.md": "so $a_t < b$\n\n$$\n\\sum_j |x - x_j|\n$$\n"}) / "page.html").read_text()
    assert page.count("<math") == 2 and page.count("arithmatex") == 0
    assert "<msub><mi>a</mi><mi>t</mi></msub>" in page and 'display="block"' in page


def test_notebooks_become_pages_with_their_images(site):
    stored = (ROOT / "docs/notebook/first-steps.ipynb").read_text(encoding="utf-8")
    linked = {"docs/method.md": "# M", "docs/samplers.md": "# S", "docs/tools.md": "# T", "README.md": "# R"}
    built = site({"docs/notebook/first-steps.ipynb": stored, "docs/page.md": "[it](notebook/first-steps.ipynb)", **linked})
    assert 'href="notebook/first-steps.html"' in (built / "page.html").read_text()
    page = (built / "notebook/first-steps.html").read_text()
    assert page.count("<img") == 6 == len(list((built / "notebook/first-steps_files").glob("*.jpg")))


def test_every_public_name_is_in_the_reference():
    pages = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "docs/reference").glob("*.md"))
    missing = [name for name in ldm_smd.__all__ if name != "__version__" and f".{name}\n" not in pages]
    assert not missing
