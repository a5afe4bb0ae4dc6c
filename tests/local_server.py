"""What the tests' HTTP servers share: a port of this machine, threads, and the ways in which a connection breaks."""

import socket
import struct
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self


class LocalServer:
    """``with Some(LocalServer)() as server``: each request goes to ``answer``, in a thread of its own."""

    def __init__(self) -> None:
        self._tries: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._closing = threading.Event()

    def answer(self, http: BaseHTTPRequestHandler) -> None:
        raise NotImplementedError

    def __enter__(self) -> Self:
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                outer.answer(self)

            def do_POST(self) -> None:
                outer.answer(self)

            def log_message(self, *words: Any) -> None:
                pass

        class Http(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 512

            def handle_error(self, request: Any, address: Any) -> None:
                pass  # a client that went away is part of the test

        self._server = Http(("127.0.0.1", 0), Handler)
        serve = threading.Thread(target=lambda: self._server.serve_forever(poll_interval=0.02), daemon=True)
        serve.start()
        return self

    def __exit__(self, *error: Any) -> None:
        self._closing.set()
        self._server.shutdown()
        self._server.server_close()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def nth(self, what: str) -> int:
        """How often this was asked, this time included."""
        with self._lock:
            self._tries[what] += 1
            return self._tries[what]

    def broken(self, http: BaseHTTPRequestHandler, fault: str | None) -> bool:
        """Whether ``fault`` is that no answer comes: "timeout" or "reset"."""
        if fault == "timeout":
            self._closing.wait(5)
        elif fault == "reset":
            http.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            http.connection.close()
        else:
            return False
        http.close_connection = True
        return True


def send(http: BaseHTTPRequestHandler, status: int, text: str, headers: dict[str, str] | None = None) -> None:
    data = text.encode()
    http.send_response(status)
    for name, value in ({"Content-Type": "application/json"} | (headers or {})).items():
        http.send_header(name, value)
    http.send_header("Content-Length", str(len(data)))
    http.end_headers()
    http.wfile.write(data)
