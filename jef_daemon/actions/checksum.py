"""`checksum`: the digest of a file or of a whole tree, with byte progress and a manifest on request."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, field_validator

from jef_daemon.actions.bytes import CHUNK, ByteProgress, File, files_of, human
from jef_daemon.actions.roots import Roots, RootsSettings
from jef_daemon.errors import ConfigurationRefused
from jef_daemon.sdk import ActionExecutor, ActionExecutorResponse, ExecutionContext

ALGORITHMS = sorted(name for name in hashlib.algorithms_guaranteed if not name.startswith("shake"))


class Checksum(ActionExecutor):
    """Digest of a file or tree; symbolic links and special files are left out."""

    action = "checksum"
    may_run_again = True
    Settings = RootsSettings

    class Configuration(BaseModel):
        """What to read."""

        model_config = ConfigDict(extra="forbid")

        path: str = Field(description="A file or a folder below the roots.")
        algorithm: str = Field(default="sha256", description=f"One of {', '.join(ALGORITHMS)}.")
        manifest: str | None = Field(
            default=None, description="Write a list of digests and names here, as sha256sum does."
        )

        @field_validator("algorithm")
        @classmethod
        def _known(cls, value: str) -> str:
            if value not in ALGORITHMS:
                raise ValueError(f"{value!r} is no algorithm here; one of {', '.join(ALGORITHMS)}")
            return value

    def execute(self, context: ExecutionContext[Configuration]) -> ActionExecutorResponse:
        """Read everything once."""
        wanted = context.configuration
        roots = Roots(self.settings.roots, context.action)
        path = roots.resolve(wanted.path)
        target = roots.resolve(wanted.manifest) if wanted.manifest else None
        if target == path:
            raise ConfigurationRefused(
                f"the manifest would replace {path}, which it is to list; name another file"
            )
        # A manifest may lie in its tree; it cannot list itself, nor what a killed attempt left of it.
        own = set() if target is None else {target, _part_of(target)}
        files = [file for file in files_of(path) if file.path not in own]
        total = sum(file.size for file in files)
        progress = ByteProgress(context, total, len(files))
        lines = []
        for file in files:
            lines.append(_line(_digest(file, roots, wanted.algorithm, progress), file.relative))
            progress.end_file()
        manifest = "".join(lines).encode("utf-8", "surrogateescape")
        if path.is_dir():
            digest = hashlib.new(wanted.algorithm, manifest, usedforsecurity=False).hexdigest()
        else:
            digest = lines[0].lstrip("\\").partition(" ")[0]
        if target is not None:
            write_atomically(target, manifest)
        what = f"{len(files)} files" if path.is_dir() else path.name
        return ActionExecutorResponse(
            result=f"{wanted.algorithm} of {what}, {human(total)}: {digest}",
            job_context_variables={
                "digest": digest,
                "algorithm": wanted.algorithm,
                "bytes": total,
                "files": len(files),
                "manifest": str(target) if target else None,
            },
        )


def _digest(file: File, roots: Roots, algorithm: str, progress: ByteProgress) -> str:
    hashed = hashlib.new(algorithm, usedforsecurity=False)
    with os.fdopen(roots.open(file.path), "rb", buffering=0) as stream:
        size = 0
        while chunk := stream.read(CHUNK):
            hashed.update(chunk)
            size += len(chunk)
            progress.add(len(chunk))
    if size != file.size:
        raise OSError(f"{file.path} changed while it was read: {file.size} bytes before, {size} now")
    return hashed.hexdigest()


def _line(digest: str, name: str) -> str:
    """A line of sha256sum's format, which escapes what would break it."""
    if "\\" in name or "\n" in name:
        escaped = name.replace("\\", "\\\\").replace("\n", "\\n")
        return f"\\{digest}  {escaped}\n"
    return f"{digest}  {name}\n"


def _part_of(path: Path) -> Path:
    return path.with_name(f".{path.name[:200]}.jef-part")


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file that is whole or not there."""
    part = _part_of(path)
    try:
        with part.open("wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
