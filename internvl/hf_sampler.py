"""Sampling with plain transformers: left-padded prompts, a key-value cache, a loop over tokens.

A prompt and its image are computed once; their cache is then repeated for the n samples. Every
sample has its own random generator, seeded as vLLM seeds it, so on a CPU both samplers draw the
same noise and, from the same float32 weights, nearly always the same tokens.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from safetensors import SafetensorError
from torch import Tensor

from internvl.chat import (
    Prompt,
    encode_prompt,
    eos_token_id,
    forbidden_token_ids,
    load_processor,
    normalize_tiles,
)
from internvl.checkpoint import DTYPES, matching, refuse_unmatched
from internvl.control_tokens import decode_completion
from internvl.errors import DataError, UserError
from internvl.packing import position_tensor
from internvl.positions import checkpoint_step, token_positions
from internvl.sampler import (
    Answer,
    Completion,
    SampleRequest,
    SamplingConfig,
    Score,
    check_request,
    collect,
    context_length,
    first_seed,
    too_long,
)

if TYPE_CHECKING:
    from transformers import DynamicCache


@dataclass
class _Row:
    """One sample on its way: its generator, its limit, and what was drawn so far."""

    generator: torch.Generator
    limit: int
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    stopped: bool = False

    @property
    def done(self) -> bool:
        return self.stopped or len(self.token_ids) == self.limit


class TransformersSampler:
    """A transformers model on one device; see `internvl.sampler.Sampler`."""

    name = "transformers"
    takes_adapters = False

    def __init__(
        self,
        model: Path,
        *,
        seed: int,
        max_model_len: int | None,
        max_num_seqs: int,
        dtype: str,
        logprobs: bool = True,
    ):
        self._seed = seed
        self._logprobs = logprobs
        self._whole = True  # whether all weights are of one version
        self._max_num_seqs = max_num_seqs
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if dtype == "auto":
            dtype = "float32" if self._device.type == "cpu" else "bfloat16"
        self._processor = load_processor(str(model))
        self._eos = eos_token_id(self._processor)
        self._model = _load(model, DTYPES[dtype]).to(self._device).eval()
        text_config = self._model.config.text_config
        self._forbidden = forbidden_token_ids(self._processor, text_config.vocab_size)
        self._control = (*self._forbidden, self._eos)
        self._position_step = checkpoint_step(self._model.config.to_dict())
        context = text_config.max_position_embeddings
        self._max_model_len = context_length(max_model_len, context)

    def sample(
        self, requests: Sequence[SampleRequest], config: SamplingConfig, progress: bool = False
    ) -> list[list[Completion]]:
        """See `internvl.sampler.Sampler.sample`."""
        for request in requests:
            check_request(request, self._control)
        return collect(self.stream(requests, config), len(requests), progress=progress)

    def stream(
        self,
        requests: Iterable[SampleRequest],
        config: SamplingConfig,
        *,
        ahead: int | None = None,
    ) -> Generator[Answer]:
        """See `internvl.sampler.StreamSampler.stream`."""
        if not self._whole:
            raise UserError("an update of the sampler's weights failed: nothing is sampled from it")
        size = max(1, self._max_num_seqs // config.n)
        if ahead:
            size = min(size, ahead)
        batch: list[tuple[int, SampleRequest, Prompt]] = []
        for number, request in enumerate(requests):
            try:
                batch.append((number, request, self._prompt(request, config)))
            except DataError as error:
                yield number, error
            if len(batch) == size:
                yield from self._sample_batch(batch, config)
                batch = []
        if batch:
            yield from self._sample_batch(batch, config)

    def update_weights(self, named_parameters: Iterable[tuple[str, Tensor]]) -> None:
        """See `internvl.sampler.Sampler.update_weights`."""
        own = dict(self._model.named_parameters())
        shapes = {name: tuple(weight.shape) for name, weight in own.items()}
        self._whole = False
        with torch.no_grad():
            for name, weight in matching(named_parameters, shapes):
                own[name].copy_(weight)
        self._whole = True

    def update_adapter(self, folder: Path) -> None:
        """Refused: see `internvl.sampler.Sampler.update_adapter`."""
        raise UserError(f"{folder}: this sampler takes whole weights, and no adapter by itself")

    def sleep(self) -> None:
        """Nothing: see `internvl.sampler.Sampler.sleep`."""

    @torch.inference_mode()
    def score(
        self, requests: Sequence[SampleRequest], config: SamplingConfig
    ) -> dict[str, list[Score]]:
        """See `internvl.sampler.Sampler.score`."""
        return {self.name: [self._score(request, config) for request in requests]}

    def _score(self, request: SampleRequest, config: SamplingConfig) -> Score:
        prompt = self._prompt(request, config)
        length = len(prompt.ids) - len(request.started)
        tiles = prompt.tiles.to(self._device)
        output = self._model(
            input_ids=torch.tensor([prompt.ids], device=self._device),
            position_ids=position_tensor([self._positions(prompt)]).to(self._device),
            pixel_values=normalize_tiles(self._processor, tiles) if len(tiles) else None,
            logits_to_keep=len(request.started) + 1,
        )
        logprobs = distribution(output.logits[0, :-1], config, self._forbidden)
        tokens = torch.tensor([*request.started], device=self._device)
        return Score(length, tuple(logprobs.gather(1, tokens[:, None])[:, 0].tolist()))

    def close(self) -> None:
        """See `internvl.sampler.Sampler.close`."""
        del self._model
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def _prompt(self, request: SampleRequest, config: SamplingConfig) -> Prompt:
        """A request's prompt, its started reply included; `DataError` where it leaves no room."""
        check_request(request, self._control)
        prompt = encode_prompt(
            *(self._processor, request.question, list(request.images)),
            request.budget(config.max_tiles),
            request.system,
        )
        prompt.ids += request.started
        if len(prompt.ids) >= self._max_model_len:
            raise too_long(request, len(prompt.ids), self._max_model_len)
        return prompt

    @torch.inference_mode()
    def _sample_batch(
        self, batch: Sequence[tuple[int, SampleRequest, Prompt]], config: SamplingConfig
    ) -> list[Answer]:
        """Sample all completions of a few requests, given with their numbers, together."""
        prompts = [prompt for _, _, prompt in batch]
        rows = [
            self._row(request, len(prompt.ids), sample, config)
            for _, request, prompt in batch
            for sample in range(config.n)
        ]
        self._decode(rows, config, *self._prefill(prompts, config.n))
        done = [self._completion(row) for row in rows]
        starts = range(0, len(done), config.n)
        return [
            (number, done[start : start + config.n])
            for (number, _, _), start in zip(batch, starts, strict=True)
        ]

    def _row(
        self, request: SampleRequest, length: int, sample: int, config: SamplingConfig
    ) -> _Row:
        """A row with its own generator, for a prompt of `length` tokens."""
        generator = torch.Generator(self._device)
        generator.manual_seed(first_seed(self._seed, request.seed) + sample)
        return _Row(generator, min(config.max_tokens, self._max_model_len - length))

    def _positions(self, prompt: Prompt) -> Sequence[float]:
        steps = dict.fromkeys(prompt.image_slots, self._position_step)
        return token_positions(len(prompt.ids), steps)

    def _prefill(
        self, prompts: list[Prompt], n: int
    ) -> tuple[Tensor, Tensor, Tensor, DynamicCache]:
        """Run prompts and images once, then repeat each n times.

        Returns the logits of the first token [R, V], the attention mask [R, T], the position of
        the last token [R, 1] and the cache, for R = prompts x n rows, padded on the left to T
        tokens.
        """
        from transformers import DynamicCache

        longest = max(len(prompt.ids) for prompt in prompts)
        padding = [longest - len(prompt.ids) for prompt in prompts]
        ids = [[self._eos] * pad + p.ids for pad, p in zip(padding, prompts, strict=True)]
        mask = [[0] * pad + [1] * (longest - pad) for pad in padding]
        attention = torch.tensor(mask, device=self._device)
        rows = [[0] * pad + [*self._positions(p)] for pad, p in zip(padding, prompts, strict=True)]
        positions = position_tensor(rows).to(self._device)
        tiles = torch.cat([prompt.tiles for prompt in prompts]).to(self._device)
        cache = DynamicCache(config=self._model.config.text_config)
        output = self._model(
            input_ids=torch.tensor(ids, device=self._device),
            attention_mask=attention,
            position_ids=positions,
            pixel_values=normalize_tiles(self._processor, tiles) if len(tiles) else None,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        cache.batch_repeat_interleave(n)
        logits = output.logits[:, -1].repeat_interleave(n, 0)
        last = positions[:, -1:].repeat_interleave(n, 0)
        return logits, attention.repeat_interleave(n, 0), last, cache

    def _decode(
        self,
        rows: list[_Row],
        config: SamplingConfig,
        logits: Tensor,
        attention: Tensor,
        positions: Tensor,
        cache: DynamicCache,
    ) -> None:
        """Draw tokens until every row is done; rows that are done leave when half of them are."""
        active = list(rows)  # active[i] is row i of the tensors and the cache; some may be done
        while True:
            tokens = self._draw(active, logits, config)
            kept = [i for i, row in enumerate(active) if not row.done]
            if not kept:
                return
            if 2 * len(kept) <= len(active):
                index = torch.tensor(kept, device=self._device)
                active = [active[i] for i in kept]
                tokens, attention, positions = (t[index] for t in (tokens, attention, positions))
                cache.batch_select_indices(index)
            attention = torch.cat([attention, attention.new_ones(len(active), 1)], dim=1)
            positions = positions + 1
            output = self._model(
                input_ids=tokens[:, None],
                attention_mask=attention,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
            )
            logits = output.logits[:, -1]

    def _draw(self, active: list[_Row], logits: Tensor, config: SamplingConfig) -> Tensor:
        """Draw the next token of every row that is not done; returns the tokens [R]."""
        logprobs = distribution(logits, config, self._forbidden)
        if config.temperature == 0:
            tokens = logprobs.argmax(-1)
        else:
            # The exponential race: argmax of p / noise is a draw from p, and each row's noise
            # comes from its own generator.
            noise = torch.ones_like(logprobs)
            for i, row in enumerate(active):
                if not row.done:
                    noise[i].exponential_(generator=row.generator)
            tokens = (logprobs.exp() / noise).argmax(-1)
        drawn = logprobs.gather(1, tokens[:, None])[:, 0].tolist()
        for row, token, logprob in zip(active, tokens.tolist(), drawn, strict=True):
            if not row.done:
                row.token_ids.append(token)
                row.logprobs.append(logprob)
                row.stopped = token == self._eos
        return tokens

    def _completion(self, row: _Row) -> Completion:
        text = decode_completion(self._processor, row.token_ids)
        reason: Literal["stop", "length"] = "stop" if row.stopped else "length"
        logprobs = tuple(row.logprobs) if self._logprobs else ()
        return Completion(text, tuple(row.token_ids), logprobs, reason)


def distribution(logits: Tensor, config: SamplingConfig, forbidden: Sequence[int]) -> Tensor:
    """Log-probabilities [R, V] (float32) that tokens are drawn from, for logits [R, V].

    Mask, then temperature, then top-k, then top-p, each renormalised by the last step. At
    temperature 0 (greedy) only the mask acts.
    """
    logits = logits.to(torch.float32, copy=True)
    logits[:, list(forbidden)] = -torch.inf
    if config.temperature > 0:
        logits /= config.temperature
        if 0 < config.top_k < logits.shape[1]:
            smallest = logits.topk(config.top_k).values[:, -1:]
            logits.masked_fill_(logits < smallest, -torch.inf)
        if config.top_p < 1:
            ascending, order = logits.sort(dim=-1)
            below = ascending.softmax(-1).cumsum(-1) <= 1 - config.top_p
            below[:, -1] = False  # the likeliest token always stays
            logits.masked_fill_(below.scatter(1, order, below), -torch.inf)
    return logits.log_softmax(-1)


def _load(model: Path, dtype: torch.dtype) -> Any:
    """Load transformers' own model; every weight must be in the checkpoint."""
    from transformers import AutoModelForImageTextToText

    try:
        loaded, info = AutoModelForImageTextToText.from_pretrained(
            str(model), dtype=dtype, attn_implementation="sdpa", output_loading_info=True
        )
    except (OSError, ValueError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{model}: the weights cannot be loaded: {reason}") from None
    refuse_unmatched(model, info)
    return loaded
