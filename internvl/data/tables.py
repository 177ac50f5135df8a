"""Rows of Hugging Face data sets by number: parquet files, and folders made by `save_to_disk`.

Images are never decoded here: a cell holds the encoded bytes, or a path. A parquet file can only
be read a row group at a time, so large ones are copied once into Arrow's own format in the cache,
which is mapped into memory and read row by row.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

from internvl.data.cache import CACHED_FROM, cached_file
from internvl.errors import DataError

if TYPE_CHECKING:
    import pyarrow as pa

_BATCH_ROWS = 256
_VERSION = 1  # of the copies
_SPLIT_FILE = re.compile(r"(?P<split>.+)-\d{5}-of-\d{5}(-.*)?\.parquet")


class Table:
    """The rows of one file, by number from 0."""

    def __init__(self, path: Path, batches: Sequence[pa.RecordBatch]):
        self.path = path
        self._batches = batches
        self._ends = list(accumulate(batch.num_rows for batch in batches))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def record(self, index: int) -> dict[str, Any]:
        """One row without its nulls; where the table has no ids, the file's name and the row's
        number are one.
        """
        part = bisect_right(self._ends, index)
        before = self._ends[part - 1] if part else 0
        (cells,) = self._batches[part].slice(index - before, 1).to_pylist()
        record = {name: cell for name, cell in cells.items() if cell is not None}
        if "id" not in cells:
            record["id"] = f"{self.path.stem}-{index + 1}"
        return record


def find_tables(path: Path) -> list[Path]:
    """The parquet or Arrow files behind a path: a file, `folder/name*.parquet`, or a folder.

    Raises `DataError` for a folder that holds none, or several splits.
    """
    if "*" in path.name:
        files = sorted(path.parent.glob(path.name))
        if not files:
            raise DataError(f"{path}: no such files")
        if others := [file for file in files if file.suffix not in (".parquet", ".arrow")]:
            raise DataError(
                f"{path}: {others[0].name} is not parquet; a meta.json lists several JSONL files"
            )
        return files
    if not path.is_dir():
        return [path]
    if (path / "dataset_dict.json").is_file():
        splits = ", ".join(sorted(str(f.parent) for f in path.glob("*/state.json")))
        raise DataError(f"{path}: holds several splits; give the folder of one: {splits}")
    if (path / "state.json").is_file():
        return _saved_files(path)
    files = sorted(path.glob("*.parquet"))
    splits_found = {m["split"] for file in files if (m := _SPLIT_FILE.fullmatch(file.name))}
    if len(splits_found) > 1:
        shown = " or ".join(f"'{path / name}-*.parquet'" for name in sorted(splits_found))
        raise DataError(f"{path}: holds several splits; give one: {shown}")
    if not files:
        inner = sorted({str(file.parent) for file in path.glob("*/*.parquet")})
        hint = f"; there are some in {', '.join(inner)}" if inner else ""
        raise DataError(
            f"{path}: a folder without parquet files, and not made by save_to_disk{hint}"
        )
    return files


def _saved_files(folder: Path) -> list[Path]:
    """The Arrow files of a folder made by `Dataset.save_to_disk`, in order."""
    try:
        state = json.loads((folder / "state.json").read_bytes())
        files = [folder / entry["filename"] for entry in state["_data_files"]]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{folder}/state.json: not written by save_to_disk: {error!r}") from None
    if state.get("_indices_data_files"):
        raise DataError(
            f"{folder}: saved by an old version of datasets with an order of rows of its own; load "
            "it and save it again with a version of today"
        )
    if missing := [str(file) for file in files if not file.is_file()]:
        raise DataError(f"{folder}: its file {missing[0]} is missing")
    return files


def open_tables(path: Path, *, cached_from: int = CACHED_FROM, quiet: bool = False) -> list[Table]:
    """The files behind a path, ready to be read by row number.

    cached_from: the bytes of all parquet files together from which they are copied into the cache.
    quiet: no progress bar. Raises `DataError` for a file that is not what its name says.
    """
    files = find_tables(path)
    size = sum(file.stat().st_size for file in files if file.suffix == ".parquet")
    return [Table(file, _batches(file, copy=size >= cached_from, quiet=quiet)) for file in files]


@contextmanager
def _read_faults_told(file: Path) -> Iterator[None]:
    """What Arrow says of a file that is not what its name says, or is damaged, as `DataError`."""
    import pyarrow as pa

    try:
        yield
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, pa.ArrowTypeError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # the system's, not Arrow's: no rights, no room
        raise DataError(f"{file}: cannot be read: {' '.join(str(error).split())}") from None


def _batches(file: Path, *, copy: bool, quiet: bool) -> list[pa.RecordBatch]:
    import pyarrow as pa

    if file.suffix != ".parquet":
        with _read_faults_told(file):
            return pa.ipc.open_stream(pa.memory_map(str(file))).read_all().to_batches()
    if not copy:
        return list(_parquet_batches(file))

    def make(target: Path) -> None:
        _copy_to_arrow(file, target, quiet=quiet)

    kept = cached_file([file], ".arrow", make, version=_VERSION)
    with _read_faults_told(kept):
        return pa.ipc.open_stream(pa.memory_map(str(kept))).read_all().to_batches()


def _parquet_batches(file: Path) -> Iterator[pa.RecordBatch]:
    import pyarrow.parquet as pq

    with _read_faults_told(file), pq.ParquetFile(file) as parquet:
        yield from parquet.iter_batches(batch_size=_BATCH_ROWS)


def _copy_to_arrow(file: Path, target: Path, *, quiet: bool) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq
    from tqdm import tqdm

    with _read_faults_told(file), pq.ParquetFile(file) as parquet:
        rows, schema = parquet.metadata.num_rows, parquet.schema_arrow
    bar = tqdm(total=rows, desc=f"copying {file.name}", unit="row", delay=2, disable=quiet)
    with bar, pa.OSFile(str(target), "wb") as out, pa.ipc.new_stream(out, schema) as writer:
        for batch in _parquet_batches(file):
            writer.write_batch(batch)
            bar.update(batch.num_rows)
