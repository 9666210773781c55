"""Opening a ledger: the engine, who owns it, its version; and what its errors mean in a sentence."""

from __future__ import annotations

import fcntl
import os
import time
import uuid
from pathlib import Path
from typing import IO, Any

from sqlalchemy import URL, Engine, create_engine, event, insert, inspect, make_url, text
from sqlalchemy.exc import ArgumentError, DBAPIError, SQLAlchemyError

from jef_daemon.errors import LedgerError, LedgerInUse, LedgerTooNew, LedgerUnavailable
from jef_daemon.ledger import schema

_BUSY_S = 5.0
"""How long SQLite waits for another process's lock before it says so."""
_LEFT_BEHIND_S, _LOOK_AGAIN_S = 5.0, 0.02
"""A daemon that was killed in the moment in which it started a process has left it what it had open, until that one is
another program: milliseconds, or as long as a machine under load takes."""

_VERSION_TABLE = (
    "CREATE TABLE alembic_version "
    "(version_num VARCHAR(32) NOT NULL, CONSTRAINT alembic_version_pkc PRIMARY KEY (version_num))"
)
"""As the migration tool makes it."""
_MEANINGS = (
    ("disk is full", "its disk is full; free some space on it"),
    (
        "readonly database",
        "it cannot be written; check the owner and the permissions of the file and its folder",
    ),
    ("unable to open", "it cannot be opened; check that the folder exists and belongs to the daemon's user"),
    ("database is locked", "another process holds it locked; find it with `fuser` and let it finish"),
    ("not a database", "the file is no ledger; move it away or set another JEF_LEDGER_URL"),
    ("malformed", "the file is damaged; restore it from a backup"),
    ("disk i/o error", "its disk reports an error; look at the kernel's log"),
)
"""(what the database says, what it means and what to do)."""


def explain(error: SQLAlchemyError, url: URL) -> str:
    """One sentence that names the ledger, what is wrong and the remedy."""
    said = str(getattr(error, "orig", None) or error)
    for words, meaning in _MEANINGS:
        if words in said.lower():
            return f"the ledger {_named(url)} takes no writes: {meaning}"
    return f"the ledger {_named(url)} does not answer: {said}"


def open_engine(ledger_url: str, *, read_only: bool = False) -> Engine:
    """An engine for a ledger, not yet connected.

    Args:
        ledger_url: `sqlite:////absolute/path`.
        read_only: for looking only: changes nothing, not even the folder.

    Raises:
        LedgerError: the URL is no database's that we can use.
    """
    url = parse(ledger_url)
    if not read_only:
        try:
            Path(url.database or "").parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise LedgerUnavailable(f"the ledger's folder cannot be made: {error}") from None
    # Values are the jobs' own, and tokens: no error is to carry them into a log, or to whoever waits for an answer.
    connecting = {"timeout": _BUSY_S, "check_same_thread": False}
    engine = create_engine(url, connect_args=connecting, hide_parameters=True)
    event.listen(engine, "connect", _set_up_reader if read_only else _set_up_writer)
    event.listen(engine, "begin", _begin_reading if read_only else _begin_writing)
    return engine


def parse(ledger_url: str) -> URL:
    """The ledger's URL, checked."""
    try:
        url = make_url(ledger_url)
    except ArgumentError:
        raise LedgerError(f"{ledger_url!r} is no ledger URL; write sqlite:////absolute/path") from None
    if url.get_backend_name() != "sqlite":
        raise LedgerError(
            f"a ledger on {url.get_backend_name()} is not supported yet; use sqlite:////absolute/path"
        )
    if not url.database or url.database == ":memory:":
        raise LedgerError(
            "the ledger must be a file, or a restart would lose every job: sqlite:////absolute/path"
        )
    return url


def existing(ledger_url: str) -> str:
    """The URL of a ledger that is there.

    Raises:
        LedgerUnavailable: it is not.
    """
    database = parse(ledger_url).database or ""
    if not Path(database).exists():
        raise LedgerUnavailable(
            f"there is no ledger at {database}; start a daemon, or set JEF_LEDGER_URL to its ledger"
        )
    return ledger_url


def examine(ledger_url: str) -> None:
    """Open a ledger as a daemon would, beside a running one: version, and whether it can be written.

    Raises:
        LedgerError: with what is wrong.
    """
    engine = open_engine(ledger_url)
    try:
        migrate(engine)
    finally:
        engine.dispose()


