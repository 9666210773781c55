"""An external service that renders, over HTTP: what the action `http` talks to. Nothing of jef_daemon is imported.

    python examples/render_service.py --port 8600

POST /renders takes a job as the action sends it. Its configuration says how long it takes ({"seconds": 3}). One that
takes no time is answered at once with the result; any other with 202, and then either the service is polled at the
address of `Location`, or, with --report callback, it reports to the job's callback. DELETE stops it.
"""

from __future__ import annotations

import argparse
import itertools
import json
import ssl
import threading
import time
import urllib.error
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

STEPS = 10
LONGEST_BODY = 1024 * 1024


class Render:
    """One render: a thread that works a while."""

    def __init__(self, number: int, job: dict[str, Any], reports: bool) -> None:
        self.id = f"render-{number}"
        self.job = job
        self.state: dict[str, Any] = {"externalId": self.id, "status": "RUNNING", "progress": 0}
        self._stop = threading.Event()
        self._reports = reports
        threading.Thread(target=self._work, daemon=True).start()

    def stop(self) -> None:
        self._stop.set()

    def _work(self) -> None:
        configuration = self.job["configuration"]
        for step in range(STEPS):
            self._tell(status="RUNNING", progress=100 * step // STEPS, message=f"frame {step} of {STEPS}")
            if self._stop.wait(configuration["seconds"] / STEPS):
                self._tell(status="CANCELLED", message="stopped")
                return
            if configuration.get("broken") and step == STEPS // 2:
                self._tell(status="FAILED", error={"type": "OutOfPaint", "message": "no blue left"})
                return
        self._tell(status="COMPLETED", progress=100, **done(self.job))

    def _tell(self, **news: Any) -> None:
        self.state = {"externalId": self.id, **news}
        if self._reports and report(self.job["callback"], self.state).get("cancelRequested"):
            self._stop.set()


def done(job: dict[str, Any]) -> dict[str, Any]:
    scene = job["configuration"].get("scene", "nothing")
    return {"result": f"rendered {scene}", "jobContextVariables": {"frames": STEPS, "scene": scene}}


def report(callback: dict[str, str], update: dict[str, Any]) -> dict[str, Any]:
    """Send an update to the daemon, again while it cannot be reached; returns its answer."""
    request = urllib.request.Request(
        callback["url"],
        json.dumps(update).encode(),
        {"Authorization": f"Bearer {callback['token']}", "Content-Type": "application/json"},
    )
    for pause in (0.2, 0.5, 1, 2, 5, 10, 30):
        try:
            with urllib.request.urlopen(request, timeout=30) as response:
                answer: dict[str, Any] = json.load(response)
                return answer
        except urllib.error.HTTPError as error:
            if error.code not in {408, 503}:  # the daemon does not want to hear it: the job is over
                return {"accepted": False, "cancelRequested": True}
        except OSError:
            pass  # the daemon restarts, perhaps
        time.sleep(pause)
    return {"accepted": False, "cancelRequested": True}


class Service(ThreadingHTTPServer):
    """Keeps the renders, by id; one job that is sent twice is one render."""

    daemon_threads = True

    def __init__(self, address: tuple[str, int], reports: bool, password: str | None) -> None:
        super().__init__(address, Handler)
        self.reports = reports
        self.password = password
        self.renders: dict[str, Render] = {}
        self.by_key: dict[str, Render] = {}
        self.numbers = itertools.count(1)
        self.lock = threading.Lock()


class Handler(BaseHTTPRequestHandler):
    server: Service
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        length = int(self.headers.get("Content-Length", "0"))
        if length > LONGEST_BODY:
            self.close_connection = True
            return self.answer(413)
        job = json.loads(self.rfile.read(length))
        if not self.may_pass():
            return self.answer(401, {"message": "who are you?"})
        if self.path != "/renders":
            return self.answer(404)
        if not job["configuration"].get("seconds"):
            return self.answer(200, done(job))
        with self.server.lock:
            key = self.headers["Idempotency-Key"]
            render = self.server.by_key.get(key)
            if render is None:
                render = Render(next(self.server.numbers), job, self.server.reports)
                self.server.by_key[key] = self.server.renders[render.id] = render
        if self.server.reports:
            return self.answer(202, {"externalId": render.id})
        return self.answer(202, {"externalId": render.id}, {"Location": f"/renders/{render.id}"})

    def do_GET(self) -> None:
        render = self.render()
        self.answer(200, render.state) if render else self.answer(404)

    def do_DELETE(self) -> None:
        render = self.render()
        if render:
            render.stop()
        self.answer(202 if render else 404)

    def render(self) -> Render | None:
        return self.server.renders.get(self.path.removeprefix("/renders/")) if self.may_pass() else None

    def may_pass(self) -> bool:
        return self.server.password in {None, self.headers.get("Authorization")}

    def answer(self, status: int, body: Any = None, headers: dict[str, str] | None = None) -> None:
        content = b"" if body is None else json.dumps(body).encode()
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


def main() -> None:
    parser = argparse.ArgumentParser(description="A service that renders.")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8600)
    parser.add_argument("--report", choices=["status", "callback"], default="status")
    parser.add_argument("--authorization", help="what the header Authorization must be")
    parser.add_argument("--certificate", help="PEM file of certificate and key: TLS")
    chosen = parser.parse_args()
    service = Service((chosen.host, chosen.port), chosen.report == "callback", chosen.authorization)
    if chosen.certificate:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(chosen.certificate)
        service.socket = context.wrap_socket(service.socket, server_side=True)
    print(f"rendering at port {service.server_address[1]}", flush=True)
    service.serve_forever()


if __name__ == "__main__":
    main()
