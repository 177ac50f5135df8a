"""Sampling with vLLM, inside the training process; the only file that imports vllm.

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
import os
import warnings
from collections.abc import Generator, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from internvl.chat import (
    decode_completion,
    encode_text,
    eos_token_id,
    forbidden_token_ids,
    load_processor,
    render_prompt,
    tile_settings,
)
from internvl.errors import DataError, UserError
from internvl.sampler import (
    Answer,
    Completion,
    SampleRequest,
    SamplingConfig,
    check_request,
    collect,
    context_length,
    first_seed,
    matching,
    random_state_kept,
    too_long,
)

if TYPE_CHECKING:
    from torch import Tensor

# Read by vLLM when it is imported. The engine must live in this process (weights are handed over
# as tensors); the others are defaults that the user's environment may override.
FORCED = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
DEFAULTS = {
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}
MASK = -1e9  # added to the logit of a forbidden token
PREFILL_TOKENS = 4096  # prompt tokens a step, or one whole prompt where that is longer


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
    ):
        self._seed = seed
        self._logprobs = logprobs
        self._max_num_seqs = max_num_seqs
        self._processor = load_processor(str(model))
        self._eos = eos_token_id(self._processor)
        self._shapes, self._tied, text_config = _describe(model)
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
        with random_state_kept():
            self._llm, self._on_cpu, self._owns_group = _start(options)

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
        self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iterator})
        self._llm.reset_prefix_cache()
        self._llm.llm_engine.reset_mm_cache()
        self._llm.llm_engine.reset_encoder_cache()

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

    def _enqueue(self, request: SampleRequest, config: SamplingConfig) -> str:
        """Hand one request to the engine; returns its id."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        rendered = self._render(request, request.budget(config.max_tiles))
        params = SamplingParams(
            n=config.n,
            temperature=config.temperature,
            top_p=config.top_p,
            top_k=config.top_k,
            max_tokens=config.max_tokens,
            seed=first_seed(self._seed, request.seed),
            stop_token_ids=[self._eos],
            logit_bias=dict.fromkeys(self._forbidden, MASK),
            logprobs=0 if self._logprobs else None,  # of the sampled token only
            flat_logprobs=True,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        self._next_id += 1
        request_id = str(self._next_id)
        self._llm.llm_engine.add_request(request_id, rendered, params)
        return request_id

    def _completions(self, output: Any) -> list[Completion]:
        """The engine's answer to one request as our records."""
        return [self._completion(sample) for sample in output.outputs]

    def _completion(self, sample: Any) -> Completion:
        ids = tuple(sample.token_ids)
        logprobs = tuple(sample.logprobs.logprobs) if self._logprobs else ()
        text = decode_completion(self._processor, ids)
        return Completion(text, ids, logprobs, sample.finish_reason)


def _describe(model: Path) -> tuple[dict[str, tuple[int, ...]], bool, Any]:
    """Names and shapes of transformers' parameters, whether lm_head is tied, the LLM's config."""
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText

    from internvl.conversion.heads import has_own_head

    config = AutoConfig.from_pretrained(str(model))
    if config.tie_word_embeddings and has_own_head(model):
        config.tie_word_embeddings = False  # vLLM does not tie it either
    with torch.device("meta"):
        skeleton = AutoModelForImageTextToText.from_config(config)
    shapes = {name: tuple(weight.shape) for name, weight in skeleton.named_parameters()}
    return shapes, "lm_head.weight" not in shapes, config.text_config


def _import_vllm() -> tuple[Any, bool]:
    """vLLM's `LLM` class, imported under our settings, and whether it runs on a CPU."""
    os.environ.update(FORCED)
    for name, value in DEFAULTS.items():
        os.environ.setdefault(name, value)
    try:
        from vllm import LLM
        from vllm.platforms import current_platform
    except ImportError as error:
        raise UserError(
            f"vLLM cannot be imported: {error}. Install it, or use the transformers backend"
        ) from None
    return LLM, current_platform.is_cpu()


def _start(options: dict[str, Any]) -> tuple[Any, bool, bool]:
    """Start the engine; returns it, whether it runs on a CPU, and whether it made a group."""
    import torch

    llm_class, on_cpu = _import_vllm()
    if options["dtype"] == "auto":
        options["dtype"] = "float32" if on_cpu else "bfloat16"
    if on_cpu:
        if "gpu_memory_utilization" in options:
            raise UserError(
                "gpu_memory_utilization was given, but vLLM runs on a CPU here: "
                "set VLLM_CPU_KVCACHE_SPACE (GiB) instead"
            )
        options["enable_chunked_prefill"] = False
        options["enforce_eager"] = True
        options["max_num_batched_tokens"] = max(PREFILL_TOKENS, options["max_model_len"])
    had_group = torch.distributed.is_initialized()
    set_num_threads = torch.set_num_threads
    with warnings.catch_warnings():
        # vLLM touches a deprecated name of torch while it starts; nobody here can act on it.
        warnings.simplefilter("ignore", FutureWarning)
        llm = llm_class(
            **options,
            generation_config="vllm",  # not the checkpoint's: all sampling options come from us
            logprobs_mode="processed_logprobs",
            enable_prefix_caching=True,
            limit_mm_per_prompt={"video": 0},
            use_tqdm_on_load=False,
        )
    # vLLM on a CPU replaces this function by one that does nothing, for the whole process.
    torch.set_num_threads = set_num_threads
    return llm, on_cpu, not had_group
