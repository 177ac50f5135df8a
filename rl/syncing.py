"""The policy's weights to the sampler, and a canary that shows whether they arrived.

    model --one whole tensor at a time, or its adapter--> sampler
    fixed completions: log-probs of the trainer == log-probs of every engine, or the run stops

A sync that goes wrong is silent otherwise: the engine samples on from weights that are half old, or
from a cache, and the reward creeps. The canary's tokens go through all that sampling goes through:
image, prompt, caches, mask and temperature.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

from internvl.chat import encode_text
from internvl.checkpoint import full_weights, plain_name, whole
from internvl.data import Row
from internvl.errors import UserError
from internvl.sampler import Sampler, SamplingConfig, Score, request_of
from rl.config import RLConfig
from rl.ranks import raise_everywhere
from rl.rollouts import Group

CANARY_TOKENS = 8  # of each completion: the more, the more requests of one token
# where no bound is given: what a sync that worked stays well below, and a broken one does not
BOUNDS = {"float32": 1e-2, "bfloat16": 1.0}
ADVICE = (
    "Look at: whether every weight is handed over (its name, a tied lm_head), the caches after an "
    "update, the dtype of the two, image tiling and preprocessing, temperature and top-k of the "
    "sampler"
)


class Canary:
    """A few fixed completions of the run's own questions, scored by trainer and sampler alike.

    rows: the questions; `number` of them are taken, spread evenly. encode_text: text to ids.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        encode_text: Callable[[str], list[int]],
        config: SamplingConfig,
        *,
        number: int,
    ):
        self.config = config
        places = [index * len(rows) // number for index in range(min(number, len(rows)))]
        self.groups, self.requests = [], []
        # no longer than the sampler has room for, with the one token that it draws behind them
        length = max(1, min(CANARY_TOKENS, config.max_tokens - 1))
        for place in dict.fromkeys(places):
            row = rows[place]
            ids = encode_text(f"The answer is {row.data.get('answer')}.")[:length]
            self.groups.append(_group(place, ids))
            self.requests.append(replace(request_of(row, seed=place), started=tuple(ids)))
        self.prompt_tokens: list[int] | None = None  # the trainer's, where it has told

    def gap(self, engines: dict[str, list[Score]]) -> tuple[float, str]:
        """The largest difference to what the trainer wrote into `groups`, and whose it is.

        Raises `UserError` where an engine reads a prompt as another number of tokens.
        """
        largest, whose = 0.0, ""
        for engine, scores in engines.items():
            for number, (group, score) in enumerate(zip(self.groups, scores, strict=True)):
                self._compare_lengths(engine, number, score)
                assert group.old_logprobs is not None
                for mine, theirs in zip(group.old_logprobs[0], score.logprobs, strict=True):
                    if theirs is None:
                        continue
                    gap = abs(mine - theirs)
                    if not math.isfinite(gap):
                        gap = math.inf
                    if gap > largest:
                        largest, whose = gap, engine
        return largest, whose

    def _compare_lengths(self, engine: str, number: int, score: Score) -> None:
        expected = None if self.prompt_tokens is None else self.prompt_tokens[number]
        if expected is not None and expected != score.prompt_tokens:
            question = self.requests[number].question
            raise UserError(
                f"{engine} reads the prompt of {question!r} as {score.prompt_tokens} tokens, the "
                f"trainer as {expected}. Look at: max_tiles and the image processor of the two, "
                "the chat template"
            )


def _group(question: int, ids: list[int]) -> Group:
    """A completion as what the trainer scores; its advantage only keeps it from being left out."""
    return Group(
        question=question,
        completions=[ids],
        texts=[""],
        sampler_logprobs=[[0.0] * len(ids)],
        rewards=[0.0],
        advantages=[1.0],
        outcomes=[""],
        formats=[False],
        clipped=[False],
        terms={},
        weight_version=0,
    )


class WeightSync:
    """Hands the policy's weights to the sampler, looks at the canary, and stops a run that must.

    score: writes the trainer's log-probabilities into groups (`old_logprobs`). bound: of the
    canary's gap. folder: for adapters on their way. lead: whether this rank asks the engines;
    with servers one rank does for all.
    """

    def __init__(
        self,
        sampler: Sampler,
        canary: Canary | None,
        score: Callable[[Sequence[Group]], None],
        *,
        bound: float,
        folder: Path,
        device: torch.device,
        lead: bool = True,
    ):
        self.sampler, self.canary = sampler, canary
        self._score, self._bound = score, bound
        self._folder, self._device, self._lead = folder, device, lead

    def push(self, model: nn.Module, step: int) -> float | None:
        """Hand over the weights after optimizer step `step`; every rank must call it.

        Returns the canary's gap, over all ranks. Raises `UserError` where it is over the bound.
        """
        fault = None
        try:
            if self.sampler.takes_adapters and is_plain_lora(model):
                self.sampler.update_adapter(self._saved_adapter(model))
            else:
                self.sampler.update_weights(full_weights(model))
        except UserError as error:
            fault = error
        raise_everywhere(fault)  # and where one rank hands over for all, none samples before
        return self.look(step)

    def look(self, step: int) -> float | None:
        """Compare the canary's log-probabilities."""
        if self.canary is None:
            return None
        self._score(self.canary.groups)
        gap, whose, fault = 0.0, "", None
        if self._lead:
            try:
                engines = self.sampler.score(self.canary.requests, self.canary.config)
                gap, whose = self.canary.gap(engines)
            except UserError as error:  # every rank must hear of it
                gap, fault = math.inf, error
        raise_everywhere(fault)
        largest = self._over_ranks(gap)
        if largest > self._bound:
            raise UserError(
                f"step {step}: after the weights were handed over, {whose or 'the sampler'} and "
                f"the trainer differ by {largest:.3g} in the log-probability of a fixed "
                f"completion's token, over {self._bound:g} (max_logprob_gap). {ADVICE}. Nothing "
                "was trained on since; the last checkpoint is whole"
            )
        return largest

    def _over_ranks(self, gap: float) -> float:
        if not dist.is_initialized() or dist.get_world_size() == 1:
            return gap
        largest = torch.tensor(gap, device=self._device)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        return float(largest)

    def _saved_adapter(self, model: Any) -> Path:
        """The adapter as PEFT would save it; gathered from all ranks where it is sharded."""
        from safetensors.torch import save_file

        (name,) = model.peft_config
        state = {
            plain_name(key).replace(f".{name}.", "."): whole(parameter).to("cpu").contiguous()
            for key, parameter in model.named_parameters()
            if ".lora_" in key
        }
        self._folder.mkdir(parents=True, exist_ok=True)
        save_file(state, self._folder / "adapter_model.safetensors")
        model.peft_config[name].save_pretrained(str(self._folder))
        return self._folder


def check_gap(gap: Tensor, step: int, args: RLConfig) -> None:
    """Raise `UserError` where a sampled token's gap [L] is over max_logprob_gap."""
    # of weights that are older on purpose, a gap says nothing: the canary is looked at alone
    bound = None if args.max_staleness else args.max_logprob_gap
    if bound is not None and gap.numel() and float(gap.max()) > bound:
        raise UserError(
            f"step {step}: sampler and trainer differ by {float(gap.max()):.3g} in a token's "
            f"log-probability, over max_logprob_gap {bound:g}. {ADVICE}."
        )


def make_sync(trainer: Any, sampling: SamplingConfig) -> WeightSync:
    """The sync of an RLTrainer: its canary, its bound, and which rank asks the engines."""
    args, sampler = trainer.rl_args, trainer.sampler
    if sampler.name != "servers" and args.max_staleness:
        raise UserError("max_staleness needs servers: here training and sampling take turns")
    canary = None
    if args.canary_questions:
        processor = trainer.processing_class
        canary = Canary(
            trainer.rows, partial(encode_text, processor), sampling, number=args.canary_questions
        )
        places = (group.question for group in canary.groups)
        prompts = (trainer.encoder.completions(trainer.rows[place], []) for place in places)
        canary.prompt_tokens = [len(prompt.prompt_ids) for prompt in prompts]
    bound = args.max_logprob_gap
    if bound is None:
        weights = {p.dtype for p in trainer.model.parameters()}
        whole = weights == {torch.float32} and not (args.bf16 or args.fp16)
        bound = BOUNDS["float32" if whole else "bfloat16"]
    return WeightSync(
        sampler,
        canary,
        lambda groups: trainer._add_logprobs(groups, "old_logprobs"),
        bound=bound,
        folder=Path(args.output_dir or ".") / "adapter-for-sampler" / str(args.process_index),
        device=args.device,
        lead=sampler.name != "servers" or args.process_index == 0,
    )


def is_plain_lora(model: nn.Module) -> bool:
    """Whether a model is one LoRA on the language model alone, which vLLM can add by itself."""
    from peft import PeftModel

    if not isinstance(model, PeftModel) or len(model.peft_config) != 1:
        return False
    (config,) = model.peft_config.values()
    trained = [name for name, _ in _adapted(model)]
    return (
        config.peft_type.value == "LORA"
        and not (config.use_dora or config.lora_bias or config.modules_to_save)
        and config.bias == "none"
        and all(".language_model." in name for name in trained)
        and not any(type(p).__name__ in ("Params4bit", "Int8Params") for p in model.parameters())
    )


def _adapted(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return ((name, p) for name, p in model.named_parameters() if ".lora_" in name)
