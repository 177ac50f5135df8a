"""Trainer and engine side by side on a few of the recipe's own questions, before anything is run.

    question -> trainer: ids, tiles -> log-probabilities   \\
             -> sampler: ids, pixels -> sampled tokens      +- the same, also after an update
    weights, moved -> sampler, and saved -> loaded -> generated

What is different here would show later as a reward that creeps, or a loss that means nothing.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from cascade.doctor.findings import Finding, error, ok
from internvl.chat import encode_prompt, forbidden_token_ids, load_processor, normalize_tiles
from internvl.checkpoint import checksum, full_weights, load_model
from internvl.data import Row
from internvl.encoding import Encoder
from internvl.errors import UserError
from internvl.packing import pack
from internvl.positions import checkpoint_step
from internvl.sampler import (
    SamplingConfig,
    StreamSampler,
    choose_backend,
    open_sampler,
    request_of,
)

if TYPE_CHECKING:
    from internvl.sampler import Backend, Completion

TEMPERATURES = (1.0, 0.7)
SHOWN_TOKENS = 24  # of a completion
MOVED = 0.1  # of each weight's own deviation: what an update changes
# the largest difference of a token's log-probability: float32, and what 16 bits are known to do
BOUNDS = {"float32": 1e-4, "bfloat16": 1.0}
_LOOK_AT = (
    "look at: two attention or image-processing versions, the dtype of the two, a chat template "
    "that engine and trainer read apart; sampler: transformers works without an engine"
)


@dataclass
class Bench:
    """A checkpoint as the trainer and as the sampler have it.

    rows: questions. max_tiles: of a prompt whose row names none. bound: of a log-probability.
    """

    folder: Path
    rows: Sequence[Row]
    max_tiles: int
    model: Any
    encoder: Encoder
    sampler: StreamSampler
    bound: float

    @classmethod
    def open(cls, folder: Path, rows: Sequence[Row], *, max_tiles: int, backend: Backend) -> Bench:
        """Load the checkpoint twice; raises `UserError` where one of the two does not take it."""
        gpu = torch.cuda.is_available()
        dtype: Literal["float32", "bfloat16"] = "bfloat16" if gpu else "float32"
        # an engine takes its share of a GPU first; what is left must hold the trainer's copy
        share = 0.45 if gpu and choose_backend(folder, backend) == "vllm" else None
        sampler = open_sampler(folder, backend=backend, dtype=dtype, gpu_memory_utilization=share)
        model = load_model(folder, dtype=dtype).to("cuda" if gpu else "cpu").eval()
        context = model.config.text_config.max_position_embeddings
        step = checkpoint_step(model.config.to_dict())
        encoder = Encoder(load_processor(str(folder)), max_tiles, context, (step,))
        return cls(folder, rows, max_tiles, model, encoder, sampler, BOUNDS[dtype])

    def close(self) -> None:
        """End the engine."""
        self.sampler.close()

    def sample(self, config: SamplingConfig) -> list[list[Completion]]:
        """Completions of all questions."""
        requests = [request_of(row, seed) for seed, row in enumerate(self.rows)]
        return self.sampler.sample(requests, config)

    def config(self, temperature: float = 1.0, n: int = 2, tokens: int = SHOWN_TOKENS) -> Any:
        """How a few completions are sampled."""
        return SamplingConfig(
            n=n, temperature=temperature, max_tokens=tokens, max_tiles=self.max_tiles
        )

    @torch.inference_mode()
    def trainer_logprobs(
        self, row: Row, completions: Sequence[Completion], temperature: float
    ) -> list[Tensor]:
        """Log-probabilities of sampled tokens as the trainer computes them, one [T] each."""
        ids = [list(completion.token_ids) for completion in completions]
        scores = self.score(self.encoder.completions(row, ids), temperature)
        return list(scores.float().cpu().split([len(tokens) for tokens in ids]))

    def score(self, example: Any, temperature: float = 1.0) -> Tensor:
        """The trainer's packed forward over one example's completions: [N]."""
        processor = self.encoder.processor
        batch = pack([example]).on(self.model.device)
        tiles = batch.tiles
        if not len(tiles):
            tiles = tiles.new_zeros(1, *tiles.shape[1:])
        pixels = normalize_tiles(processor, tiles).to(self.model.dtype)
        vocabulary = self.model.config.text_config.vocab_size
        forbidden = forbidden_token_ids(processor, vocabulary)
        scores = self.model(
            packed=batch, pixel_values=pixels, temperature=temperature, forbidden=forbidden
        )
        logprobs: Tensor = scores.logprobs
        return logprobs


# ---------------------------------------------------------------- checks


def check_engine(bench: Bench, *, update: bool) -> list[Finding]:
    """Tokens, pixels, log-probabilities, an update of the weights, and a round trip on disk.

    update: hand moved weights to the sampler (not where that is known not to work).
    """
    findings = [*check_tokens(bench)]
    if any(finding.level == "error" for finding in findings):
        return findings  # completions of another prompt cannot be compared
    findings += check_logprobs(bench)
    move_weights(bench.model)
    if update:
        findings += check_update(bench)
    return [*findings, *check_round_trip(bench)]


def check_tokens(bench: Bench) -> list[Finding]:
    """Prompt ids and pixels of trainer, engine and transformers' own processor, compared."""
    tiles = tokens = 0
    for number, row in enumerate(bench.rows):
        request = request_of(row, number)
        budget = request.budget(bench.max_tiles)
        images = list(request.images)
        prompt = encode_prompt(
            *(bench.encoder.processor, request.question, images, budget, request.system)
        )
        tiles, tokens = tiles + len(prompt.tiles), tokens + len(prompt.ids)
        pixels = normalize_tiles(bench.encoder.processor, prompt.tiles)
        for who, (ids, seen) in _others(bench, request, images, budget, prompt.text).items():
            if ids != prompt.ids:
                told = f"{who} reads line {row.line} as {len(ids)} tokens, the trainer as "
                told += f"{len(prompt.ids)} ({len(prompt.tiles)} tiles)"
                return [error("engine.tokens", told, str(row.file), cure=_LOOK_AT)]
            if len(seen) != len(pixels) or not torch.equal(seen.float(), pixels):
                told = f"{who} sees other pixels than the trainer in line {row.line}: "
                told += f"{len(seen)} and {len(pixels)} tiles"
                return [error("engine.tokens", told, str(row.file), cure=_LOOK_AT)]
    told = f"{len(bench.rows)} prompts, {tokens:,} tokens, {tiles} tiles: equal in trainer, "
    told += f"{bench.sampler.name} and transformers' processor"
    return [ok("engine.tokens", told)]


