"""What a program prints, read as it comes, whatever it prints."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from jef_daemon.actions.command import CommandSettings
from jef_daemon.actions.output import Output, Patterns

PERCENT = r"(?P<percent>[\d.]+)%"


def output(
    progress: str | None = None, duration: str | None = None, message: str | None = None, tail: int = 100
) -> tuple[Output, list[tuple[float | None, str | None]]]:
    seen: list[tuple[float | None, str | None]] = []
    patterns = Patterns.of(progress, duration, message)
    return Output(patterns, tail, lambda percent, text: seen.append((percent, text))), seen


@pytest.mark.parametrize("end", [b"\n", b"\r", b"\r\n"])
def test_lines_by_any_end(end: bytes) -> None:
    """Programs that draw a progress bar end lines with a carriage return."""
    reader, seen = output(PERCENT)
    reader.feed(b"10%" + end + b"20%" + end)
    assert seen == [(10, None), (20, None)]


def test_a_line_without_an_end() -> None:
    """It is read when the output is over, once."""
    reader, seen = output(PERCENT)
    reader.feed(b"10%")
    assert seen == []
    reader.close()
    reader.close()
    assert seen == [(10, None)]


@given(st.lists(st.integers(0, 30), max_size=6))
def test_it_does_not_matter_how_it_is_cut(cuts: list[int]) -> None:
    """Chunks end where they like, in the middle of a character too."""
    text = "é 1%\nü 22%\r\n\n333%".encode()
    reader, seen = output(r"\w " + PERCENT, message=r"^(\S+)", tail=1000)
    edges = sorted({0, len(text), *(cut for cut in cuts if cut < len(text))})
    for start, end in itertools.pairwise(edges):
        reader.feed(text[start:end])
    reader.close()
    assert seen == [(1, "é"), (22, "ü"), (None, "333%")]
    assert reader.tail == text.decode()


@pytest.mark.parametrize(
    ("pattern", "line", "percent"),
    [
        (PERCENT, "at 12.5% now", 12.5),
        (r"(?P<done>\d+) of (?P<total>\d+)", "3 of 4", 75),
        (r"(?P<done>\d+) of (?P<total>\d+)", "3 of 0", None),
        (r"(?P<done>\d+)? of (?P<total>\d+)", " of 4", None),
        (r"(?P<percent>\S+)%", "n/a%", None),
        (r"(?P<percent>\d+)?%", "%", None),
        (r"time=(?P<time>\S+)", "time=00:30", None),
        (PERCENT, "nothing", None),
    ],
)
def test_percent(pattern: str, line: str, percent: float | None) -> None:
    """What cannot be read as a number tells nothing, and stops nothing."""
    reader, seen = output(pattern)
    reader.feed(f"{line}\n".encode())
    assert seen == ([] if percent is None else [(percent, None)])


@pytest.mark.parametrize(
    ("whole", "at", "percent"),
    [("00:01:00", "00:00:15.00", 25), ("1:0:0", "0:30:0", 50), ("90", "45", 50)],
)
def test_time_of_a_duration(whole: str, at: str, percent: float) -> None:
    reader, seen = output(r"time=(?P<time>\S+)", r"Duration: (?P<duration>[^,]+)")
    reader.feed(f"Duration: {whole}, start: 0\ntime={at}\n".encode())
    assert seen == [(percent, None)]


@pytest.mark.parametrize("whole", ["N/A", "", "00:00:00"])
def test_an_unknown_duration(whole: str) -> None:
    """A stream has none, and ffmpeg says N/A: no progress then, and it is read on."""
    reader, seen = output(r"time=(?P<time>\S+)", r"Duration: (?P<duration>[^,]*)", r"^end")
    reader.feed(f"Duration: {whole}, start: 0\ntime=00:00:01\nend\n".encode())
    assert seen == [(None, "end")]


def test_a_group_that_took_no_part() -> None:
    """An alternative without the group: the whole match is the message, no duration is known."""
    reader, seen = output(None, r"D(?P<duration>\d)?", r"pass (\d)|done")
    reader.feed(b"D\npass 1\ndone\n")
    assert seen == [(None, "1"), (None, "done")]


def test_messages() -> None:
    """The first group, or the whole match; the last one is kept for the result."""
    reader, seen = output(None, None, r"frame=\s*\d+")
    reader.feed(b"frame=  1 x\nframe= 2 x\nother\n")
    assert seen == [(None, "frame=  1"), (None, "frame= 2")]
    assert reader.message == "frame= 2"


def test_progress_and_message_of_one_line_are_one_report() -> None:
    reader, seen = output(PERCENT, None, r"pass (\d)")
    reader.feed(b"pass 1 10%\n")
    assert seen == [(10, "1")]


def test_bytes_that_are_no_text() -> None:
    """They are replaced, in lines and in the tail."""
    reader, seen = output(None, None, r"^(.*)x")
    reader.feed(b"\xff\xfe\x00x\n")
    assert seen == [(None, "\ufffd\ufffd\x00")]
    assert reader.tail == "\ufffd\ufffd\x00x\n"


@given(st.lists(st.binary(max_size=40), max_size=10), st.integers(0, 50))
def test_any_bytes(chunks: list[bytes], tail: int) -> None:
    """Nothing raises, and the tail is the end of it all."""
    reader, _ = output(PERCENT, r"(?P<duration>\S+)", r"(\S)?", tail=tail)
    for chunk in chunks:
        reader.feed(chunk)
    reader.close()
    everything = b"".join(chunks)
    assert reader.tail == (everything[-tail:] if tail else b"").decode("utf-8", "replace")


def test_a_line_that_never_ends() -> None:
    """Neither memory nor time grows with it; what begins it is looked at."""
    reader, seen = output(PERCENT, tail=1000)
    for _ in range(200):
        reader.feed(b"5%" + b"x" * 65_534)
    held = sum(len(value) for value in vars(reader).values() if isinstance(value, bytes))
    assert held + sum(map(len, reader._kept)) < 200_000
    assert reader.tail == "x" * 1000
    assert seen[0] == (5, None)
    reader.feed(b"\n7%\n")
    assert seen[-1] == (7, None)


# --- the operator's patterns -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "pattern"),
    [
        ("progress_pattern", "("),
        ("message_pattern", "*"),
        ("progress_pattern", r"(\d+)%"),
        ("progress_pattern", r"(?P<done>\d+)"),
        ("duration_pattern", r"Duration: (\S+)"),
    ],
)
def test_a_pattern_that_can_tell_nothing(key: str, pattern: str) -> None:
    """It is refused with its groups' names, when the daemon starts."""
    settings: dict[str, Any] = {"argv": ["a"], key: pattern}
    with pytest.raises(ValidationError, match=key):
        CommandSettings.model_validate(settings)


@pytest.mark.parametrize("pattern", [PERCENT, r"(?P<done>\d+)/(?P<total>\d+)", r"(?P<time>\S+)", None, ""])
def test_a_pattern_that_can(pattern: str | None) -> None:
    assert CommandSettings(argv=["a"], progress_pattern=pattern).progress_pattern == pattern
