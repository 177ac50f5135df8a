"""Sampling completions from an InternVL: what a sampler is, and which one to open.

    SampleRequest(question, images, seed)  --sample-->  [Completion(text, token_ids, logprobs)] * n
    trainer's named parameters  --update_weights-->  the next completions come from them

Two samplers do the same: vLLM (internvl.vllm_sampler) and plain transformers
(internvl.hf_sampler: slower on large models, runs everywhere). Both are given the pixels and the
prompt of internvl.chat, both never sample an image token, and both report the log-probability of
each sampled token under the distribution that it was drawn from, so that with top-p and top-k off
it equals what the trainer computes from the same weights, the same temperature and the same mask.
"""

from __future__ import annotations

import hashlib
import importlib.util
import sys
from collections.abc import Collection, Generator, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

from internvl.data import IMAGE_PLACEHOLDER, Row, RowImages
from internvl.errors import DataError, UserError
from internvl.folders import require_hf_layout
from internvl.positions import checkpoint_step

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

NO_V2PE = (
    "vLLM knows no fractional positions (V2PE); use the transformers sampler, or a checkpoint "
    "trained with position_steps 1"
)
Backend = Literal["auto", "vllm", "transformers"]
MAX_SAMPLES = 1 << 16  # of one request: their seeds are consecutive, see `first_seed`


@dataclass(frozen=True)
class SampleRequest:
    """One question to answer.

    question: with one "<image>" for each of `images` (RGB). seed: makes this request's samples
    repeatable, whatever else is in the batch. system: the system prompt, if any. max_tiles: tile
    budget of this prompt (None: the SamplingConfig's). started: token ids of a reply that has begun
    already; what is sampled goes on from there, and is all that a Completion holds.
    """

    question: str
    images: Sequence[Image.Image]
    seed: int
    system: str | None = None
    max_tiles: int | None = None
    started: Sequence[int] = ()

    def budget(self, default: int) -> int:
        """The tile budget of this prompt, where the SamplingConfig's is `default`."""
        return default if self.max_tiles is None else self.max_tiles


def request_of(row: Row, seed: int) -> SampleRequest:
    """The request of a question's row; its images are decoded when the sampler comes to it."""
    return SampleRequest(
        question=row.prompt_text(row.data["question"]),
        images=RowImages(row),
        seed=seed,
        system=row.data.get("system"),
        max_tiles=row.tile_budget(None),
    )


@dataclass(frozen=True)
class SamplingConfig:
    """How to sample; raises `UserError` for values that cannot be honoured.

    n: completions a request. temperature: 0 takes the likeliest token (then n must be 1, and
    log-probabilities are those of temperature 1). top_p = 1 and top_k = 0: off. max_tokens: limit
    of a completion. max_tiles: tile budget of a whole prompt, thumbnails not counted.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    max_tokens: int = 1024
    max_tiles: int = 12

    def __post_init__(self) -> None:
        faults = [
            (not 1 <= self.n <= MAX_SAMPLES, f"n is {self.n}, give 1 to {MAX_SAMPLES}"),
            (self.temperature < 0, f"temperature is {self.temperature}, give 0 or more"),
            (
                self.temperature == 0 and self.n > 1,
                f"temperature 0 with n = {self.n}: all {self.n} samples would be the same; "
                "give n = 1 or a temperature above 0",
            ),
            (
                0 < self.temperature < 0.01,
                f"temperature is {self.temperature}, give 0 (greedy) or at least 0.01",
            ),
            (not 0 < self.top_p <= 1, f"top_p is {self.top_p}, give a number in (0, 1]"),
            (self.top_k < 0, f"top_k is {self.top_k}, give 0 (off) or more"),
            (self.max_tokens < 1, f"max_tokens is {self.max_tokens}, give 1 or more"),
            (self.max_tiles < 1, f"max_tiles is {self.max_tiles}, give 1 or more"),
        ]
        for wrong, message in faults:
            if wrong:
                raise UserError(message)


@dataclass(frozen=True)
class Completion:
    """One sampled completion.

    text: decoded without control tokens; `<box>` and the like stay. token_ids: with the
    end-of-turn id as the last one when it was sampled (finish_reason "stop"), without it when the
    limit cut the completion ("length"). logprobs: of each token of token_ids, after temperature,
    top-k, top-p and mask; none where the sampler was opened without.
    """

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: Literal["stop", "length"]


@dataclass(frozen=True)
class Score:
    """What an engine says of a given completion.

    prompt_tokens: the prompt as it was read, images expanded. logprobs: of each token of `started`,
    None for one that this engine cannot be asked for.
    """

    prompt_tokens: int
    logprobs: tuple[float | None, ...]


class Sampler(Protocol):
    """A model ready to be sampled from; its weights can be replaced between calls."""

    name: str
    takes_adapters: bool  # whether `update_adapter` is there

    def sample(
        self, requests: Sequence[SampleRequest], config: SamplingConfig, progress: bool = False
    ) -> list[list[Completion]]:
        """Return `config.n` completions for each request, in the order of the requests.

        The same request (seed included) gives the same completions in any batch: exactly with
        vLLM in float32 on one CPU thread, else up to rounding (which other requests are there
        changes how sums are split, and with transformers the padding). torch's global generator
        is left as it was. Raises
        `DataError` for a request whose images and placeholders differ in number, or that does
        not fit into the model's context.
        """
        ...

    def score(
        self, requests: Sequence[SampleRequest], config: SamplingConfig
    ) -> dict[str, list[Score]]:
        """Score what each request has `started`, under what its tokens would be drawn from.

        By engine (there may be several), in the order of the requests. For checks against the
        trainer: the tokens go through all that sampling goes through, caches included.
        """
        ...

    def update_weights(self, named_parameters: Iterable[tuple[str, Tensor]]) -> None:
        """Take over all weights, by the names of transformers' `named_parameters()`.

        Raises `UserError` when a name is missing, unknown or of another shape; after any error,
        nothing is sampled until an update has gone well.
        """
        ...

    def update_adapter(self, folder: Path) -> None:
        """Take over a LoRA adapter, as PEFT saved it; the base's weights stay as they are.

        Raises `UserError` where this sampler cannot, see `takes_adapters`.
        """
        ...

    def sleep(self) -> None:
        """Give the device's memory back until the next update; nothing where that is not done."""
        ...

    def close(self) -> None:
        """Give memory back; the sampler cannot be used afterwards."""
        ...


