r"""Sampling from OpenAI-compatible vLLM servers; see `internvl.sampler.StreamSampler`.

    SampleRequest --chat messages, PNG data URIs--> POST /chat/completions --> [Completion] * n

The checkpoint's folder must be at hand, too: its processor counts the prompt's tokens, names the
tokens that must not be sampled and decodes what was. A server that reads a prompt otherwise (other
weights' tokenizer, another chat template, another number of tiles) is found out by the ids that it
returns, and stops the run. What a server of vLLM 0.31 must be started with:

    python -m vllm.entrypoints.openai.api_server --model CKPT --trust-request-mm-kwargs

--trust-request-mm-kwargs allows a tile budget for each prompt, and is to be used on a private
network only. `--logprobs-mode processed_logprobs` makes the log-probabilities those of our other
samplers; without it they are of the distribution before temperature and mask. Seeds are the same as
with vLLM in this process: with float32 on a CPU and one thread, so are the completions.

Pictures travel without loss, most as our own decoding made them (rotated, over white): a server
that opened the files itself would see other pixels in some of them.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from internvl.chat import (
    encode_text,
    eos_token_id,
    expand_images,
    forbidden_token_ids,
    load_processor,
    prompt_messages,
    render_messages,
    render_prompt,
    tile_settings,
)
from internvl.control_tokens import decode_completion
from internvl.data import IMAGE_PLACEHOLDER
from internvl.errors import DataError, UserError
from internvl.folders import require_hf_layout
from internvl.positions import checkpoint_step
from internvl.sampler import (
    NO_V2PE,
    Answer,
    Completion,
    SampleRequest,
    SamplingConfig,
    Score,
    check_request,
    collect,
    first_seed,
    too_long,
)
from internvl.server_weights import SharedWeights, TakesWeights
from internvl.server_wire import (
    clip,
    data_uris,
    parse_answer,
    scored_body,
    scored_logprob,
    send,
    signed_seed,
    speaks_of_length,
)
from internvl.servers import Server, ServerPool, Unreachable, Unusable
from internvl.tiling import count_tiles, processor_tile_size

if TYPE_CHECKING:
    import openai

MASK = -100  # added to the logit of a forbidden token; the API takes no less
IN_FLIGHT = 512  # completions at a time and server, by default: twice vLLM's own 256
LOOK_TIMEOUT = 10.0  # seconds for a server to say what it serves


@dataclass(frozen=True)
class _Served:
    """What a server offers: the model's name there, and how long prompt and completion may be."""

    name: str
    max_model_len: int | None


@dataclass(frozen=True)
class _Job:
    request: SampleRequest
    config: SamplingConfig


@dataclass(frozen=True)
class _Asked:
    """A request as it is sent, and the prompt ids that the server must report."""

    body: dict[str, Any]
    ids: list[int]


