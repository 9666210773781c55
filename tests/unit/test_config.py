"""Where a setting comes from, and what is said of a wrong one."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jef_daemon import config
from jef_daemon.actions import command
from jef_daemon.config import broker_url, known_keys, load, masked, parse_override
from jef_daemon.errors import ExitCode, SettingsError
from jef_daemon.settings import Settings


@pytest.fixture(autouse=True)
def _no_system_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine's own configuration is nobody's business here."""
    monkeypatch.setattr(config, "SYSTEM_FILE", tmp_path / "none.toml")


def loaded(
    folder: Path, text: str = "", environ: Mapping[str, str] | None = None, **overrides: Any
) -> Settings:
    path = folder / "jef.toml"
    path.write_text(text, encoding="utf-8")
    dotted = {key.replace("__", "."): value for key, value in overrides.items()}
    return load(path, dotted, environ or {})


def problem(folder: Path, text: str = "", environ: Mapping[str, str] | None = None, **overrides: Any) -> str:
    with pytest.raises(SettingsError) as caught:
        loaded(folder, text, environ, **overrides)
    assert caught.value.exit_code == ExitCode.SETTINGS
    return str(caught.value)


def secret(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text)
    path.chmod(0o600)
    return path


# --- which source wins -----------------------------------------------------------------------------------


def test_nothing_set(tmp_path: Path) -> None:
    """It works without any configuration."""
    assert load(None, None, {}).slots.total == Settings().slots.total


def test_each_source_beats_the_one_before(tmp_path: Path) -> None:
    """Default, file, environment, command line: key by key, not section by section."""
    text = "[slots]\ntotal = 1\nbacklog = 11\nwarm_processes = 5\n"
    environ = {"JEF_SLOTS__TOTAL": "2", "JEF_SLOTS__BACKLOG": "22"}
    slots = loaded(tmp_path, text, environ, slots__total="3").slots
    assert (slots.total, slots.backlog, slots.warm_processes) == (3, 22, 5)


def test_a_section_as_json_keeps_the_rest(tmp_path: Path) -> None:
    """JEF_SLOTS takes an object; what it does not name stays."""
    slots = loaded(tmp_path, "[slots]\ntotal = 1\nbacklog = 11\n", {"JEF_SLOTS": '{"total": 2}'}).slots
    assert (slots.total, slots.backlog) == (2, 11)


def test_the_file_that_the_environment_names(tmp_path: Path) -> None:
    """JEF_CONFIG is read unless the command line names one."""
    (tmp_path / "other.toml").write_text('prefix = "other"')
    environ = {"JEF_CONFIG": str(tmp_path / "other.toml")}
    assert load(None, None, environ).prefix == "other"
    assert loaded(tmp_path, 'prefix = "mine"', environ).prefix == "mine"


def test_the_systems_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is read where nothing else is named."""
    monkeypatch.setattr(config, "SYSTEM_FILE", tmp_path / "system.toml")
    (tmp_path / "system.toml").write_text('prefix = "system"')
    assert load(None, None, {}).prefix == "system"


FILE, CREDENTIAL, ENVIRONMENT, COMMAND_LINE = (
    f"amqp://u:p@{host}/" for host in ("file", "credential", "environment", "command-line")
)


@pytest.mark.parametrize(
    ("sources", "winner"),
    [
        ("file", FILE),
        ("file credential", CREDENTIAL),
        ("file credential environment", ENVIRONMENT),
        ("file environment", ENVIRONMENT),
        ("file command-line", COMMAND_LINE),
        ("file credential command-line", COMMAND_LINE),
        ("file credential environment command-line", COMMAND_LINE),
    ],
)
@pytest.mark.parametrize("in_file", ["amqp_url", "amqp_url_file"])
def test_the_brokers_url(tmp_path: Path, sources: str, winner: str, in_file: str) -> None:
    """File, credential, environment, command line, whichever of the two keys the weaker ones use."""
    values = {"amqp_url": FILE, "amqp_url_file": str(secret(tmp_path, "from-file", FILE))}
    text = f"{in_file} = {json.dumps(values[in_file])}"
    environ = {}
    if "credential" in sources:
        secret(tmp_path, "amqp_url", CREDENTIAL)
        environ["CREDENTIALS_DIRECTORY"] = str(tmp_path)
    if "environment" in sources:
        environ["JEF_AMQP_URL"] = ENVIRONMENT
    overrides = {"amqp_url": COMMAND_LINE} if "command-line" in sources else {}
    assert broker_url(loaded(tmp_path, text, environ, **overrides)) == winner


def test_paths_in_the_file_count_from_its_folder(tmp_path: Path) -> None:
    """Wherever the daemon is started; a path in the environment is the shell's."""
    settings = loaded(tmp_path, 'data_dir = "data"\npython_path = ["a", "/b"]')
    assert settings.data_dir == tmp_path / "data"
    assert settings.python_path == [tmp_path / "a", Path("/b")]
    assert loaded(tmp_path, "", {"JEF_DATA_DIR": "data"}).data_dir == Path("data")


