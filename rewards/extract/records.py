"""A record of several lines, "company: ABC" and below it "total: 9.00", of which one was read."""

from __future__ import annotations

import re

from rewards.extract.answers import MAX_ANSWER, explains, has_more, peel_line, readable
from rewards.extract.extraction import MORE, Extraction, found_at

_FIELD = re.compile(r"[*_`]{0,3}[^\W\d_][^:：\n]{0,40}[:：][*_`]{0,3}[ \t]{0,9}[^\s/]")
_MAX_LINES = 64  # looked at from the end for where the record begins


def whole_record(completion: str, found: Extraction) -> Extraction:
    """The answer with the fields in the lines below it, where it is the first line of a record.

    The record ends at an empty line, or where a line is no "key: value" or explains.
    """
    if found.text is None or "\n" in found.text or not _FIELD.match(found.text):
        return found
    lines = readable(completion).split("\n")
    for first in range(len(lines) - 1, max(-1, len(lines) - 1 - _MAX_LINES), -1):
        line = " " + peel_line(lines[first])
        if line.endswith((" " + found.text, ":" + found.text, "：" + found.text)):
            break
    else:
        return found
    if "\\boxed" in lines[first]:
        return found
    fields, after = [found.text], first + 1
    while after < len(lines) and _FIELD.match(lines[after]) and not explains(lines[after]):
        fields.append(peel_line(lines[after]))
        after += 1
    record = "\n".join(fields)
    if len(fields) == 1 or len(record) > MAX_ANSWER:
        return found
    more = has_more("\n".join(lines[after:]))
    fault = found.fault if found.fault != MORE else MORE if more else None
    return found_at(record, found.style, fault)