class ServerSampler(TakesWeights):
    """Any number of servers of the same checkpoint; see `internvl.sampler.StreamSampler`."""

    name = "servers"

    def __init__(
        self,
        model: Path,
        urls: Sequence[str],
        *,
        seed: int,
        concurrency: int | None,
        timeout: float,
        patience: float,
        served_name: str | None,
        logprobs: bool,
        weights: SharedWeights | None = None,
    ):
        self._model, self._seed = model, seed
        self._timeout, self._patience = timeout, patience
        self._served_name, self._logprobs = served_name, logprobs
        self._urls, self._concurrency = list(urls), concurrency
        self._weights = weights
        self.takes_adapters = weights is not None and weights.adapters
        self._processor = load_processor(str(model))
        self._eos = eos_token_id(self._processor)
        self._forbidden = forbidden_token_ids(self._processor, _vocabulary(model))
        self._side = processor_tile_size(self._processor.image_processor)
        self._clients: dict[str, openai.OpenAI] = {}
        self._lock = threading.Lock()  # of the clients, and of the tokenizer
        self._pool: ServerPool[_Job, list[Completion]] = ServerPool(
            *(self._urls, self._look, self._ask, self._interrupt, 1), patience=patience
        )

    def sample(
        self, requests: Sequence[SampleRequest], config: SamplingConfig, progress: bool = False
    ) -> list[list[Completion]]:
        """See `internvl.sampler.Sampler.sample`."""
        for request in requests:
            check_request(request)
        return collect(self.stream(requests, config), len(requests), progress=progress)

    def stream(
        self,
        requests: Iterable[SampleRequest],
        config: SamplingConfig,
        *,
        ahead: int | None = None,
    ) -> Generator[Answer]:
        """See `internvl.sampler.StreamSampler.stream`."""
        if self._weights is not None:  # one may have been started anew since they were pushed
            self._pool.each(lambda server: self._checked(server.url))
        self._pool.concurrency = self._concurrency or min(256, -(-IN_FLIGHT // config.n))
        yield from self._pool.run((_Job(request, config) for request in requests), ahead=ahead)

    def score(
        self, requests: Sequence[SampleRequest], config: SamplingConfig
    ) -> dict[str, list[Score]]:
        """See `internvl.sampler.Sampler.score`: of every server that is in.

        A beginning that would become other tokens as text cannot be asked for.
        """
        return self._pool.each(
            lambda server: [self._score(server, request, config) for request in requests]
        )

    def _score(self, server: Server, request: SampleRequest, config: SamplingConfig) -> Score:
        empty = replace(request, started=(), images=list(request.images))
        asked = self._asked(empty, replace(config, n=1, max_tokens=1), server.facts)
        found: list[float | None] = []
        for place, token in enumerate(request.started):
            started = list(request.started[:place])
            with self._lock:
                text = self._processor.tokenizer.decode(started)
                same = encode_text(self._processor, text) == started
            if not same:
                found.append(None)
                continue
            answer = self._post(server, scored_body(asked.body, text, token))
            self._compare(server.url, answer.get("prompt_token_ids"), asked.ids + started)
            found.append(scored_logprob(answer, token))
        return Score(len(asked.ids), tuple(found))

    def _post(self, server: Server, body: dict[str, Any]) -> dict[str, Any]:
        client = self._client(server.url)
        raw = send(server.url, lambda: client.chat.completions.with_raw_response.create(**body))
        return parse_answer(raw, body["n"], self._logprobs)

    def close(self) -> None:
        """See `internvl.sampler.Sampler.close`."""
        self._interrupt()

    # ------------------------------------------------------------------ one server

    def _client(self, url: str) -> openai.OpenAI:
        import openai

        with self._lock:
            if url not in self._clients:
                key = os.environ.get("OPENAI_API_KEY") or "none"
                self._clients[url] = openai.OpenAI(
                    base_url=url, api_key=key, timeout=self._timeout, max_retries=0
                )
            return self._clients[url]

    def _interrupt(self) -> None:
        with self._lock:
            clients, self._clients = list(self._clients.values()), {}
        for client in clients:
            client.close()

    def _look(self, url: str) -> _Served:
        """What a server serves; see `ServerPool`."""
        client = self._client(url).with_options(timeout=LOOK_TIMEOUT)
        try:
            raw = send(url, lambda: client.models.with_raw_response.list())
        except Unusable as error:
            raise Unreachable(str(error)) from None
        try:
            listed = json.loads(raw)["data"]
            offered = {one["id"]: one.get("max_model_len") for one in listed}
        except (ValueError, TypeError, KeyError, AttributeError):
            raise Unreachable(f"its list of models is not one: {clip(raw)}") from None
        name = self._served_name
        if name is None and self._weights is not None:  # not our own adapters
            offered = {key: offered[key] for key in offered if not self._weights.owns(key)}
        if name is None and len(offered) == 1:
            (name,) = offered
        if name is None or name not in offered:
            raise UserError(
                f"{url} offers {', '.join(map(repr, offered)) or 'no model'}"
                + (f", not {name!r}" if name else "; name one of them (--server-model)")
            )
        self._checked(url)  # it may have been started anew, with other weights
        return _Served(name, offered[name])

    def _ask(self, server: Server, job: _Job) -> list[Completion]:
        """The completions of a request; see `ServerPool`."""
        asked = self._asked(job.request, job.config, server.facts)
        try:
            answer = self._post(server, asked.body)
        except DataError as error:
            if not server.served and not speaks_of_length(str(error)):
                # it never answered: our options are at fault, not this question
                raise UserError(str(error)) from None
            raise
        self._compare(server.url, answer.get("prompt_token_ids"), asked.ids)
        return [self._completion(choice) for choice in answer["choices"]]

    def _compare(self, url: str, theirs: list[int] | None, ours: list[int]) -> None:
        if theirs is None or theirs == ours:  # None: not a vLLM server, it does not say
            return
        raise UserError(
            f"{url} reads a prompt as {len(theirs)} tokens that {self._model} reads as "
            f"{len(ours)}, or as other ones: it serves another checkpoint, chat template or tile "
            "setting. Serve the same folder there"
        )

    # ------------------------------------------------------------------ one request

    def _asked(self, request: SampleRequest, config: SamplingConfig, served: _Served) -> _Asked:
        """The body of a request. Raises `DataError` where it cannot be asked."""
        check_request(request)
        images = list(request.images)
        settings = tile_settings(len(images), request.budget(config.max_tiles))
        tiles = [
            count_tiles(*image.size, max_tiles=settings["max_patches"], tile_size=self._side)
            for image in images
        ]
        with self._lock:  # a tokenizer is not made for several threads
            parts = self._parts(request)
            text = render_prompt(self._processor, request.question, request.system)
            ids = encode_text(self._processor, expand_images(self._processor, text, tiles))
        limit, room = served.max_model_len, config.max_tokens
        if limit is not None:
            if len(ids) >= limit:
                raise too_long(request, len(ids), limit)
            room = min(room, limit - len(ids))
        uris = iter(data_uris(request.images, images))
        content = [
            {"type": "image_url", "image_url": {"url": next(uris)}}
            if part["type"] == "image"
            else part
            for part in parts
        ]
        system = [{"role": "system", "content": request.system}] if request.system else []
        extra = {
            "top_k": config.top_k,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "stop_token_ids": [self._eos],
            "skip_special_tokens": False,
            "return_token_ids": True,
            **({"mm_processor_kwargs": settings} if images else {}),
        }
        body = {
            "model": (self._weights and self._weights.adapter_name) or served.name,
            "messages": [*system, {"role": "user", "content": content}],
            "n": config.n,
            "temperature": config.temperature,
            "top_p": config.top_p,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "max_tokens": room,
            "seed": signed_seed(first_seed(self._seed, request.seed)),
            "logit_bias": {str(token): MASK for token in self._forbidden},
            "logprobs": self._logprobs,
            "extra_body": extra,
        }
        return _Asked(body, ids)

    def _parts(self, request: SampleRequest) -> list[dict[str, Any]]:
        """The question as parts, which the chat template must write as it writes the text."""
        parts: list[dict[str, Any]] = []
        for number, text in enumerate(request.question.split(IMAGE_PLACEHOLDER)):
            if number:
                parts.append({"type": "image"})
                text = text.removeprefix("\n")  # templates write one behind an image
            if text:
                parts.append({"type": "text", "text": text})
        messages = prompt_messages(request.question, request.system)
        in_parts = [*messages[:-1], {"role": "user", "content": parts}]
        rendered = (
            render_messages(self._processor, turns, generate=True) for turns in (messages, in_parts)
        )
        if len(set(rendered)) > 1:
            raise DataError(
                f"a server cannot be asked {request.question!r}: its chat template puts an image "
                f"on a line of its own. Write {IMAGE_PLACEHOLDER} so, or sample with a backend here"
            )
        return parts

    def _completion(self, choice: dict[str, Any]) -> Completion:
        """A choice of the answer as our record; ids and log-probabilities where it has them."""
        ids = tuple(choice.get("token_ids") or ())
        text = decode_completion(self._processor, ids) if ids else choice["message"]["content"]
        logprobs = (choice.get("logprobs") or {}).get("content") or ()
        drawn = tuple(float(one["logprob"]) for one in logprobs)
        return Completion(text or "", ids, drawn, choice["finish_reason"])


def open_servers(
    model: str | Path,
    urls: Sequence[str],
    *,
    seed: int = 0,
    concurrency: int | None = None,
    timeout: float = 600.0,
    patience: float = 300.0,
    served_name: str | None = None,
    logprobs: bool = True,
    weights: SharedWeights | None = None,
) -> ServerSampler:
    """Open OpenAI-compatible servers that serve the checkpoint folder `model` for sampling.

    urls: as http://host:8000/v1. concurrency: requests at a time and server (None: 512 / n).
    timeout: seconds for one request. patience: seconds to go on while no server answers.
    served_name: the model's name there, where servers offer several. logprobs: whether completions
    hold them. weights: by which the servers get a trainer's weights. The key is the
    environment's OPENAI_API_KEY, if any.
    Raises `UserError` where no server answers.
    """
    try:
        import openai  # noqa: F401
    except ImportError:
        raise UserError(
            "servers are asked through the package openai: pip install 'internvl-posttraining[api]'"
        ) from None
    for url in urls:
        if not url.startswith(("http://", "https://")):
            raise UserError(f"--server {url}: expected a URL such as http://host:8000/v1")
    return ServerSampler(
        Path(model),
        list(dict.fromkeys(url.rstrip("/") for url in urls)),
        seed=seed,
        concurrency=concurrency,
        timeout=timeout,
        patience=patience,
        served_name=served_name,
        logprobs=logprobs,
        weights=weights,
    )


def _vocabulary(model: Path) -> int:
    """The logits of a checkpoint; raises `UserError` for one that vLLM cannot serve."""
    from transformers import AutoConfig

    if checkpoint_step(require_hf_layout(model)) != 1:
        raise UserError(f"{model}: {NO_V2PE}")
    return int(AutoConfig.from_pretrained(str(model)).text_config.vocab_size)
