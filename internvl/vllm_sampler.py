"""Sampling with vLLM, inside the training process; only this file and its start import vllm.

What vLLM 0.31 needs to be exact, each found by a measurement:
- log-probabilities after the mask and the temperature: `logprobs_mode="processed_logprobs"`;
- prompts with ONE placeholder an image: ids that are already expanded are expanded again;
- new weights through `reload_weights` (on a CPU the linear weights are packed away after loading,
  and `load_weights` alone would fail), then three caches emptied: a prefix, an image or an image
  feature of the old weights must not be used again. A tied lm_head is not refreshed on a CPU;
- on a CPU, no chunked prefill: a request with its own seed that is cut in two dies with "CPU
  Generator does not use offset".

Speed on a CPU: a tiny model spends its time in vLLM's scheduling, in Python, so one thread
(OMP_NUM_THREADS=1) is as fast as two; two that wait for each other on a busy machine are ten times
slower, unless OMP_WAIT_POLICY=passive.
"""

from __future__ import annotations

import gc
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from internvl.chat import (
    encode_text,
    eos_token_id,
    forbidden_token_ids,
    load_processor,
    render_prompt,
    tile_settings,
)
from internvl.checkpoint import matching
from internvl.control_tokens import decode_completion
from internvl.errors import DataError, UserError
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
    random_state_kept,
    too_long,
)
from internvl.vllm_sampler_start import describe, lora_rank, start_engine

if TYPE_CHECKING:
    from torch import Tensor

MASK = -1e9  # added to the logit of a forbidden token
HALF_DONE = (
    "the sampler has no whole set of weights: its last update failed, or it was put to sleep; "
    "nothing is sampled from it. Start the same command again to go on from the last checkpoint"
)


