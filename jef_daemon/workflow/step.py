"""One event of a workflow, while the law carries it out: what it may look at, what it leaves behind. Pure."""

from __future__ import annotations

from jef_daemon.lifecycle import Status
from jef_daemon.workflow.events import CancelJob, Effect, Noted
from jef_daemon.workflow.plan import Plan
from jef_daemon.workflow.state import Bounds, Phase, Run, State, execution_id

_STOPPED = frozenset({Phase.CANCELLED, Phase.NOT_RUN})


class Step:
    """One event and all that follows from it at once.

    Args:
        plan: of the revision that the workflow is pinned to.
        state: changed.
        now: UTC seconds since the epoch.
        bounds: limits.
    """

    def __init__(self, plan: Plan, state: State, now: float, bounds: Bounds) -> None:
        self.plan = plan
        self.state = state
        self.now = now
        self.bounds = bounds
        self.effects: list[Effect] = []

    @property
    def is_ending(self) -> bool:
        """Whether nothing begins any more but the `always` stages."""
        return self.state.error is not None or self.state.cancel_requested

    @property
    def outcome(self) -> Status:
        """What the workflow comes to, as far as it is known: a cancel that found nothing to stop is none."""
        stages = self.state.stages.values()
        if self.state.cancel_requested and any(stage.phase in _STOPPED for stage in stages):
            return Status.CANCELLED
        return Status.COMPLETED if self.state.error is None else Status.FAILED

    def goes_on(self, stage: str) -> bool:
        """Whether a stage may have further jobs; those that clean up may, whatever became of the others."""
        return self.plan.stages[stage].always or not self.is_ending

    def ask_to_stop(self, stage: str, index: int, run: Run, then: str, reason: str, *, force: bool) -> None:
        """Have a stage's job cancelled; `then` says what follows (`Run.then`)."""
        run.then = then
        is_child = self.plan.stages[stage].workflow is not None
        self.effects.append(CancelJob(self.name_of(stage, index, run), reason, force, is_child))

    def name_of(self, stage: str, index: int, run: Run) -> str:
        """The execution id of a stage's job, or of the workflow that it is."""
        is_list = self.state.stages[stage].is_list
        return execution_id(self.state.key, stage, index if is_list else None, run.attempt)

    def fail(self, kind: str, said: str, actor: str = "coordinator") -> None:
        """Fail the workflow as a whole; the first failure stays."""
        self.note(kind, actor=actor, reason=said)
        if self.state.error is None:
            self.state.error = {"type": kind, "message": said}

    def note(self, event: str, stage: str = "", actor: str = "coordinator", reason: str = "") -> None:
        """Add a line to the history."""
        self.effects.append(Noted(event, stage, actor, reason))
