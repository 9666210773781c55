"""jef_daemon: a job daemon on RabbitMQ. Requests come in, executors run, the life cycle is kept and told.

The tour, in the order of the flow (each module's docstring says what it does and what not):

    messages            what is on the wire; notifications: what is told of a job
    intake              delivery → valid request, duplicate or dead letter; custody
    lock/               which jobs may run at the same time
    run/                a queued job → a slot → an executor → its outcome
    updates             async jobs' updates, operators' commands → the ledger
    watch               silence → TIMED_OUT; waits and limits that run out
    tracing/            what was committed → spans, where it is on
    workflow/           a stage has ended → the next one's request
    web/, metrics       the HTTP port, where it is open: health, metrics, updates, commands
    notify              outbox → confirmed, ordered notifications on `jef.status`
    ledger/             executions, history, outbox: one transaction for all that is ready
    rabbitmq/           topology in one table; the bus
    events, lifecycle   the law they all keep: what can happen, statuses, the transition table
    daemon              puts them together; config says how; cli is the door for people

For authors of executors everything is importable from here:

    from jef_daemon import ActionExecutor, ActionExecutorResponse, ExecutionContext, action
"""

from jef_daemon.sdk import (
    ActionExecutor,
    ActionExecutorResponse,
    AsyncActionExecutor,
    ExecutionContext,
    ExternalCancelled,
    ExternalFailure,
    GrantedLock,
    NothingToPoll,
    action,
)

__version__ = "0.1.0"

__all__ = [
    "ActionExecutor",
    "ActionExecutorResponse",
    "AsyncActionExecutor",
    "ExecutionContext",
    "ExternalCancelled",
    "ExternalFailure",
    "GrantedLock",
    "NothingToPoll",
    "__version__",
    "action",
]
