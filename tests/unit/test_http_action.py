"""What services answer, as the action `http` reads it; its settings; what it sends."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from jef_daemon import ExecutionContext, ExternalCancelled, ExternalFailure
from jef_daemon.actions.exchange import Reply, ServiceFailure
from jef_daemon.actions.http import Answer, Http, HttpSettings


def reply(body: Any, status: int = 200) -> Reply:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return Reply(status, "https://render.example/x?token=hunter2", None, "application/json", content)


def context(**more: Any) -> ExecutionContext[Any]:
    return ExecutionContext(
        configuration=Http.Configuration(),
        execution_id="a:1",
        action="http",
        report=lambda *_: None,
        scratch="/nowhere",
        **more,
    )


def test_an_answer_without_a_body_says_nothing() -> None:
    assert Answer.of(reply(b" \n")) == Answer()
    assert Answer.of(reply({"unknown": 1})) == Answer()


def test_an_answer_is_the_seeds_response() -> None:
    body = {
        "result": "fine",
        "externalId": "r-1",
        "jobContextVariables": {"frames": 7},
        "workflowContextVariables": {"who": "ann"},
    }
    response = Answer.of(reply(body)).response()
    assert (response.result, response.execution_id) == ("fine", "r-1")
    assert response.job_context_variables == {"frames": 7}
    assert response.workflow_context_variables == {"who": "ann"}


@pytest.mark.parametrize(
    "body",
    [
        b"<html>",
        b"[]",
        b"5",
        {"status": "DONE"},
        {"externalId": ""},
        {"externalId": "x" * 256},
        {"progress": "a lot"},
        {"jobContextVariables": []},
        {"error": "broken"},
        {"result": 5},
    ],
)
def test_what_is_no_answer_is_said_so(body: Any) -> None:
    """Without the query of the address, which may be a secret."""
    with pytest.raises(
        ServiceFailure, match=r"^https://render\.example:443/x answers what is no answer"
    ) as caught:
        Answer.of(reply(body))
    assert "hunter2" not in str(caught.value)


def test_how_the_work_ended() -> None:
    broken = {"type": "OutOfPaint", "message": "no blue left"}
    failed = Answer.of(reply({"status": "FAILED", "error": broken})).failure()
    assert (type(failed), str(failed)) == (ExternalFailure, "OutOfPaint: no blue left")
    assert str(Answer.of(reply({"status": "FAILED", "message": "broken"})).failure()) == "broken"
    assert isinstance(Answer.of(reply({"status": "CANCELLED"})).failure(), ExternalCancelled)
    assert Answer.of(reply({"status": "RUNNING"})).failure() is None
    assert Answer.of(reply({})).failure() is None


@pytest.mark.parametrize(
    "wrong",
    [
        {"allowed_hosts": ["https://render.example"]},
        {"allowed_hosts": ["*"]},
        {"allowed_hosts": ["render.example/x"]},
        {"headers": {"Host": "/x"}},
        {"headers": {"idempotency-key": "/x"}},
        {"headers": {"Bad Header": "/x"}},
        {"callback_base_url": "daemon.example"},
        {"callback_base_url": "https://user:password@daemon.example"},
        {"cancel_method": "GET"},
        {"roots": []},
    ],
)
def test_settings_that_are_wrong(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        HttpSettings.model_validate(wrong)


def test_the_callback_names_the_execution() -> None:
    """Its id cannot change the address."""
    executor = Http(HttpSettings(callback_base_url="https://daemon.example/jef/"))
    job = json.loads(executor._job(context(token="t")))
    assert job["callback"] == {"url": "https://daemon.example/jef/executions/a%3A1/updates", "token": "t"}
    assert "callback" not in json.loads(Http(HttpSettings())._job(context(token="t")))


def test_headers_come_from_files(tmp_path: Path) -> None:
    secret = tmp_path / "x"
    secret.write_text("hunter2\n")
    executor = Http(HttpSettings(headers={"Authorization": secret}))
    headers = executor._headers(context(attempt=3))
    assert (headers["Authorization"], headers["Idempotency-Key"]) == ("hunter2", "a:1-3")
    for content in (b"two\nlines", b"\xff", b"\xc3\xa9", b"\x00"):
        secret.write_bytes(content)
        with pytest.raises(ServiceFailure, match="the file for the header Authorization"):
            executor._headers(context())


def test_importing_it_loads_no_library_of_http() -> None:
    """The daemon imports every action at its start."""
    code = "import sys, jef_daemon.actions.http; sys.exit('httpx' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
