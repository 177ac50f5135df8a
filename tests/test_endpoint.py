"""The client of an endpoint: one gate for all when there are too many requests, equal ones once."""

from __future__ import annotations

import email.utils
import threading
import time
from typing import Any

import pytest
from data_tool_cases import endpoint
from judge_server import Answer, Handler, Server, fails, says

from rewards.endpoint import Endpoint
from rewards.endpoint.exchange import retry_after

MESSAGES = [{"role": "user", "content": "How many?"}]


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch):
    with endpoint(monkeypatch) as running:
        yield running


def number(reply: str) -> tuple[int | None, str | None]:
    return (int(reply), None) if reply.isdigit() else (None, "it is no number")


def ask_all(client: Endpoint, contents: list[str]) -> list[Any]:
    found: dict[str, Any] = {}

    def ask(place: int, content: str) -> None:
        request = client.request([{"role": "user", "content": content}])
        found[str(place)] = client.ask_one(request, number)

    threads = [threading.Thread(target=ask, args=pair) for pair in enumerate(contents)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [found[str(place)] for place in range(len(contents))]


def limited(rate: float) -> Answer:
    """Answers one request every so many seconds, and tells the others to wait that long."""
    state = {"next": 0.0}

    def answer(handler: Handler) -> None:
        with handler.server.lock:
            now = time.monotonic()
            free = now >= state["next"]
            if free:
                state["next"] = now + rate
        well = says("7") if free else fails(429, retry_after_ms=str(int(rate * 1000)))
        well(handler)

    return answer


def test_too_many_requests_are_no_failures(server: Server) -> None:
    """With patience all get through; without, they use up their retries."""
    contents = [f"question {n}" for n in range(12)]
    server.answers = [limited(0.05)]
    client = Endpoint(server.url, "m", max_retries=0, max_concurrency=12, patience=60)
    assert [answer.value for answer in ask_all(client, contents)] == [7] * 12
    assert client.traffic.requests == len(server.requests)
    assert client.traffic.rate_limited == len(server.requests) - 12 > 0
    client.close()
    client = Endpoint(server.url, "m", max_retries=0, max_concurrency=12)
    reasons = [answer.reason for answer in ask_all(client, contents)]
    assert "HTTP 429" in reasons
    client.close()


def test_all_wait_when_one_is_told_to(server: Server) -> None:
    server.answers = [fails(429, Retry_After="0.4"), says("7")]
    client = Endpoint(server.url, "m", max_concurrency=2)
    first = threading.Thread(target=ask_all, args=(client, ["a"]))
    first.start()
    while client.traffic.rate_limited == 0:
        time.sleep(0.002)
    start = time.monotonic()
    ask_all(client, ["b"])
    assert time.monotonic() - start > 0.3
    first.join()
    client.close()


def test_money_that_is_spent_is_not_waited_for(server: Server) -> None:
    body = b'{"error": {"message": "You are over your limit", "code": "insufficient_quota"}}'
    server.answers = [lambda handler: handler.send(429, body, Content_Type="application/json")]
    client = Endpoint(server.url, "m", patience=5)
    answer = client.ask_one(client.request(MESSAGES), number)
    assert (answer.value, answer.reason, len(server.requests)) == (None, "HTTP 429", 1)
    client.close()


def test_equal_requests_under_way_are_one(server: Server) -> None:
    server.answers = [says("7", after=0.3)]
    client = Endpoint(server.url, "m")
    assert [answer.value for answer in ask_all(client, ["same"] * 5)] == [7] * 5
    assert len(server.requests) == 1
    client.close()


def test_a_kept_reply_is_read_again(server: Server, tmp_path: Any) -> None:
    """A reader that asks for more than before asks the model again."""
    server.answers = [says("7"), says("12")]
    client = Endpoint(server.url, "m", cache=tmp_path / "kept.sqlite")
    request = client.request(MESSAGES)
    assert client.ask_one(request, number).value == 7
    assert client.ask_one(request, number).value == 7 and len(server.requests) == 1

    def large(reply: str) -> tuple[int | None, str | None]:
        return (int(reply), None) if int(reply) > 10 else (None, "it is small")

    assert client.ask_one(request, large).value == 12 and len(server.requests) == 2
    assert client.ask_one(request, number).value == 12 and len(server.requests) == 2
    client.close()


def test_closing_ends_the_waiting(server: Server) -> None:
    server.answers = [fails(429, Retry_After="60")]
    client = Endpoint(server.url, "m", patience=600)
    found: list[Any] = []
    thread = threading.Thread(
        target=lambda: found.append(client.ask_one(client.request(MESSAGES), number))
    )
    thread.start()
    while client.traffic.rate_limited == 0:
        time.sleep(0.002)
    client.close()
    thread.join(5)
    assert not thread.is_alive() and found[0].value is None


def test_retry_after() -> None:
    soon = email.utils.formatdate(time.time() + 30, usegmt=True)
    assert 27 < (retry_after({"retry-after": soon}) or 0) <= 30
    assert retry_after({"retry-after": "nonsense"}) is None
    assert retry_after({"retry-after": "nan"}) is None
    assert retry_after({"retry-after-ms": "250", "retry-after": "9"}) == 0.25
