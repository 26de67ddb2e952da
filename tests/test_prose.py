"""Length of sentences in pages and docstrings, size of the README, and terms of the glossary.

test_docs.py checks links and commands.
"""

import ast
import inspect
import re
import statistics
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCS = [
    path
    for folder in ("docs", "docs/tutorials")
    for path in sorted((ROOT / folder).glob("*.md"))
    if path.stem not in ("tools", "index")  # the output of --help, and the front page of the site
]
MOST_WORDS = 18
"""Maximum number of words of the median sentence."""
PACKAGES = [path.parent for path in sorted((ROOT / "ldm_smd").rglob("__init__.py"))]
ARGUMENT = re.compile(r"^ +[*\w, ]+: ", re.MULTILINE)
"""Start of an item under "Args:" in a docstring."""
README_LINES = 150
ABBREVIATIONS = re.compile(r"\b(e\.g|i\.e|et al|cf|vs|eq|no|fig)\.", re.IGNORECASE)
WORD = re.compile(r"[A-Za-z0-9]")
LONGEST = 45
"""Maximum number of words of a sentence."""


def paragraphs(text):
    """Yield the paragraphs and list items of a Markdown page, each as one line.

    Headings, tables, code, images and formulas (paragraphs indented by four spaces) are left out.
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
    """Remove the markup of a paragraph. A link becomes its text, and code or a formula becomes one word."""
    paragraph = re.sub(r"`[^`]*`", "code", paragraph)
    paragraph = re.sub(r"\$[^$]*\$", "formula", paragraph)
    paragraph = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", paragraph)
    return ABBREVIATIONS.sub(r"\1", paragraph.replace("**", ""))


def sentences(text):
    """Yield the words of each sentence of two or more words. It ends with a full stop, a question mark or its paragraph."""
    for paragraph in paragraphs(text):
        for sentence in re.split(r"(?<=[.!?])[)\"]?\s+(?=[\"(]?[A-Z0-9])", plain(paragraph)):
            words = [word for word in sentence.split() if WORD.search(word)]
            if len(words) > 1:
                yield words


def lengths(pages):
    return [len(words) for page in pages for words in sentences(page.read_text(encoding="utf-8"))]


def docstrings(package):
    """Yield (file, docstring) of modules, classes, functions and values in a package, without its subpackages."""
    for path in sorted(package.glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            body = getattr(node, "body", None)
            for statement in body if isinstance(body, list) else []:
                match statement:
                    case ast.Expr(ast.Constant(str(text))):
                        yield path.name, inspect.cleandoc(text)


PAGE = """# A heading. With two.

One sentence of `code. here` and 0.34 ± 0.02. A [second
one](a.b.md) goes on, e.g. here.

| a table. | b |

    a formula. here

* **An item.** It has
  two lines
* another item

```sh
no. Words here.
```
"""


def test_sentences_of_a_page_are_found():
    assert [" ".join(words) for words in sentences(PAGE)] == [
        "One sentence of code and 0.34 0.02.",
        "A second one goes on, e.g here.",
        "An item.",
        "It has two lines",
        "another item",
    ]


@pytest.mark.parametrize("pages", [[ROOT / "README.md"], DOCS], ids=["README", "docs"])
def test_the_median_sentence_is_short(pages):
    assert statistics.median(lengths(pages)) <= MOST_WORDS


@pytest.mark.parametrize("package", PACKAGES, ids=lambda package: package.name)
def test_the_median_sentence_of_docstrings_is_short(package):
    texts = [ARGUMENT.sub("* ", text) for _, text in docstrings(package)]
    counts = [len(words) for text in texts for words in sentences(text)]
    assert len(counts) >= len(texts) / 2 and statistics.median(counts) <= MOST_WORDS


def test_no_docstring_begins_with_of():
    found = [(name, text) for package in PACKAGES for name, text in docstrings(package)]
    assert len(found) > 1000 and [name for name, text in found if text.startswith("Of ")] == []


@pytest.mark.parametrize("page", [ROOT / "README.md", *DOCS], ids=lambda page: page.stem)
def test_no_sentence_is_too_long(page):
    assert max(lengths([page])) <= LONGEST


@pytest.mark.parametrize("page", DOCS, ids=lambda page: page.stem)
def test_a_page_begins_with_its_purpose_and_a_link_to_the_glossary(page):
    text = page.read_text(encoding="utf-8")
    first = next(paragraphs(text))
    assert re.search(r"\b(page|tutorial|section|recipe|Look)\b", first)
    assert page.stem == "glossary" or "glossary.md)" in text.split("\n## ")[0]


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= README_LINES


def test_terms_of_this_project_are_used_on_other_pages():
    ours = (ROOT / "docs/glossary.md").read_text(encoding="utf-8").split("## Terms of this project")[1]
    terms = [row.split("|")[1].strip() for row in re.findall(r"^\|.*\|$", ours, re.MULTILINE)[2:]]
    others = [path.read_text(encoding="utf-8") for path in DOCS if path.stem != "glossary"]
    text = " ".join(" ".join(others).lower().split())
    assert len(terms) > 10
    assert [term for term in terms if term.removeprefix("a ").removeprefix("the ").lower() not in text] == []


if __name__ == "__main__":
    for name in [ROOT / "README.md", *DOCS]:
        counts = lengths([name])
        print(f"{name.relative_to(ROOT)}: {len(counts)} sentences, median {statistics.median(counts)}, longest {max(counts)}")
    print("README and docs together:", statistics.median(lengths([ROOT / "README.md", *DOCS])))
