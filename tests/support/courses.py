"""A workflow that a test drives by hand through the law."""

from __future__ import annotations

from typing import Any

from pydantic_core import from_json

from jef_daemon.lifecycle import Status
from jef_daemon.workflow import events, law
from jef_daemon.workflow.definition import Definition
from jef_daemon.workflow.plan import plan
from jef_daemon.workflow.state import Bounds, Holding, decode, encode, parsed


class Course:
    """One workflow, driven by hand.

    Args:
        stages: of its definition; an action is added to those without.
        bounds: limits.
        around: locks of the workflows that it is within.
        begins: whether it may run at once.
        more: of its definition.
    """

    def __init__(
        self,
        *stages: dict[str, Any],
        bounds: Bounds = law.DEFAULTS,
        around: tuple[Holding, ...] = (),
        begins: bool = True,
        **more: Any,
    ) -> None:
        spelled = [{"action": "a"} | stage if "workflow" not in stage else stage for stage in stages]
        self.plan = plan(Definition.model_validate({"name": "w", "stages": spelled, **more}))
        self.state = law.new(self.plan, "w", {}, 0, 0.0)
        self.state.around = list(around)
        self.bounds = bounds
        self.now = 100.0
        self.effects: list[events.Effect] = []
        if begins:
            self.do(events.Begun())

    def do(self, event: events.Event) -> list[events.Effect]:
        """Let something happen."""
        self.state = decode(encode(self.state))
        new = law.advance(self.plan, self.state, event, self.now, self.bounds)
        self.effects += new
        return new

    def end(self, name: str, status: Status = Status.COMPLETED, **more: Any) -> list[events.Effect]:
        """Let a job come to its end: `stage:attempt`, or `stage.index:attempt`."""
        found = parsed(f"w:{name}")
        assert found is not None
        _, stage, index, attempt = found
        return self.do(events.Ended(stage=stage, index=index, attempt=attempt, status=status, **more))

    def asked(self) -> list[str]:
        """Jobs that were asked for, in order."""
        jobs = [from_json(effect.body) for effect in self.effects if isinstance(effect, events.StartJob)]
        return [job["executionId"].removeprefix("w:") for job in jobs]

    def noted(self) -> list[str]:
        """The history: what happened, and to which stage."""
        found = [effect for effect in self.effects if isinstance(effect, events.Noted)]
        return [f"{each.event} {each.stage}".strip() for each in found]

    def request(self, name: str) -> dict[str, Any]:
        """The request for a job."""
        jobs = [from_json(effect.body) for effect in self.effects if isinstance(effect, events.StartJob)]
        return next(job for job in jobs if job["executionId"] == f"w:{name}")

    def phases(self) -> dict[str, str]:
        """How far each stage has come."""
        return {name: stage.phase.value for name, stage in self.state.stages.items()}
