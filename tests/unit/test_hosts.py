"""Which addresses may be talked to."""

from __future__ import annotations

import pytest

from jef_daemon.actions.hosts import Hosts, origin, shown
from jef_daemon.errors import ConfigurationRefused

HOSTS = Hosts(["Render.Example", "farm.example:8443", "[::1]:8600"], "http")
PLAIN = Hosts(["render.example", "127.0.0.1:8600"], "http", plain_http=True)


@pytest.mark.parametrize(
    "url",
    [
        "https://render.example/renders",
        "https://RENDER.example:443/renders?a=b",
        "https://render.example./",
        "https://farm.example:8443/",
        "https://[::1]:8600/",
    ],
)
def test_what_is_listed_passes(url: str) -> None:
    assert HOSTS.check(url) == url


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("https://render.example:8443/", "render.example:8443 is not allowed"),
        ("https://render.example:0/", "render.example:0 is not allowed"),
        ("https://farm.example/", "farm.example:443 is not allowed"),
        ("https://evil.example/render.example", "evil.example:443 is not allowed"),
        ("https://render.example.evil.example/", "is not allowed"),
        ("https://evilrender.example/", "is not allowed"),
        ("https://169.254.169.254/latest/meta-data", "169.254.169.254:443 is not allowed"),
        ("https://2852039166/", "is not allowed"),
        ("https://127.0.0.1/", "is not allowed"),
        ("https://[::1]/", r"[::1]:443 is not allowed"),
        ("https://render.example@evil.example/", "user or a password"),
        ("https://user:hunter2@render.example/", "user or a password"),
        ("https://render.example\\@evil.example/", "is none"),
        ("https://render.example /", "is none"),
        ("https://render.example\n/", "is none"),
        ("https://render.example:port/", "is none"),
        ("https://render.example:99999/", "is none"),
        ("https://[::1/", "is none"),
        ("https:///renders", "is none"),
        ("", "is none"),
        ("http://render.example/", "plain_http"),
        ("file://render.example/etc/passwd", "should begin with https"),
        ("//render.example/", "should begin with https"),
    ],
)
def test_what_is_not_is_refused(url: str, said: str) -> None:
    """In one sentence that never repeats a password."""
    with pytest.raises(ConfigurationRefused) as caught:
        HOSTS.check(url)
    assert said in str(caught.value)
    assert "hunter2" not in str(caught.value)


def test_plain_http_where_it_is_allowed() -> None:
    assert PLAIN.check("http://127.0.0.1:8600/x")
    assert PLAIN.check("http://render.example/x")
    with pytest.raises(ConfigurationRefused):
        PLAIN.check("http://render.example:443/")


def test_without_a_list_everything_is_refused() -> None:
    with pytest.raises(ConfigurationRefused, match=r"set allowed_hosts in \[actions\.http\]"):
        Hosts([], "http").check("https://render.example/")


def test_origins() -> None:
    assert origin("https://A.example/x") == origin("https://a.example:443/y") == ("https", "a.example", 443)
    assert origin("http://a.example/") != origin("https://a.example/")


def test_queries_are_not_shown() -> None:
    assert shown("https://a.example/x?token=hunter2#y") == "https://a.example:443/x"