def test_other_variables_are_left_alone(tmp_path: Path) -> None:
    """What is no setting: of tests, of jobs, of other programs."""
    environ = {"JEF_TEST_X": "1", "JEF_EXECUTION_ID": "1", "PATH": "/bin", "JEFFERSON": "1"}
    assert loaded(tmp_path, "", environ) == loaded(tmp_path)


def test_variables_that_a_job_gets_are_no_settings(tmp_path: Path) -> None:
    """So that a program which the daemon runs may call `jef`."""
    names = set(re.findall(r'"(JEF_[A-Z_]+)"', Path(command.__file__).read_text()))
    assert {"JEF_EXECUTION_ID", "JEF_FENCING_TOKENS"} <= names
    assert loaded(tmp_path, "", dict.fromkeys(names, "{}")) == loaded(tmp_path)


@pytest.mark.parametrize(
    ("name", "text", "read"),
    [
        ("JEF_PYTHON_PATH", '["/a"]', lambda settings: settings.python_path == [Path("/a")]),
        ("JEF_JOBS__EXECUTION_TIMEOUT_S", "", lambda settings: settings.jobs.execution_timeout_s is None),
        ("JEF_JOBS__TELL_TRACEBACKS", "false", lambda settings: not settings.jobs.tell_tracebacks),
        ("JEF_ACTIONS__NAP__COMMAND", '["a"]', lambda settings: settings.actions["nap"].command == ["a"]),
        (
            "JEF_ACTIONS__COPY__ROOTS",
            '["/a"]',
            lambda settings: settings.actions["copy"].executor_settings == {"roots": ["/a"]},
        ),
    ],
)
def test_texts_become_what_the_key_takes(tmp_path: Path, name: str, text: str, read: Any) -> None:
    assert read(loaded(tmp_path, "", {name: text}))


# --- what is wrong ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "named", "nearest"),
    [
        ("prefixx = 1", "`prefixx`", "`prefix`"),
        ("[slots]\ntotl = 1", "`slots.totl`", "`slots.total`"),
        ("[slot]\ntotal = 1", "`slot.total`", "`slots.total`"),
        ("[bus]\nprefetsh = 1", "`bus.prefetsh`", "`bus.prefetch`"),
    ],
)
def test_an_unknown_key_names_its_nearest(tmp_path: Path, text: str, named: str, nearest: str) -> None:
    said = problem(tmp_path, text)
    assert f"unknown key {named}" in said
    assert f"did you mean {nearest}?" in said
    assert f"jef.toml line {len(text.splitlines())}" in said


