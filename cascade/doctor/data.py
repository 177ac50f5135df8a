"""The recipe's data: what the stages would put aside, on a sample of each file.

    file -> records by number -> scan (records, ids, questions) -> sample: texts, images, length,
                                                                   answers -> findings by reason

Nothing is written: the stages' own quarantine names every line later. What is counted here is told
as a share of what was looked at, and held against the stage's own `max_bad`.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cascade.doctor.findings import Finding, Level, ok, some
from internvl.data import Kind, Quarantine, Row, Rows, read_rows
from internvl.data.rows import look_at_images
from internvl.errors import DataError, UserError

if TYPE_CHECKING:
    from internvl.encoding import Encoder

SAMPLED = 200  # rows of a file whose images are decoded and whose tokens are counted
SCANNED = 50_000  # records of a file that are read
_CONTEXT = "<IMG_CONTEXT>"
# where no tokenizer is at hand: InternVL's own, as in all its checkpoints
_CONTROL = re.compile(r"<\|im_start\|>|<\|im_end\|>|<\|endoftext\|>|</?img>|<IMG_CONTEXT>")


@dataclass(frozen=True)
class DataFile:
    """A file that stages read.

    stages: their names. trained: it is learned from, and not only looked at. answers: completions
    are judged by its gold answers. room: tokens that a completion may take behind its prompt.
    max_bad: the share (< 1) or number of bad rows borne.
    """

    path: Path
    kind: Kind
    stages: tuple[str, ...]
    image_root: Path | None = None
    answers: bool = False
    trained: bool = True
    room: int = 0
    max_bad: float = 0.05

    @property
    def where(self) -> str:
        """The file and who reads it."""
        return f"{self.path} ({', '.join(self.stages)})"


@dataclass
class Scanned:
    """A file's records: how many, which of them were read, and which of those are bad."""

    file: DataFile
    rows: Rows
    numbers: Sequence[int]
    faults: dict[int, str] = field(default_factory=dict)
    repeated: list[tuple[str, int, int]] = field(default_factory=list)  # id, its lines
    by_question: dict[str, list[int]] = field(default_factory=lambda: defaultdict(list))

    def sample(self, most: int = SAMPLED) -> list[int]:
        """Numbers of rows whose records are good, spread evenly."""
        good = [number for number in self.numbers if number not in self.faults]
        return spread(good, most)


def is_given(path: Path) -> bool:
    """Whether a path can be opened: what is not there is told as recipe.inputs."""
    return path.exists() or "*" in path.name


