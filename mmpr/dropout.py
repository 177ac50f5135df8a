"""Dropout-NTP: pairs without a gold answer (MPO, arXiv 2411.10442, section 3.1).

    rollout --cut in its middle--> prefix --the model goes on WITHOUT the image--> rejected
       `-----------------------------------------------------------------------> chosen

What the model says when it cannot see is a guess that reads well: rejecting it teaches to look. The
rollouts that are taken ended by themselves (finish_reason "stop"); of verdicts, those whose outcome
is among `DropoutConfig.outcomes`. As published, the image's placeholders are taken out of the
question. Unlike there, a reply is cut by tokens (`mmpr.cutting`), and a continuation that says the
same as the original, or only how it begins, is no pair.

Continuations are in `<output>.continuations.jsonl`, which is resumed as rollouts are.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from internvl.data import (
    IMAGE_PLACEHOLDER,
    Quarantine,
    Row,
    append_jsonl,
    dump_line,
    portable_record,
    write_json,
)
from internvl.data.records import VIDEO_PLACEHOLDER
from internvl.data.resumable import check_same_run, meta_path, naming_the_file, whole_lines
from internvl.errors import DataError, UserError
from internvl.hashing import stable_hash
from mmpr.cutting import cut_reply
from mmpr.groups import OUTCOMES, golds
from mmpr.pairs import OF_THE_PROMPT
from mmpr.resumable import Asked, recover, sample_good

if TYPE_CHECKING:
    from transformers import InternVLProcessor

    from internvl.sampler import Completion, Sampler, SamplingConfig

NOT_KNOWN_TO_BE_WRONG = ("correct", "cannot_judge", "timeout")
_PLACEHOLDERS = re.compile(f"{re.escape(IMAGE_PLACEHOLDER)}|{re.escape(VIDEO_PLACEHOLDER)}")


@dataclass(frozen=True)
class DropoutConfig:
    """How pairs are made.

    start_ratio: share of the reply's tokens that is kept. max_pairs: per question. outcomes: of the
    verdicts that are taken. seed: of the draw, and of each continuation.
    """

    start_ratio: float = 0.5
    max_pairs: int = 15
    outcomes: tuple[str, ...] = NOT_KNOWN_TO_BE_WRONG
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.start_ratio < 1:
            raise UserError(f"start ratio is {self.start_ratio}; it lies between 0 and 1")
        if self.max_pairs < 1:
            raise UserError(f"max pairs per question is {self.max_pairs}; it must be at least 1")
        if unknown := [name for name in self.outcomes if name not in OUTCOMES]:
            raise UserError(f"outcome {unknown[0]!r} is unknown; one of: {', '.join(OUTCOMES)}")


@dataclass
class DropoutReport:
    """What became of the rollouts; left_out: those that gave no pair, by reason."""

    rollouts: int = 0
    chosen: int = 0
    sampled: int = 0
    done_before: int = 0
    pairs: int = 0
    left_out: Counter[str] = field(default_factory=Counter)
    chosen_chars: int = 0
    rejected_chars: int = 0

    def as_dict(self) -> dict[str, Any]:
        """The report as JSON, without what differs between a run and one that was resumed."""
        pairs = max(1, self.pairs)
        return {
            "rollouts": self.rollouts,
            "chosen": self.chosen,
            "pairs": self.pairs,
            "left_out": dict(self.left_out),
            "mean_chosen_chars": self.chosen_chars / pairs,
            "mean_rejected_chars": self.rejected_chars / pairs,
        }


def choose_rollouts(
    rows: Sequence[Row], config: DropoutConfig, report: DropoutReport
) -> dict[str, int]:
    """The rollouts that are taken: pair id -> row number, in the order of the rows.

    Within a question each text once, and at most `max_pairs`, drawn by the seed.
    """
    taken: dict[str, list[tuple[int, str, int]]] = defaultdict(list)
    texts: dict[str, set[int]] = defaultdict(set)
    for number, row in enumerate(rows):
        report.rollouts += 1
        record = row.data
        text = stable_hash(record["completion"].strip())
        if reason := why_not_chosen(record, config):
            report.left_out[reason] += 1
        elif text in texts[record["id"]]:
            report.left_out["duplicate completion"] += 1
        else:
            texts[record["id"]].add(text)
            pair_id = f"{record['id']}-dropout-{record['sample']}"
            rank = stable_hash(config.seed, "dropout", pair_id)
            taken[record["id"]].append((rank, pair_id, number))
    kept = []
    for candidates in taken.values():
        kept += sorted(candidates)[: config.max_pairs]
        report.left_out["over the pairs per question"] += max(0, len(candidates) - config.max_pairs)
    report.left_out = +report.left_out
    report.chosen = len(kept)
    return {pair_id: number for _, pair_id, number in sorted(kept, key=lambda item: item[2])}


def why_not_chosen(record: dict[str, Any], config: DropoutConfig) -> str | None:
    """Why a rollout (or verdict) cannot be the chosen reply of a pair, or None."""
    if not record["completion"].strip():
        return "empty completion"
    if record.get("finish_reason") != "stop":
        return f"finish_reason is {record.get('finish_reason')!r}, not 'stop'"
    if "outcome" in record and record["outcome"] not in config.outcomes:
        return f"outcome is {record['outcome']}"
    return None


def without_image(question: str) -> str:
    r"""A question's text as the model is asked that cannot see.

    >>> without_image("<image>\nHow many?")
    'How many?'
    """
    return _PLACEHOLDERS.sub("", question).strip()


class Starter:
    """Makes the requests: what a reply begins with, as tokens that decode to text's beginning."""

    def __init__(self, processor: InternVLProcessor, config: DropoutConfig):
        self._processor = processor
        self._config = config

    def decode(self, ids: Sequence[int]) -> str:
        """Token ids to text, control tokens included."""
        tokenizer: Any = self._processor.tokenizer
        return str(tokenizer.decode(ids, skip_special_tokens=False))

    def ask(self, pair_id: str, row: Row, output: Path) -> Asked | None:
        """The request for one pair; None where the reply cannot be cut.

        Raises `DataError` for a reply that spells a control token.
        """
        from internvl.sampler import SampleRequest

        question, system = without_image(row.data["question"]), row.data.get("system")
        ids = self._reply_ids(row, question)
        text = row.data["completion"]
        cut = cut_reply(ids, text, self._config.start_ratio, self.decode)
        if cut is None:
            return None
        seed = stable_hash(self._config.seed, pair_id) % 2**31
        request = SampleRequest(question, (), seed, system, started=tuple(ids[: cut.tokens]))
        whole = portable_record(row, output)
        names = (*OF_THE_PROMPT, "dataset")
        shared = {name: whole[name] for name in names if whole.get(name) is not None}
        record = {
            "id": pair_id,
            "sample": 0,
            **shared,
            "question": whole["question"],
            "chosen": text,
            "prefix": cut.prefix,
            "answer_gt": golds(whole)[0],
        }
        return Asked(row, request, record)

    def _reply_ids(self, row: Row, question: str) -> list[int]:
        """The reply's tokens as they were sampled, or (by another tokenizer, edited) made anew."""
        from internvl.chat import encode_reply, eos_token_id, render_prompt
        from internvl.control_tokens import refuse_control_tokens

        text, ids = row.data["completion"], list(row.data.get("token_ids") or [])
        if ids and ids[-1] == eos_token_id(self._processor):
            ids.pop()
        if ids and self.decode(ids) == text:
            return ids
        refuse_control_tokens(self._processor, text, "completion")
        opening = render_prompt(self._processor, question, row.data.get("system"))
        return encode_reply(self._processor, opening, text)[:-1]

    def rejected(self, asked: Asked, completion: Completion) -> str:
        """The started reply with its continuation; in one piece, since tokens may join spaces."""
        from internvl.control_tokens import decode_completion

        started: Sequence[int] = asked.request.started
        return decode_completion(self._processor, [*started, *completion.token_ids])


