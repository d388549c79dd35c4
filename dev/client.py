"""A small client of ComfyUI's HTTP and websocket interface."""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from .websocket import WebSocket

Prompt = dict[str, dict[str, Any]]  # a workflow in API format
OnEvent = Callable[[str, dict[str, Any]], None]

END_EVENTS = ("execution_success", "execution_error", "execution_interrupted")


class PromptRefused(Exception):
    """The server did not accept a workflow; the text holds its reasons, one a line."""


@dataclass
class Run:
    """How one workflow went."""

    prompt_id: str
    status: str = ""  # one of END_EVENTS
    error: str = ""  # "NodeType: message" after execution_error
    seconds: dict[str, float] = field(default_factory=dict)  # node id -> time it took
    outputs: dict[str, dict[str, Any]] = field(default_factory=dict)  # node id -> what it shows

    def images(self, kind: str = "output") -> list[dict[str, str]]:
        """References of the pictures saved ("output") or previewed ("temp"), in node order."""
        found: list[dict[str, str]] = []
        for node in sorted(self.outputs, key=_node_order):
            found += [i for i in self.outputs[node].get("images", []) if i.get("type") == kind]
        return found


def _node_order(node: str) -> tuple[int, str]:
    return (int(node), "") if node.isdigit() else (1 << 30, node)


class Client:
    """Talks to one server on this machine."""

    def __init__(self, port: int, timeout: float = 600.0) -> None:
        self.port = port
        self.address = f"http://127.0.0.1:{port}"
        self.timeout = timeout

    def fetch(self, path: str, body: Any = None) -> bytes:
        """GET `path`, or POST `body` to it as JSON; raises urllib.error.HTTPError and URLError."""
        data = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(self.address + path, data=data, headers=headers)
        # An own opener: a proxy from the environment must not come between us and this machine.
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(request, timeout=60) as answer:
            return answer.read()

    def json(self, path: str, body: Any = None) -> Any:
        """Like `fetch`, decoded; None for an empty answer."""
        answer = self.fetch(path, body)
        return json.loads(answer) if answer else None

    def queue(self, prompt: Prompt, client_id: str = "") -> str:
        """Hand a workflow in; returns its id.

        Raises:
            PromptRefused: with every reason the server gives, per node and input.
        """
        try:
            return self.json("/prompt", {"prompt": prompt, "client_id": client_id})["prompt_id"]
        except urllib.error.HTTPError as error:
            raise PromptRefused(_reasons(error.read().decode("utf-8", "replace"))) from error

    def run(self, prompt: Prompt, on_event: OnEvent | None = None) -> Run:
        """Run a workflow to its end, however it ends; `on_event(type, data)` sees what happens.

        Raises:
            PromptRefused: when it does not even start.
            ConnectionError, TimeoutError: when the server dies or is silent for too long.
        """
        name = uuid.uuid4().hex
        socket = WebSocket("127.0.0.1", self.port, f"/ws?clientId={name}", self.timeout)
        try:
            run = Run(self.queue(prompt, name))
            self._follow(socket, run, on_event)
        finally:
            socket.close()
        return run

    def _follow(self, socket: WebSocket, run: Run, on_event: OnEvent | None) -> None:
        node, since = None, 0.0
        while True:
            text = socket.receive()
            if text is None:
                raise ConnectionError("the server closed the connection")
            message = json.loads(text)
            kind, data = message["type"], message.get("data") or {}
            # Other people's workflows and the queue's state arrive on the same connection.
            if data.get("prompt_id") != run.prompt_id:
                continue
            if kind == "executing" or kind in END_EVENTS:
                now = time.perf_counter()
                if node is not None:
                    run.seconds[node] = run.seconds.get(node, 0.0) + now - since
                node, since = data.get("node") if kind == "executing" else None, now
            elif kind == "executed":
                run.outputs[data["node"]] = data.get("output") or {}
            if on_event:
                on_event(kind, data)
            if kind in END_EVENTS:
                run.status = kind
                if kind == "execution_error":
                    run.error = f"{data['node_type']}: {data['exception_message'].strip()}"
                return

    def picture(self, reference: dict[str, str]) -> bytes:
        """The file of a picture that a run's outputs refer to."""
        return self.fetch("/view?" + urllib.parse.urlencode(reference))


def _reasons(answer: str) -> str:
    """The reasons in the body of a refusal, which is JSON unless the server itself stumbled."""
    try:
        refusal: dict[str, Any] = json.loads(answer)
    except ValueError:
        return answer
    error = refusal.get("error") or {}
    lines = [
        f"{error.get('message', 'the server gave no reason')} {error.get('details', '')}".strip()
    ]
    for node in (refusal.get("node_errors") or {}).values():
        for error in node.get("errors", []):
            lines.append(f"{node.get('class_type')}: {error['message']}: {error['details']}")
    return "\n".join(lines)
