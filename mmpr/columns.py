"""What is counted of every record, a column a fact: numbers in arrays, whatever a record's size.

    Listing -> row by row -> Columns {"chosen_chars": array, "outcome": array of codes, ...}
                                 |-> statistics (mmpr.stats), of any choice of rows
                                 `-> what a page shows, drawn by data set and kind (mmpr.view)

Some 100 bytes a row are kept, so 3 million rows are 300 MB; the records are not.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from internvl.data import Quarantine, Row
from internvl.errors import DataError
from mmpr.listing import Listing

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from mmpr.token_counts import TokenCounter

TOLD_REASONS = 20  # of bad rows
MISSING = -1  # a fact that a record does not hold


@dataclass
class Columns:
    """Facts of the records that can be used, row by row.

    numbers: int64 a row, MISSING where a row lacks the fact. names: of a column of codes, what each
    code stands for. bad_rows: of records that cannot be used; bad_reasons: of the first of them.
    """

    kind: str
    numbers: dict[str, array[int]] = field(default_factory=dict)
    names: dict[str, list[str]] = field(default_factory=dict)
    rows: int = 0
    bad_rows: int = 0
    bad_reasons: list[str] = field(default_factory=list)

    def add(self, facts: dict[str, int | str]) -> None:
        """One row's facts; text is a category and becomes a code."""
        for name, value in facts.items():
            column = self.numbers.get(name)
            if column is None:
                column = self.numbers[name] = array("q", [MISSING]) * self.rows
            column.append(self._code(name, value) if isinstance(value, str) else value)
        self.rows += 1
        for column in self.numbers.values():
            if len(column) < self.rows:
                column.append(MISSING)

    def _code(self, name: str, value: str) -> int:
        codes = self._codes.setdefault(name, {})
        code = codes.setdefault(value, len(codes))
        if code == len(self.names.setdefault(name, [])):
            self.names[name].append(value)
        return code

    _codes: dict[str, dict[str, int]] = field(default_factory=dict, repr=False)

    def get(self, name: str) -> NDArray[np.int64]:
        """A column, all MISSING where no row has the fact."""
        import numpy as np

        if name not in self.numbers:
            return np.full(self.rows, MISSING, dtype=np.int64)
        return np.frombuffer(self.numbers[name], dtype=np.int64)


def read_columns(
    listing: Listing,
    quarantine: Quarantine,
    *,
    counter: TokenCounter | None = None,
    quiet: bool = False,
) -> Columns:
    """The facts of all records; those that cannot be used go to the quarantine.

    counter: counts tokens and tiles too, for which image headers are read.
    Raises DataError when no record can be used.
    """
    from tqdm import tqdm

    columns = Columns(listing.kind)
    questions: dict[int, int] = {}
    numbers = tqdm(range(len(listing)), desc="reading rows", unit="row", delay=1, disable=quiet)
    for number in numbers:
        row = listing.row(number)
        fault = row.fault
        counts: dict[str, int] = {}
        if fault is None and counter is not None:
            try:
                counts = counter.count(row, listing.kind)
            except DataError as error:
                fault = str(error)
        if fault is not None:
            quarantine.add(row.file, row.line, fault, row.data)
            columns.bad_rows += 1
            if len(columns.bad_reasons) < TOLD_REASONS:
                columns.bad_reasons.append(f"{row.file}:{row.line}: {fault}")
            continue
        facts = _FACTS[listing.kind](row.data)
        question = questions.setdefault(_question_key(row, listing.kind), len(questions))
        shared = {"number": number, "question": question, "data_set": str(row.data["dataset"])}
        columns.add({**shared, **_shared(row), **facts, **counts})
    if not columns.rows:
        raise DataError(
            f"{listing.path}: none of its {len(listing)} records is a usable {listing.kind}; "
            f"the first: {columns.bad_reasons[0] if columns.bad_reasons else 'there is none'}"
        )
    return columns


def _hash(parts: Iterable[object]) -> int:
    """A signed 64-bit number of the parts' text."""
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        data = part if isinstance(part, bytes) else str(part).encode("utf-8", "surrogatepass")
        digest.update(len(data).to_bytes(8, "little") + data)
    return int.from_bytes(digest.digest(), "little", signed=True)


def _question_key(row: Row, kind: str) -> int:
    """What tells questions apart: the id of rollouts, else what is asked of which pictures."""
    if kind in ("rollout", "verdict"):
        return _hash([row.data["dataset"], row.data["id"]])
    asked = row.data["conversations"][0] if kind == "conversation" else _asked(row.data)
    return _hash([row.image_root, asked, row.data.get("video"), *row.images])


def _asked(data: dict[str, Any]) -> object:
    """A question, with the turns before it where there are some."""
    return [data["history"], data["question"]] if data.get("history") else data["question"]


def _shared(row: Row) -> dict[str, int | str]:
    data = row.data
    images = row.num_frames or len(row.images)
    facts: dict[str, int | str] = {"images": images}
    if "question" in data:
        facts["question_chars"] = len(data["question"])
    return facts


def _pair(data: dict[str, Any]) -> dict[str, int | str]:
    pictures = [data.get("image"), data.get("video")]
    return {
        "kind": str(data.get("kind") or "not said"),
        "chosen_chars": len(data["chosen"]),
        "rejected_chars": len(data["rejected"]),
        "text": _hash([*pictures, _asked(data), data["chosen"], data["rejected"]]),
    }


def _rollout(data: dict[str, Any]) -> dict[str, int | str]:
    facts: dict[str, int | str] = {
        "completion_chars": len(data["completion"]),
        "text": _hash([data["dataset"], data["id"], data["completion"].strip()]),
    }
    if isinstance(data.get("token_ids"), list):
        facts["completion_tokens"] = len(data["token_ids"])
    if data.get("finish_reason") is not None:
        facts["finish_reason"] = str(data["finish_reason"])
    return facts


def _verdict(data: dict[str, Any]) -> dict[str, int | str]:
    return {
        **_rollout(data),
        "outcome": data["outcome"],
        "matcher": str(data.get("matcher")),
        "format_ok": int(data["format_ok"]),
    }


def _question(data: dict[str, Any]) -> dict[str, int | str]:
    facts: dict[str, int | str] = {
        "text": _hash([data.get("image"), data.get("video"), data["question"]])
    }
    if data.get("matcher") is not None:
        facts["matcher"] = str(data["matcher"])
    return facts


def _conversation(data: dict[str, Any]) -> dict[str, int | str]:
    replies = [turn["value"] for turn in data["conversations"][1::2]]
    asked = [turn["value"] for turn in data["conversations"][::2]]
    return {
        "replies": len(replies),
        "question_chars": sum(map(len, asked)),
        "reply_chars": sum(map(len, replies)),
        "text": _hash([data.get("image"), data.get("video"), *asked, *replies]),
    }


_FACTS = {
    "pair": _pair,
    "rollout": _rollout,
    "verdict": _verdict,
    "question": _question,
    "conversation": _conversation,
}