def describe_run(
    model: str,
    fingerprint: str,
    dtype: str,
    backend: str,
    *,
    config: DropoutConfig,
    sampling: SamplingConfig,
) -> dict[str, Any]:
    """All that continuations depend on besides the rollouts, as written to `.meta.json`."""
    names = {"model": model, "fingerprint": fingerprint, "dtype": dtype, "backend": backend}
    facts = {**asdict(sampling), **asdict(config), "outcomes": list(config.outcomes)}
    del facts["max_tiles"]  # no image is seen
    return {**names, **facts}


def _text_of(record: dict[str, Any]) -> int:
    """A number of what a continuation was asked for, which is all that is kept of those done."""
    return stable_hash(*(record.get(name) for name in ("question", "system", "chosen")))


def check_unchanged(rows: Sequence[Row], chosen: dict[str, int], output: Path) -> None:
    """Raise UserError where a continuation on disk is of a rollout that is another now."""
    for pair_id, text in recover(output, 1, _text_of).items():
        if pair_id not in chosen:
            raise UserError(
                f"{output} holds {pair_id!r}, whose rollout is not among those taken now. "
                "Give another --output, or the same rollouts and options to go on."
            )
        row = rows[chosen[pair_id]]
        if _text_of({**row.data, "chosen": row.data["completion"]}) != text:
            raise UserError(
                f"{row.file}:{row.line}: the rollout of {pair_id!r} has changed since {output} was "
                "begun. Give another --output."
            )