def _others(
    bench: Bench, request: Any, images: Sequence[Any], budget: int, text: str
) -> dict[str, tuple[list[int], Tensor]]:
    """What others make of a prompt: (ids, pixels [X, 3, H, W]) by their names."""
    from internvl.chat import tile_settings

    processor: Any = bench.encoder.processor
    given = {"images": [*images], **tile_settings(len(images), budget)} if images else {}
    own = processor(text=[text], return_tensors="pt", add_special_tokens=False, **given)
    side = processor.image_processor.size
    none = torch.zeros(0, 3, side["height"], side["width"])
    found = {
        "transformers' processor": (own["input_ids"][0].tolist(), own.get("pixel_values", none))
    }
    inputs = getattr(bench.sampler, "engine_inputs", None)
    if inputs is not None:
        found[bench.sampler.name] = inputs(replace(request, images=[*images]), budget)
    return found


def check_logprobs(bench: Bench) -> list[Finding]:
    """The largest difference in a sampled token's log-probability, by temperature."""
    gaps = {t: largest_gap(bench, bench.sample(bench.config(t)), t) for t in TEMPERATURES}
    told = ", ".join(f"{gap:.1e} at temperature {t:g}" for t, gap in gaps.items())
    told = f"sampler ({bench.sampler.name}) and trainer differ by at most {told}"
    if max(gaps.values()) <= bench.bound:
        return [ok("engine.logprobs", f"{told} (bound {bench.bound:g})", str(bench.folder))]
    told += f", over {bench.bound:g}"
    return [error("engine.logprobs", told, str(bench.folder), cure=_LOOK_AT)]


