"""A judge's server on this machine: it speaks the chat-completions protocol, and its replies and faults are scripted."""

import json
import socket
import struct
import threading
from collections import Counter
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self

Messages = list[dict[str, str]]
HTTP_FAULTS = {"429": 429, "500": 500, "503": 503, "400": 400, "401": 401, "403": 403, "404": 404}


class JudgeServer:
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
        self.reply, self.fault, self.headers, self.usage = reply, fault, headers or {}, usage
        self.asked: list[dict[str, Any]] = []  # bodies of all requests, in the order of arrival
        self.answered: list[Messages] = []  # those that got a usable reply
        self.keys: set[str] = set()  # Authorization headers
        self.before: Callable[[int], None] = lambda number: (
            None
        )  # told the number of each request before it is answered
        self._tries: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._closing = threading.Event()

    def __enter__(self) -> Self:
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                outer._answer(self)

            def log_message(self, *words: Any) -> None:
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 64

            def handle_error(self, request: Any, address: Any) -> None:
                pass  # a client that went away is part of the script

        self._server = Server(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=lambda: self._server.serve_forever(poll_interval=0.02), daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *error: Any) -> None:
        self._closing.set()
        self._server.shutdown()
        self._server.server_close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}/v1"

    def _answer(self, http: BaseHTTPRequestHandler) -> None:
        body = json.loads(http.rfile.read(int(http.headers["Content-Length"])))
        messages = body["messages"]
        with self._lock:
            self.asked.append(body)
            number = len(self.asked)
            self.keys.add(http.headers.get("Authorization", ""))
            self._tries[json.dumps(messages)] += 1
            nth = self._tries[json.dumps(messages)]
        self.before(number)
        fault = self.fault(messages, nth)
        if fault in HTTP_FAULTS:
            _send(
                http,
                HTTP_FAULTS[fault],
                json.dumps({"error": {"message": f"no: {http.headers['Authorization']}"}}),
                self.headers,
            )
        elif fault == "timeout":
            self._closing.wait(5)
            http.close_connection = True
        elif fault == "reset":
            http.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            http.connection.close()
            http.close_connection = True
        elif fault == "json":
            _send(http, 200, '{"choices": [{"mess')
        elif fault == "page":
            _send(http, 200, "<html>gateway</html>", {"Content-Type": "text/html"})
        elif fault == "shape":
            _send(http, 200, '{"choices": []}')
        else:
            text = "" if fault in ("empty", "filtered") else self.reply(messages)
            finish = {"cut": "length", "filtered": "content_filter"}.get(fault or "", "stop")
            choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": finish}
            if text:
                with self._lock:
                    self.answered.append(messages)
            _send(http, 200, json.dumps({"choices": [choice], **({"usage": self.usage} if self.usage else {})}))


def _send(http: BaseHTTPRequestHandler, status: int, text: str, headers: dict[str, str] | None = None) -> None:
    data = text.encode()
    http.send_response(status)
    for name, value in ({"Content-Type": "application/json"} | (headers or {})).items():
        http.send_header(name, value)
    http.send_header("Content-Length", str(len(data)))
    http.end_headers()
    http.wfile.write(data)
