"""Logs: one line an event, machine-readable where nobody watches; libraries' own go the same way."""

from __future__ import annotations

import io
import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import structlog

from jef_daemon import logs
from jef_daemon.errors import SettingsError
from jef_daemon.sections import Logging
from tests.support.journal import JournalSocket


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


# --- the journal -----------------------------------------------------------------------------------------


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[JournalSocket]:
    with JournalSocket(tmp_path / "journal") as listening:
        yield listening


def to_journal(journal: JournalSocket, **settings: Any) -> io.StringIO:
    return configured(format="journal", journal_socket=journal.path, **settings)


def test_the_journal_gets_fields(journal: JournalSocket) -> None:
    """Each by its name, the level as a number of syslog's, the place in the code, and a line for people."""
    stream = to_journal(journal)
    structlog.get_logger().bind(execution_id="624").warning(
        "finished", outcome="completed", executions=3, actions=["a", "b"], what=None, is_late=False
    )
    told = journal.next()
    assert told.pop("CODE_FILE") == __file__
    assert told.pop("CODE_LINE").isdigit()
    assert told == {
        "MESSAGE": 'finished execution_id=624 outcome=completed executions=3 actions="[\\"a\\", \\"b\\"]" '
        "is_late=false",
        "PRIORITY": "4",
        "SYSLOG_IDENTIFIER": "jef",
        "CODE_FUNC": "test_the_journal_gets_fields",
        "JEF_EVENT": "finished",
        "JEF_EXECUTION_ID": "624",
        "JEF_OUTCOME": "completed",
        "JEF_EXECUTIONS": "3",
        "JEF_ACTIONS": '["a", "b"]',
        "JEF_IS_LATE": "false",
    }
    assert stream.getvalue() == ""


@pytest.mark.parametrize(
    ("level", "priority"),
    [("debug", "7"), ("info", "6"), ("warning", "4"), ("error", "3"), ("critical", "2")],
)
def test_priorities(journal: JournalSocket, level: str, priority: str) -> None:
    to_journal(journal, level="debug")
    getattr(structlog.get_logger(), level)("x")
    assert journal.next()["PRIORITY"] == priority


def test_whatever_is_told_keeps_to_the_protocol(journal: JournalSocket) -> None:
    """Line ends, halves of characters, odd names, objects: all of it arrives, nothing raises."""
    to_journal(journal)
    structlog.get_logger().error(
        "x",
        detail="a\nJEF_EVENT=forged\n",
        half="\ud800",
        what=object(),
        raw=b"\xff",
        **{"Öd name-" * 20: "y"},
    )
    told = journal.next()
    assert told["JEF_DETAIL"] == "a\nJEF_EVENT=forged\n"
    assert told["JEF_EVENT"] == "x"
    assert told["JEF_HALF"] == "\\ud800"
    assert told["JEF_WHAT"].startswith('"<object')
    assert [value for name, value in told.items() if name.startswith("JEF__D_NAME_")] == ["y"]


def test_an_exception_stands_in_the_message_and_in_a_field(journal: JournalSocket) -> None:
    to_journal(journal)
    try:
        raise ValueError("a\nb")
    except ValueError:
        structlog.get_logger().exception("job_broke")
    told = journal.next()
    assert told["JEF_EXCEPTION"].endswith("ValueError: a\nb")
    assert told["MESSAGE"] == f"job_broke\n{told['JEF_EXCEPTION']}"
    assert told["PRIORITY"] == "3"


def test_a_large_event_goes_as_a_sealed_file(journal: JournalSocket) -> None:
    """No datagram is so long."""
    to_journal(journal)
    structlog.get_logger().info("x", detail="y" * 3_000_000)
    assert journal.next()["JEF_DETAIL"] == "y" * 3_000_000
    assert journal.large == 1


def test_a_librarys_record_goes_there_too(journal: JournalSocket) -> None:
    """With the place that it comes from."""
    to_journal(journal)
    logging.getLogger("somebody.else").warning("%s of %d", "one", 2)
    told = journal.next()
    assert (told["JEF_EVENT"], told["JEF_LOGGER"], told["JEF_DETAIL"]) == (
        "library",
        "somebody.else",
        "one of 2",
    )
    assert told["CODE_FILE"] == __file__


def test_a_journal_that_went_gets_nothing_and_nothing_is_lost(journal: JournalSocket) -> None:
    """Restarted, it has another socket at the same place: that one is found. Meanwhile it is told as JSON."""
    stream = to_journal(journal)
    journal.__exit__()
    journal.path.unlink()
    structlog.get_logger().info("away", execution_id="624")
    (line,) = lines(stream)
    assert (line["JEF_EVENT"], line["JEF_EXECUTION_ID"]) == ("away", "624")
    assert "No such file" in line["JEF_NOT_IN_THE_JOURNAL"]
    with JournalSocket(journal.path) as again:
        structlog.get_logger().info("back")
        assert again.next()["JEF_EVENT"] == "back"


def test_a_journal_that_is_not_there_is_a_mistake() -> None:
    with pytest.raises(SettingsError, match="no journal listens at /nowhere"):
        configured(format="journal", journal_socket="/nowhere")


def test_auto_finds_the_journal_where_systemd_has_connected_the_stream(
    journal: JournalSocket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Device and inode must be the stream's own: what inherits the variable may have redirected it."""
    with (tmp_path / "stream").open("w+") as stream:
        there = os.fstat(stream.fileno())
        for named, is_journal in (
            (f"{there.st_dev}:{there.st_ino}", True),
            (f"{there.st_dev}:{there.st_ino + 1}", False),
            ("nonsense", False),
            ("", False),
        ):
            monkeypatch.setenv("JOURNAL_STREAM", named)
            logs.configure(Logging(journal_socket=journal.path), stream)
            structlog.get_logger().info("told")
            assert bool(stream.tell()) is not is_journal
            if is_journal:
                assert journal.next()["JEF_EVENT"] == "told"
            stream.seek(0)
            stream.truncate()


def test_a_traceback_on_a_console_shows_no_variables() -> None:
    """A secret may be in one of them."""
    stream = configured(Terminal(), format="console")
    password = "hunter" + "2"  # not in the source line that a traceback quotes
    try:
        raise ValueError(len(password))
    except ValueError:
        structlog.get_logger().exception("x")
    assert "ValueError: 7" in stream.getvalue()
    assert password not in stream.getvalue()
