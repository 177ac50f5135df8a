"""Rows that a program has in memory: a `datasets.Dataset`, or a list of records."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from internvl.data.fingerprint import digest_of_each
from internvl.data.records import Kind, find_fault, tidy_record
from internvl.data.rows import Row
from internvl.data.rowsets import RowSequence
from internvl.errors import UserError


class LoadedRows(RowSequence):
    """Records by number, each looked at when it is asked for (`Row.fault`).

    records: a `datasets.Dataset` in the format "arrow" (which does not decode images), or dicts.
    name: what the rows are called where one is put aside. root: where relative paths of images
    start, and that none may leave.
    """

    def __init__(self, records: Any, kind: Kind, root: Path, name: str):
        self._records = records
        self._kind: Kind = kind
        self._root = root
        self._name = Path(name)

    def __len__(self) -> int:
        return len(self._records)

    def row(self, index: int) -> Row:
        """The row of a number from 0; a record without an id is called by its number."""
        if isinstance(self._records, list):
            cells = self._records[index]
        else:
            (cells,) = self._records[index : index + 1].to_pylist()
        record: Any = cells
        if isinstance(cells, dict):
            record = {name: cell for name, cell in cells.items() if cell is not None}
            record = tidy_record({"id": f"{index + 1}", **record}, self._kind)
        fault = find_fault(record, self._kind)
        return Row(record, self._name, index + 1, self._root, fault=fault)

    def fingerprint(self) -> str:
        """Of every record; of images in files of their own only the path."""
        return digest_of_each(row.data for row in self)


def as_rows(found: Any, kind: Kind, root: Path, name: str) -> Sequence[Row] | None:
    """What a program gives a trainer as rows: rows, a `datasets.Dataset`, or a list of records.

    Raises `UserError` for what has no rows by number (a stream, several splits), or none at all.
    """
    if found is None or isinstance(found, RowSequence):
        return found
    if isinstance(found, list | tuple) and not found:
        raise UserError(f"{name} is empty")
    if isinstance(found, Sequence) and all(isinstance(item, Row) for item in found):
        return found
    if isinstance(found, list):
        return LoadedRows(found, kind, root, name)
    from datasets import Dataset, DatasetDict, IterableDataset

    if isinstance(found, Dataset):
        if not len(found):
            raise UserError(f"{name} is empty")
        return LoadedRows(found.with_format("arrow"), kind, root, name)
    told = f"{name} is a {type(found).__name__}"
    if isinstance(found, IterableDataset):
        raise UserError(
            f"{told}, a stream, which a run could not go on with at a sample: download the data "
            "(hf download NAME --repo-type dataset --local-dir DIR) and give their files"
        )
    if isinstance(found, DatasetDict):
        raise UserError(f"{told} of several splits: give one, {name}[{min(found, default='')!r}]")
    raise UserError(
        f"{told}; give a datasets.Dataset, a list of records, or what internvl.data.read_rows reads"
    )
