"""The wire protocol for machines: JSON Schemas of every message, and an AsyncAPI document of every channel."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from jef_daemon import __version__
from jef_daemon.lock.messages import LockReply, LockRequest
from jef_daemon.messages import (
    Control,
    ControlReply,
    JobRequest,
    StatusNotification,
    Update,
    UpdateReply,
    WorkflowRequest,
)
from jef_daemon.names import Names
from jef_daemon.workflow.messages import WorkflowNotification

_DIALECT = "https://json-schema.org/draft/2020-12/schema"


WIRE_MODELS: tuple[type[BaseModel], ...] = (
    JobRequest,
    StatusNotification,
    Update,
    UpdateReply,
    Control,
    ControlReply,
    LockRequest,
    LockReply,
    WorkflowRequest,
    WorkflowNotification,
)
"""What `jef schema` publishes."""


def json_schemas() -> dict[str, dict[str, Any]]:
    """The schema of each message by its name, keys as they are on the wire."""
    found = {}
    for model in WIRE_MODELS:
        schema = model.model_json_schema(by_alias=True)
        found[model.__name__] = {"$schema": _DIALECT, **schema}
    return found


def _channels(names: Names) -> dict[str, tuple[str, str, str, tuple[str, ...], str]]:
    """Name → (address, kind, who acts: the daemon receives or sends, messages, what it is)."""
    return {
        "jobs": (
            names.jobs,
            "topic",
            "receive",
            ("JobRequest",),
            "Requests; routing key: the action's name.",
        ),
        "status": (
            names.status,
            "topic",
            "send",
            ("StatusNotification",),
            "Status notifications; routing key `<action>.<status in lower case>`.",
        ),
        "updates": (
            names.updates,
            "queue",
            "receive",
            ("Update",),
            "Updates of async jobs, by whoever runs them.",
        ),
        "control": (names.control, "queue", "receive", ("Control",), "Commands: cancel, retry, resume."),
        "locks": (
            names.locks,
            "queue",
            "receive",
            ("LockRequest",),
            "Operations on locks; answered to `reply_to`.",
        ),
        "workflows": (names.workflows, "queue", "receive", ("WorkflowRequest",), "Requests for workflows."),
        "workflow-status": (
            names.workflow_status,
            "topic",
            "send",
            ("WorkflowNotification",),
            "Notifications of workflows; routing key `<workflow>.<status in lower case>`.",
        ),
        "dead": (names.dead, "fanout", "send", (), "Dead letters, with `x-jef-reason` and `x-jef-detail`."),
    }


def asyncapi(prefix: str = "jef") -> dict[str, Any]:
    """An AsyncAPI 3.0 document of all channels, from the daemon's point of view."""
    channels, operations = {}, {}
    for name, (address, kind, act, told, what) in _channels(Names(prefix)).items():
        channels[name] = {
            "address": address,
            "description": what,
            "messages": {message: {"$ref": f"#/components/messages/{message}"} for message in told},
            "bindings": {"amqp": _binding(address, kind)},
        }
        operations[f"{act}-{name}"] = {
            "action": act,
            "channel": {"$ref": f"#/channels/{name}"},
            "summary": what,
        }
    return {
        "asyncapi": "3.0.0",
        "info": {
            "title": "jef_daemon",
            "version": __version__,
            "description": "Jobs on RabbitMQ: requests, status notifications, updates, commands, locks.",
            "license": {"name": "Apache-2.0"},
        },
        "defaultContentType": "application/json",
        "channels": channels,
        "operations": operations,
        "components": _components(),
    }


def _binding(address: str, kind: str) -> dict[str, Any]:
    if kind == "queue":
        return {
            "is": "queue",
            "queue": {"name": address, "durable": True, "exclusive": False, "autoDelete": False},
        }
    return {
        "is": "routingKey",
        "exchange": {"name": address, "type": kind, "durable": True, "autoDelete": False},
    }


def _components() -> dict[str, Any]:
    """Messages, and their schemas beside them: in a document, `$ref` counts from the document's root."""
    _, found = models_json_schema(
        [(model, "validation") for model in WIRE_MODELS], ref_template="#/components/schemas/{model}"
    )
    messages = {
        model.__name__: {
            "name": model.__name__,
            "summary": (model.__doc__ or "").partition("\n")[0],
            "payload": {"$ref": f"#/components/schemas/{model.__name__}"},
        }
        for model in WIRE_MODELS
    }
    return {"messages": messages, "schemas": found["$defs"]}