class Ownership:
    """The lock that keeps two daemons from using one ledger file; released with the process."""

    def __init__(self, url: URL) -> None:
        path = Path(f"{url.database}.lock")
        try:
            self._file: IO[str] = path.open("a+", encoding="utf-8")
        except OSError as error:
            raise LedgerUnavailable(f"the ledger's lock file cannot be made: {error}") from None
        self._take(url)
        self._file.truncate(0)
        self._file.write(f"{os.getpid()}\n")
        self._file.flush()

    def release(self) -> None:
        """Let another daemon have it."""
        self._file.close()

    def _take(self, url: URL) -> None:
        until = time.monotonic() + _LEFT_BEHIND_S
        while True:
            try:
                return fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                self._file.seek(0)
                owner = self._file.read().strip()
            if not _is_gone(owner):
                said = f"belongs to the daemon with process id {owner or '?'}; stop that one"
            elif time.monotonic() < until:
                time.sleep(_LOOK_AGAIN_S)
                continue
            else:
                said = f"is held by what a daemon that is gone (process id {owner}) left behind; end what `fuser` names"
            self._file.close()
            raise LedgerInUse(f"the ledger {_named(url)} {said}, or give this one its own JEF_LEDGER_URL")


def _is_gone(owner: str) -> bool:
    """Whether a process, by its id, has ended."""
    try:
        os.kill(int(owner), 0)
    except ProcessLookupError:
        return True
    except (ValueError, OverflowError, PermissionError):
        return False
    return False


def migrate(engine: Engine) -> None:
    """Bring the ledger to the newest version.

    Raises:
        LedgerTooNew: a newer version of this program has written it.
        LedgerUnavailable: it cannot be read or written.
    """
    try:
        found = version(engine)
        if found == schema.HEAD:
            _check_writable(engine)
        elif found is None:
            _create(engine)
        else:
            _upgrade(engine, found)
    except DBAPIError as error:
        raise LedgerUnavailable(explain(error, engine.url)) from None


def version(engine: Engine) -> str | None:
    """The ledger's migration, None for an empty one."""
    with engine.connect() as connection:
        if not inspect(connection).has_table("alembic_version"):
            return None
        found: str | None = connection.scalar(text("SELECT version_num FROM alembic_version"))
        return found


def _check_writable(engine: Engine) -> None:
    with engine.begin() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = version_num"))


def _create(engine: Engine) -> None:
    """Make an empty ledger as all migrations would, which a test compares."""
    # Without the migration tool: it takes as long to import as all the rest of a start, and ten megabytes for good.
    with engine.begin() as connection:
        if inspect(connection).has_table("alembic_version"):
            return  # somebody else was as quick
        schema.metadata.create_all(connection)
        connection.execute(insert(schema.identity).values(id=uuid.uuid4().hex[:12]))
        connection.execute(text(_VERSION_TABLE))
        connection.execute(text("INSERT INTO alembic_version VALUES (:head)"), {"head": schema.HEAD})


def _upgrade(engine: Engine, found: str) -> None:
    # Imported here: a daemon whose ledger is up to date never pays for the migration tool.
    from alembic import command
    from alembic.config import Config
    from alembic.script import ScriptDirectory

    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
    known = {script.revision for script in ScriptDirectory.from_config(config).walk_revisions()}
    if found not in known:
        raise LedgerTooNew(
            f"the ledger {_named(engine.url)} has version {found}, newer than this program's {schema.HEAD}; "
            "start the newer program, or restore a ledger from before its upgrade"
        )
    with engine.begin() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, "head")


def _set_up_writer(dbapi: Any, record: object) -> None:
    # SQLite's driver must not begin transactions by itself: ours begin with the write lock (see below).
    dbapi.isolation_level = None
    cursor = dbapi.cursor()
    for pragma in (
        "journal_mode=WAL",
        "synchronous=FULL",
        "temp_store=MEMORY",
        "journal_size_limit=67108864",
    ):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


def _set_up_reader(dbapi: Any, record: object) -> None:
    dbapi.isolation_level = None
    dbapi.execute("PRAGMA query_only=ON")


def _begin_writing(connection: Any) -> None:
    # IMMEDIATE: what we read stays true until we commit, and a busy ledger is found out at the beginning.
    connection.exec_driver_sql("BEGIN IMMEDIATE")


def _begin_reading(connection: Any) -> None:
    connection.exec_driver_sql("BEGIN")


def _named(url: URL) -> str:
    return (
        str(url.database) if url.get_backend_name() == "sqlite" else url.render_as_string(hide_password=True)
    )
