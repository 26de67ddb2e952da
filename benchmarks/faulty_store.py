"""A proxy in front of a local HTTP server that injects the faults of real networks and servers."""

from __future__ import annotations

import contextlib
import http.client
import socket
import struct
import threading
import time
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

LOOPBACK = "127.0.0.1"
CHUNK = 64 * 1024
FAULTS = ("refuse", "500", "503", "cut", "truncate", "wrong")
"""Kinds of faults: close without an answer (refuse), answer with an error (500, 503), close in the middle of the body (cut),
announce and send half of the body (truncate), change a byte of it (wrong)."""
NOT_FORWARDED = {"connection", "transfer-encoding", "content-length", "keep-alive", "date", "server"}


@dataclass(frozen=True)
class Fault:
    """A fault for the next request with this method whose path contains ``path``."""

    kind: str
    path: str = ""
    method: str = "GET"


class FaultyProxy:
    """A proxy of an HTTP server that applies each of ``faults`` to one request.

    Attributes:
        faults: faults that are still to be injected.
        injected: number of injected faults by kind.
        requests: number of requests by method.
        bytes_per_second: bandwidth of all response bodies together; None for no limit.
    """

    def __init__(self, port: int, bytes_per_second: float | None = None) -> None:
        self.server_port, self.bytes_per_second = port, bytes_per_second
        self.faults: deque[Fault] = deque()
        self.injected: Counter[str] = Counter()
        self.requests: Counter[str] = Counter()
        self.lock = threading.Lock()
        self.free_at = 0.0
        self.server: ThreadingHTTPServer | None = None
        self.port = self.start(0)

    @property
    def url(self) -> str:
        return f"http://{LOOPBACK}:{self.port}"

    def start(self, port: int) -> int:
        proxy = self

        class Handler(ProxyHandler):
            owner = proxy

        self.server = Server((LOOPBACK, port), Handler)
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()
        return self.server.server_address[1]

    def stop(self) -> None:
        if self.server is not None:
            self.server.shutdown()
            self.server.server_close()
            self.server = None

    @contextlib.contextmanager
    def offline(self) -> Iterator[None]:
        """Refuse connections until the block ends."""
        self.stop()
        try:
            yield
        finally:
            self.injected["away"] += 1
            self.start(self.port)

    def go_offline(self, seconds: float) -> threading.Thread:
        """Refuse connections for ``seconds`` from now on."""

        def wait() -> None:
            with self.offline():
                started.set()
                time.sleep(seconds)

        started = threading.Event()
        thread = threading.Thread(target=wait, daemon=True)
        thread.start()
        started.wait()
        return thread

    def fault_for(self, method: str, path: str) -> str | None:
        """Remove and return the first fault that applies to this request."""
        with self.lock:
            self.requests[method] += 1
            for fault in self.faults:
                if fault.method == method and fault.path in path:
                    self.faults.remove(fault)
                    self.injected[fault.kind] += 1
                    return fault.kind
        return None

    def throttle(self, count: int) -> None:
        """Wait until ``count`` more bytes are within the bandwidth."""
        if self.bytes_per_second:
            with self.lock:
                start = max(self.free_at, time.monotonic())
                self.free_at = start + count / self.bytes_per_second
            time.sleep(max(0.0, start - time.monotonic()))


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def __init__(self, *arguments: object) -> None:
        self.open: set[socket.socket] = set()
        super().__init__(*arguments)

    def process_request(self, request: socket.socket, client_address: object) -> None:
        self.open.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: socket.socket) -> None:
        self.open.discard(request)
        super().shutdown_request(request)

    def server_close(self) -> None:
        super().server_close()
        for request in list(self.open):  # keep-alive connections
            with contextlib.suppress(OSError):
                request.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: object, client_address: object) -> None:
        """Ignore clients that closed their connection."""


class ProxyHandler(BaseHTTPRequestHandler):
    owner: FaultyProxy
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def forward(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        fault = self.owner.fault_for(self.command, self.path)
        if fault == "refuse":
            return self.reset()
        if fault in ("403", "500", "503"):
            code = {"403": "AccessDenied", "500": "InternalError", "503": "SlowDown"}[fault]
            text = f'<?xml version="1.0"?><Error><Code>{code}</Code><Message>injected</Message></Error>'.encode()
            return self.answer(int(fault), [("Content-Type", "application/xml")], text)
        upstream = http.client.HTTPConnection(LOOPBACK, self.owner.server_port, timeout=60)
        upstream.request(self.command, self.path, body, dict(self.headers))
        response = upstream.getresponse()
        content = response.read()
        upstream.close()
        headers = [(name, value) for name, value in response.getheaders() if name.lower() not in NOT_FORWARDED]
        if self.command == "HEAD":
            return self.answer(response.status, headers, b"", length=response.getheader("Content-Length", "0"))
        if fault == "cut":
            self.answer(response.status, headers, content[: len(content) // 2], length=str(len(content)))
            return self.reset()
        if fault == "truncate":
            content = content[: len(content) // 2]
        if fault == "wrong":
            middle = len(content) // 2
            content = content[:middle] + bytes([content[middle] ^ 255]) + content[middle + 1 :]
        self.answer(response.status, headers, content)

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = forward

    def answer(self, status: int, headers: list[tuple[str, str]], body: bytes, length: str | None = None) -> None:
        self.send_response_only(status)
        for name, value in headers:
            self.send_header(name, value)
        self.send_header("Content-Length", length or str(len(body)))
        self.end_headers()
        for start in range(0, len(body), CHUNK):
            chunk = body[start : start + CHUNK]
            self.owner.throttle(len(chunk))
            self.wfile.write(chunk)

    def reset(self) -> None:
        """Reset the connection (TCP RST)."""
        self.close_connection = True
        self.wfile.flush()
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()
