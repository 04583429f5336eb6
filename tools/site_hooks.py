"""Hooks of MkDocs: README, CONTRIBUTING and CHANGELOG become pages of the site, and links to other files that are no
pages become their names."""

import posixpath
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
ROOT_PAGES: Mapping[str, str] = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
}
"""Files of the repository's first level that are pages of the site."""
LINK = re.compile(r"\[([^\]]+)\]\(([^)#:\s]+)(#[^)\s]*)?\)")


def on_files(files: Any, config: Any) -> Any:
    """Add the pages that lie outside of docs/."""
    from mkdocs.structure.files import File

    for source, page in ROOT_PAGES.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=relinked(text, source)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Relink the pages of docs/."""
    path = page.file.src_uri
    return markdown if path in ROOT_PAGES.values() else relinked(markdown, f"docs/{path}")


def relinked(text: str, source: str) -> str:
    """A document's text with links as the site needs them.

    Args:
        text: Markdown.
        source: where the document lies in the repository, such as ``docs/concepts.md``.
    """
    here = posixpath.dirname(ROOT_PAGES.get(source, source.removeprefix("docs/")))

    def link(match: re.Match[str]) -> str:
        label, target, anchor = match[1], match[2], match[3] or ""
        place = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        page = place.removeprefix("docs/") if place.startswith("docs/") else ROOT_PAGES.get(place)
        return label if page is None else f"[{label}]({posixpath.relpath(page, here or '.')}{anchor})"

    return LINK.sub(link, text)
