"""A small endpoint on this machine that judges, is slow, fails and lies, as a test tells it to."""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from rewards.judge.judge import Judge

Answer = Callable[["Handler"], None]


class Handler(BaseHTTPRequestHandler):
    """Answers a request with the next of the server's answers, the last one again and again."""

    server: Server
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # head and body in one packet, or each response waits for the client's word

    def do_POST(self) -> None:
        server = self.server
        self.body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock:
            server.requests.append((self.path, self.headers, self.body))
            server.running += 1
            server.most = max(server.most, server.running)
            answer = server.answers.pop(0) if len(server.answers) > 1 else server.answers[0]
        try:
            answer(self)
        except OSError:
            pass  # the client has gone
        finally:
            with server.lock:
                server.running -= 1

    def send(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        if "Content_Length" not in headers:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
        self.wfile.flush()

    def log_message(self, *args: Any) -> None:
        pass


class Server(ThreadingHTTPServer):
    """requests: (path, headers, body) of each; most: how many ran at a time."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.lock = threading.Lock()
        self.requests: list[tuple[str, Message, dict[str, Any]]] = []
        self.running = self.most = 0
        self.answers: list[Answer] = [says('{"correct": true}')]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # a dropped connection is what was asked for


@contextmanager
def serve() -> Iterator[Server]:
    server = Server()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def completion(text: Any) -> bytes:
    return json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]}).encode()


def says(text: Any, after: float = 0.0) -> Answer:
    """A chat completion with this text."""

    def answer(handler: Handler) -> None:
        time.sleep(after)
        handler.send(200, completion(text), Content_Type="application/json")

    return answer


def judges(right: Callable[[dict[str, Any]], bool]) -> Answer:
    """Says of a request's data what a function says."""

    def answer(handler: Handler) -> None:
        data = json.loads(handler.body["messages"][-1]["content"])
        says(json.dumps({"correct": right(data)}))(handler)

    return answer


def replies(text_of: Callable[[list[dict[str, str]]], Any], after: float = 0.0) -> Answer:
    """Says what a function says to a request's messages."""
    return lambda handler: says(text_of(handler.body["messages"]), after)(handler)


def stumbles(well: Answer, faults: list[Answer]) -> Answer:
    """Each request meets a fault before it is answered well: which one, its content decides."""
    met: set[str] = set()

    def answer(handler: Handler) -> None:
        text = json.dumps(handler.body["messages"])
        with handler.server.lock:
            again = text in met
            met.add(text)
        fault = faults[int(hashlib.sha256(text.encode()).hexdigest(), 16) % len(faults)]
        (well if again else fault)(handler)

    return answer


def fails(status: int, **headers: str) -> Answer:
    return lambda handler: handler.send(
        status, b'{"error": {"message": "no such model"}}', **headers
    )


def gives(body: bytes, **headers: str) -> Answer:
    """A good status with any body."""
    return lambda handler: handler.send(200, body, **headers)


def drops(handler: Handler) -> None:
    """The connection ends without a word."""
    handler.close_connection = True


def breaks(handler: Handler) -> None:
    """It ends within the body."""
    handler.send(200, b'{"choices": [', Content_Length="1000")
    handler.close_connection = True


def breaks_in_an_error(handler: Handler) -> None:
    """The same, within the body of an error."""
    handler.send(400, b'{"error": {', Content_Length="1000")
    handler.close_connection = True


def drips(handler: Handler) -> None:
    """A byte now and then, each before the client's clock runs out, for seconds."""
    handler.send(200, b"", Content_Length="1000")
    for _ in range(100):
        handler.wfile.write(b" ")
        handler.wfile.flush()
        time.sleep(0.05)


MakeJudge = Callable[..., Judge]


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    # a proxy that is not there: nothing of this may be sent through it
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, "127.0.0.1")
    with serve() as running:
        yield running


@pytest.fixture
def make(server: Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[MakeJudge]:
    monkeypatch.setenv("JUDGE_KEY", "any text")
    opened: list[Judge] = []

    def judge(base_url: str = server.url, model: str = "m", **options: Any) -> Judge:
        given = {"api_key_env": "JUDGE_KEY", "timeout": 5.0, **options}
        opened.append(Judge(base_url, model, **given))
        return opened[-1]

    yield judge
    for one in opened:
        one.close()
