"""A proxy before S3 that misbehaves: errors, cut connections, lost answers, long waits."""

import http.client
import random
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

BUSY = b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
BROKEN = b"<Error><Code>InternalError</Code><Message>We had a problem. Try again.</Message></Error>"
FAULTS = ("503", "500", "cut", "lost answer", "slow")


class FaultyProxy(ThreadingHTTPServer):
    """Passes requests on to `target`; a share of them, by lot, meets one of `FAULTS`."""

    daemon_threads = True

    def __init__(self, target: str, share: float, seed: int) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.target, self.share, self.lot = urlsplit(target).netloc, share, random.Random(seed)
        self.met: Counter[str] = Counter()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def draw(self) -> str:
        fault = self.lot.choice(FAULTS) if self.lot.random() < self.share else ""
        self.met[fault or "none"] += 1
        return fault

    def handle_error(self, request, client_address) -> None:
        """A connection that we cut is no news."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FaultyProxy

    def _pass(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        fault = self.server.draw()
        if fault in ("500", "503"):
            return self._answer(int(fault), {}, BROKEN if fault == "500" else BUSY)
        if fault == "cut":
            return self._cut()
        if fault == "slow":
            time.sleep(1)
        connection = http.client.HTTPConnection(self.server.target, timeout=60)
        connection.request(self.command, self.path, body, dict(self.headers))
        answer = connection.getresponse()
        content = answer.read()
        connection.close()
        return (
            self._cut()
            if fault == "lost answer"
            else self._answer(answer.status, dict(answer.getheaders()), content)
        )

    def _answer(self, status: int, headers: dict[str, str], content: bytes) -> None:
        self.send_response_only(status)
        for name, value in headers.items():
            if name.lower() not in ("transfer-encoding", "connection", "content-length"):
                self.send_header(name, value)
        size = headers.get("Content-Length", headers.get("content-length"))
        head = self.command == "HEAD" and size
        self.send_header("Content-Length", size if head else str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def _cut(self) -> None:
        self.close_connection = True
        self.connection.shutdown(2)

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = _pass  # noqa: N815

    def log_message(self, format, *args) -> None:
        """Say nothing."""
