"""Fills the settings: defaults, then the file, then credentials, then the environment, then the command line.

Every mistake is a `SettingsError` of one sentence per problem that names the key, where it was set, and the
remedy; an unknown key names its nearest known one. Secrets never appear in an error, a log or a repr.
"""

from __future__ import annotations

import difflib
import json
import os
import re
import stat
import tomllib
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote, urlsplit, urlunsplit

import structlog
from pydantic import BaseModel, SecretStr, ValidationError

from jef_daemon.errors import SettingsError
from jef_daemon.sections import Action
from jef_daemon.settings import Settings

log = structlog.get_logger()

SYSTEM_FILE = Path("/etc/jef-daemon/jef.toml")
"""Read when neither `--config` nor `JEF_CONFIG` names a file, and it exists."""
ENVIRONMENT = "JEF_"
_OTHER_USES = frozenset(
    {
        "JEF_CONFIG",
        "JEF_CUSTODY",
        "JEF_EXECUTION_ID",
        "JEF_WORKFLOW_ID",
        "JEF_ATTEMPT",
        "JEF_FENCING_TOKENS",
    }
)
_TOKEN_CHARACTERS = 16
_CREDENTIALS = "CREDENTIALS_DIRECTORY"
_SECRET_KEYS = frozenset({"amqp_url"})
_PATH_KEYS = frozenset(
    {"amqp_url_file", "amqp_password_file", "http_token_file", "data_dir", "python_path", "workflows_dir"}
)

Keys = tuple[str, ...]


class _Sources:
    """Values by key, each with where it came from; later ones win."""

    def __init__(self) -> None:
        self.values: dict[str, Any] = {}
        self._origins: dict[Keys, str] = {}

    def put(self, keys: Keys, value: Any, origin: str) -> None:
        """Set a key."""
        if isinstance(value, dict):
            self._descend(keys)
            for key, inner in value.items():
                self.put((*keys, key), inner, origin)
            return
        self._descend(keys[:-1])[keys[-1]] = value
        self._origins[keys] = origin

    def origin(self, keys: Keys) -> str:
        """Where a key, or something in it, was set."""
        for known, origin in self._origins.items():
            if known[: len(keys)] == keys or keys[: len(known)] == known:
                return origin
        return "the defaults"

    def keys(self) -> Iterator[Keys]:
        """Every key that was set."""
        yield from self._origins

    def _descend(self, keys: Keys) -> dict[str, Any]:
        inner = self.values
        for key in keys:
            found = inner.setdefault(key, {})
            if not isinstance(found, dict):
                found = inner[key] = {}
            inner = found
        return inner


def load(
    path: Path | None = None,
    overrides: Mapping[str, Any] | None = None,
    environ: Mapping[str, str] | None = None,
) -> Settings:
    """Read all sources.

    Args:
        path: the configuration file; None: `JEF_CONFIG`, else the system's, else none.
        overrides: `{"slots.total": 8}`, from the command line.
        environ: the environment.

    Raises:
        SettingsError: with every problem found.
    """
    environ = os.environ if environ is None else environ
    sources = _Sources()
    lines = _put_file(sources, path, environ)
    _put_credentials(sources, environ)
    _put_environment(sources, environ)
    for name, value in (overrides or {}).items():
        sources.put(tuple(name.split(".")), value, "the command line")
    if overrides and "amqp_url" in overrides and "amqp_url_file" not in overrides:
        sources.put(("amqp_url_file",), None, "the command line")  # a file named elsewhere would win
    problems = [_unknown(keys, sources, lines) for keys in sources.keys() if not _is_known(keys)]  # noqa: SIM118
    if problems:
        raise SettingsError("\n".join(problems))
    try:
        return Settings.model_validate(sources.values)
    except ValidationError as error:
        raise SettingsError("\n".join(_invalid(error, sources, lines))) from None


