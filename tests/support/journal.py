"""A journal: a datagram socket, and the native protocol read strictly, as systemd documents it."""

from __future__ import annotations

import array
import fcntl
import os
import re
import socket
import struct
from pathlib import Path
from typing import Self

_NAME = re.compile(rb"[A-Z][A-Z0-9_]{0,63}")
"""Of a field that a client may set: no underscore at its beginning."""
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SEAL


def parse(entry: bytes) -> dict[str, str]:
    """The fields of an entry.

    Raises:
        AssertionError: it keeps not to the protocol.
    """
    found: dict[str, str] = {}
    while entry:
        line, newline, rest = entry.partition(b"\n")
        assert newline, f"no line end: {entry[:80]!r}"
        name, equals, value = line.partition(b"=")
        if not equals:
            (length,) = struct.unpack("<Q", rest[:8])
            value, rest = rest[8 : 8 + length], rest[8 + length :]
            assert len(value) == length
            assert rest[:1] == b"\n"
            rest = rest[1:]
        assert _NAME.fullmatch(name), f"no name of a field: {name!r}"
        assert name.decode() not in found, "twice"
        found[name.decode()] = value.decode()
        entry = rest
    assert "MESSAGE" in found
    return found


class JournalSocket:
    """Where a journal would listen.

    Args:
        path: made.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.large = 0
        """Entries that came as a file."""
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)

    def __enter__(self) -> Self:
        self._socket.bind(str(self.path))
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def next(self, within_s: float = 30) -> dict[str, str]:
        """The fields of the next entry."""
        self._socket.settimeout(within_s)
        data, ancillary, flags, _ = self._socket.recvmsg(1 << 20, socket.CMSG_LEN(4))
        assert not flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC)
        if not ancillary:
            return parse(data)
        assert data == b""
        [(_, kind, payload)] = ancillary
        assert kind == socket.SCM_RIGHTS
        [descriptor] = array.array("i", payload)
        self.large += 1
        try:
            # Else journald would have to copy what the sender could still change.
            assert fcntl.fcntl(descriptor, fcntl.F_GET_SEALS) & _SEALS == _SEALS
            return parse(os.pread(descriptor, os.fstat(descriptor).st_size, 0))
        finally:
            os.close(descriptor)

    def until(self, event: str, **fields: str) -> dict[str, str]:
        """The next entry of an event with these fields."""
        while True:
            found = self.next()
            if found.get("JEF_EVENT") == event and fields.items() <= found.items():
                return found