def spread(items: Sequence[int], most: int) -> list[int]:
    """At most so many of the items, evenly spread, the first among them."""
    if len(items) <= most:
        return list(items)
    return [items[place * len(items) // most] for place in range(most)]


def open_file(file: DataFile) -> Scanned | Finding:
    """A file with its records read, or why it cannot be."""
    quarantine = Quarantine(None, max_bad=1.0)
    try:
        rows = read_rows(
            file.path,
            kind=file.kind,
            quarantine=quarantine,
            image_root=file.image_root,
            checked=False,
            quiet=True,
        )
    except DataError as fault:
        cure = "write the file's path as it is, relative to the recipe's file"
        return Finding("error", "data.file", str(fault), file.where, cure)
    scanned = Scanned(file, rows, spread(range(len(rows)), SCANNED))
    lines: dict[tuple[Path, str], int] = {}
    for number in scanned.numbers:
        row = rows[number]
        if row.fault is not None:
            scanned.faults[number] = row.fault
            continue
        for question in questions_of(row):
            scanned.by_question[question].append(number)
        if file.kind == "question":
            first = lines.setdefault((row.file, str(row.data["id"])), row.line)
            if first != row.line:
                scanned.repeated.append((str(row.data["id"]), first, row.line))
    return scanned


def questions_of(row: Row) -> Iterator[str]:
    """What a user says in a row, in lower case and without placeholders and white space."""
    texts = [row.data.get("question")]
    texts += [turn["value"] for turn in (row.data.get("conversations") or [])[::2]]
    for text in texts:
        if isinstance(text, str):
            yield " ".join(re.sub(r"<image>|<video>", " ", text).lower().split())


# ---------------------------------------------------------------- what is wrong with a row

# code -> (what a row of it is, the cure)
_REASONS: dict[str, tuple[str, str]] = {
    "data.images": (
        "images are missing or broken",
        "put the images where the paths lead (image_root says where they start), or take the rows "
        "out: mmpr check FILE --fix DIR",
    ),
    "data.expanded": (
        f"texts hold {_CONTEXT} already: expanded prompts, which would be expanded again",
        'write one "<image>" for each image and nothing else; the tokens are put in here',
    ),
    "data.control": (
        "texts spell control tokens",
        "take them out of the texts: the chat template writes them",
    ),
    "data.placeholders": (
        "placeholders and images differ in number",
        'write one "<image>" in the question for each image of the row',
    ),
    "data.length": (
        "rows are longer than the model or max_length allows",
        "lower max_tiles, or raise max_length; nothing is ever cut",
    ),
    "data.answers": (
        "questions cannot be judged",
        'give each an "answer" (and a "matcher" that reads it), or make pairs without answers by '
        "mmpr dropout",
    ),
    "data.rows": (
        "records cannot be used",
        "see docs/data.md for what a record holds, and mmpr check FILE for every line",
    ),
}


def record_code(fault: str) -> str:
    """The code of what is wrong with a record, by its words.

    >>> record_code("1 image(s) but 2 <image> placeholder(s)")
    'data.placeholders'
    """
    if "placeholder(s)" in fault:
        return "data.placeholders"
    return "data.answers" if fault.startswith("field 'answer'") else "data.rows"


def texts_of(data: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """(field, text) of all that a model is given of a record."""
    for name in ("system", "question", "chosen", "rejected"):
        if isinstance(data.get(name), str):
            yield name, data[name]
    for name in ("history", "conversations"):
        for number, turn in enumerate(data.get(name) or []):
            yield f"turn {number} of {name}", turn["value"]


def row_fault(
    row: Row,
    file: DataFile,
    encoder: Encoder | None,
    answer_fault: Callable[[Mapping[str, Any]], str | None],
) -> tuple[str, str] | None:
    """(code, reason) of why a row whose record is good cannot be used, or None.

    encoder: counts tokens and knows the checkpoint's control tokens (None: neither).
    """
    pattern = _CONTROL
    if encoder is not None:
        from internvl.control_tokens import control_pattern

        pattern = control_pattern(encoder.processor.tokenizer)
    for name, text in texts_of(row.data):
        if _CONTEXT in text:
            return "data.expanded", f"{name} holds {text.count(_CONTEXT)} {_CONTEXT}"
        if found := pattern.search(text):
            return "data.control", f"{name} holds {found[0]}"
    fault, sizes = look_at_images(row)
    if fault is not None:
        return "data.images", fault
    if file.answers and (reason := answer_fault(row.data)):
        return "data.answers", reason
    if encoder is not None and (reason := encoder.length_fault(row, file.kind, file.room, sizes)):
        return ("data.length" if "over max_length" in reason else "data.rows"), reason
    return None


def check_rows(
    scanned: Scanned,
    encoder: Encoder | None,
    answer_fault: Callable[[Mapping[str, Any]], str | None],
) -> list[Finding]:
    """One finding for each reason for which rows of a file would be put aside, or one that is ok.

    The level is "error" where so many are bad that the stage would stop (`max_bad`), and "warning"
    where it would go on without them.
    """
    numbers = scanned.sample()
    bad: dict[str, list[tuple[int, str]]] = defaultdict(list)
    for number, fault in scanned.faults.items():
        bad[record_code(fault)].append((number, fault))
    in_records = len(scanned.faults) / max(1, len(scanned.numbers))
    faults = 0
    for number in numbers:
        if found_bad := row_fault(scanned.rows[number], scanned.file, encoder, answer_fault):
            bad[found_bad[0]].append((number, found_bad[1]))
            faults += 1
    share = in_records + (1 - in_records) * faults / max(1, len(numbers))
    level = _level(share, len(scanned.rows), scanned.file.max_bad)
    total, looked = f"{len(scanned.rows):,}", len(numbers)
    if not bad:
        told = f"{total} rows, {looked} of them looked at: all can be used"
        return [ok("data.rows", told, scanned.file.where)]
    found = []
    for code, rows in sorted(bad.items()):
        what, cure = _REASONS[code]
        lines = [str(scanned.rows[number].line) for number, _ in rows]
        records = sum(number in scanned.faults for number, _ in rows)
        of = len(scanned.numbers) if records == len(rows) else looked
        told = f"{len(rows):,} of {of:,} rows looked at: {what} (lines {some(lines)}); "
        told += f"{rows[0][1]}; the file has {total} rows"
        cure = cure.replace("FILE", str(scanned.file.path))
        found.append(Finding(level, code, told, scanned.file.where, cure))
    return found


def _level(share: float, rows: int, max_bad: float) -> Level:
    limit = max_bad if max_bad < 1 else max_bad / max(1, rows)
    return "error" if share > limit else "warning"


def check_ids(scanned: Scanned) -> list[Finding]:
    """Questions whose id is there twice: rollouts and verdicts are told apart by it."""
    if not scanned.repeated:
        return []
    shown = [f"{name!r} in lines {one} and {two}" for name, one, two in scanned.repeated]
    told = f"{len(shown):,} of {len(scanned.numbers):,} ids are there before: {some(shown)}"
    level = _level(len(shown) / len(scanned.numbers), len(scanned.rows), scanned.file.max_bad)
    cure = "give each question an id of its own: samples and verdicts are joined by it"
    return [Finding(level, "data.ids", told, scanned.file.where, cure)]


def check_files(
    files: Sequence[DataFile],
    encoder_of: Callable[[DataFile], Encoder | None],
    answer_fault: Callable[[Mapping[str, Any]], str | None],
) -> tuple[list[Finding], list[Scanned]]:
    """The findings of all files, and those that could be read."""
    findings: list[Finding] = []
    read = []
    for file in files:
        scanned = open_file(file)
        if isinstance(scanned, Finding):
            findings.append(scanned)
            continue
        read.append(scanned)
        try:
            findings += check_rows(scanned, encoder_of(file), answer_fault)
        except UserError as fault:
            cure = "see docs/data.md"
            findings.append(Finding("error", "data.file", str(fault), file.where, cure))
        findings += check_ids(scanned)
    return findings, read
