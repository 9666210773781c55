"""Spans of what is committed and confirmed: whatever happens to a job, and whoever forgets what."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExportResult
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode
from structlog.testing import capture_logs

from jef_daemon import lifecycle, notifications, traceparent
from jef_daemon.commits import Commit, Tally
from jef_daemon.errors import RequestRefused
from jef_daemon.events import (
    Accepted,
    CancelRequested,
    Completed,
    Event,
    Failed,
    FellSilent,
    GraceEnded,
    Interrupted,
    Launched,
    LockAwaited,
    Progressed,
    Resumed,
    Retried,
    Started,
    Stopped,
)
from jef_daemon.lifecycle import TABLE, Execution, Place, Transition
from jef_daemon.names import Names
from jef_daemon.ports import Accepted as Word
from jef_daemon.ports import Arrival, Delivery, Outgoing, Refusal
from jef_daemon.sections import Tracing as TracingSettings
from jef_daemon.settings import Settings
from jef_daemon.tracing.export import Export
from jef_daemon.tracing.recorded import DEFINITIONS, EVERY, Happening, Recorded, load
from jef_daemon.tracing.spans import Spans

TRACE, PRODUCER = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
HEADER = f"00-{TRACE}-{PRODUCER}-01"
NOW = 1_800_000_000.0


class Ledger:
    """Moves one execution as the ledger does, and tells the observer of each commit."""

    def __init__(self, emit: Any, execution: Execution, *, sampled: bool = True) -> None:
        self._emit, self._sampled = emit, sampled
        self.now = NOW
        self.execution = execution
        self.restart()

    def restart(self) -> None:
        """Another life of the daemon, which remembers nothing."""
        self.spans = Spans(self._emit, lambda _: self._sampled, Names())

    def accept(self, word: Word = Word.NEW) -> None:
        self.spans.begin(self.execution)
        arrival = Arrival(self.execution, "{}")
        moves = []
        if word is Word.NEW:
            moves = [lifecycle.accept(self.execution, self.now)]
            self.execution = moves[0].execution
        self.spans.committed(Commit(0.001, 1, [(arrival, word)], moves))

    def apply(self, *events: Event, after_s: float = 1.0) -> None:
        self.now += after_s
        moves: list[Transition] = []
        for event in events:
            moves.append(lifecycle.apply(self.execution, event, self.now))
            self.execution = moves[-1].execution
        self.spans.committed(Commit(0.001, 1, [], moves))

    def grant(self) -> None:
        self.now += 1.0
        tally = Tally(grants=[(self.execution, self.now)])
        self.spans.committed(Commit(0.001, 1, [], [], tally))

    def confirm(self, exchange: str = "jef.status") -> None:
        """The broker has confirmed what tells the last transition."""
        move = Transition(Place.NEW, self.execution, Progressed(), self.now, late=False, was=self.execution)
        headers = {"traceparent": traceparent.carried(self.execution)}
        key = "transcode.running" if exchange else "answers"
        body = notifications.notification(move)
        self.spans.confirmed([Outgoing(1, exchange, key, body, headers, "c-1")])


def job(**more: Any) -> Execution:
    return Execution("624", "transcode", **({"traceparent": HEADER} | more))


def started(**more: Any) -> tuple[Ledger, list[Recorded]]:
    """A job that runs, and the spans made since."""
    recorded: list[Recorded] = []
    ledger = Ledger(recorded.append, job(**more))
    ledger.accept()
    ledger.apply(Started())
    return ledger, recorded


def by_name(recorded: list[Recorded]) -> dict[str, Recorded]:
    found = {one.name: one for one in recorded}
    assert len(found) == len(recorded), [one.name for one in recorded]
    return found


def test_a_job_with_everything() -> None:
    """Each span below the one it belongs to, one behind the other, with what happened in it."""
    recorded: list[Recorded] = []
    ledger = Ledger(recorded.append, job(wants_locks=True, not_before=NOW + 5, workflow_id="w"))
    ledger.accept()
    place = {"resource": "asset/1", "mode": "EXCLUSIVE", "position": 2, "holders": []}
    ledger.apply(LockAwaited(waiting_for=place), after_s=6)
    ledger.grant()
    ledger.apply(Started(), after_s=2)
    ledger.apply(Progressed(progress=40, message="pass 1"))
    ledger.apply(CancelRequested(reason="why not"))
    ledger.apply(Launched(external_id="render-7"))
    ledger.apply(FellSilent())
    ledger.apply(Resumed())
    ledger.apply(Completed())
    ledger.confirm()
    spans = by_name(recorded)
    of_job, run = spans["job transcode"], spans["execution"]
    assert list(spans) == [
        *("intake", "delay", "lock wait", "slot wait", "execution", "job transcode", "notify COMPLETED")
    ]
    assert str(of_job.parent) == HEADER
    assert {one.parent for one in recorded if one is not of_job} == {of_job.span}
    seconds = {
        name: (spans[name].begun_ns / 1e9 - NOW, spans[name].ended_ns / 1e9 - NOW)
        for name in ("delay", "lock wait", "slot wait", "execution")
    }
    assert seconds == {"delay": (0, 5), "lock wait": (5, 7), "slot wait": (7, 9), "execution": (9, 15)}
    assert [one.name for one in spans["lock wait"].happenings] == ["waiting"]
    told = [one.name for one in run.happenings]
    assert told == ["progress", "cancel requested", "launched", "silent", "resumed"]
    assert run.happenings[0].attributes == {"jef.progress": 40, "jef.message": "pass 1"}
    assert (run.is_ok, run.attributes["jef.external.id"]) == (True, "render-7")
    assert of_job.attributes["jef.workflow.id"] == "w"


def test_stack_traces_are_told_where_the_operator_lets_them() -> None:
    """`jobs.tell_tracebacks` counts here, too."""
    for wanted in (True, False):
        ledger, recorded = started()
        ledger.spans = Spans(recorded.append, lambda _: True, Names(), tracebacks=wanted)
        ledger.apply(Failed(error_type="E", error_message="m", traceback="where"))
        [exception] = by_name(recorded)["execution"].happenings
        assert ("exception.stacktrace" in exception.attributes) is wanted


def test_a_daemon_that_died_has_its_spans_made_by_its_next_life() -> None:
    """From the ledger: the true times, the same names. What it had only in memory is gone, no more."""
    ledger, recorded = started(wants_locks=True)
    ledger.apply(Progressed(progress=10))
    before = traceparent.of_run(ledger.execution)
    ledger.restart()
    ledger.apply(Failed(error_type="Interrupted", error_message="the daemon died"), after_s=3600)
    run = by_name(recorded)["execution"]
    assert (run.span, run.ended_ns - run.begun_ns) == (before, 3601 * 10**9)
    assert [one.name for one in run.happenings] == ["exception"]
    assert run.error == "Interrupted: the daemon died"


def test_attempts_are_spans_of_their_own_and_name_the_one_before() -> None:
    """A retry waits in a span, too: its delay."""
    ledger, recorded = started()
    ledger.apply(Failed(error_type="OSError", error_message="no"), Retried(token="t", not_before=NOW + 61))
    ledger.apply(Started(), after_s=60)
    ledger.apply(Interrupted(token="u", reason="the daemon was stopped"))
    ledger.apply(Started())
    ledger.apply(Completed())
    jobs = [one for one in recorded if one.name == "job transcode"]
    assert [one.attributes["jef.attempt"] for one in jobs] == [1, 2, 3]
    assert [one.attributes.get("error.type") for one in jobs] == ["OSError", "Interrupted", None]
    assert [one.links for one in jobs] == [(), (jobs[0].span,), (jobs[1].span,)]
    assert {str(one.parent) for one in jobs} == {HEADER}
    assert len({one.span for one in recorded}) == len(recorded)
    [delay] = [one for one in recorded if one.name == "delay"]
    assert (delay.ended_ns - delay.begun_ns) == 59 * 10**9
    assert jobs[1].error == "the daemon was stopped"


def test_a_time_out_is_a_span_once_no_update_counts() -> None:
    """It ended when it was flagged, if nobody came back."""
    ledger, recorded = started()
    ledger.apply(FellSilent())
    assert "job transcode" not in by_name(recorded)
    ledger.apply(GraceEnded(), after_s=300)
    of_job = by_name(recorded)["job transcode"]
    assert of_job.ended_ns == round((NOW + 2) * 1e9)
    assert (of_job.attributes["jef.status"], of_job.attributes["error.type"]) == ("TIMED_OUT", "TIMED_OUT")
    ledger.apply(CancelRequested())
    by_name(recorded)


def test_a_job_that_never_ran_has_waited() -> None:
    recorded: list[Recorded] = []
    ledger = Ledger(recorded.append, job(wants_locks=True))
    ledger.accept()
    ledger.apply(CancelRequested(), after_s=7)
    spans = by_name(recorded)
    assert set(spans) == {"intake", "lock wait", "job transcode"}
    assert spans["lock wait"].ended_ns - spans["lock wait"].begun_ns == 7 * 10**9
    assert (spans["job transcode"].is_ok, spans["job transcode"].error) == (False, None)


def test_duplicates_and_refusals_are_shown_to_who_sent_them() -> None:
    """Below their own request; what came without a trace, or not recorded, begins none."""
    ledger, recorded = started()
    own = ledger.execution
    other = HEADER.replace(PRODUCER, "c" * 16)
    for header in (other, None, other.removesuffix("01") + "00"):
        ledger.execution = job(traceparent=header)
        ledger.accept(Word.KNOWN)
        refused = RequestRefused("invalid-json", "it is no JSON", "9")
        delivery = Delivery(
            "transcode", b"{", 1, 1, headers={} if header is None else {"traceparent": header}
        )
        ledger.spans.committed(
            Commit(0.001, 1, [(Refusal(refused, delivery, "transcode"), Word.REFUSED)], [])
        )
    [known, refusal] = [one for one in recorded if str(one.parent) == other]
    assert (known.name, known.attributes["jef.outcome"]) == ("intake", "known")
    assert (refusal.attributes["error.type"], refusal.error) == ("invalid-json", "it is no JSON")
    ledger.execution = own
    ledger.apply(Completed())
    assert len(recorded) == 6  # these two, and the four of the job that they did not disturb


def test_a_notification_told_twice_is_the_same_span() -> None:
    """And the one to `reply_to` is another."""
    ledger, recorded = started()
    recorded.clear()
    ledger.confirm()
    ledger.confirm()
    ledger.confirm(exchange="")
    assert [one.span == recorded[0].span for one in recorded] == [True, True, False]
    assert recorded[2].attributes["messaging.destination.name"] == "answers"
    hand_back = Outgoing(1, "jef.jobs", "transcode", b"{}", {"traceparent": HEADER})
    ledger.spans.confirmed([hand_back, Outgoing(2, "jef.status", "x.y", b"{}")])
    assert len(recorded) == 3


@pytest.mark.parametrize("sampled", [True, False])
def test_a_job_without_a_trace_begins_one(sampled: bool) -> None:
    """Recorded or not, as the sampler says; those behind us are told."""
    recorded: list[Recorded] = []
    ledger = Ledger(recorded.append, job(traceparent="00-malformed"), sampled=sampled)
    ledger.accept()
    ledger.apply(Started())
    ledger.apply(Completed())
    ledger.confirm()
    place = traceparent.parse(ledger.execution.traceparent)
    assert place is not None
    assert place.is_sampled is sampled
    assert len(recorded) == (5 if sampled else 0)
    if sampled:
        assert by_name(recorded)["job transcode"].parent is None


EXAMPLES: dict[type[Event], Event] = {
    LockAwaited: LockAwaited(waiting_for={"resource": "a"}),
    Started: Started(),
    Progressed: Progressed(progress=5),
    Launched: Launched(external_id="x"),
    Completed: Completed(),
    Failed: Failed(error_type="E", error_message="m", traceback="tb"),
    CancelRequested: CancelRequested(),
    Stopped: Stopped(),
    FellSilent: FellSilent(),
    GraceEnded: GraceEnded(),
    Resumed: Resumed(),
    Retried: Retried(token="t", not_before=NOW + 100),
    Interrupted: Interrupted(token="t"),
}
OPEN = {Place.QUEUED, Place.WAITING_FOR_LOCK, Place.RUNNING, Place.TIMED_OUT_OPEN}


@given(st.data(), st.booleans())
def test_every_attempt_that_is_over_has_its_spans_once(data: st.DataObject, wants_locks: bool) -> None:
    """Whatever the life cycle allows, and however often the daemon dies in between."""
    recorded: list[Recorded] = []
    ledger = Ledger(recorded.append, job(wants_locks=wants_locks))
    ledger.accept()
    ran = set()
    for _ in range(data.draw(st.integers(0, 12))):
        events = sorted((event for place, event in TABLE if place is ledger.execution.place), key=str)
        if not events:
            break
        if data.draw(st.booleans()):
            ledger.restart()
        ledger.apply(EXAMPLES[data.draw(st.sampled_from(events))], after_s=data.draw(st.floats(0, 9)))
        if ledger.execution.place is Place.RUNNING:
            ran.add(ledger.execution.attempt)
    is_open = ledger.execution.place in OPEN
    over = set(range(1, ledger.execution.attempt + (not is_open)))
    attempts = [one.attributes["jef.attempt"] for one in recorded if one.name == "job transcode"]
    assert sorted(attempts) == sorted(over)
    runs = [one.attributes["jef.attempt"] for one in recorded if one.name == "execution"]
    assert sorted(runs) == sorted(over & ran)
    assert len({one.span for one in recorded}) == len(recorded)
    assert all(one.ended_ns >= one.begun_ns for one in recorded if one.name != "job transcode")


def test_the_examples_are_all_events() -> None:
    assert set(EXAMPLES) | {Accepted} == {event for _, event in TABLE}


def test_the_table_of_spans_is_what_is_made() -> None:
    """Names, kinds, attributes and events, and nothing besides."""
    recorded: list[Recorded] = []
    for ends in (Completed(), Failed(error_type="E", error_message="m", traceback="tb")):
        more = {"wants_locks": True, "not_before": NOW + 1, "workflow_id": "w", "correlation_id": "c"}
        ledger = Ledger(recorded.append, job(**more))
        ledger.accept()
        waiting = {"resource": "a", "mode": "SHARED", "position": 1}
        ledger.apply(LockAwaited(waiting_for=waiting), after_s=2)
        ledger.grant()
        ledger.apply(Started())
        reports = (Launched(external_id="x"), Progressed(progress=1, message="m"), CancelRequested())
        ledger.apply(*reports, FellSilent(), Resumed(), ends)
        ledger.confirm()
        refused = Refusal(
            RequestRefused("code", "detail", "1"),
            Delivery("transcode", b"", 1, 1, headers={"traceparent": HEADER}),
            "transcode",
        )
        ledger.spans.committed(Commit(0.1, 1, [(refused, Word.REFUSED)], []))
    made: dict[str, tuple[str, set[str], dict[str, set[str]]]] = {}
    for one in recorded:
        kind, attributes, happenings = made.setdefault(one.name.partition(" ")[0], (one.kind, set(), {}))
        assert kind == one.kind
        attributes |= set(one.attributes)
        for each in one.happenings:
            happenings.setdefault(each.name, set()).update(each.attributes)
    assert made.keys() == {one.name.partition(" ")[0] for one in DEFINITIONS}
    for definition in DEFINITIONS:
        kind, attributes, happenings = made[definition.name.partition(" ")[0]]
        assert kind == definition.kind
        assert attributes == set(definition.attributes) | set(EVERY), definition.name
        assert happenings.keys() == set(definition.happenings)
        for name, told in definition.happenings.items():
            assert set(re.findall(r"`([a-z.]+)`", told)) == happenings[name], name


# --- the library -----------------------------------------------------------------------------------------


@pytest.fixture
def memory() -> InMemorySpanExporter:
    return InMemorySpanExporter()


@pytest.fixture
def export(memory: InMemorySpanExporter, monkeypatch: pytest.MonkeyPatch) -> Export:
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "60000")
    return Export(TracingSettings(), "ledger-1", memory)


async def exported(export: Export, memory: InMemorySpanExporter) -> list[ReadableSpan]:
    await export.finish(30)
    return list(memory.get_finished_spans())


async def test_the_library_is_given_what_was_recorded(export: Export, memory: InMemorySpanExporter) -> None:
    """Ids, times, parents, events, links, status: nothing of its own."""
    ledger = Ledger(export.emit, job())
    ledger.accept()
    ledger.apply(Started())
    ledger.apply(Progressed(progress=40))
    ledger.apply(Failed(error_type="OSError", error_message="no"), Retried(token="t"))
    ledger.apply(Started())
    ledger.apply(Completed())
    spans = await exported(export, memory)
    assert {span.context.trace_id for span in spans} == {int(TRACE, 16)}
    first, second = [span for span in spans if span.name == "job transcode"]
    assert first.parent is not None
    assert first.parent.span_id == int(PRODUCER, 16)
    assert (first.status.status_code, first.status.description) == (StatusCode.ERROR, "OSError: no")
    assert (second.status.status_code, second.links[0].context.span_id) == (
        StatusCode.OK,
        first.context.span_id,
    )
    run = next(span for span in spans if span.name == "execution")
    assert (run.start_time, run.end_time) == (round((NOW + 1) * 1e9), round((NOW + 3) * 1e9))
    assert [event.name for event in run.events] == ["progress", "exception"]
    assert run.events[0].timestamp == round((NOW + 2) * 1e9)
    assert run.resource.attributes["service.instance.id"] == "ledger-1"


@pytest.mark.parametrize(
    ("ratio", "variables", "least", "most"),
    [
        (None, {}, 500, 500),
        (0.0, {}, 0, 0),
        (0.5, {"OTEL_TRACES_SAMPLER": "always_off"}, 150, 350),
        (None, {"OTEL_TRACES_SAMPLER": "always_off"}, 0, 0),
        (
            None,
            {"OTEL_TRACES_SAMPLER": "parentbased_traceidratio", "OTEL_TRACES_SAMPLER_ARG": "0.5"},
            150,
            350,
        ),
    ],
)
def test_the_share_of_traces_that_begin_here(
    ratio: float | None,
    variables: dict[str, str],
    least: int,
    most: int,
    memory: InMemorySpanExporter,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The setting wins over the environment."""
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    export = Export(TracingSettings(sampling_ratio=ratio), "", memory)
    # Ids far apart from each other, as random ones are.
    count = sum(export.samples(f"{number * 0x9E3779B97F4A7C15 % 2**128:032x}") for number in range(1, 501))
    assert least <= count <= most


