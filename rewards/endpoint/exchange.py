"""One request and its response: what it says, or what went wrong and when to try again."""

from __future__ import annotations

import email.utils
import json
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from openai import APIStatusError, OpenAI

MAX_REPLY = 1_000_000  # bytes of a response
_LONGEST_RETRY_AFTER = 120.0  # seconds; a server that asks for more is not asked again
_PASSING = (408, 409, 429)  # and from 500 on: statuses after which another try may go well
_NO_MONEY = "insufficient_quota"  # which comes as HTTP 429 and does not pass


@dataclass(frozen=True)
class Response:
    """text: what the model says, None where nothing came; then reason says why.

    detail: the endpoint's own words. try_again: whether it makes sense. retry_after: the seconds
    that the server asks to wait. rate_limited: that there were too many requests (HTTP 429). cut:
    that the text stops at max_tokens.
    """

    text: str | None
    reason: str | None = None
    detail: str | None = None
    try_again: bool = True
    retry_after: float | None = None
    rate_limited: bool = False
    cut: bool = False


def exchange(client: OpenAI, request: dict[str, Any], timeout: float) -> Response:
    """Send a request once and read its response, all of which may take `timeout` seconds."""
    import httpx2
    from openai import APIConnectionError, APIStatusError, APITimeoutError

    try:
        with client.chat.completions.with_streaming_response.create(**request) as response:
            return _read_body(response, timeout)
    except (APITimeoutError, httpx2.TimeoutException):
        return Response(None, "timed out")
    except APIConnectionError:
        return Response(None, "no connection")
    except APIStatusError as error:
        return _status_response(error)
    except httpx2.HTTPError:  # within the body, also that of an error, which the client reads
        return Response(None, "the connection broke")


def _status_response(error: APIStatusError) -> Response:
    status, seconds = error.status_code, retry_after(error.response.headers)
    passing = (status in _PASSING or status >= 500) and error.code != _NO_MONEY
    return Response(
        text=None,
        reason=f"HTTP {status}",
        detail=" ".join(error.message.split())[:300],
        try_again=passing and (seconds is None or seconds <= _LONGEST_RETRY_AFTER),
        retry_after=seconds,
        rate_limited=status == 429 and passing,
    )


def retry_after(headers: Mapping[str, str]) -> float | None:
    """The seconds that a server asks to wait: as a number, in milliseconds, or as a date.

    >>> retry_after({"retry-after": "2"}), retry_after({"retry-after-ms": "5"}), retry_after({})
    (2.0, 0.005, None)
    """
    for name, divisor in (("retry-after-ms", 1000), ("retry-after", 1)):
        try:
            seconds = float(headers.get(name, "")) / divisor
        except ValueError:
            continue
        if math.isfinite(seconds) and seconds >= 0:
            return seconds
    try:
        date = email.utils.parsedate_to_datetime(headers.get("retry-after", ""))
    except ValueError:
        return None
    return max(0.0, date.timestamp() - time.time())


def _read_body(response: Any, timeout: float) -> Response:
    """The client's clock starts again with every byte: the whole body gets one here."""
    body = bytearray()
    end = time.monotonic() + timeout
    for chunk in response.iter_bytes():
        body += chunk
        if time.monotonic() > end:
            return Response(None, "timed out")
        if len(body) > MAX_REPLY:
            return Response(None, f"its response is over {MAX_REPLY} bytes")
    return _content_of(body)


def _content_of(body: bytes | bytearray) -> Response:
    """The text in the body of a chat completion."""
    try:
        choice = json.loads(body)["choices"][0]
        content, finish = choice["message"]["content"], choice.get("finish_reason")
    except (ValueError, RecursionError, LookupError, TypeError, AttributeError):
        content = finish = None
    if not isinstance(content, str):
        return Response(None, "its response is no chat completion")
    return Response(content, cut=finish == "length")
