"""Pages of the site that live elsewhere in the repository, and the links between all pages: a hook of mkdocs.

Pages are written for a reader of the repository, where README.md links to docs/install.md and docs/results.md to
../LOG.md. On the site these are neighbours.
"""

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
PAGES = {
    "README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md",
    "LOG.md": "log.md", "PAPERS.md": "papers.md", "benchmarks/RESULTS.md": "benchmarks.md",
    "toyworld/pipeline/README.md": "toyworld.md",
}  # fmt: skip
"""Files beside docs/, and what they are called on the site."""
SOURCES = {page: source for source, page in PAGES.items()}

LINK = re.compile(r"(!?\[[^\]]*\])\(([^)#:\s]+)(#[^)\s]*)?\)")
ROLE = re.compile(r":(?:func|class|data|mod|meth|attr):(?=<code>)")


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that live outside docs/."""
    for source, page in PAGES.items():
        text = (ROOT / source).read_text()
        if text.startswith("---\n"):  # the card of a model begins with its metadata
            text = text.split("---\n", 2)[2]
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, **rest: Any) -> str:
    """Turn links between files of the repository into links between pages, and those to other files into text."""
    here = page.file.src_uri

    def turned(match: re.Match[str]) -> str:
        text, target, anchor = match[1], place_on_site(here, match[2]), match[3] or ""
        return f"{text}({target}{anchor})" if target else text.strip("[]")

    return LINK.sub(turned, markdown)


def on_page_content(html: str, **rest: Any) -> str:
    """Drop the roles of docstrings, such as :func:, before the names they belong to."""
    return ROLE.sub("", html)


def place_on_site(page: str, link: str) -> str:
    """Return where a link of a page leads on the site; empty for files that are not part of it."""
    source = SOURCES.get(page, f"docs/{page}")
    target = posixpath.normpath(posixpath.join(posixpath.dirname(source), link))
    if target in PAGES:
        target = PAGES[target]
    elif target.startswith("docs/"):
        target = target.removeprefix("docs/")
    else:
        return ""
    return posixpath.relpath(target, posixpath.dirname(page) or ".")