def test_an_unknown_key_says_which_source_it_came_from(tmp_path: Path) -> None:
    """All of them at once, each on its line."""
    said = problem(tmp_path, "", {"JEF_SLOTS__TOTL": "1"}, bus__prefetsh=1, qqq=1).splitlines()
    assert [line.partition(";")[0] for line in said] == [
        "unknown key `slots.totl` in JEF_SLOTS__TOTL",
        "unknown key `bus.prefetsh` in the command line",
        "unknown key `qqq` in the command line",
    ]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("slots = 5", "`slots` in X line 1: should be a table, not 5"),
        (
            'prefix = "a b"',
            "`prefix` in X line 1: should be text of the form \\A[A-Za-z0-9_-]{1,64}\\z, not 'a b'",
        ),
        (
            '[actions.nap]\nexecutor = "a:B"\ncommand = ["sleep"]',
            "`actions.nap` in X: has an executor and a command: leave one of them out",
        ),
        ("[slots]\ntotal = true", "`slots.total` in X line 2: should be a whole number, not true"),
        ("[jobs]\nkill_grace_s = false", "`jobs.kill_grace_s` in X line 2: should be a number, not false"),
        (
            "[actions.nap]\nupdate_timeout_s = true",
            "`actions.nap.update_timeout_s` in X line 2: should be a number, not true",
        ),
    ],
)
def test_a_wrong_value_is_told_in_words_of_the_file(tmp_path: Path, text: str, said: str) -> None:
    """Not of the library that reads it."""
    assert problem(tmp_path, text) == said.replace("X", str(tmp_path / "jef.toml"))


@pytest.mark.parametrize("key", [key for key in known_keys() if key != "actions.NAME.retry"])
def test_nothing_takes_true_for_another_value(key: str) -> None:
    """Python does: it would be the number 1."""
    try:
        settings = load(None, {key: True}, {})
    except SettingsError as error:
        assert f"`{key}` in the command line: should be " in str(error)  # noqa: PT017 - or else it was taken
    else:
        taken: Any = settings
        for part in key.split("."):
            taken = taken[part] if isinstance(taken, dict) else getattr(taken, part)
        assert taken is True


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ('[slots]\ntotal = "many"', "slots.total"),
        ("[slots]\ntotal = 0", "slots.total"),
        ("slots = 5", "slots"),
        ('prefix = "a.b"', "prefix"),
        ('prefix = ""', "prefix"),
        ('[bus]\nqueue_type = "stream"', "bus.queue_type"),
        ("[actions.nap]\ncommand = 5", "actions.nap.command"),
        ("[jobs]\nexecution_timeout_s = -1", "jobs.execution_timeout_s"),
        ("python_path = 5", "python_path"),
        ("data_dir = 5", "data_dir"),
    ],
)
def test_a_wrong_value_names_key_and_line(tmp_path: Path, text: str, key: str) -> None:
    said = problem(tmp_path, text)
    assert f"`{key}`" in said
    assert f"jef.toml line {len(text.splitlines())}: should be " in said


def test_the_culprit_is_the_source_that_won(tmp_path: Path) -> None:
    assert "`slots.total` in JEF_SLOTS__TOTAL: should be " in problem(
        tmp_path, "[slots]\ntotal = 5", {"JEF_SLOTS__TOTAL": "x"}
    )


@pytest.mark.parametrize("content", [b"a = ", b"\xff", b"a = 1\na = 2"])
def test_a_file_that_is_no_toml(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "jef.toml").write_bytes(content)
    with pytest.raises(SettingsError, match=r"jef\.toml is no TOML"):
        load(tmp_path / "jef.toml", None, {})


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"nothing\.toml cannot be read: No such file"):
        load(tmp_path / "nothing.toml", None, {})


# --- secrets ---------------------------------------------------------------------------------------------


def test_secrets_are_not_told(tmp_path: Path) -> None:
    """Neither by the settings nor by an error."""
    settings = loaded(tmp_path, 'amqp_url = "amqp://u:hunter2@h/"')
    assert "hunter2" not in repr(settings) + str(settings.model_dump())
    assert "hunter2" not in problem(tmp_path, 'amqp_url = ["amqp://u:hunter2@h/"]')
    assert "hunter2" not in problem(tmp_path, "", {"JEF_AMQP_URL": "amqp://u:hunter2@h/", "JEF_PREFIX": "."})


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("amqp://u:p@h:5672/v", "amqp://u:***@h:5672/v"),
        ("amqp://u:p@@h/v", "amqp://u:***@h/v"),
        ("amqps://u:p@h/v?password=p#p", "amqps://u:***@h/v"),
        ("amqp://h/v", "amqp://h/v"),
    ],
)
def test_a_url_as_it_is_shown(url: str, shown: str) -> None:
    assert masked(url) == shown


