"""What a record must hold to be a question, rollout, verdict, pair or conversation.

`tidy_record` brings the spellings that published data sets use into one; `find_fault` says what is
wrong with a tidy record. Neither looks at a file: images are checked where they are decoded.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable
from typing import Any, Literal

from internvl.data.preferences import is_preference, to_pair

Kind = Literal["question", "rollout", "verdict", "pair", "conversation"]
RecordFault = Callable[[dict[str, Any]], str | None]
IMAGE_PLACEHOLDER = "<image>"
VIDEO_PLACEHOLDER = "<video>"
DEFAULT_FRAMES = 8  # of a video: num_segments in the published chat examples
_OF_VALUES = ("list", "box", "point")  # matchers whose gold answer may be a list of values
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://[^/]*|data:[^,]{0,40}")


def list_images(record: dict[str, Any]) -> list[str | bytes]:
    """The images of a record: paths as they are written, or the encoded bytes of an image.

    `image` is one of them or a list: a path, bytes, or {"bytes": ..., "path": ...} as Hugging Face
    data sets hold it, where bytes come first. Absent, null, "" and [] mean no image.
    Raises ValueError for anything else.
    """
    value = record.get("image")
    if value is None or value == "" or value == []:
        return []
    if isinstance(value, str):
        return [value]
    items = value if isinstance(value, list) else [value]
    images = [_one_image(item) for item in items]
    found = [image for image in images if image is not None]
    if len(found) < len(images):
        wrong = next(item for item, image in zip(items, images, strict=True) if image is None)
        what = f"a list with {_shape(wrong)}" if isinstance(value, list) else _shape(wrong)
        raise ValueError(f"field 'image' is {what}, expected a path, image bytes or a list of them")
    return found


def _one_image(item: object) -> str | bytes | None:
    if isinstance(item, dict) and item.keys() <= {"bytes", "path"}:
        item = item.get("path") if item.get("bytes") is None else item["bytes"]
    return item if isinstance(item, str | bytes) and item else None


def _shape(item: object) -> str:
    if isinstance(item, dict):
        return f"an object with {', '.join(map(repr, item)) or 'nothing'}"
    return f"empty {type(item).__name__}" if item in ("", b"") else type(item).__name__


def video_name(record: dict[str, Any]) -> str | None:
    """The path of a record's video as it is written, or None."""
    return record.get("video") or None


def tidy_record(
    record: dict[str, Any], kind: Kind, *, image_in_front: bool = True
) -> dict[str, Any]:
    """The record as the rest of the code reads it; what is wrong is left for `find_fault`.

    `images` (a column's usual name on the hub) becomes `image`, and a whole number as id its text;
    a missing answer becomes "", numbers their texts, coordinates one text; TRL's preference rows
    become pairs; one image or video without a placeholder gets it in front of the (first) question,
    as in InternVL's published code. image_in_front: False leaves such a pair as it is, a fault: the
    other rows of its file write the placeholder (`implies_placeholder`).
    """
    if type(record.get("id")) is int:
        record = {**record, "id": str(record["id"])}
    if kind in ("question", "rollout", "verdict"):
        record = {**record, "answer": _tidy_answer(record.get("answer"), record.get("matcher"))}
    if isinstance(record.get("images"), list) and not record.get("image"):
        record = {**record, "image": record["images"]}
        del record["images"]
    try:
        images = len(list_images(record))
        if kind == "pair" and is_preference(record):
            record = to_pair(record, images)
            images = len(list_images(record))
            image_in_front = True  # TRL's rows name their images beside the text
    except ValueError:
        return record
    text = _prompt_text(record, kind)
    if text is None:
        return record
    if video_name(record) and VIDEO_PLACEHOLDER not in text:
        return _put_in_front(record, kind, f"{VIDEO_PLACEHOLDER}\n")
    if images == 1 and IMAGE_PLACEHOLDER not in text and image_in_front:
        return _put_in_front(record, kind, f"{IMAGE_PLACEHOLDER}\n")
    return record


def implies_placeholder(first_records: Iterable[object]) -> bool:
    """Whether a file of pairs leaves `<image>` out everywhere, going by its first records.

    Then one image belongs in front of the question, as InternVL's published code puts it; in a
    file that writes the placeholder, a pair without it is a fault.
    """
    return not any(
        isinstance(record, dict) and IMAGE_PLACEHOLDER in str(record.get("question"))
        for record in first_records
    )


def _is_number(value: object) -> bool:
    return type(value) is int or (type(value) is float and math.isfinite(value))


def _holds_numbers(value: object) -> bool:
    """Whether it is a box or a point among others."""
    return isinstance(value, list) and bool(value) and all(map(_is_number, value))


def _tidy_answer(answer: object, matcher: object) -> object:
    """Gold answers as texts: "" for none, and a list's or a box's values as the text of the list.

    >>> _tidy_answer(7, None), _tidy_answer([1, 2, 3, 4], "box"), _tidy_answer([7, 8], "number")
    ('7', '[1, 2, 3, 4]', ['7', '8'])
    >>> _tidy_answer([1, 2, 3, 4], ["box"]), _tidy_answer([[1, 2, 3, 4]], None)
    ('[1, 2, 3, 4]', '[[1, 2, 3, 4]]')
    """
    if answer is None:
        return ""
    if _is_number(answer):
        return str(answer)
    if isinstance(answer, list):
        named = matcher if isinstance(matcher, list) else [matcher]
        of_values = any(name in _OF_VALUES for name in named)
        if answer and not isinstance(answer[0], str) and (of_values or _holds_numbers(answer[0])):
            return json.dumps(answer)
        return [str(item) if _is_number(item) else item for item in answer]
    return answer