# A request's number, and its completions or why it has none.
Answer = tuple[int, list[Completion] | DataError]


class StreamSampler(Sampler, Protocol):
    """A sampler that takes requests as it has room for them, and answers them as they are done."""

    def stream(
        self,
        requests: Iterable[SampleRequest],
        config: SamplingConfig,
        *,
        ahead: int | None = None,
    ) -> Generator[Answer]:
        """Yield (number of the request, its completions) in the order in which they are done.

        The completions are those of `sample`. A request that cannot be answered (an image that
        cannot be decoded, a prompt that is too long) yields its `DataError` and the others go on.
        ahead: no request is taken that is so many behind the oldest one without an answer, so that
        who puts them into order holds no more. Close the generator to stop: no answer of it comes
        into a later call.
        torch's global generator may have moved afterwards.
        """
        ...


def open_sampler(
    model: str | Path,
    *,
    backend: Backend = "auto",
    seed: int = 0,
    max_model_len: int | None = None,
    max_num_seqs: int = 256,
    dtype: Literal["auto", "float32", "bfloat16"] = "auto",
    gpu_memory_utilization: float | None = None,
    logprobs: bool = True,
    max_image_tokens: int = 0,
    max_lora_rank: int | None = None,
    sleep_mode: bool = False,
) -> StreamSampler:
    """Open a checkpoint folder (HF-native layout) for sampling.

    backend: "auto" is vLLM where it can be imported and can serve the checkpoint, else
    transformers, and a line says so.
    seed: mixed into the seed of every request. max_model_len: tokens of prompt and completion
    together (None: what the model allows). max_num_seqs: completions decoded at a time.
    dtype: "auto" is float32 on a CPU and bfloat16 on a GPU. gpu_memory_utilization: share of the
    GPU that vLLM may fill, weights included (None: vLLM's own default). logprobs: whether
    completions hold them; who has no use for them samples a little faster without.
    max_image_tokens: of the largest image; vLLM must take it in one step. max_lora_rank: for
    `update_adapter`, which takes vLLM. sleep_mode: `Sampler.sleep` is used; of vLLM on a GPU.
    """
    if dtype not in ("auto", "float32", "bfloat16"):
        raise UserError(f"dtype {dtype!r} is not one of auto, float32, bfloat16")
    if max_num_seqs < 1:
        raise UserError(f"max_num_seqs is {max_num_seqs}, give 1 or more")
    folder = Path(model)
    if choose_backend(folder, backend) == "vllm":
        from internvl.vllm_sampler import VLLMSampler

        return VLLMSampler(
            folder,
            seed=seed,
            max_model_len=max_model_len,
            max_num_seqs=max_num_seqs,
            dtype=dtype,
            gpu_memory_utilization=gpu_memory_utilization,
            logprobs=logprobs,
            max_image_tokens=max_image_tokens,
            max_lora_rank=max_lora_rank,
            sleep_mode=sleep_mode,
        )
    if gpu_memory_utilization is not None:
        raise UserError("gpu_memory_utilization is an option of vLLM; transformers has none")
    if max_lora_rank is not None or sleep_mode:
        raise UserError("adapters by themselves and sleep are vLLM's; transformers has neither")
    from internvl.hf_sampler import TransformersSampler

    return TransformersSampler(
        folder,
        seed=seed,
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs,
        dtype=dtype,
        logprobs=logprobs,
    )


