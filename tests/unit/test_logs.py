"""Logs: one line an event, machine-readable where nobody watches; libraries' own go the same way."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator
from typing import Any

import pytest
import structlog

from jef_daemon import logs
from jef_daemon.settings import Logging


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    """Logging belongs to the whole process: it is put back."""
    root = logging.getLogger()
    before, level = root.handlers[:], root.level
    yield
    structlog.reset_defaults()
    root.handlers[:], root.level = before, level
    root.setLevel(level)
    for name in (*logs._QUIET, *logs._SILENT):
        logging.getLogger(name).setLevel(logging.NOTSET)


def configured(stream: io.StringIO | None = None, **settings: Any) -> io.StringIO:
    stream = stream or io.StringIO()
    logs.configure(Logging(**settings), stream)
    return stream


def lines(stream: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_a_line_of_json() -> None:
    """The event first, then what it is about; UTC."""
    stream = configured()
    structlog.get_logger().bind(execution_id="624").info("finished", outcome="completed")
    (line,) = lines(stream)
    assert next(iter(line)) == "event"
    assert (line["event"], line["execution_id"], line["level"]) == ("finished", "624", "info")
    assert line["timestamp"].endswith("Z")


def test_one_line_whatever_is_told() -> None:
    """Line ends, objects, exceptions, bytes: nothing breaks a line or raises."""
    stream = configured()
    try:
        raise ValueError("a\nb")
    except ValueError:
        structlog.get_logger().error("x", detail="c\nd", what=object(), raw=b"\xff", exc_info=True)
    (line,) = lines(stream)
    assert line["detail"] == "c\nd"
    assert "ValueError: a\nb" in line["exception"]


@pytest.mark.parametrize(
    ("format_", "stream", "is_json"),
    [
        ("auto", io.StringIO(), True),
        ("auto", Terminal(), False),
        ("json", Terminal(), True),
        ("console", io.StringIO(), False),
    ],
)
def test_formats(format_: str, stream: io.StringIO, is_json: bool) -> None:
    """A terminal gets words, everything else JSON, unless the operator says so."""
    configured(stream, format=format_)
    structlog.get_logger().info("started")
    assert stream.getvalue().startswith("{") is is_json
    assert ("\x1b[" in stream.getvalue()) is (stream.isatty() and not is_json)


@pytest.mark.parametrize(
    ("level", "told"),
    [
        ("debug", ["debug", "info", "warning", "error"]),
        ("info", ["info", "warning", "error"]),
        ("warning", ["warning", "error"]),
        ("error", ["error"]),
    ],
)
def test_levels(level: str, told: list[str]) -> None:
    """Ours and the libraries' alike."""
    stream = configured(level=level)
    for name in ("debug", "info", "warning", "error"):
        getattr(structlog.get_logger(), name)("ours")
        getattr(logging.getLogger("somebody"), name)("theirs")
    assert [line["level"] for line in lines(stream)] == [name for name in told for _ in range(2)]


def test_a_librarys_record() -> None:
    """Its logger and its text, the arguments filled in."""
    stream = configured()
    logging.getLogger("somebody.else").warning("%s of %d", "one", 2)
    (line,) = lines(stream)
    assert (line["event"], line["logger"], line["detail"]) == ("library", "somebody.else", "one of 2")


def test_noisy_libraries_are_quiet() -> None:
    """Their warnings only; and what the bus says in our words is not said twice."""
    stream = configured(level="debug")
    logging.getLogger("aio_pika.robust").info("connecting")
    logging.getLogger("aiormq.connection").error("lost")
    logging.getLogger("sqlalchemy.engine").info("SELECT")
    assert stream.getvalue() == ""
    logging.getLogger("aio_pika.robust").warning("odd")
    assert len(lines(stream)) == 1


def test_a_library_that_logs_at_a_level_of_its_own() -> None:
    """It is told as the level below it."""
    stream = configured()
    logging.getLogger("somebody").log(25, "notice")
    logging.getLogger("somebody").log(60, "beyond")
    assert [(line["level"], line["detail"]) for line in lines(stream)] == [
        ("info", "notice"),
        ("critical", "beyond"),
    ]


def test_a_library_that_logs_wrongly(capsys: pytest.CaptureFixture[str]) -> None:
    """A record whose arguments do not fit is its author's mistake: it must not stop the caller."""
    configured()
    logging.getLogger("somebody").warning("%d", "x")
    assert "Logging error" in capsys.readouterr().err


def test_configured_again_does_not_tell_twice() -> None:
    """A child process configures for itself."""
    configured()
    stream = configured()
    logging.getLogger("somebody").warning("once")
    assert len(lines(stream)) == 1
