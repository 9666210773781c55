"""The folders that an executor may touch. Whoever may publish a request names paths; the operator names roots."""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from jef_daemon.errors import ConfigurationRefused


class RootsSettings(BaseModel):
    """The operator's keys of an action that touches files."""

    model_config = ConfigDict(extra="forbid")

    roots: list[Path] = Field(
        default_factory=list, description="Folders it may touch; unset: a folder of the daemon's own."
    )


class Roots:
    """Resolves paths and refuses those that lead outside.

    Args:
        roots: folders; a relative path is taken relative to the first.
        action: named in the refusal's remedy.
    """

    def __init__(self, roots: Sequence[Path], action: str) -> None:
        self._roots = [Path(os.path.realpath(root)) for root in roots]
        self._action = action

    def resolve(self, given: str) -> Path:
        """The real path, symbolic links resolved; it need not exist.

        Raises:
            ConfigurationRefused: it lies outside the roots, or is no path.
        """
        if not given or "\0" in given:
            raise ConfigurationRefused(f"{given!r} is no path")
        if not self._roots:
            raise ConfigurationRefused(f"no roots are configured; set roots in [actions.{self._action}]")
        real = Path(os.path.realpath(self._roots[0] / given))
        self._check(real, given)
        return real

    def open(self, path: Path) -> int:
        """Open a regular file for reading; what was opened is checked, not what was named.

        Raises:
            ConfigurationRefused: it was swapped for something outside the roots.
            OSError: it cannot be opened, or is no regular file.
        """
        # NONBLOCK: opening a FIFO that was put there meanwhile must not hang.
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise OSError(f"{path} is no regular file")
            opened = Path(f"/proc/self/fd/{descriptor}")
            if opened.is_symlink():  # not everywhere is Linux
                self._check(opened.readlink(), str(path))
        except BaseException:
            os.close(descriptor)
            raise
        return descriptor

    def _check(self, real: Path, given: str) -> None:
        if not any(real == root or root in real.parents for root in self._roots):
            allowed = ", ".join(str(root) for root in self._roots)
            raise ConfigurationRefused(
                f"{given} lies outside the roots ({allowed}); the operator can add its folder to roots "
                f"in [actions.{self._action}]"
            )
