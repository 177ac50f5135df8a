"""A model behind an OpenAI-compatible endpoint: requests, retries, limits, replies that are kept.

    request -> known? -> its turn (max_concurrency, the server's Retry-After) -> response
        -> read(its text) -> a value: the text is kept;   anything else: asked again, at last None

Who asks says how a reply is read (`Read`); a reply is kept by all that decides: the endpoint and
the whole request (model, messages, temperature, max_tokens). A failure is never kept. A kept reply
is read again, so that a reader that asks for more than before asks the model again.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from rewards.endpoint.cache import ReplyCache
from rewards.endpoint.exchange import Response, exchange

if TYPE_CHECKING:
    from openai import OpenAI

Value = TypeVar("Value")
Request = dict[str, Any]
# a reply's value, or None and what is wrong with it
Read = Callable[[str], tuple[Value | None, str | None]]
# (request, reply, what is wrong with it) -> the request that asks for a better one
Again = Callable[[Request, str, str], Request]

INSTALL = "pip install 'internvl-posttraining[api]'"
MAX_CHARACTERS = 20_000  # of a request's last message; longer ones are not sent
_FAILURES_IN_A_ROW = 3  # times max_concurrency: then the rest is given up
_TEMPERATURE = 0.0
_FIRST_WAIT, _LONGEST_WAIT = 0.5, 8.0  # seconds between two attempts


@dataclass(frozen=True)
class Answer(Generic[Value]):
    """What came of a request; value is None where nothing usable came, and reason says how.

    replied: whether the last attempt brought a reply at all (which could not be read). detail: the
    endpoint's own words about a failure, which differ from time to time.
    """

    value: Value | None
    reason: str | None = None
    replied: bool = False
    detail: str | None = field(default=None, compare=False)


@dataclass(frozen=True)
class Reader(Generic[Value]):
    """How the replies of a request are read; see `Endpoint.ask_one`."""

    read: Read[Value]
    again: Again | None = None
    whole: bool = False

    def value_of(self, response: Response) -> tuple[Value | None, str | None]:
        """What a response that brought a text says, or None and what is wrong with it."""
        value, fault = (
            (None, None) if self.whole and response.cut else self.read(response.text or "")
        )
        if value is None and response.cut:
            return None, "its reply was cut off; more max_tokens may help"
        return value, fault


class Failures:
    """Counts the failures since the last success; too_many from `limit` on, and then for good."""

    def __init__(self, limit: int):
        self.limit = limit
        self.too_many = False
        self._in_a_row = 0
        self._lock = threading.Lock()

    def add(self, failed: bool) -> None:
        """Count one request."""
        with self._lock:
            self._in_a_row = self._in_a_row + 1 if failed else 0
            self.too_many = self.too_many or self._in_a_row >= self.limit


@dataclass
class Traffic:
    """What an endpoint was asked so far: requests sent, and how many of them met a rate limit."""

    requests: int = 0
    rate_limited: int = 0


class Endpoint:
    """Asks a model behind an OpenAI-compatible endpoint; may be used from several threads.

    base_url: up to and with "/v1". api_key_env: the environment variable that holds the key; it
    must be set, and local servers take any text. timeout: seconds to wait for the connection, for
    the response to begin, and for all of it. max_retries: how often a request is sent again after
    the first time, whatever went wrong; after a failure it waits 0.5, 1, 2 .. 8 seconds, or as long
    as the server's Retry-After says (up to two minutes); after HTTP 429 all requests wait, and for
    `patience` seconds of a request these do not count as retries.
    max_concurrency: requests at a time, of this process. max_tokens: of a reply. cache: a file to
    keep replies in, which processes may share. option: how the user writes an option of these
    names, for errors; role: what the endpoint is to the user. A proxy of the environment is used
    for local servers, too, unless NO_PROXY names them.
    Raises ValueError for a missing package or key, and what else cannot be honoured.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        *,
        api_key_env: str = "OPENAI_API_KEY",
        timeout: float = 30.0,
        max_retries: int = 2,
        patience: float = 0.0,
        max_concurrency: int = 8,
        max_tokens: int = 1024,
        max_characters: int = MAX_CHARACTERS,
        cache: Path | None = None,
        option: Callable[[str], str] = str,
        role: str = "endpoint",
    ):
        if not re.match(r"https?://[^/\s]", base_url):
            raise ValueError(
                f"{option('base_url')} is {base_url!r}; it starts with http:// or https://"
            )
        if not model:
            raise ValueError(f"{option('model')} is missing: the model's name at that endpoint")
        for name, value, least in [
            ("max_retries", max_retries, 0),
            ("max_concurrency", max_concurrency, 1),
            ("max_tokens", max_tokens, 1),
            ("max_characters", max_characters, 1),
        ]:
            if value < least:
                raise ValueError(f"{option(name)} is {value}, at least {least}")
        if not 0 <= patience < 86_400:
            raise ValueError(f"{option('patience')} is {patience:g}; seconds, 0 or more")
        if not 0 < timeout < 86_400:
            raise ValueError(f"{option('timeout')} is {timeout:g}; seconds, more than 0")
        self.base_url = base_url
        self.model = model
        self.timeout = timeout
        self.max_retries = max_retries
        self.patience = patience
        self.max_concurrency = max_concurrency
        self.max_tokens = max_tokens
        self.max_characters = max_characters
        self.traffic = Traffic()
        self._option, self._role = option, role
        self.cache = None if cache is None else ReplyCache(cache, option=option("cache"))
        self._free = threading.BoundedSemaphore(max_concurrency)
        self._gate = Gate()
        self._lock = threading.Lock()
        self._under_way: dict[str, Future[Answer[Any]]] = {}
        self._client = self._open_client(api_key_env)

    def _open_client(self, api_key_env: str) -> OpenAI:
        try:
            import httpx2
            from openai import OpenAI
        except ModuleNotFoundError as error:
            if error.name not in ("openai", "httpx2"):
                raise
            raise ValueError(f"a {self._role} needs the package openai: {INSTALL}") from None
        key = os.environ.get(api_key_env)
        if not key:
            raise ValueError(
                f"the environment variable {api_key_env} is not set; the {self._role} at "
                f"{self.base_url} gets it as its key (local servers take any: "
                f"export {api_key_env}=none)"
            )
        if not (key.isascii() and key.isprintable()):
            raise ValueError(f"the environment variable {api_key_env} holds no key but odd signs")
        try:
            return OpenAI(api_key=key, base_url=self.base_url, timeout=self.timeout, max_retries=0)
        except httpx2.InvalidURL as error:
            raise ValueError(f"{self._option('base_url')} is {self.base_url!r}: {error}") from None

    def close(self) -> None:
        """Close the connections; requests that wait for their turn are given up."""
        self._gate.close()
        self._client.close()

    def request(self, messages: Sequence[dict[str, str]]) -> Request:
        """A request's body."""
        return {
            "model": self.model,
            "messages": list(messages),
            "temperature": _TEMPERATURE,
            "max_tokens": self.max_tokens,
        }

    def key_of(self, request: Request) -> str:
        """What a reply is kept by.

        The endpoint is in it: two servers may call different models by one name ("default").
        """
        text = json.dumps([self.base_url.rstrip("/"), request], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def check(self, request: Request, read: Read[Value]) -> None:
        """Ask something plain, past the cache; raises ValueError where nothing usable comes."""
        _, found = self._send(request, Reader(read))
        if found.value is None:
            said = "" if found.detail is None else f" ({found.detail})"
            where = f"{self._option('base_url')} {self.base_url}, model {self.model}"
            raise ValueError(f"{where}: {self._role}: {found.reason}{said}")

    def failures(self) -> Failures:
        """A count of failures in a row, by which a caller gives the endpoint up."""
        return Failures(_FAILURES_IN_A_ROW * self.max_concurrency)

    def ask(self, requests: Sequence[Request], read: Read[Value]) -> list[Answer[Value]]:
        """The answer of each request; equal requests are sent once.

        When many in a row have failed the rest is not sent, so that an endpoint that is down costs
        a call some timeouts and not all of them; the next call tries again.
        """
        keys = [self.key_of(request) for request in requests]
        unique = dict(zip(keys, requests, strict=True))
        found = self._kept(list(unique), read)
        wanted = [key for key in unique if key not in found]
        failures = self.failures()

        def ask_one(key: str) -> Answer[Value]:
            answer = self._ask(key, unique[key], Reader(read), failures)
            failures.add(answer.value is None)
            return answer

        if wanted:
            threads = ThreadPoolExecutor(min(self.max_concurrency, len(wanted)), self._role)
            try:
                found |= zip(wanted, threads.map(ask_one, wanted), strict=True)
            finally:
                threads.shutdown(cancel_futures=True)
        return [found[key] for key in keys]

    def ask_one(
        self,
        request: Request,
        read: Read[Value],
        *,
        again: Again | None = None,
        whole: bool = False,
        failures: Failures | None = None,
    ) -> Answer[Value]:
        """The answer of one request, from any thread; the same request is under way only once.

        whole: a reply that stops at max_tokens is of no use, whatever can be read of it. again:
        makes the next request where a reply cannot be used (by default the same one).
        failures: counts requests that brought no reply at all; once they are too many none is sent.
        """
        key = self.key_of(request)
        if kept := self._kept([key], read):
            return kept[key]
        with self._lock:
            theirs = self._under_way.get(key)
            mine: Future[Answer[Any]] = Future()
            if theirs is None:
                self._under_way[key] = mine
        if theirs is not None:
            return theirs.result()
        try:
            answer = self._ask(key, request, Reader(read, again, whole), failures)
            if failures is not None:
                failures.add(answer.value is None and not answer.replied)
            mine.set_result(answer)
        except BaseException as error:  # the threads that wait for it get it too
            mine.set_exception(error)
            raise
        finally:
            with self._lock:
                del self._under_way[key]
        return answer

    def _kept(self, keys: Sequence[str], read: Read[Value]) -> dict[str, Answer[Value]]:
        known = {} if self.cache is None else self.cache.get(keys)
        values = {key: read(reply)[0] for key, reply in known.items()}
        return {key: Answer(value) for key, value in values.items() if value is not None}

    def _ask(
        self,
        key: str,
        request: Request,
        reader: Reader[Value],
        failures: Failures | None,
    ) -> Answer[Value]:
        with self._free:
            if failures is not None and failures.too_many:
                return Answer(None, "not asked, too many requests before it failed")
            reply, answer = self._send(request, reader)
        if self.cache is not None and answer.value is not None:
            self.cache.put(key, reply)
        return answer

    def _send(self, request: Request, reader: Reader[Value]) -> tuple[str, Answer[Value]]:
        """Ask until a reply can be read, at most 1 + max_retries times: the reply, its value."""
        if len(request["messages"][-1]["content"]) > self.max_characters:
            return "", Answer(None, f"not asked, over {self.max_characters} characters")
        first, attempt, limited = request, 0, 0
        answer: Answer[Value] = Answer(None, "not asked, the run was stopped")
        end = time.monotonic() + self.patience
        while attempt <= self.max_retries and self._gate.passed():
            with self._lock:
                self.traffic.requests += 1
            response = exchange(self._client, request, self.timeout)
            answer = Answer(None, response.reason, detail=response.detail)
            if response.text is not None:
                value, fault = reader.value_of(response)
                if value is not None:
                    return response.text, Answer(value)
                answer = Answer(None, fault, replied=True)
                if response.cut and reader.whole:
                    break  # it would be cut again
                if reader.again is not None and fault is not None:
                    request = reader.again(first, response.text, fault)
            elif not response.try_again:
                break
            if response.rate_limited and time.monotonic() < end:
                limited += 1
            else:
                attempt += 1
            if response.text is None and attempt <= self.max_retries:
                self._wait(response, limited if response.rate_limited else attempt)
        return "", answer

    def _wait(self, response: Response, number: int) -> None:
        """Wait after the `number`th failure of a request, all requests if there are too many."""
        seconds = response.retry_after
        if seconds is None:
            seconds = min(_FIRST_WAIT * 2.0 ** min(number - 1, 10), _LONGEST_WAIT)
        if response.rate_limited:
            with self._lock:
                self.traffic.rate_limited += 1
            self._gate.hold(seconds)
        else:
            self._gate.sleep(seconds)


class Gate:
    """Where requests wait; all of them when the server says that there are too many."""

    def __init__(self) -> None:
        self._closed = threading.Event()
        self._lock = threading.Lock()
        self._until = 0.0

    def hold(self, seconds: float) -> None:
        """Let nobody pass for so long."""
        with self._lock:
            self._until = max(self._until, time.monotonic() + seconds)

    def sleep(self, seconds: float) -> None:
        """Wait alone."""
        self._closed.wait(seconds)

    def passed(self) -> bool:
        """Wait for one's turn; False when the gate was closed for good."""
        while not self._closed.is_set():
            with self._lock:
                seconds = self._until - time.monotonic()
            if seconds <= 0:
                return True
            self._closed.wait(seconds)
        return False

    def close(self) -> None:
        """Let nobody pass any more."""
        self._closed.set()