class VLLMSampler:
    """vLLM on one device, in this process; see `internvl.sampler.Sampler`."""

    name = "vllm"

    def __init__(
        self,
        model: Path,
        *,
        seed: int,
        max_model_len: int | None,
        max_num_seqs: int,
        dtype: str,
        gpu_memory_utilization: float | None,
        logprobs: bool = True,
        max_image_tokens: int = 0,
        max_lora_rank: int | None = None,
        sleep_mode: bool = False,
    ):
        self._seed = seed
        self._logprobs = logprobs
        self._whole = True  # whether the engine's weights are one whole version
        self._asleep, self._sleep_mode = False, sleep_mode
        self.takes_adapters = max_lora_rank is not None
        self._adapter: Any = None
        self._adapters = 0  # how many there were
        self._max_num_seqs = max_num_seqs
        self._processor = load_processor(str(model))
        self._eos = eos_token_id(self._processor)
        self._shapes, self._tied, text_config = describe(model)
        self._forbidden = forbidden_token_ids(self._processor, text_config.vocab_size)
        self._control = (*self._forbidden, self._eos)
        context = text_config.max_position_embeddings
        self._max_model_len = context_length(max_model_len, context)
        self._next_id = 0
        options: dict[str, Any] = {
            "model": str(model),
            "seed": seed,
            "max_model_len": self._max_model_len,
            "max_num_seqs": max_num_seqs,
            "dtype": dtype,
        }
        if gpu_memory_utilization is not None:
            options["gpu_memory_utilization"] = gpu_memory_utilization
        if max_lora_rank is not None:
            options |= {
                "enable_lora": True,
                "max_loras": 1,
                "max_lora_rank": lora_rank(max_lora_rank),
            }
        if sleep_mode:
            options["enable_sleep_mode"] = True
        with random_state_kept():
            self._llm, self._on_cpu, self._owns_group = start_engine(options, max_image_tokens)

    def sample(
        self, requests: Sequence[SampleRequest], config: SamplingConfig, progress: bool = False
    ) -> list[list[Completion]]:
        """See `internvl.sampler.Sampler.sample`."""
        for request in requests:
            check_request(request, self._control)
        with random_state_kept():
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
            raise UserError(HALF_DONE)
        # Enough waiting requests to keep the engine full, and no more: each holds its pixels.
        in_flight = -(-2 * self._max_num_seqs // config.n)
        engine = self._llm.llm_engine
        waiting, running = enumerate(requests), dict[str, int]()  # in the order of their numbers
        upcoming = next(waiting, None)
        try:
            while upcoming or running:
                while upcoming and len(running) < in_flight:
                    number, request = upcoming
                    if ahead and running and number - next(iter(running.values())) >= ahead:
                        break
                    try:
                        check_request(request, self._control)
                        running[self._enqueue(request, config)] = number
                    except DataError as error:
                        yield number, error
                    upcoming = next(waiting, None)
                for output in engine.step() if running else ():
                    if output.finished:
                        yield running.pop(output.request_id), self._completions(output)
        finally:
            if running:  # an error or an interrupt: what is left must not run into the next call
                engine.abort_request(list(running))

    def update_weights(self, named_parameters: Iterable[tuple[str, Tensor]]) -> None:
        """See `internvl.sampler.Sampler.update_weights`."""
        if self._tied and self._on_cpu:
            raise UserError(
                "vLLM on a CPU does not refresh a tied lm_head: samples would come from old "
                "weights. Use the transformers backend, or a model with tie_word_embeddings=False"
            )
        weights = ((name, tensor.detach()) for name, tensor in named_parameters)
        iterator = matching(weights, self._shapes)
        with self._replacing():
            self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iterator})
            self._adapter = None

    def update_adapter(self, folder: Path) -> None:
        """See `internvl.sampler.Sampler.update_adapter`."""
        if not self.takes_adapters:
            raise UserError("vLLM was opened without max_lora_rank: it takes no adapter by itself")
        from vllm.lora.request import LoRARequest

        # a name of its own for each version: what vLLM caches is kept apart by it
        self._adapters += 1
        adapter = LoRARequest(f"version-{self._adapters}", self._adapters, str(folder))
        with self._replacing():
            if self._adapter is not None:
                self._llm.llm_engine.remove_lora(self._adapter.lora_int_id)
            try:
                self._llm.llm_engine.add_lora(adapter)
            except (ValueError, RuntimeError) as error:
                raise UserError(f"vLLM does not take the adapter {folder}: {error}") from None
            self._adapter = adapter

    @contextmanager
    def _replacing(self) -> Iterator[None]:
        """While open the weights are not whole; when it ends well, nothing of the old is cached."""
        self._whole = False
        if self._asleep:
            self._llm.wake_up(tags=["weights"])
        yield
        if self._asleep:
            self._llm.wake_up(tags=["kv_cache"])
            self._asleep = False
        self._llm.reset_prefix_cache()
        self._llm.llm_engine.reset_mm_cache()
        self._llm.llm_engine.reset_encoder_cache()
        self._whole = True

    def sleep(self) -> None:
        """See `internvl.sampler.Sampler.sleep`; weights that come anew are not kept on the host."""
        if self._sleep_mode and not self._asleep:
            self._llm.sleep(level=1 if self.takes_adapters else 2)
            self._asleep, self._whole = True, False

    def score(
        self, requests: Sequence[SampleRequest], config: SamplingConfig
    ) -> dict[str, list[Score]]:
        """See `internvl.sampler.Sampler.score`: one token is drawn after each beginning."""
        if not self._whole:
            raise UserError(HALF_DONE)
        engine = self._llm.llm_engine
        running = dict[str, tuple[int, int]]()
        found = [[0.0] * len(request.started) for request in requests]
        lengths = [0] * len(requests)
        with random_state_kept():
            try:
                for number, request in enumerate(requests):
                    check_request(request, self._control)
                    decoded = replace(request, images=list(request.images))
                    for place, token in enumerate(request.started):
                        before = replace(decoded, started=request.started[:place])
                        running[self._enqueue(before, config, scored=token)] = (number, place)
                while running:
                    for output in engine.step():
                        number, place = running.pop(output.request_id)
                        scored = output.outputs[0].logprobs[0][requests[number].started[place]]
                        found[number][place] = scored.logprob
                        lengths[number] = len(output.prompt_token_ids) - place
            finally:
                if running:
                    engine.abort_request(list(running))
        return {self.name: [Score(n, tuple(v)) for n, v in zip(lengths, found, strict=True)]}

    def close(self) -> None:
        """See `internvl.sampler.Sampler.close`."""
        from vllm.distributed import parallel_state

        self._llm.llm_engine.engine_core.shutdown()
        del self._llm
        parallel_state.destroy_model_parallel()
        if self._owns_group:
            parallel_state.destroy_distributed_environment()
        gc.collect()

    def engine_inputs(self, request: SampleRequest, max_tiles: int) -> tuple[list[int], Tensor]:
        """What the engine will see: expanded prompt ids, and pixels [X, 3, H, W] in float32.

        For checks: they must equal internvl.chat's `encode_prompt` and `normalize_tiles`.
        """
        import torch

        rendered = self._render(request, max_tiles, skip_mm_cache=True)
        images = rendered.get("mm_kwargs", {}).get("image", [])
        pixels = [item["pixel_values"].data for item in images]
        side = self._processor.image_processor.size
        empty = torch.zeros(0, 3, side["height"], side["width"])
        return list(rendered["prompt_token_ids"]), torch.cat([empty, *pixels])

    def _render(self, request: SampleRequest, max_tiles: int, **options: bool) -> Any:
        """The request as the engine takes it: expanded ids and processed pixels."""
        text = render_prompt(self._processor, request.question, request.system)
        ids = [*encode_text(self._processor, text), *request.started]
        self._check_length(request, len(ids))
        prompt: dict[str, Any] = {"prompt_token_ids": ids}
        if request.images:
            prompt["multi_modal_data"] = {"image": list(request.images)}
            prompt["mm_processor_kwargs"] = tile_settings(len(request.images), max_tiles)
        (rendered,) = self._llm.llm_engine.renderer.render_cmpl([prompt], **options)
        self._check_length(request, len(rendered["prompt_token_ids"]))
        return rendered

    def _check_length(self, request: SampleRequest, length: int) -> None:
        if length >= self._max_model_len:
            raise too_long(request, length, self._max_model_len)

    def _enqueue(
        self, request: SampleRequest, config: SamplingConfig, scored: int | None = None
    ) -> str:
        """Hand one request to the engine; returns its id.

        scored: draw one token only, and tell the log-probability that this one had.
        """
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        rendered = self._render(request, request.budget(config.max_tiles))
        params = SamplingParams(
            n=config.n if scored is None else 1,
            temperature=config.temperature,
            top_p=config.top_p,
            top_k=config.top_k,
            max_tokens=config.max_tokens if scored is None else 1,
            seed=first_seed(self._seed, request.seed),
            stop_token_ids=[self._eos],
            logit_bias=dict.fromkeys(self._forbidden, MASK),
            # of the sampled token only, or of the one that is asked for
            logprobs=0 if self._logprobs and scored is None else None,
            logprob_token_ids=None if scored is None else [scored],
            flat_logprobs=scored is None,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        self._next_id += 1
        request_id = str(self._next_id)
        self._llm.llm_engine.add_request(request_id, rendered, params, lora_request=self._adapter)
        return request_id

    def _completions(self, output: Any) -> list[Completion]:
        """The engine's answer to one request as our records."""
        return [self._completion(sample) for sample in output.outputs]

    def _completion(self, sample: Any) -> Completion:
        ids = tuple(sample.token_ids)
        logprobs = tuple(sample.logprobs.logprobs) if self._logprobs else ()
        text = decode_completion(self._processor, ids)
        return Completion(text, ids, logprobs, sample.finish_reason)
