"""The recipe's options against each other: tile budgets, lengths, precision, references.

Whether an option is one of its command's is asked of that command's own parser
(`cascade.check_options`); here stands what no single command can see.
"""

from __future__ import annotations

from collections.abc import Sequence

from cascade.doctor.data import Scanned, spread
from cascade.doctor.facts import Facts
from cascade.doctor.findings import Finding, error, ok, warning
from cascade.recipe import StageSpec
from internvl.encoding import Encoder
from internvl.errors import DataError

LOST_BELOW = 5e-5  # rates at which an update of a bfloat16 weight is mostly rounded away
BORNE = 0.05  # share of replies that may be longer than what is sampled
_REPLIES = 200


def check_budgets(facts: Facts) -> list[Finding]:
    """One tile budget for a question wherever it is looked at: sampled, trained on, evaluated."""
    found, uses = [], []
    for spec in facts.training:
        trained = int(facts.option(spec, "max_tiles"))
        uses.append((spec.name, trained))
        if spec.data is not None:
            sampled = int(facts.sampling(facts.recipe.stages[spec.data])["max-tiles"])
            if sampled != trained:
                found.append(_budget(spec.data, "max-tiles", sampled, spec.name, trained))
        options = facts.evaluation(spec)
        if options is not None and int(options["max-tiles"]) < trained:
            seen = int(options["max-tiles"])
            found.append(_budget(f"evaluate.{spec.name}", "max-tiles", seen, spec.name, trained))
    if not found and uses:
        told = ", ".join(f"{name} {tiles}" for name, tiles in uses)
        return [
            ok("recipe.tiles", f"the tile budget is one wherever a question is looked at ({told})")
        ]
    return found


def _budget(one: str, option: str, tiles: int, other: str, trained: int) -> Finding:
    told = f"{one} looks at {tiles} tiles of a prompt, and {other} trains on {trained}: another "
    told += "picture, another number of tokens"
    section = "evaluate" if one.startswith("evaluate.") else f"stages.{one}.sample"
    return error(
        "recipe.tiles", told, f"{one}, {other}", cure=f"{section}: {{{option}: {trained}}}"
    )


def check_precision(facts: Facts) -> list[Finding]:
    """Whether whole weights are trained in 16 bits, at rates whose updates are rounded away."""
    found = []
    for spec in facts.training:
        dtype, rate = facts.option(spec, "dtype"), float(facts.option(spec, "learning_rate"))
        if facts.option(spec, "use_peft") or dtype == "float32":
            continue
        told = f"{spec.name} trains {dtype} weights at a rate of {rate:g}: an update of less than "
        told += "1/512 of a weight is rounded away"
        report = error if rate < LOST_BELOW else warning
        cure = "dtype: float32 beside bf16: true (autocast), or use_peft: true"
        found.append(report("recipe.rounding", told, f"stages.{spec.name}.dtype", cure=cure))
    return found


def check_references(facts: Facts) -> list[Finding]:
    """Whether MPO's pairs were sampled from the model that it starts from: its reference."""
    found = []
    for spec in facts.training:
        if spec.kind != "mpo" or spec.data is None or spec.model is None:
            continue
        source = facts.recipe.stages[spec.data]
        while source.data is not None:
            source = facts.recipe.stages[source.data]
        if source.model is None:
            continue
        starts, asked = spec.model, source.model  # an adapter and the whole made of it are one
        if (starts.stage, starts.path) == (asked.stage, asked.path):
            continue
        told = f"{spec.name} starts from {_name(spec)}, which is its reference, and its pairs are "
        told += f"samples of {_name(source)}"
        cure = f"stages.{source.name}.model: {_name(spec)}, unless this is meant"
        found.append(warning("recipe.reference", told, spec.name, cure=cure))
    return found


def _name(spec: StageSpec) -> str:
    assert spec.model is not None
    return str(spec.model.path) if spec.model.stage is None else spec.model.stage


def check_lengths(
    facts: Facts, scanned: Sequence[Scanned], encoder: Encoder | None
) -> list[Finding]:
    """Whether replies as the model is taught them end before what is sampled of it is cut."""
    if encoder is None:
        return []
    found = []
    limits = sampled_limits(facts)
    for file in scanned:
        if file.file.kind != "conversation" or not limits:
            continue
        lengths = reply_lengths(file, encoder)
        if not lengths:
            continue
        for (name, option), limit in limits.items():
            cut = sum(length > limit for length in lengths)
            if cut > BORNE * len(lengths):
                told = f"{cut} of {len(lengths)} replies are longer than {option} {limit} of "
                told += f"{name} (the longest: {max(lengths)} tokens): what is cut has no answer"
                cure = f"{name}: {option}: {max(lengths) * 5 // 4}"
                found.append(error("recipe.cut", told, str(file.file.path), cure=cure))
    return found


def sampled_limits(facts: Facts) -> dict[tuple[str, str], int]:
    """Tokens that a completion may have, by (stage, option)."""
    limits: dict[tuple[str, str], int] = {}
    for spec in facts.stages.values():
        if spec.kind in ("pairs", "select") and spec.data is None:
            limits[spec.name, "max-tokens"] = int(facts.sampling(spec)["max-tokens"])
        if spec.kind == "rl":
            name = "max_completion_length"
            limits[spec.name, name] = int(facts.option(spec, name))
        if (options := facts.evaluation(spec)) is not None:
            limits[f"evaluate.{spec.name}", "max-tokens"] = int(options["max-tokens"])
    return limits


def reply_lengths(scanned: Scanned, encoder: Encoder) -> list[int]:
    """Tokens of the last reply of conversations, on a sample, the end of the turn included."""
    tokenizer = encoder.processor.tokenizer
    lengths = []
    for number in spread(scanned.sample(), _REPLIES):
        text = scanned.rows[number].data["conversations"][-1]["value"]
        lengths.append(len(tokenizer(text, add_special_tokens=False)["input_ids"]) + 1)
    return lengths


def mean_tokens(scanned: Scanned, encoder: Encoder) -> float:
    """Mean tokens of a row (prompt and longest reply) on a sample; 0 where none can be counted."""
    lengths = []
    for number in spread(scanned.sample(), _REPLIES):
        try:
            lengths.append(encoder.length(scanned.rows[number], scanned.file.kind))
        except (DataError, OSError):
            continue  # told as a fault of the row
    return sum(lengths) / len(lengths) if lengths else 0.0
