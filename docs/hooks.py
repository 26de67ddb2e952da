"""What the site needs beside MkDocs: notebooks as pages, the files of the repository that pages link to, the head of the README
on the first page, and formulas as MathML, which browsers draw themselves."""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import nbformat
from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from nbconvert import MarkdownExporter

README_MARK = "<!-- README -->"
REPOSITORY = "repository"
"""Folder of the site for files from outside docs."""
LINK = re.compile(r"(?<=\]\()(?P<target>[^)\s#:]+)(?P<anchor>#[^)\s]*)?(?=\))")
FENCE = re.compile(r"^(```|~~~).*?^\1", flags=re.DOTALL | re.MULTILINE)
FORMULA = re.compile(r'<(?P<tag>span|div) class="arithmatex">\\[(\[](?P<latex>.*?)\\[)\]]</(?P=tag)>', flags=re.DOTALL)
ENTITIES = {"&lt;": "<", "&gt;": ">", "&amp;": "&"}
LANGUAGES = {".py": "python", ".yaml": "yaml", ".yml": "yaml", ".json": "json", ".toml": "toml", ".sh": "sh", "": "text"}
PICTURES = {".png", ".jpg", ".jpeg", ".svg", ".webp"}


class Repository:
    """Finds the files of the repository that pages link to, and gives each a place in the site."""

    def __init__(self, config: MkDocsConfig) -> None:
        self.config = config
        self.docs = Path(config.docs_dir)
        self.root = self.docs.parent
        self.added: dict[str, File] = {}

    def page_of(self, path: Path) -> str | None:
        """Return the page that shows a file of the repository, a folder by its README; None where there is nothing."""
        if path.is_dir():
            path /= "README.md"
        if not path.is_file() or not path.is_relative_to(self.root):
            return None
        if path.is_relative_to(self.docs):
            return (path.with_suffix(".md") if path.suffix == ".ipynb" else path).relative_to(self.docs).as_posix()
        name = path.relative_to(self.root).as_posix()
        uri = f"{REPOSITORY}/{name}"
        if path.suffix not in PICTURES | {".md"}:
            uri += ".md"
        if uri not in self.added:
            self._add(uri, path)
        return uri

    def _add(self, uri: str, path: Path) -> None:
        options: dict[str, Any] = {"inclusion": InclusionLevel.INCLUDED}
        if path.suffix in PICTURES:
            self.added[uri] = File.generated(self.config, uri, abs_src_path=str(path), **options)
            return
        text = path.read_text(encoding="utf-8")
        if path.suffix != ".md":
            language = LANGUAGES.get(path.suffix, "text")
            text = f"# {path.name}\n\n`{path.relative_to(self.root).as_posix()}`\n\n```{language}\n{text.rstrip()}\n```\n"
        else:
            text = without_front_matter(text)
        # Its own links lead from where it stands in the repository. The place is kept: links may lead in circles.
        self.added[uri] = File.generated(self.config, uri, content=text, **options)
        self.added[uri] = File.generated(self.config, uri, content=self.linked(text, path, uri), **options)

    def linked(self, markdown: str, source: Path, uri: str) -> str:
        """Change the links of a page, ``source`` in the repository and ``uri`` in the site, to where their files are in the
        site. Code is left alone, and so are links that lead nowhere: MkDocs warns of them."""

        def changed(match: re.Match) -> str:
            target = (source.parent / unquote(match["target"])).resolve()
            page = self.page_of(target)
            if page is None:
                return match[0]
            return posixpath.relpath(page, posixpath.dirname(uri) or ".") + (match["anchor"] or "")

        parts, end = [], 0
        for fence in FENCE.finditer(markdown):
            parts += [LINK.sub(changed, markdown[end : fence.start()]), fence[0]]
            end = fence.end()
        return "".join((*parts, LINK.sub(changed, markdown[end:])))


def without_front_matter(text: str) -> str:
    """Drop the YAML head of a model card."""
    return re.sub(r"\A---\n.*?\n---\n", "", text, flags=re.DOTALL)


def head_of_readme(root: Path) -> str:
    """Return the README from its title to the first section; its links to the sections after that lead to the whole README."""
    return (root / "README.md").read_text(encoding="utf-8").split("\n## ")[0].replace("](#", "](README.md#")


def notebook_page(path: Path) -> tuple[str, dict[str, bytes]]:
    """Return a notebook with its stored outputs as Markdown, and its pictures by name."""
    names = {"output_files_dir": f"{path.stem}_files"}
    body, resources = MarkdownExporter().from_notebook_node(nbformat.read(path, as_version=4), names)
    return body, resources["outputs"]


def on_files(files: Files, config: MkDocsConfig) -> Files:
    repository = Repository(config)
    for file in list(files):
        path = Path(file.abs_src_path or "")
        if path.suffix == ".ipynb":
            body, pictures = notebook_page(path)
            for name, content in pictures.items():
                files.append(File.generated(config, posixpath.join(posixpath.dirname(file.src_uri), name), content=content))
            uri = posixpath.splitext(file.src_uri)[0] + ".md"
            files.append(File.generated(config, uri, content=repository.linked(body, path, uri)))
        elif file.is_documentation_page() and path.is_file():
            text = path.read_text(encoding="utf-8")
            if README_MARK in text:
                head = repository.linked(head_of_readme(repository.root), repository.root / "README.md", file.src_uri)
                text = repository.linked(text, path, file.src_uri).replace(README_MARK, head)
            else:
                text = repository.linked(text, path, file.src_uri)
            files.remove(file)
            files.append(File.generated(config, file.src_uri, content=text))
    for file in repository.added.values():
        files.append(file)
    return files


def on_page_content(html: str, **_: Any) -> str:
    return FORMULA.sub(mathml, html)


def mathml(match: re.Match) -> str:
    """Return a formula that arithmatex has marked as MathML."""
    latex = match["latex"]
    for entity, character in ENTITIES.items():
        latex = latex.replace(entity, character)
    return convert(latex.strip(), display="block" if match["tag"] == "div" else "inline")