def choose_backend(folder: Path, backend: Backend) -> Literal["vllm", "transformers"]:
    """The sampler that `backend` means for a checkpoint folder; nothing is loaded.

    Raises `UserError` where vLLM was asked for and cannot serve the checkpoint: it knows no
    fractional positions (V2PE), and would sample from another model without a word.
    """
    if backend not in ("auto", "vllm", "transformers"):
        raise UserError(f"backend {backend!r} is not one of auto, vllm, transformers")
    config = require_hf_layout(folder)
    try:
        step = checkpoint_step(config)
    except UserError as error:
        raise UserError(f"{folder}: {error}") from None
    if backend == "vllm" and step != 1:
        raise UserError(f"{folder}: position_step is {step:g}: {NO_V2PE}")
    if backend != "auto":
        return backend
    reason = f"position_step is {step:g}, which vLLM does not have" if step != 1 else ""
    if not importlib.util.find_spec("vllm"):
        reason = "vLLM is not installed"
    if reason:
        print(f"{reason}: sampling with transformers, slower", file=sys.stderr)
    return "transformers" if reason else "vllm"


# ---------------------------------------------------------------- what both samplers share


def first_seed(sampler_seed: int, request_seed: int) -> int:
    """The seed of a request's first sample; sample j has this + j.

    Hashed and spaced by 2^16, so that the samples of neighbouring request seeds never share a
    random stream (vLLM adds j to the seed that it is given: seeds 0 and 1 would overlap).
    """
    digest = hashlib.sha256(f"{sampler_seed} {request_seed}".encode()).digest()
    return int.from_bytes(digest[:6], "big") * MAX_SAMPLES


def collect(
    answers: Generator[Answer], total: int, *, progress: bool = False
) -> list[list[Completion]]:
    """All answers of a stream in the order of their `total` requests; raises its first error."""
    from tqdm import tqdm

    results: list[list[Completion]] = [[] for _ in range(total)]
    bar = tqdm(total=total, desc="sampling", unit="question", disable=not progress)
    with closing(answers), bar:
        for number, answer in answers:
            if isinstance(answer, DataError):
                raise answer
            results[number] = answer
            bar.update()
    return results


def check_request(request: SampleRequest, control: Collection[int] | None = None) -> None:
    """Raise `DataError` unless the question has one placeholder for each image, and a budget.

    control: ids that a started reply may not hold, since nothing goes on after them (None: this
    sampler cannot go on with a started reply at all, and `UserError` says so).
    """
    if request.started and control is None:
        raise UserError(
            "this sampler cannot go on with a started reply; open a checkpoint with backend vllm "
            "or transformers"
        )
    if wrong := sorted(set(control or ()).intersection(request.started)):
        raise DataError(f"the started reply holds the control token(s) {wrong}")
    if request.max_tiles is not None and request.max_tiles < 1:
        raise DataError(f"max_tiles is {request.max_tiles} in a request, give 1 or more")
    placeholders = request.question.count(IMAGE_PLACEHOLDER)
    if placeholders != len(request.images):
        raise DataError(
            f"{len(request.images)} image(s) but {placeholders} {IMAGE_PLACEHOLDER} placeholder(s) "
            f"in the question {request.question!r}"
        )


def too_long(request: SampleRequest, length: int, limit: int) -> DataError:
    """The error for a prompt that leaves no room for a completion."""
    return DataError(
        f"the prompt of {request.question!r} has {length} tokens, and max_model_len is {limit}: "
        "no room for a completion. Lower max_tiles or raise max_model_len"
    )


def context_length(asked: int | None, context: int) -> int:
    """Tokens of prompt and completion together: what was asked for, or what the model allows.

    Raises `UserError` for more than the model allows.
    """
    if asked is not None and not 1 <= asked <= context:
        raise UserError(f"max_model_len is {asked}; this model allows 1 to {context}")
    return asked or context


@contextmanager
def random_state_kept() -> Iterator[None]:
    """Leave torch's, numpy's and Python's global generators as they were: the trainer owns them."""
    import random

    import numpy as np
    import torch

    # vLLM seeds all three when it starts, so this must know them all
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002