def largest_gap(bench: Bench, sampled: Iterable[Sequence[Completion]], temperature: float) -> float:
    """The largest difference of a sampled token's log-probability to the trainer's."""
    worst = 0.0
    for row, completions in zip(bench.rows, sampled, strict=True):
        mine = bench.trainer_logprobs(row, completions, temperature)
        for completion, own in zip(completions, mine, strict=True):
            gap = (torch.tensor(completion.logprobs) - own).abs().nan_to_num(torch.inf)
            worst = max(worst, float(gap.max()))
    return worst


def move_weights(model: Any) -> None:
    """Change every weight a little, as an optimizer would over some time; always the same way."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _, weight in sorted(model.named_parameters()):
            noise = torch.randn(weight.shape, generator=generator).to(weight)
            deviation = weight.float().std() if weight.numel() > 1 else weight.float().abs()
            weight.add_(noise * (MOVED * deviation).to(weight.dtype))


def check_update(bench: Bench) -> list[Finding]:
    """The same after an update of the sampler's weights: a canary for old weights and caches."""
    where = str(bench.folder)
    try:
        bench.sampler.update_weights(full_weights(bench.model))
    except UserError as fault:
        cure = "sampler: transformers (or backend: transformers)"
        return [error("engine.update", str(fault), where, cure=cure)]
    gap = largest_gap(bench, bench.sample(bench.config()), 1.0)
    told = f"after a weight update {bench.sampler.name} and trainer differ by at most {gap:.1e}"
    if gap <= bench.bound:
        return [ok("engine.update", f"{told} (bound {bench.bound:g})", where)]
    told += f", over {bench.bound:g}: the sampler goes on with old weights, or with a cache of them"
    cure = "sampler: transformers (or backend: transformers) until the engine refreshes them"
    return [error("engine.update", told, where, cure=cure)]


def check_round_trip(bench: Bench) -> list[Finding]:
    """Save the moved weights as a stage does, load them, and generate from what was loaded."""
    where = str(bench.folder)
    with tempfile.TemporaryDirectory(prefix="doctor-") as saved:
        bench.model.save_pretrained(saved)
        bench.encoder.processor.save_pretrained(saved)
        dtype = str(bench.model.dtype).removeprefix("torch.")
        again = load_model(saved, dtype=dtype)
        cure = "train from float32 weights; see transformers issue 43701 for names that get lost"
        if checksum(again.named_parameters()) != checksum(bench.model.named_parameters()):
            told = "what was saved and loaded again is not what was saved (checksums differ)"
            return [error("checkpoint.round-trip", told, where, cure=cure)]
        del again
        sampler = open_sampler(saved, backend="transformers", dtype=_dtype(dtype), max_num_seqs=8)
        rows = bench.rows[:2]
        requests = [request_of(row, seed) for seed, row in enumerate(rows)]
        greedy = sampler.sample(requests, bench.config(temperature=0.0, n=1))
        sampler.close()
    gap = largest_gap(replace(bench, rows=rows), greedy, 1.0)
    tokens = sum(len(done.token_ids) for [done] in greedy)
    told = f"saved, loaded and sampled from: equal weights, {tokens} greedy tokens within {gap:.1e}"
    if gap > bench.bound:
        return [error("checkpoint.round-trip", told, where, cure=cure)]
    return [ok("checkpoint.round-trip", told, where)]


def _dtype(name: str) -> Literal["float32", "bfloat16"]:
    return "float32" if name == "float32" else "bfloat16"
