"""Headers as W3C has them; the same spans have the same names in every process and life."""

from __future__ import annotations

import dataclasses
import string

import pytest
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry import trace
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from jef_daemon import traceparent
from jef_daemon.lifecycle import Execution
from jef_daemon.traceparent import TraceParent, parse

HEADER = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


def hexadecimal(length: int) -> st.SearchStrategy[str]:
    return st.text("0123456789abcdef", min_size=length, max_size=length) | st.just("0" * length)


HEADERS = st.builds(
    "{}{}-{}-{}-{}{}{}".format,
    st.sampled_from(["", " ", "\t"]),
    st.sampled_from(["00", "01", "fe", "ff", "0", "zz"]),
    hexadecimal(32) | hexadecimal(31),
    hexadecimal(16) | hexadecimal(17),
    hexadecimal(2),
    st.sampled_from(["", "-", "-more", "more", "-a\nb"]),
    st.sampled_from(["", " ", "\n"]),
)


@given(HEADERS | st.text(string.hexdigits + "-"))
def test_headers_are_read_as_the_library_reads_them(header: str) -> None:
    """Except that a line's end is in no header."""
    context = TraceContextTextMapPropagator().extract({"traceparent": header})
    theirs = trace.get_current_span(context).get_span_context()
    ours = parse(header)
    if "\n" in header or not theirs.is_valid:
        assert ours is None
    else:
        assert ours is not None
        assert (int(ours.trace_id, 16), int(ours.span_id, 16)) == (theirs.trace_id, theirs.span_id)
        assert ours.is_sampled == theirs.trace_flags.sampled
        assert parse(str(ours)) == ours


MALFORMED = [
    *(None, "", "00-x", HEADER.upper(), HEADER + "-", HEADER + "\n", "ff" + HEADER[2:]),
    *(HEADER.replace(HEADER[3:35], "0" * 32), HEADER.replace(HEADER[36:52], "0" * 16)),
]


@pytest.mark.parametrize("header", MALFORMED)
def test_what_is_malformed_begins_no_trace(header: str | None) -> None:
    assert parse(header) is None


def execution(header: str | None = HEADER, attempt: int = 1) -> Execution:
    return Execution("624", "transcode", attempt=attempt, traceparent=header)


def of_job(execution: Execution) -> TraceParent:
    span = traceparent.of_job(execution)
    assert span is not None
    return span


def test_an_attempt_has_one_span_whoever_names_it() -> None:
    """Below the producer's, another for each attempt and execution, the same in each process and life."""
    first, second = of_job(execution()), of_job(execution(attempt=2))
    other = of_job(dataclasses.replace(execution(), execution_id="625"))
    assert len({first.span_id, second.span_id, other.span_id}) == 3
    # Written down once: a daemon of another version goes on with the traces of this one.
    assert first.span_id == "e50dcc77833402f8"
    assert traceparent.parent_of_job(execution()) == parse(HEADER)
    run = traceparent.of_run(execution())
    assert run is not None
    assert run.trace_id == first.trace_id
    assert run.span_id not in {first.span_id, second.span_id}
    assert traceparent.before(execution(attempt=2)) == first
    assert traceparent.before(execution()) is None


def test_a_trace_that_began_here_has_its_first_attempt_as_root() -> None:
    """Later attempts are below it; a daemon that takes the job over knows it from the header alone."""
    began = str(traceparent.begin("a" * 32, "624", 1, sampled=True))
    first, second = execution(began), execution(began, attempt=2)
    assert traceparent.parent_of_job(first) is None
    assert traceparent.parent_of_job(second) == traceparent.of_job(first)


def test_what_is_not_sampled_has_no_spans_and_goes_through() -> None:
    """Its flags are respected: nobody behind us records it either."""
    header = HEADER.removesuffix("01") + "00"
    silent = execution(header)
    assert traceparent.of_job(silent) is None
    assert traceparent.of_run(silent) is None
    assert traceparent.exemplar(silent) is None
    assert traceparent.carried(silent) == header
    assert traceparent.given(silent, is_traced=True) == header


def test_executors_are_given_what_can_stand_in_an_environment() -> None:
    """Our span of the run where we trace, the producer's else; nothing that is malformed."""
    assert traceparent.given(execution(), is_traced=True) == str(traceparent.of_run(execution()))
    assert traceparent.given(execution(), is_traced=False) == HEADER
    assert traceparent.given(execution("01" + HEADER[2:] + "-more\x00"), is_traced=False) == HEADER
    assert traceparent.given(execution("00-x"), is_traced=False) is None
    assert traceparent.given(execution(None), is_traced=True) is None


@given(st.integers(0, 255))
def test_flags_that_nobody_knows_are_not_passed_on(flags: int) -> None:
    place = parse(HEADER[:-2] + f"{flags:02x}")
    assert place == TraceParent(HEADER[3:35], HEADER[36:52], flags & 3)
