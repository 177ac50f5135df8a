"""A small OpenAI-compatible server that is slow, dies, comes back, or answers garbage."""

from __future__ import annotations

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from internvl.sampler import SampleRequest


class FakeServer:
    """Answers each question from its seed; `behave(request number, body)` may change that.

    behave returns None (answer well), (status, text) or raises ConnectionError (drop the line).
    """

    def __init__(self, *, behave=None, delay=0.0, models=None, limit=512):
        self.behave, self.delay = behave or (lambda number, body: None), delay
        self.models = models or [{"id": "tiny", "max_model_len": limit}]
        self.bodies: list[dict] = []
        self.at_once = self.most_at_once = 0
        self.lock = threading.Lock()
        self.port = 0
        self.start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.port}/v1"

    def start(self):
        """Listen, at the port of before where there was one."""
        handler = type("Handler", (_Handler,), {"fake": self})
        self.http = _Quiet(("127.0.0.1", self.port), handler)
        self.port = self.http.server_address[1]
        thread = threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True)
        thread.start()

    def stop(self):
        """Die: nobody listens any more, and lines that were open are cut."""
        self.http.dying = True
        self.http.shutdown()
        self.http.server_close()

    def get(self, path):
        """What is told at a path other than the list of models, if anything."""
        return None

    def post(self, path, body):
        """(status, text) for a path other than the completions', if any."""
        return None

    def answer(self, body):
        """A choice for each of n: the seed's own numbers."""
        choices = [
            {
                "index": index,
                "message": {"role": "assistant", "content": f"{body['seed'] % 1000 + index}"},
                "finish_reason": "stop",
            }
            for index in range(body["n"])
        ]
        return {"object": "chat.completion", "model": "tiny", "choices": choices}


class _Quiet(ThreadingHTTPServer):
    daemon_threads = True
    allow_reuse_address = True
    block_on_close = False
    request_queue_size = 256
    dying = False

    def handle_error(self, request, client_address):
        pass


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    fake: FakeServer

    def log_message(self, *args):
        pass

    def reply(self, status, text):
        if self.server.dying:
            self.close_connection = True
            return
        encoded = text.encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(encoded)))
        self.end_headers()
        self.wfile.write(encoded)

    def do_GET(self):
        if (text := self.fake.get(self.path)) is not None:
            self.reply(200, text)
            return
        self.reply(200, json.dumps({"object": "list", "data": self.fake.models}))

    def do_POST(self):
        fake = self.fake
        length = int(self.headers["Content-Length"] or 0)
        body = json.loads(self.rfile.read(length)) if length else {}
        if (other := fake.post(self.path, body)) is not None:
            self.reply(*other)
            return
        with fake.lock:
            fake.bodies.append(body)
            number = len(fake.bodies)
            fake.at_once += 1
            fake.most_at_once = max(fake.most_at_once, fake.at_once)
        try:
            time.sleep(fake.delay)
            other = fake.behave(number, body)
        except ConnectionError:
            self.close_connection = True
            return
        finally:
            with fake.lock:
                fake.at_once -= 1
        self.reply(*(other or (200, json.dumps(fake.answer(body)))))


def started_servers():
    """Yields `start(**options)`, which starts a server; all are stopped in the end."""
    started = []

    def start(**options):
        started.append(FakeServer(**options))
        return started[-1]

    yield start
    for fake in started:
        fake.stop()


def requests(number):
    return [SampleRequest(f"How many of {i}?", (), seed=i) for i in range(number)]