def broker_url(settings: Settings) -> str:
    """The broker's URL, secret files read, the password in it.

    Raises:
        SettingsError: a secret file cannot be read, or the URL is none.
    """
    url = settings.amqp_url.get_secret_value()
    if settings.amqp_url_file is not None:
        url = _secret(settings.amqp_url_file, "amqp_url_file")
    try:
        parts = urlsplit(url)
        is_one = parts.scheme in {"amqp", "amqps"} and parts.hostname and parts.port != 0
    except ValueError:  # a password with a / ends up as the port
        is_one = False
    if not is_one:
        raise SettingsError(
            "amqp_url is no broker's URL; write amqp://user:password@host:5672/vhost, special characters as %XX"
        )
    if settings.amqp_password_file is None:
        return url
    password = quote(_secret(settings.amqp_password_file, "amqp_password_file"), safe="")
    user = quote(unquote(parts.username or "guest"), safe="")
    host = parts.netloc.rpartition("@")[2]
    return urlunsplit(parts._replace(netloc=f"{user}:{password}@{host}"))


def http_token(settings: Settings) -> str | None:
    """The token of operators on the HTTP port; None: there is none.

    Raises:
        SettingsError: its file cannot be read, or holds one that could be guessed.
    """
    if settings.http_token_file is None:
        return None
    token = _secret(settings.http_token_file, "http_token_file")
    if len(token) < _TOKEN_CHARACTERS or not token.isascii():
        raise SettingsError(
            f"the token in {settings.http_token_file} (http_token_file) should be at least {_TOKEN_CHARACTERS} "
            "characters of ASCII; `openssl rand -hex 32` makes one"
        )
    return token


def masked(url: str) -> str:
    """A URL as it may be shown: without its password and its options."""
    parts = urlsplit(url)
    if "@" in parts.netloc:
        user, _, host = parts.netloc.rpartition("@")
        parts = parts._replace(netloc=f"{user.partition(':')[0]}:***@{host}")
    return urlunsplit(parts._replace(query="", fragment=""))


# --- sources ---------------------------------------------------------------------------------------------


