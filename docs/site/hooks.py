"""What the site's generator is told to do besides: pages of the repository that lie outside `docs/`, their links.

The pages are written for whoever reads them in the repository: their links go to files there. In the site, those to
README, changelog and the like become links to the pages made of them; those to sources, to a page with the source.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(Path(__file__).parent)]

from scripts import MERMAID, WORKER, Unavailable, fetch  # noqa: E402  the file beside this one

_ELSEWHERE = {
    "README.md": "readme.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "LICENSE": "source/LICENSE.md",
    "benchmarks/README.md": "benchmarks.md",
    "examples/README.md": "examples/readme.md",
}
"""Pages of the site that are files outside `docs/`, by their path in the repository."""
_LINK = re.compile(r"(?P<before>\]\()(?P<target>[^)\s#:]+)(?P<anchor>#[^)\s]*)?(?P<after>\))")
_FENCE = re.compile(r"^(```|~~~~?).*?^\1", re.MULTILINE | re.DOTALL)
_LANGUAGES = {".py": "python", ".toml": "toml", ".sh": "sh", ".json": "json", ".yml": "yaml", ".yaml": "yaml"}
_ASSETS = Path(__file__).parent / "assets"


def slug(text: str, separator: str = "-") -> str:
    """A heading's anchor, as the repository's host makes it: the pages' links are written for that."""
    return re.sub(r"[^\w\- ]", "", text.lower()).strip().replace(" ", separator)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Anchors as on the repository's host."""
    config.mdx_configs["toc"]["slugify"] = slug
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages from elsewhere, the sources that any page links to, and what the pages load."""
    for path, uri in _ELSEWHERE.items():
        if path.endswith(".md"):
            files.append(File.generated(config, uri, content=(ROOT / path).read_text(encoding="utf-8")))
    for path in sorted({linked for page in _pages(files) for linked in _sources(page, files)}):
        files.append(File.generated(config, _source_page(path), content=_shown(path)))
    for asset in sorted(_ASSETS.iterdir()):
        files.append(File.generated(config, f"assets/{asset.name}", abs_src_path=str(asset)))
    for script in (MERMAID, WORKER):
        try:
            brought = fetch(script, ROOT / ".jef" / "site")
        except Unavailable as error:
            raise PluginError(str(error)) from None
        files.append(File.generated(config, f"assets/{script.name}", abs_src_path=str(brought)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links as they are right in the site."""
    here = _home(page.file)

    def moved(match: re.Match[str]) -> str:
        target = _uri(here, match["target"], files)
        if target is None:
            return match[0]  # the generator says that it leads nowhere
        up = len(PurePosixPath(page.file.src_uri).parts) - 1
        return f"{match['before']}{'../' * up}{target}{match['anchor'] or ''}{match['after']}"

    return _outside_code(markdown, lambda text: _LINK.sub(moved, text))


def on_post_page(output: str, page: Page, config: MkDocsConfig) -> str:
    """The site's own script where the theme's template names a server's."""
    up = "../" * (len(PurePosixPath(page.file.dest_uri).parts) - 1)
    return output.replace(WORKER.foreign, f"{up}assets/{WORKER.name}")


def on_post_template(output_content: str, template_name: str, config: MkDocsConfig) -> str:
    """The same in the page for what is not found; the generator writes its links from the root."""
    return output_content.replace(WORKER.foreign, f"/assets/{WORKER.name}")


def _pages(files: Files) -> Iterator[File]:
    yield from (file for file in files.documentation_pages() if not file.src_uri.startswith("source/"))


def _home(file: File) -> PurePosixPath:
    """Where a page lies in the repository."""
    outside = {uri: path for path, uri in _ELSEWHERE.items()}
    path = PurePosixPath(outside.get(file.src_uri, f"docs/{file.src_uri}"))
    return path.parent


def _sources(file: File, files: Files) -> Iterator[str]:
    """Files of the repository that a page links to and that are no pages."""
    text = _outside_code(file.content_string, lambda text: text, code="")
    for match in _LINK.finditer(text):
        path = _resolved(_home(file), match["target"])
        if path and path not in _ELSEWHERE and not _in_docs(path, files):
            yield path


def _uri(here: PurePosixPath, target: str, files: Files) -> str | None:
    """Where in the site a link leads; None: nowhere."""
    path = _resolved(here, target)
    if path is None:
        return None
    if path in _ELSEWHERE:
        return _ELSEWHERE[path]
    return _in_docs(path, files) or _source_page(path)


def _in_docs(path: str, files: Files) -> str | None:
    uri = path.removeprefix("docs/")
    return uri if path.startswith("docs/") and files.get_file_from_path(uri) is not None else None


def _resolved(here: PurePosixPath, target: str) -> str | None:
    """A link's file by its path in the repository; of a folder its README, or the only file in it."""
    path = (ROOT / here / target).resolve()
    if path.is_dir():
        inside = [path / "README.md"] if (path / "README.md").exists() else sorted(path.iterdir())[:1]
        path = inside[0] if inside else path
    if not path.is_file() or not path.is_relative_to(ROOT):
        return None
    return path.relative_to(ROOT).as_posix()


def _source_page(path: str) -> str:
    return f"source/{path}.md"


def _shown(path: str) -> str:
    """A source as a page."""
    text = (ROOT / path).read_text(encoding="utf-8")
    language = _LANGUAGES.get(Path(path).suffix, "text")
    return f"---\nhide: [toc]\n---\n\n# `{path}`\n\n`````{language}\n{text.rstrip()}\n`````\n"


def _outside_code(markdown: str, change: Any, code: str | None = None) -> str:
    """A page with a change made outside its blocks of code; `code` in their place, if it is given."""
    parts, end = [], 0
    for block in _FENCE.finditer(markdown):
        parts += [change(markdown[end : block.start()]), block[0] if code is None else code]
        end = block.end()
    return "".join([*parts, change(markdown[end:])])
