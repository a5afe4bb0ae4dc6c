"""A judge's server on this machine: it speaks the chat-completions protocol, and its replies and faults are scripted."""

import json
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler
from typing import Any

from local_server import LocalServer, send

Messages = list[dict[str, str]]
HTTP_FAULTS = {"429": 429, "500": 500, "503": 503, "400": 400, "401": 401, "403": 403, "404": 404}


class JudgeServer(LocalServer):
    """``reply(messages)`` is what the judge says; ``fault(messages, nth)`` what goes wrong at the nth try (from 1).

    Faults: an HTTP status ("429", "500", "400" ...), "timeout", "reset", "json" (not JSON), "page" (HTML with status
    200), "shape" (JSON of another kind), "empty", "cut" (ended by the length cap), "filtered". None: the reply.
    """

    def __init__(
        self,
        reply: Callable[[Messages], str],
        fault: Callable[[Messages, int], str | None] = lambda messages, nth: None,
        *,
        headers: dict[str, str] | None = None,
        usage: dict[str, int] | None = None,
    ) -> None:
        super().__init__()
        self.reply, self.fault, self.headers, self.usage = reply, fault, headers or {}, usage
        self.asked: list[dict[str, Any]] = []  # bodies of all requests, in the order of arrival
        self.answered: list[Messages] = []  # those that got a usable reply
        self.keys: set[str] = set()  # Authorization headers
        self.before: Callable[[int], None] = lambda number: (
            None
        )  # told the number of each request before it is answered

    @property
    def url(self) -> str:
        return f"{self.address}/v1"

    def answer(self, http: BaseHTTPRequestHandler) -> None:
        body = json.loads(http.rfile.read(int(http.headers["Content-Length"])))
        messages = body["messages"]
        with self._lock:
            self.asked.append(body)
            number = len(self.asked)
            self.keys.add(http.headers.get("Authorization", ""))
        nth = self.nth(json.dumps(messages))
        self.before(number)
        fault = self.fault(messages, nth)
        if self.broken(http, fault):
            return
        if fault in HTTP_FAULTS:
            send(
                http,
                HTTP_FAULTS[fault],
                json.dumps({"error": {"message": f"no: {http.headers['Authorization']}"}}),
                self.headers,
            )
        elif fault == "json":
            send(http, 200, '{"choices": [{"mess')
        elif fault == "page":
            send(http, 200, "<html>gateway</html>", {"Content-Type": "text/html"})
        elif fault == "shape":
            send(http, 200, '{"choices": []}')
        else:
            text = "" if fault in ("empty", "filtered") else self.reply(messages)
            finish = {"cut": "length", "filtered": "content_filter"}.get(fault or "", "stop")
            choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": finish}
            if text:
                with self._lock:
                    self.answered.append(messages)
            send(http, 200, json.dumps({"choices": [choice], **({"usage": self.usage} if self.usage else {})}))
