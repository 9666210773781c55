"""`copy`: a file or tree is copied under a temporary name, synced, read back, compared, and then renamed.

Under the final name there is never half a file: not after a full disk, a kill, a power failure.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from jef_daemon.actions.bytes import CHUNK, ByteProgress, File, files_of, human
from jef_daemon.actions.roots import Roots, RootsSettings
from jef_daemon.sdk import ActionExecutor, ActionExecutorResponse, ExecutionContext


class Copy(ActionExecutor):
    """Verified, atomic copy of a file or tree; symbolic links and special files are left out."""

    action = "copy"
    may_run_again = True
    Settings = RootsSettings

    class Configuration(BaseModel):
        """From where to where."""

        model_config = ConfigDict(extra="forbid")

        source: str = Field(description="A file or a folder below the roots.")
        destination: str = Field(
            description="Its new path below the roots; a folder that exists: its place in it."
        )
        overwrite: bool = Field(default=False, description="Replace what is there.")

    def execute(self, context: ExecutionContext[Configuration]) -> ActionExecutorResponse:
        """Copy, verify, rename."""
        wanted = context.configuration
        roots = Roots(self.settings.roots, context.action)
        source, named = roots.resolve(wanted.source), roots.resolve(wanted.destination)
        destination = named
        if context.attempt > 1:
            _clean_up(named, context.execution_id)
        if named.is_dir() and not (source.is_dir() and wanted.overwrite):
            destination = roots.resolve(str(named / source.name))
            if context.attempt > 1:
                _clean_up(destination, context.execution_id)
        _check_apart(source, destination)
        files = files_of(source)
        total = sum(file.size for file in files)
        if context.attempt > 1 and not wanted.overwrite:
            # An attempt may have been killed when its copy was in place and its end not yet recorded.
            progress = ByteProgress(context, 2 * total, 2 * len(files))
            for made in (named, destination):
                if _is_apart(source, made) and _is_copy(source, files, made, progress):
                    return _response(made, files, total)
        if destination.exists() and not wanted.overwrite:
            raise FileExistsError(errno.EEXIST, "it exists; set overwrite to replace it", str(destination))
        destination.parent.mkdir(parents=True, exist_ok=True)
        _check_room(destination.parent, total)
        part = _part_of(destination, context.execution_id)
        progress = ByteProgress(context, 2 * total, 2 * len(files))
        try:
            _copy_all(source, files, part, roots, progress)
            _put_in_place(part, destination, overwrite=wanted.overwrite)
        except OSError as error:
            if error.errno == errno.ENOSPC:
                raise OSError(
                    errno.ENOSPC,
                    f"the disk of {destination.parent} is full; {human(total)} were to be copied",
                ) from error
            raise
        finally:
            _remove(part)
        return _response(destination, files, total)


def _response(destination: Path, files: list[File], total: int) -> ActionExecutorResponse:
    return ActionExecutorResponse(
        result=f"copied {human(total)} to {destination}, verified",
        job_context_variables={"destination": str(destination), "bytes": total, "files": len(files)},
    )


def _check_apart(source: Path, destination: Path) -> None:
    if not source.exists():
        raise FileNotFoundError(errno.ENOENT, "there is no such file or folder", str(source))
    if not _is_apart(source, destination):
        raise ValueError(f"{destination} and {source} lie within each other")


def _is_apart(source: Path, destination: Path) -> bool:
    return not (destination == source or source in destination.parents or destination in source.parents)


def _is_copy(source: Path, files: list[File], made: Path, progress: ByteProgress) -> bool:
    """Whether a path holds the very same files with the very same bytes."""
    if not (source.is_file() and made.is_file()) and not (source.is_dir() and made.is_dir()):
        return False
    copied = files_of(made)
    if [file.size for file in copied] != [file.size for file in files]:
        return False
    if source.is_dir() and [file.relative for file in copied] != [file.relative for file in files]:
        return False
    return all(
        _digest(file.path, progress) == _digest(copy.path, progress)
        for file, copy in zip(files, copied, strict=True)
    )


def _check_room(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(
            errno.ENOSPC, f"{human(needed)} are needed and {human(free)} free on the disk of {folder}"
        )


def _part_of(destination: Path, execution_id: str) -> Path:
    """The temporary name: beside the destination, the same for every attempt of a job, of no other job."""
    mark = hashlib.sha256(execution_id.encode()).hexdigest()[:12]
    name = destination.name.encode()[:200].decode(errors="ignore")
    return destination.with_name(f".{name}.jef-{mark}.part")


def _clean_up(destination: Path, execution_id: str) -> None:
    """Undo what a killed attempt of this very job left beside a destination, whatever becomes of this one."""
    part = _part_of(destination, execution_id)
    old = part.with_suffix(".old")
    _remove(part)
    if old.exists() and not destination.exists():
        old.rename(destination)
    _remove(old)


def _copy_all(source: Path, files: list[File], part: Path, roots: Roots, progress: ByteProgress) -> None:
    if not source.is_dir():
        _copy_file(files[0], part, roots, progress)
        return
    part.mkdir()
    for folder, _, _ in os.walk(source):
        (part / Path(folder).relative_to(source)).mkdir(exist_ok=True)
    for file in files:
        _copy_file(file, part / file.relative, roots, progress)
    for folder, _, _ in os.walk(source, topdown=False):
        copied = part / Path(folder).relative_to(source)
        shutil.copystat(folder, copied)
        _sync_folder(copied)


def _copy_file(file: File, target: Path, roots: Roots, progress: ByteProgress) -> None:
    hashed = hashlib.blake2b()
    with os.fdopen(roots.open(file.path), "rb", buffering=0) as reading:
        with target.open("xb", buffering=0) as writing:
            while chunk := reading.read(CHUNK):
                hashed.update(chunk)
                _write(writing.fileno(), chunk)
                progress.add(len(chunk))
            os.fsync(writing.fileno())
            if hasattr(os, "posix_fadvise"):
                # So that verifying reads what the disk has, not what memory remembers.
                os.posix_fadvise(writing.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        progress.end_file()
        info = os.fstat(reading.fileno())
    if _digest(target, progress) != hashed.digest():
        raise OSError(errno.EIO, f"the copy of {file.path} reads back otherwise than it was written")
    progress.end_file()
    target.chmod(info.st_mode & 0o7777)
    os.utime(target, ns=(info.st_atime_ns, info.st_mtime_ns))


def _write(descriptor: int, chunk: bytes) -> None:
    view = memoryview(chunk)
    while view:
        view = view[os.write(descriptor, view) :]


def _digest(path: Path, progress: ByteProgress) -> bytes:
    hashed = hashlib.blake2b()
    with path.open("rb", buffering=0) as stream:
        while chunk := stream.read(CHUNK):
            hashed.update(chunk)
            progress.add(len(chunk))
    return hashed.digest()


def _put_in_place(part: Path, destination: Path, *, overwrite: bool) -> None:
    if part.is_dir():
        _put_tree(part, destination, overwrite=overwrite)
    elif overwrite:
        part.replace(destination)
    else:
        try:
            # A link refuses to replace, so that two copies to one name cannot both win.
            os.link(part, destination)
        except FileExistsError:
            raise
        except OSError:  # a file system without links
            if destination.exists():
                raise FileExistsError(errno.EEXIST, "it exists by now", str(destination)) from None
            part.rename(destination)
    _sync_folder(destination.parent)


def _put_tree(part: Path, destination: Path, *, overwrite: bool) -> None:
    if not overwrite:
        try:
            part.rename(destination)  # refuses to replace anything but an empty folder
        except OSError:
            if destination.exists():
                raise FileExistsError(errno.EEXIST, "it exists by now", str(destination)) from None
            raise
        return
    old = part.with_suffix(".old")
    if destination.exists():
        destination.rename(old)
    try:
        part.rename(destination)
    except OSError:
        if old.exists():
            old.rename(destination)
        raise
    _remove(old)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        with contextlib.suppress(FileNotFoundError):
            path.unlink()