def _put_file(sources: _Sources, path: Path | None, environ: Mapping[str, str]) -> dict[Keys, int]:
    """The file's values; returns the line of each key, as far as it can be told."""
    if path is None:
        named = environ.get("JEF_CONFIG")
        # Asked so that somebody who may not look into its folder goes on without it.
        path = Path(named) if named else SYSTEM_FILE if os.path.exists(SYSTEM_FILE) else None  # noqa: PTH110
    if path is None:
        return {}
    try:
        text = path.read_text(encoding="utf-8")
        values = tomllib.loads(text)
    except OSError as error:
        raise SettingsError(f"the configuration {path} cannot be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SettingsError(f"the configuration {path} is no TOML: {error}") from None
    folder = path.absolute().parent
    for key, value in values.items():
        sources.put((key,), _placed(value, folder) if key in _PATH_KEYS else value, str(path))
    return _lines(text)


def _placed(value: Any, folder: Path) -> Any:
    """Paths in the file count from the file's folder, wherever the daemon is started."""
    if isinstance(value, list):
        return [_placed(inner, folder) for inner in value]
    return str(folder / value) if isinstance(value, str) else value


def _put_credentials(sources: _Sources, environ: Mapping[str, str]) -> None:
    """Files that systemd hands over, named like top-level keys."""
    folder = environ.get(_CREDENTIALS)
    for name in ("amqp_url", "amqp_password", "http_token") if folder else ():
        path = Path(str(folder), name)
        if path.exists():
            sources.put((f"{name}_file",), str(path), f"the credential {name}")


def _put_environment(sources: _Sources, environ: Mapping[str, str]) -> None:
    for name, text in sorted(environ.items()):
        if not name.startswith(ENVIRONMENT) or name in _OTHER_USES or name.startswith("JEF_TEST_"):
            continue
        keys = tuple(part.lower() for part in name.removeprefix(ENVIRONMENT).split("__"))
        sources.put(keys, _value(keys, text), name)
    if "JEF_AMQP_URL" in environ and "JEF_AMQP_URL_FILE" not in environ:
        # The environment wins over the file and over credentials, also where those name a file.
        sources.put(("amqp_url_file",), None, "JEF_AMQP_URL")


def _value(keys: Keys, text: str) -> Any:
    """A text from the environment or the command line as what the key takes."""
    wanted = _annotation(keys)
    is_structure = any(word in str(wanted) for word in ("list[", "dict[", "Action"))
    if wanted is None or is_structure or _is_section(wanted):
        try:
            return json.loads(text)
        except ValueError:
            return text
    if text == "" and "None" in str(wanted):
        return None
    return text


def parse_override(text: str) -> tuple[str, Any]:
    """`slots.total=8` from the command line.

    Raises:
        SettingsError: there is no `=` in it.
    """
    name, found, value = text.partition("=")
    if not found:
        raise SettingsError(f"{text!r} is no setting; write key=value, for example slots.total=8")
    return name.strip(), _value(tuple(name.strip().split(".")), value.strip())


def _secret(path: Path, key: str) -> str:
    try:
        mode = path.stat().st_mode
        text = path.read_text(encoding="utf-8").strip()
    except OSError as error:
        raise SettingsError(f"the secret file {path} ({key}) cannot be read: {error.strerror}") from None
    if mode & stat.S_IROTH:
        log.warning("secret_readable_by_all", path=str(path), remedy="chmod 600")
    if not text:
        raise SettingsError(f"the secret file {path} ({key}) is empty")
    return text


# --- what is wrong ---------------------------------------------------------------------------------------


def known_keys() -> list[str]:
    """Every key, dotted; `actions.NAME.…` for those of an action."""
    return sorted(".".join(keys) for keys in _known(Settings, ()))


def _known(model: type[BaseModel], above: Keys) -> Iterator[Keys]:
    for name, field in model.model_fields.items():
        annotation = field.annotation
        if annotation == dict[str, Action]:
            yield from _known(Action, (*above, name, "NAME"))
        elif _is_section(annotation):
            yield from _known(typing.cast("type[BaseModel]", annotation), (*above, name))
        else:
            yield (*above, name)


def _is_known(keys: Keys) -> bool:
    return keys[:1] == ("actions",) or _annotation(keys) is not None


def _annotation(keys: Keys) -> Any:
    """What a key's value is to be; None: there is no such key."""
    model: Any = Settings
    if keys[:1] == ("actions",) and len(keys) > 2:
        model, keys = Action, keys[2:]
    for key in keys:
        field = model.model_fields.get(key) if _is_section(model) else None
        if field is None:
            return None
        model = field.annotation
    return model


def _is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _unknown(keys: Keys, sources: _Sources, lines: Mapping[Keys, int]) -> str:
    name = ".".join(keys)
    where = _where(keys, sources, lines)
    near = difflib.get_close_matches(name, known_keys(), n=1, cutoff=0.5)
    advice = f"did you mean `{near[0]}`?" if near else "docs/configuration.md lists all keys"
    return f"unknown key `{name}` in {where}; {advice}"


def _invalid(error: ValidationError, sources: _Sources, lines: Mapping[Keys, int]) -> Iterator[str]:
    for problem in error.errors():
        keys = tuple(str(part) for part in problem["loc"])
        is_secret = any("url" in key or "password" in key for key in keys)
        given = (
            "" if is_secret or isinstance(problem["input"], dict) else f", not {_written(problem['input'])}"
        )
        template = _WORDS.get(problem["type"], "should be {msg}")
        said = template.format(msg=problem["msg"].removeprefix("Input should be "), **problem.get("ctx", {}))
        yield f"`{'.'.join(keys)}` in {_where(keys, sources, lines)}: {said}{given}"


def _written(value: Any) -> str:
    """A value as it stands in the file."""
    return str(value).lower() if isinstance(value, bool) else repr(value)


_WORDS = {
    "model_type": "should be a table",
    "string_pattern_mismatch": "should be text of the form {pattern}",
    "value_error": "{error}",
}
"""Of the library's messages, those that speak of Python, or are no continuation of ours."""


def _where(keys: Keys, sources: _Sources, lines: Mapping[Keys, int]) -> str:
    origin = sources.origin(keys)
    line = lines.get(keys) if not origin.startswith((ENVIRONMENT, "the ")) else None
    return f"{origin} line {line}" if line else origin


_TABLE = re.compile(r"^\s*\[([^\[\]]+)\]")
_KEY = re.compile(r"^\s*([A-Za-z0-9_.\"-]+)\s*=")


def _lines(text: str) -> dict[Keys, int]:
    """The line of each key; good enough for messages, the values come from the TOML parser."""
    found: dict[Keys, int] = {}
    table: Keys = ()
    for number, line in enumerate(text.splitlines(), 1):
        if match := _TABLE.match(line):
            table = tuple(part.strip().strip('"') for part in match[1].split("."))
        elif match := _KEY.match(line):
            found[(*table, *(part.strip('"') for part in match[1].split(".")))] = number
    return found


__all__ = ["SecretStr", "broker_url", "http_token", "known_keys", "load", "masked", "parse_override"]
