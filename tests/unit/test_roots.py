"""The folders an executor may touch: every way out is closed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jef_daemon.actions.roots import Roots
from jef_daemon.errors import ConfigurationRefused


@pytest.fixture
def world(tmp_path: Path) -> Path:
    """Two roots, a folder whose name begins like a root's, and a secret outside."""
    for name in ("in", "out", "in-other"):
        (tmp_path / name).mkdir()
    (tmp_path / "in" / "a.mov").write_bytes(b"a")
    (tmp_path / "secret").write_bytes(b"s")
    return tmp_path


@pytest.fixture
def roots(world: Path) -> Roots:
    return Roots([world / "in", world / "out"], "copy")


@pytest.mark.parametrize(
    ("given_", "found"),
    [
        ("a.mov", "in/a.mov"),
        ("new/b.mov", "in/new/b.mov"),
        (".", "in"),
        ("x/../a.mov", "in/a.mov"),
        ("../out/a.mov", "out/a.mov"),
        ("..a", "in/..a"),
        ("~", "in/~"),
        ("$HOME", "in/$HOME"),
    ],
)
def test_inside(world: Path, roots: Roots, given_: str, found: str) -> None:
    """Relative to the first root; it need not exist; a shell's signs mean nothing."""
    assert roots.resolve(given_) == world.resolve() / found


def test_an_absolute_path_in_any_root(world: Path, roots: Roots) -> None:
    assert roots.resolve(str(world / "out" / "b")) == world.resolve() / "out" / "b"


@pytest.mark.parametrize(
    "given_",
    ["..", "../secret", "../in-other/x", "/etc/passwd", "/", "x/../../secret", "a.mov/../../secret", "//etc"],
)
def test_outside(roots: Roots, given_: str) -> None:
    """The refusal names what was asked for and what the operator can do."""
    with pytest.raises(ConfigurationRefused, match=r"lies outside the roots .*\[actions\.copy\]"):
        roots.resolve(given_)


@pytest.mark.parametrize("given_", ["", "\0", "a\0.mov", "../secret\0"])
def test_no_path(roots: Roots, given_: str) -> None:
    with pytest.raises(ConfigurationRefused, match="is no path"):
        roots.resolve(given_)


def test_no_roots() -> None:
    """Nothing configured, nothing allowed."""
    with pytest.raises(ConfigurationRefused, match=r"set roots in \[actions\.copy\]"):
        Roots([], "copy").resolve("a")


@pytest.mark.parametrize("target", ["../secret", "..", "/etc", "link", "../in-other"])
def test_links_lead_nowhere(world: Path, roots: Roots, target: str) -> None:
    """The link itself, and what lies below it."""
    link = world / "in" / "link"
    link.symlink_to(target)
    for asked in ("link", "link/x"):
        if target == "link":  # a loop has no end to be checked: it cannot be opened either
            with pytest.raises((ConfigurationRefused, OSError)):
                os.close(roots.open(roots.resolve(asked)))
        else:
            with pytest.raises(ConfigurationRefused):
                roots.resolve(asked)


def test_a_link_that_stays_inside(world: Path, roots: Roots) -> None:
    """It is resolved, so that what is checked is what is used."""
    (world / "in" / "link").symlink_to(world / "out")
    assert roots.resolve("link/b") == world.resolve() / "out" / "b"


def test_a_root_that_is_a_link(world: Path) -> None:
    """The operator may name a folder by a link."""
    (world / "linked").symlink_to("in")
    assert Roots([world / "linked"], "copy").resolve("a.mov") == world.resolve() / "in" / "a.mov"


@given(st.lists(st.sampled_from(["..", ".", "in", "out", "x", "link", "secret", ""]), max_size=8))
def test_no_combination_leads_out(tmp_path_factory: pytest.TempPathFactory, parts: list[str]) -> None:
    """Whatever is asked for is refused or lies in the root, for real."""
    world = tmp_path_factory.mktemp("world")
    root = world / "in"
    root.mkdir()
    (root / "link").symlink_to("..")
    try:
        found = Roots([root], "copy").resolve("/".join(parts))
    except ConfigurationRefused:
        return
    assert Path(os.path.realpath(found)).is_relative_to(root.resolve())


# --- opening ---------------------------------------------------------------------------------------------


def test_a_file_is_opened(roots: Roots) -> None:
    with os.fdopen(roots.open(roots.resolve("a.mov")), "rb") as stream:
        assert stream.read() == b"a"


def test_swapped_for_a_link(world: Path, roots: Roots) -> None:
    """Between resolving and opening somebody replaces the file."""
    path = roots.resolve("a.mov")
    path.unlink()
    path.symlink_to(world / "secret")
    with pytest.raises(OSError, match="symbolic links"):
        roots.open(path)


def test_its_folder_swapped_for_a_link(world: Path, roots: Roots) -> None:
    """The same, one level up: what was opened is checked, not what was named."""
    folder = world / "in" / "sub"
    folder.mkdir()
    (folder / "secret").write_bytes(b"harmless")
    path = roots.resolve("sub/secret")
    (folder / "secret").unlink()
    folder.rmdir()
    folder.symlink_to(world)
    with pytest.raises(ConfigurationRefused):
        roots.open(path)


@pytest.mark.timeout(10)
def test_what_is_no_file(world: Path, roots: Roots) -> None:
    """A folder, a FIFO that nobody writes to: refused, and it does not hang."""
    os.mkfifo(world / "in" / "pipe")
    for name in (".", "pipe"):
        with pytest.raises(OSError, match="no regular file"):
            roots.open(roots.resolve(name))


def test_nothing_stays_open(world: Path, roots: Roots) -> None:
    """A refusal closes what it opened."""
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(3):
        with pytest.raises(OSError, match="no regular file"):
            roots.open(roots.resolve("."))
    assert len(list(Path("/proc/self/fd").iterdir())) == before