def sample_continuations(
    rows: Sequence[Row],
    chosen: dict[str, int],
    open_sampler: Callable[[], Sampler],
    starter: Starter,
    *,
    output: Path,
    config: SamplingConfig,
    run: dict[str, Any],
    quarantine: Quarantine,
    report: DropoutReport,
    batch: int = 256,
) -> None:
    """Sample every continuation that `output` does not hold yet, and append it.

    chosen: of `choose_rollouts`. open_sampler: called where something is left to sample. run:
    `describe_run` of this run.
    Raises UserError when `output` belongs to another run, DataError when too many rows are bad.
    """
    from tqdm import tqdm

    total = len(rows) + quarantine.count
    run = {**run, "model": check_same_run(output, run)}
    done = recover(output, 1, _text_of)
    with naming_the_file(meta_path(output)):
        write_json(meta_path(output), run)
    pending = [pair_id for pair_id in chosen if pair_id not in done]
    report.done_before = len(done)
    sampler: Sampler | None = None
    bar = tqdm(total=len(chosen), initial=len(done), desc="continuing", unit="reply", delay=1)
    try:
        for start in range(0, len(pending), batch):
            part = {pair_id: rows[chosen[pair_id]] for pair_id in pending[start : start + batch]}
            asked = _ask(part, starter, output, quarantine, report)
            if asked and sampler is None:
                sampler = open_sampler()
            answered = sample_good(sampler, asked, config, quarantine) if sampler else []
            with naming_the_file(output), append_jsonl(output) as out:
                for one, (completion,) in answered:
                    out.write(dump_line(_continued(one, completion, starter, run, config)))
            report.sampled += len(answered)
            bar.update(len(part))
            quarantine.check(total)  # after writing: it is kept
    finally:
        bar.close()
        if sampler is not None:
            sampler.close()


def _ask(
    rows: dict[str, Row],
    starter: Starter,
    output: Path,
    quarantine: Quarantine,
    report: DropoutReport,
) -> list[Asked]:
    """The requests of the replies that can be cut; the others are counted, or put aside."""
    asked = []
    for pair_id, row in rows.items():
        try:
            request = starter.ask(pair_id, row, output)
        except DataError as error:
            quarantine.add(row.file, row.line, str(error), row.data)
            continue
        if request is None:
            report.left_out["too short to be cut"] += 1
        else:
            asked.append(request)
    return asked


def _continued(
    asked: Asked,
    completion: Completion,
    starter: Starter,
    run: dict[str, Any],
    config: SamplingConfig,
) -> dict[str, Any]:
    return {
        **asked.record,
        "rejected": starter.rejected(asked, completion),
        "token_ids": list(completion.token_ids),
        "finish_reason": completion.finish_reason,
        "model": run["model"],
        "seed": asked.request.seed,
        "temperature": config.temperature,
        "top_p": config.top_p,
        "top_k": config.top_k,
        "max_tokens": config.max_tokens,
    }


def why_no_pair(record: dict[str, Any]) -> str | None:
    """Why a continuation makes no pair with the original, or None."""
    prefix, chosen, rejected = (record[name] for name in ("prefix", "chosen", "rejected"))
    if not rejected.startswith(prefix):
        return "the continuation changed what was there before it"
    if not rejected[len(prefix) :].strip():
        return "the continuation is empty"
    if rejected.strip() == chosen.strip():
        return "the continuation is the original"
    if chosen.strip().startswith(rejected.strip()):
        return "the continuation is a beginning of the original"
    if record["finish_reason"] == "length":
        return "the continuation was cut off"
    return None


def pairs_of(continuations: Path, report: DropoutReport) -> Iterator[dict[str, Any]]:
    """The pairs (MMPR records of kind "dropout") that a file of continuations gives, if any."""
    if not continuations.exists():  # no reply could be taken
        return
    for _, _, record in whole_lines(continuations):
        if reason := why_no_pair(record):
            report.left_out[reason] += 1
            continue
        names = ("id", *OF_THE_PROMPT, "dataset", "question", "chosen", "rejected", "answer_gt")
        yield {**{name: record[name] for name in names if name in record}, "kind": "dropout"}
