"""Scripts that the site's pages run, from npm packages into the site: the theme would load them from somebody's server.

Kept by version in a folder that is not committed; refused unless they are the very files that were looked at.
"""

from __future__ import annotations

import hashlib
import io
import subprocess
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path

_PATIENCE_S = 120


@dataclass(frozen=True)
class Script:
    """A file of an npm package."""

    package: str
    version: str
    member: str
    sha256: str
    foreign: str
    """Where the theme would load it from."""

    @property
    def name(self) -> str:
        """As the site has it."""
        return f"{self.package}.min.js"


MERMAID = Script(
    "mermaid",
    "11.17.2",
    "package/dist/mermaid.min.js",
    "581ed7d74bd9048d0e3a91363927d72ef22942d7722546b27f7cc29e35390eb8",
    "https://unpkg.com/mermaid@11/dist/mermaid.min.js",
)
"""Draws the diagrams. The theme loads its own unless a script of the page has brought it (`extra_javascript`)."""
WORKER = Script(
    "iframe-worker",
    "1.0.4",
    "package/shim/index.js",
    "e8e412dbcfea9b7e31b5ffa288d7b6035915e714c542f4176a0cdbe262fc9609",
    "https://unpkg.com/iframe-worker/shim",
)
"""Lets the search work in a site that is opened from a disk."""


class Unavailable(Exception):
    """A script cannot be had, with what to do about it."""


def fetch(script: Script, folder: Path) -> Path:
    """The file, brought from npm the first time.

    Raises:
        Unavailable: npm is missing or has no network, or what came is another file.
    """
    path = folder / f"{script.version}-{script.name}"
    if not path.exists() or _digest(path.read_bytes()) != script.sha256:
        content = _packed(script)
        if _digest(content) != script.sha256:
            raise Unavailable(
                f"{script.package} {script.version} from npm is not the file that docs/site/scripts.py expects"
            )
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, delete=False) as new:
            new.write(content)
        Path(new.name).chmod(0o644)
        Path(new.name).replace(path)  # two builds at once: each writes the whole of it
    return path


def _packed(script: Script) -> bytes:
    wanted = f"{script.package}@{script.version}"
    with tempfile.TemporaryDirectory() as folder:
        try:
            npm = ["npm", "pack", "--silent", wanted]
            subprocess.run(npm, cwd=folder, check=True, capture_output=True, timeout=_PATIENCE_S)
        except (OSError, subprocess.SubprocessError) as error:
            raise Unavailable(
                f"{wanted}, a script of the site's pages, cannot be had from npm ({error}); "
                "with npm and a network, run this again"
            ) from None
        package = next(Path(folder).glob("*.tgz")).read_bytes()
    with tarfile.open(fileobj=io.BytesIO(package)) as archive:
        member = archive.extractfile(script.member)
        if member is None:
            raise Unavailable(f"{wanted} from npm has no {script.member}")
        return member.read()


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
