"""How the prose reads: the length of its sentences, the size of the README, and the glossary.

Links are checked in test_docs.py.
"""

import re
import statistics
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
GENERATED = "tools.md"
DOCS = [path for path in sorted((ROOT / "docs").rglob("*.md")) if path.name != GENERATED]
MOST_WORDS = 18
"""Of the median sentence."""
README_LINES = 150
ABBREVIATIONS = re.compile(r"\b(e\.g|i\.e|et al|cf|vs|eq|no|fig)\.", re.IGNORECASE)
WORD = re.compile(r"[A-Za-z]")


def paragraphs(text):
    """The prose of a Markdown page: its paragraphs and list items, each as one line.

    Headings, tables, code, pictures and formulas (paragraphs indented by four spaces) are left out.
    """
    text = re.sub(r"^ *```.*?^ *```", "\n", text, flags=re.DOTALL | re.MULTILINE)
    text = re.sub(r"\$\$.*?\$\$", "\n", text, flags=re.DOTALL)
    block: list[str] = []
    for line in [*text.splitlines(), ""]:
        starts_item = re.match(r"\s*([*+-]|\d+\.) ", line)
        is_prose = line.strip() and not re.match(r"\s*(\||#|!\[|---|!!!|<)", line) and (block or not line.startswith("    "))
        if (starts_item or not is_prose) and block:
            yield " ".join(block)
            block = []
        if is_prose:
            block.append(re.sub(r"^\s*([*+-]|\d+\.) ", "", line).strip())


def plain(paragraph):
    """A paragraph without its markup: a link is its text, a piece of code or a formula is one word."""
    paragraph = re.sub(r"`[^`]*`", "code", paragraph)
    paragraph = re.sub(r"\$[^$]*\$", "formula", paragraph)
    paragraph = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", paragraph)
    return ABBREVIATIONS.sub(r"\1", paragraph.replace("**", ""))


def sentences(text):
    """The sentences of a page: they end in a full stop, a question mark, or with their paragraph, and have at least two words."""
    for paragraph in paragraphs(text):
        for sentence in re.split(r"(?<=[.!?])[)\"]?\s+(?=[\"(]?[A-Z0-9])", plain(paragraph)):
            words = [word for word in sentence.split() if WORD.search(word)]
            if len(words) > 1:
                yield words


def lengths(pages):
    return [len(words) for page in pages for words in sentences(page.read_text(encoding="utf-8"))]


def test_sentences_are_found_as_a_reader_finds_them():
    page = (
        "# A heading. With two.\n\nOne sentence of `code. here` and 0.34 ± 0.02. A [second\none](a.b.md) goes on, e.g. here.\n\n"
        "| a table. | b |\n\n    a formula. here\n\n* **An item.** It has\n  two lines\n* another item\n\n```sh\nno. Words here.\n```\n"
    )
    found = [" ".join(words) for words in sentences(page)]
    assert found == ["One sentence of code and", "A second one goes on, e.g here.", "An item.", "It has two lines", "another item"]


@pytest.mark.parametrize("pages", [[ROOT / "README.md"], DOCS], ids=["README", "docs"])
def test_the_median_sentence_is_short(pages):
    assert statistics.median(lengths(pages)) <= MOST_WORDS


@pytest.mark.parametrize("page", DOCS, ids=lambda page: page.name)
def test_no_page_has_long_sentences_throughout(page):
    assert statistics.median(lengths([page])) <= MOST_WORDS + 2


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= README_LINES


if __name__ == "__main__":
    for name in [ROOT / "README.md", *DOCS]:
        counts = lengths([name])
        print(f"{name.relative_to(ROOT)}: {len(counts)} sentences, median {statistics.median(counts)}, longest {max(counts)}")
    print("README and docs together:", statistics.median(lengths([ROOT / "README.md", *DOCS])))
