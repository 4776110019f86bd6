"""What the site needs beside MkDocs: files outside of `docs/`, notebooks, and formulas.

Pages are plain Markdown that is read on GitHub too, so they link to files of the repository and to
notebooks as they lie. For the site every such file becomes a page: Markdown as it is, a notebook as
its cells and outputs, any other text as one block of code. Formulas become MathML while the site is
built, which browsers render without a script.
"""

import contextlib
import html
import io
import os
import posixpath
import re
from pathlib import Path

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from nbconvert import MarkdownExporter

ROOT = Path(__file__).parents[1]

_LINK = re.compile(r"(?<=\]\()([^)\s#:]+)(?=[)#])")
_CODE = re.compile(r"^```.*?^```|`[^`\n]+`", re.MULTILINE | re.DOTALL)
_FORMULA = re.compile(
    r'<(?:span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</(?:span|div)>', re.DOTALL
)
_HELP = re.compile(r"^\$ loft-jax (\w+) --help$", re.MULTILINE)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages of notebooks, and of the files of the repository that pages link to."""
    for notebook in [file for file in files if file.src_uri.endswith(".ipynb")]:
        files.remove(notebook)
        path = Path(str(notebook.abs_src_path))
        text, resources = MarkdownExporter().from_filename(str(path))
        files.append(_page(config, notebook.src_uri, text))
        for name, picture in resources["outputs"].items():
            uri = posixpath.join(posixpath.dirname(notebook.src_uri), name)
            files.append(File.generated(config, uri, content=picture))
    # Pages that are added link to others.
    waiting = list(files.documentation_pages())
    while waiting:
        page = waiting.pop()
        for link in _LINK.findall(_CODE.sub("", page.content_string)):
            target = _target(page.src_uri, link)
            if target.startswith("docs/") or not (ROOT / target).is_file():
                continue
            if files.get_file_from_path(_page_of(target)) is None:
                text = (ROOT / target).read_text("utf-8")
                if not target.endswith(".md"):
                    text = f"# {target}\n\n```{target.rpartition('.')[2]}\n{text.rstrip()}\n```\n"
                added = _page(config, target, text)
                files.append(added)
                waiting.append(added)
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turns links to what has become a page into links to that page."""

    def on_site(match: re.Match[str]) -> str:
        target = _target(page.file.src_uri, match[1])
        if not (ROOT / target).is_file():
            return match[1]  # for MkDocs to complain of
        return posixpath.relpath(
            _page_of(target.removeprefix("docs/")), posixpath.dirname(page.file.src_uri) or "."
        )

    pieces, last = [], 0
    for code in _CODE.finditer(markdown):
        pieces += [_LINK.sub(on_site, markdown[last : code.start()]), code[0]]
        last = code.end()
    text = "".join([*pieces, _LINK.sub(on_site, markdown[last:])])
    if page.file.src_uri == "api/command-line.md":
        text = _HELP.sub(lambda match: f"{match[0]}\n{_help_of(match[1])}", text)
    return text


def on_post_page(output: str, page: Page, config: MkDocsConfig) -> str:
    """Replaces formulas by MathML."""

    def mathml(match: re.Match[str]) -> str:
        formula = html.unescape(match[2]).strip()
        # As bars that do not stretch: one with an exponent would stand lower than its partner.
        formula = re.sub(r"\\[lr]Vert\b", r"\\|", formula)
        try:
            if match[1] == "(":
                return convert(formula)
            return f'<div class="formula">{convert(formula, display="block")}</div>'
        except Exception as error:
            raise PluginError(f"{page.file.src_uri}: {formula!r} is not read: {error!r}") from error

    return _FORMULA.sub(mathml, output)


def _help_of(command: str) -> str:
    from loft_jax.cli import main  # here, since it takes longer than the rest of a page

    os.environ["COLUMNS"] = "80"
    with contextlib.redirect_stdout(io.StringIO()) as said:
        main([command, "--help"])
    return said.getvalue().rstrip()


def _page(config: MkDocsConfig, path: str, text: str) -> File:
    return File.generated(config, _page_of(path), content=text)


def _page_of(path: str) -> str:
    """The page of a file: of itself if it is one, or a picture."""
    stem, ending = posixpath.splitext(path)
    return path if ending in (".md", ".png", ".svg") else stem + ".md"


def _target(page: str, link: str) -> str:
    """The file of the repository that a link of a page names."""
    here = page if _outside(page) else f"docs/{page}"
    return posixpath.normpath(posixpath.join(posixpath.dirname(here), link))


def _outside(page: str) -> bool:
    return not (ROOT / "docs" / page).exists() and not page.startswith("start/")