def test_the_library_can_be_turned_off_by_its_own_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    assert TracingSettings(enabled=True).is_wanted
    assert not TracingSettings().is_wanted
    monkeypatch.setenv("OTEL_SDK_DISABLED", "True")
    assert not TracingSettings(enabled=True).is_wanted


class Moody(InMemorySpanExporter):
    """Takes spans as it likes."""

    def __init__(self, *moods: SpanExportResult) -> None:
        super().__init__()
        self.moods = list(moods)

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        super().export(spans)
        return self.moods.pop(0)


async def test_a_collector_that_comes_and_goes_is_told_of_once_each(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many exports fail in between; how many spans were lost is counted."""
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "60000")
    yes, no = SpanExportResult.SUCCESS, SpanExportResult.FAILURE
    export = Export(TracingSettings(), "", Moody(yes, no, no, yes, yes, no))
    span = traceparent.TraceParent(TRACE, "c" * 16)
    with capture_logs() as told:
        for number in range(6):
            for _ in range(number + 1):
                export.emit(Recorded("x", span, None, 0, 1))
            export.provider.force_flush()
    lines = [line for line in told if line["event"].startswith("spans_")]
    assert [line["event"] for line in lines] == ["spans_not_taken", "spans_taken_again", "spans_not_taken"]
    assert lines[1]["dropped"] == 2 + 3
    await export.finish(30)


@given(
    st.builds(
        Recorded,
        name=st.text(),
        span=st.just(traceparent.TraceParent(TRACE, PRODUCER)),
        parent=st.none() | st.just(traceparent.TraceParent(TRACE, "c" * 16, 3)),
        begun_ns=st.integers(0, 2**63),
        ended_ns=st.integers(0, 2**63),
        attributes=st.dictionaries(st.text(), st.text() | st.booleans() | st.lists(st.integers())),
        happenings=st.tuples(st.builds(Happening, st.text(), st.integers(0), st.just({"a": 1.5}))),
        links=st.just((traceparent.TraceParent(TRACE, "d" * 16, 0),)),
        is_ok=st.booleans(),
        error=st.none() | st.text(),
    )
)
def test_a_span_travels_between_processes(recorded: Recorded) -> None:
    assert load(recorded.dump()) == recorded


def test_without_the_extra_the_operator_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A sentence with the remedy, not a traceback."""
    from jef_daemon.errors import SettingsError
    from jef_daemon.tracing import daemon

    monkeypatch.setattr(daemon, "_missing", "opentelemetry.sdk")
    with pytest.raises(SettingsError, match=r"no module opentelemetry\.sdk.*jef-daemon\[tracing\]"):
        daemon.Tracing(Settings(data_dir=tmp_path), "")


def test_what_the_daemon_tells_is_what_the_spans_are_made_of() -> None:
    """The notification's keys that `notify` reads."""
    ledger, recorded = started()
    ledger.confirm()
    told = json.loads(
        notifications.notification(
            Transition(Place.NEW, ledger.execution, Progressed(), NOW, late=False, was=ledger.execution)
        )
    )
    notify = by_name(recorded)["notify RUNNING"]
    assert notify.attributes["jef.sequence"] == told["sequence"]
    assert dataclasses.is_dataclass(notify)


def test_the_picture_shows_the_spans_that_there_are() -> None:
    """On the page about it; one that most jobs do not have is told in the text."""
    page = (Path(__file__).parents[2] / "docs" / "tracing.md").read_text()
    tree = page.partition("## The spans")[2].split("```")[1]
    shown = set(re.findall(r"── (job|[a-z]+ wait|[a-z]+)\b", tree)) - {"ffmpeg"}
    assert shown | {"delay"} == {
        one.name.partition(" ")[0] if " " in one.name and one.name.split()[1].isupper() else one.name
        for one in DEFINITIONS
    }
    assert "`delay`" in page.partition("## The spans")[2].partition("<!--")[0]
