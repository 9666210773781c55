"""The documentation as a site: built strictly, its links lead somewhere, and nothing in it comes from elsewhere."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from tests.support.process import ROOT

LOADED = {"script": "src", "img": "src", "iframe": "src", "link": "href", "source": "src", "video": "src"}
"""What a browser fetches by itself, by element."""


@dataclass
class Reading(HTMLParser):
    """What is in a page: anchors, links, what it loads, blocks of diagrams."""

    anchors: set[str] = field(default_factory=set)
    links: list[str] = field(default_factory=list)
    loads: list[str] = field(default_factory=list)
    diagrams: int = 0

    def __post_init__(self) -> None:
        super().__init__()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        named = {key: value or "" for key, value in attributes}
        self.anchors |= {named[key] for key in ("id", "name") if key in named}
        if tag == "a" and "href" in named:
            self.links.append(named["href"])
        if tag in LOADED and LOADED[tag] in named:
            self.loads.append(named[LOADED[tag]])
        self.diagrams += "mermaid" in named.get("class", "").split()


@dataclass(frozen=True)
class Site:
    """The built site."""

    folder: Path
    pages: dict[Path, Reading]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Site:
    """Built as `make site` does, elsewhere."""
    folder = tmp_path_factory.mktemp("site")
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert built.returncode == 0, built.stdout + built.stderr
    assert "WARNING" not in built.stderr
    assert "Documentation built" in built.stderr
    pages = {}
    for path in sorted(folder.rglob("*.html")):
        pages[path] = Reading()
        pages[path].feed(path.read_text(encoding="utf-8"))
    return Site(folder, pages)


def test_every_page_of_the_documentation_is_in_it(site: Site) -> None:
    """And README, changes and the like; the strict build sees to it that the navigation names each."""
    pages = {path.relative_to(site.folder).as_posix() for path in site.pages}
    written = {path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")}
    assert {
        re.sub(r"(^|/)README\.md$", r"\1index.html", name) for name in written if "README" in name
    } <= pages
    assert {name.replace(".md", ".html") for name in written if "README" not in name} <= pages
    assert {"readme.html", "changelog.html", "contributing.html", "benchmarks.html"} <= pages


def test_the_navigation_names_each_page_once() -> None:
    """Two people may add the same one."""
    nav = (ROOT / "mkdocs.yml").read_text().partition("\nnav:\n")[2]
    pages = re.findall(r": (\S+\.md)$", nav, re.MULTILINE)
    assert len(pages) > 20
    assert sorted(set(pages)) == sorted(pages)


def test_links_and_anchors_lead_somewhere(site: Site) -> None:
    """Of the pages as they came out, after all that was rewritten."""
    broken, checked = [], 0
    for path, page in site.pages.items():
        for link in page.links + page.loads:
            target = urlsplit(link)
            if target.scheme or target.netloc or path.name == "404.html":
                continue
            checked += 1
            file = (path.parent / unquote(target.path)).resolve() if target.path else path
            file = file / "index.html" if file.is_dir() else file
            is_there = file.is_file() and file.is_relative_to(site.folder)
            anchor = unquote(target.fragment)
            if not is_there or (anchor and file in site.pages and anchor not in site.pages[file].anchors):
                broken.append(f"{path.relative_to(site.folder)}: {link}")
    assert checked > 1000
    assert broken == []


def test_links_to_elsewhere_are_well_formed(site: Site) -> None:
    """Nobody is asked whether they are there."""
    links = {link for page in site.pages.values() for link in page.links if urlsplit(link).scheme}
    assert links
    wrong = [
        link
        for link in links
        if urlsplit(link).scheme != "https"
        or not re.fullmatch(r"[a-z0-9-]+(\.[a-z0-9-]+)+", urlsplit(link).netloc)
        or re.search(r"[\s<>\"]", link)
    ]
    assert wrong == []


def test_nothing_is_loaded_from_elsewhere(site: Site) -> None:
    """No script, style, font or picture: it can be read without a network."""
    foreign = [
        f"{path.name}: {load}"
        for path, page in site.pages.items()
        for load in page.loads
        if urlsplit(load).netloc or urlsplit(load).scheme not in {"", "data"}
    ]
    assert foreign == []
    styles = list(site.folder.rglob("*.css"))
    assert styles
    for style in styles:
        fetched = re.findall(r"(?:url\(|@import\s+)[\"']?(https?:|//)", style.read_text(encoding="utf-8"))
        assert fetched == [], style


def test_diagrams_are_drawn_by_what_the_site_holds(site: Site) -> None:
    """The theme fetches the library from elsewhere unless a script of the page has brought it."""
    with_diagrams = {path.name for path, page in site.pages.items() if page.diagrams}
    assert {"index.html", "design.html", "life-cycle.html"} <= with_diagrams
    script = site.folder / "assets" / "mermaid.min.js"
    assert script.stat().st_size > 1_000_000
    for path, page in site.pages.items():
        if page.diagrams:
            assert any((path.parent / load).resolve() == script for load in page.loads), path


_PARSE = """
// Without a browser's document there is nothing to clean a text with: it is taken as it is.
Function.prototype.addHook = () => {};
Function.prototype.sanitize = (text) => text;
const fs = require("node:fs");
require("node:vm").runInThisContext(fs.readFileSync(process.argv[1], "utf8"));
(async () => {
  for (const text of JSON.parse(fs.readFileSync(0, "utf8")))
    await globalThis.mermaid.parse(text).catch((error) => console.log(text + "\\n" + error));
})();
"""


def test_diagrams_can_be_read(site: Site) -> None:
    """By the library that draws them; a wrong one would be shown as its source."""
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
    found = re.findall(
        r"^```mermaid\n(.*?)^```", "".join(page.read_text() for page in pages), re.MULTILINE | re.DOTALL
    )
    assert len(found) >= 5
    script = str(site.folder / "assets" / "mermaid.min.js")
    for texts, is_fine in ((found, True), (["sequenceDiagram\n    A->>B: one; two three"], False)):
        node = ["node", "-e", _PARSE, script]
        told = subprocess.run(
            node, input=json.dumps(texts), capture_output=True, text=True, check=True, timeout=60
        )
        assert (told.stdout == "") is is_fine, told.stdout


def test_code_and_tables_come_out_as_such(site: Site) -> None:
    """What the repository's host renders and the generator would not: fences, tables, lists without an empty line."""
    left = []
    for path in site.pages:
        body = re.sub(
            r"<(pre|code|script|style)\b.*?</\1>", "", path.read_text(encoding="utf-8"), flags=re.DOTALL
        )
        text = re.sub(r"<[^>]+>", "", body)
        left += [
            f"{path.name}: {line}"
            for line in text.splitlines()
            if re.match(r"\s*(```|\|.*\||- \S|\d+\. \S)", line)
        ]
    assert left == []
