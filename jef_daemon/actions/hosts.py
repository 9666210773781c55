"""The hosts that an executor may talk to. Whoever may publish a request names addresses; the operator names hosts.

Only names that are on the list, with their port, so that no request reaches what stands beside the daemon: its
broker, the metadata of a cloud, a printer. A name is what it resolves to: list only names whose owner you trust.
"""

from __future__ import annotations

from collections.abc import Sequence
from urllib.parse import urlsplit

from jef_daemon.errors import ConfigurationRefused

_PORTS = {"https": 443, "http": 80}


class Hosts:
    """Lets URLs pass whose host is allowed.

    Args:
        allowed: `host` (the scheme's own port) or `host:port`; IPv6 in brackets.
        plain_http: whether `http://` is taken too.
        action: named in the refusal's remedy.
    """

    def __init__(self, allowed: Sequence[str], action: str, *, plain_http: bool = False) -> None:
        self._allowed = [one.lower() for one in allowed]
        self._schemes = ("https", "http") if plain_http else ("https",)
        self._action = action

    def check(self, url: str) -> str:
        """The URL, if it may be talked to.

        Raises:
            ConfigurationRefused: with a sentence that says why not; it shows no more of the URL than its host.
        """
        try:
            parts = urlsplit(url)
            host, port = (parts.hostname or "").rstrip("."), parts.port
        except ValueError:
            raise ConfigurationRefused("the URL is none: its host or port cannot be read") from None
        if any(character <= " " or character in "\\\x7f" for character in url) or not host:
            raise ConfigurationRefused("the URL is none: it should be https://host/path")
        if parts.scheme not in self._schemes:
            plain = f"; plain_http in [actions.{self._action}] allows http" if parts.scheme == "http" else ""
            raise ConfigurationRefused(
                f"the URL should begin with https, not {parts.scheme or 'nothing'}{plain}"
            )
        if "@" in parts.netloc:
            raise ConfigurationRefused(
                "the URL holds a user or a password; the operator sets headers instead"
            )
        self._check_host(host, port, parts.scheme)
        return url

    def _check_host(self, host: str, port: int | None, scheme: str) -> None:
        if not self._allowed:
            raise ConfigurationRefused(f"no hosts are allowed; set allowed_hosts in [actions.{self._action}]")
        named = f"[{host}]" if ":" in host else host
        number = _PORTS[scheme] if port is None else port
        meant = {f"{named}:{number}"} | ({named} if number == _PORTS[scheme] else set())
        if not meant.intersection(self._allowed):
            raise ConfigurationRefused(
                f"the host {named}:{number} is not allowed; the operator can add it to allowed_hosts in "
                f"[actions.{self._action}]"
            )


def origin(url: str) -> tuple[str, str, int]:
    """Scheme, host and port: what must stay the same when a redirect is followed."""
    parts = urlsplit(url)
    port = _PORTS.get(parts.scheme, 0) if parts.port is None else parts.port
    return parts.scheme, (parts.hostname or "").rstrip("."), port


def shown(url: str) -> str:
    """A URL as it may be told: what stands in its query may be a secret."""
    scheme, host, port = origin(url)
    return f"{scheme}://{host}:{port}{urlsplit(url).path}"