def _prompt_text(record: dict[str, Any], kind: Kind) -> str | None:
    """All text of the user's side, or None where that is not all text."""
    last: Any = ""
    turns = record.get("conversations")
    if kind != "conversation":
        last, turns = record.get("question"), record.get("history") if kind == "pair" else None
        if not isinstance(last, str):
            return None
        if turns is None:
            return last
    if not isinstance(turns, list) or not turns:
        return None
    try:
        return "".join(turn["value"] for turn in turns[::2]) + last
    except (TypeError, KeyError, IndexError):
        return None


def _put_in_front(record: dict[str, Any], kind: Kind, text: str) -> dict[str, Any]:
    name = "conversations" if kind == "conversation" else "history"
    if kind != "conversation" and (kind != "pair" or record.get("history") is None):
        return {**record, "question": text + record["question"]}
    first, *others = record[name]
    return {**record, name: [{**first, "value": text + first["value"]}, *others]}


def find_fault(record: object, kind: Kind) -> str | None:
    """What is wrong with a tidy record of this kind, in words, or None."""
    if not isinstance(record, dict):
        return f"the line is a JSON {type(record).__name__}, expected an object"
    if fault := _media_fault(record):
        return fault
    if record.get("system") is not None and (fault := _text(record, "system", empty=True)):
        return fault
    if fault := _FAULTS[kind](record):
        return fault
    text = _prompt_text(record, kind) or ""
    videos = int(video_name(record) is not None)
    for number, name, placeholder in (
        (len(list_images(record)), "image", IMAGE_PLACEHOLDER),
        (videos, "video", VIDEO_PLACEHOLDER),
    ):
        if number != text.count(placeholder):
            return f"{number} {name}(s) but {text.count(placeholder)} {placeholder} placeholder(s)"
    return None


def _media_fault(record: dict[str, Any]) -> str | None:
    try:
        images = list_images(record)
    except ValueError as error:
        return str(error)
    if "images" in record and record["images"] is not None:
        return "field 'images' beside 'image', or not a list; give one of them"
    if not isinstance(record.get("video"), str | None):
        return f"field 'video' is {type(record['video']).__name__}, expected a path"
    for place in [*images, video_name(record)]:
        if isinstance(place, str) and (found := _URL.match(place)):
            return f"'{found[0]}...' is not a path; save it as a file and give the file's path"
    if images and video_name(record):
        return "both 'image' and 'video' are given, which is not supported; make two rows of it"
    for name in ("max_tiles", "num_frames"):
        value = record.get(name)
        if value is not None and (type(value) is not int or value < 1):
            return f"field {name!r} is {value!r}, expected a whole number of at least 1"
    return None


def _text(record: dict[str, Any], field: str, *, empty: bool = False) -> str | None:
    value = record.get(field)
    if not isinstance(value, str):
        return f"field {field!r} is {type(value).__name__}, expected a string"
    if not empty and not value.strip():
        return f"field {field!r} is empty"
    try:
        value.encode()
    except UnicodeEncodeError:
        return f"field {field!r} holds half of a surrogate pair, which is no character"
    return None


def _question_fault(record: dict[str, Any]) -> str | None:
    answer = record.get("answer")
    if isinstance(answer, list):
        if not answer or not all(isinstance(item, str) for item in answer):
            return "field 'answer' is not a list of strings"
    elif not isinstance(answer, str):
        return f"field 'answer' is {type(answer).__name__}, expected a string or a list of strings"
    return _text(record, "id") or _text(record, "question")


def _rollout_fault(record: dict[str, Any]) -> str | None:
    if not isinstance(record.get("sample"), int):
        return "field 'sample' is not an integer"
    return _question_fault(record) or _text(record, "completion", empty=True)


def _verdict_fault(record: dict[str, Any]) -> str | None:
    return _rollout_fault(record) or _text(record, "outcome")


def _pair_fault(record: dict[str, Any]) -> str | None:
    if is_preference(record):
        try:
            to_pair(record, len(list_images(record)))
        except ValueError as error:
            return str(error)
    if record.get("history") is not None and (fault := _turns_fault(record, "history")):
        return fault
    fault = _text(record, "question") or _text(record, "chosen") or _text(record, "rejected")
    if fault is None and record["chosen"] == record["rejected"]:
        return "chosen and rejected are identical"
    return fault


def _conversation_fault(record: dict[str, Any]) -> str | None:
    return _turns_fault(record, "conversations")


def _turns_fault(record: dict[str, Any], name: str) -> str | None:
    turns = record.get(name)
    if not isinstance(turns, list) or len(turns) < 2 or len(turns) % 2:
        return f"field {name!r} is not a list of human and gpt turns, two at a time"
    for index, turn in enumerate(turns):
        speaker = ("human", "gpt")[index % 2]
        if not isinstance(turn, dict) or turn.get("from") != speaker:
            return f"turn {index} of {name!r} is not from {speaker!r}"
        if fault := _text(turn, "value"):
            return f"turn {index} of {name!r}: {fault}"
    return None


_FAULTS: dict[str, Callable[[dict[str, Any]], str | None]] = {
    "question": _question_fault,
    "rollout": _rollout_fault,
    "verdict": _verdict_fault,
    "pair": _pair_fault,
    "conversation": _conversation_fault,
}


def record_key(record: dict[str, Any], kind: Kind) -> tuple[object, ...] | None:
    """What must be unique in a file: the id (rollouts: with the sample's number).

    Nothing is looked up by a pair's or a conversation's id, and published sets repeat theirs.
    """
    if record.get("id") is None or kind in ("pair", "conversation"):
        return None
    key = str(record["id"])
    return (key, record["sample"]) if kind in ("rollout", "verdict") else (key,)