@pytest.mark.parametrize(
    "url", ["", "h", "http://h/", "amqp://", "amqp:///v", "amqp://[h/", "amqp://u:a/b@h/", "amqp://h:x/"]
)
def test_what_is_no_brokers_url(url: str) -> None:
    """Said without the URL: a password may be in it."""
    settings = Settings.model_validate({"amqp_url": url})
    with pytest.raises(SettingsError, match=r"^amqp_url is no broker's URL") as caught:
        broker_url(settings)
    assert "a/b" not in str(caught.value)


@given(st.text(st.characters(exclude_categories=["Cs", "Cc", "Z"]), min_size=1))
def test_a_password_of_any_characters(tmp_path_factory: pytest.TempPathFactory, password: str) -> None:
    """From its file into the URL and never beyond the mask."""
    from urllib.parse import unquote, urlsplit

    path = tmp_path_factory.mktemp("secret") / "password"
    path.write_text(password + "\n", encoding="utf-8")
    settings = Settings.model_validate({"amqp_url": "amqp://jef:old@h:1/v", "amqp_password_file": path})
    url = broker_url(settings)
    parts = urlsplit(url)
    assert unquote(parts.password or "") == password
    assert (parts.username, parts.hostname, parts.port, parts.path) == ("jef", "h", 1, "/v")
    assert masked(url) == "amqp://jef:***@h:1/v"


def test_secret_files_that_are_none(tmp_path: Path) -> None:
    """The key and the file are named."""
    empty = secret(tmp_path, "empty", " \n")
    for path, said in (
        (tmp_path / "none", "cannot be read"),
        (tmp_path, "cannot be read"),
        (empty, "is empty"),
    ):
        settings = Settings.model_validate({"amqp_password_file": path})
        with pytest.raises(SettingsError, match=rf"{path} \(amqp_password_file\) {said}"):
            broker_url(settings)


# --- the command line ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "parsed"),
    [
        ("slots.total=8", ("slots.total", "8")),
        (" slots.total = 8 ", ("slots.total", "8")),
        ("amqp_url=amqp://h/?a=b", ("amqp_url", "amqp://h/?a=b")),
        ("jobs.execution_timeout_s=", ("jobs.execution_timeout_s", None)),
        ('python_path=["/a"]', ("python_path", ["/a"])),
        ('slots={"total": 8}', ("slots", {"total": 8})),
        ('actions.nap.command=["sleep", "1"]', ("actions.nap.command", ["sleep", "1"])),
        ("actions.nap.executor=m:C", ("actions.nap.executor", "m:C")),
        ('actions.copy.roots=["/a"]', ("actions.copy.roots", ["/a"])),
        ("actions.x.level=high", ("actions.x.level", "high")),
        ("prefix=8", ("prefix", "8")),
    ],
)
def test_an_override(text: str, parsed: tuple[str, Any]) -> None:
    assert parse_override(text) == parsed


@pytest.mark.parametrize("text", ["", "slots.total", "slots.total:8"])
def test_an_override_without_a_value(text: str) -> None:
    with pytest.raises(SettingsError, match="key=value"):
        parse_override(text)


def test_known_keys_are_settable(tmp_path: Path) -> None:
    """Each of them is known to the loader too, so that the nearest key is one that exists."""
    for key in config.known_keys():
        name, value = parse_override(f"{key}=x")
        try:
            load(None, {name: value}, {})
        except SettingsError as error:
            assert "unknown key" not in str(error)  # noqa: PT017
