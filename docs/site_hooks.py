"""What makes a site of pages that are written for the repository (mkdocs.yml, `hooks`).

README.md is the site's first page, and pages link to files of the repository as GitHub resolves them. So the few files outside
docs/ that pages need are files of the site too, and links are turned from one layout into the other.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from urllib.parse import urlsplit

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parent.parent
MOVED = {"README.md": "index.md"}
PICTURES = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob("benchmarks/results/*.svg"))
OUTSIDE = ["CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "CITATION.cff", *PICTURES]
LINK = re.compile(r"(?<=\]\()[^)\s]+")


def on_files(files, config):
    """Add what lies outside docs/."""
    for path in [*MOVED, *OUTSIDE]:
        files.append(File.generated(config, MOVED.get(path, path), abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown, page, **_):
    """Links of a page as they are in the site."""
    in_site = page.file.src_uri
    moved = {new: old for old, new in MOVED.items()} | {path: path for path in OUTSIDE}
    folders = posixpath.dirname(moved.get(in_site, f"docs/{in_site}")), posixpath.dirname(in_site) or "."
    return LINK.sub(lambda link: _moved(link[0], *folders), markdown)


def _moved(link, folder_in_repository, folder_in_site):
    parts = urlsplit(link)
    if parts.scheme or not parts.path:
        return link
    target = posixpath.normpath(posixpath.join(folder_in_repository, parts.path))
    target = MOVED.get(target, target.removeprefix("docs/"))
    return parts._replace(path=posixpath.relpath(target, folder_in_site)).geturl()
