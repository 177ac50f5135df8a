"""The reference's log-probabilities on disk, by what they were computed from.

    ROOT / first half of SHA-256(settings) / settings.json        what the folder was made with
                                           / TIME-RANDOM.logps    one file a process that wrote

    .logps:  chunk | chunk | ...       a chunk is whole, or it is not there
    chunk:   "MPOREF1\\n" | number of pairs (8 bytes) | their CRC-32 | pairs | SHA-256 of all this
    pair:    SHA-256 of the sample | log pi_0(y_c|x) | log pi_0(y_r|x)     two float64

Any number of processes may write at the same time, each to a file of its own, so nothing is locked
(locks are not to be trusted on network file systems). A kill leaves at most one torn chunk at the
end of a file, which is passed over; anything else that is wrong is an error. Where two files hold
the same sample, the older one counts, whoever reads.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
import uuid
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from internvl.errors import UserError

Digests = npt.NDArray[np.bytes_]  # "S32", SHA-256
Values = npt.NDArray[np.float64]

PAIR = np.dtype([("sample", "S32"), ("logps", "<f8", (2,))])
_MAGIC = b"MPOREF1\n"
_SETTINGS = "settings.json"
_HEAD, _TAIL = len(_MAGIC) + 8 + 4, 32  # bytes


class ReferenceCache:
    """Log-probabilities of samples under one reference; see the module's text for the files.

    root: where folders of any reference lie. settings: JSON-able, everything but the sample that
    the numbers depend on. Raises `UserError` where the folder cannot be used.
    """

    def __init__(self, root: Path, settings: dict[str, Any]):
        self.key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
        self.folder = root / self.key[:32]
        self._settings = settings
        self._file: Path | None = None

    def find(self, digests: Digests) -> Values:
        """[n, 2] log-probabilities of samples, NaN where there are none."""
        out = np.full((len(digests), 2), np.nan)
        try:
            parts = [pairs for file in self._files() for pairs in self._chunks(file)]
        except OSError as error:
            self._fail(error)
        if not parts or not len(digests):
            return out
        known = np.concatenate(parts)
        samples, first = np.unique(known["sample"], return_index=True)
        places = np.minimum(np.searchsorted(samples, digests), len(samples) - 1)
        there = samples[places] == digests
        out[there] = known["logps"][first[places[there]]]
        return out

    def add(self, digests: Digests, values: Values) -> None:
        """Append a chunk, to the disk, whole or (after a kill) not at all."""
        pairs = np.empty(len(digests), PAIR)
        pairs["sample"], pairs["logps"] = digests, values
        head = _MAGIC + len(pairs).to_bytes(8, "little")
        body = head + zlib.crc32(head).to_bytes(4, "little") + pairs.tobytes()
        try:
            if self._file is None:
                self._begin()
                # its place in the order by name is that of its start
                self._file = self.folder / f"{time.time_ns():020d}-{uuid.uuid4().hex[:12]}.logps"
            with self._file.open("ab") as out:
                out.write(body + self._digest(body))
                out.flush()
                os.fsync(out.fileno())
        except OSError as error:
            self._fail(error)

    def differences(self) -> str | None:
        """Where there is no folder of these settings yet: what another's differ in, the nearest's.

        None where there is one, or no other.
        """
        if self.folder.is_dir():
            return None
        found = []
        for file in sorted(self.folder.parent.glob(f"*/{_SETTINGS}")):
            try:
                other = json.loads(file.read_text(encoding="utf-8"))
            except (OSError, ValueError):
                continue  # only told about, never used
            names = [n for n in self._settings if other.get(n) != self._settings[n]]
            found.append((len(names), file.parent.name, ", ".join(names)))
        if not found:
            return None
        _, name, differing = min(found)
        return f"{name}: another {differing}"

    def _begin(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        file = self.folder / _SETTINGS
        if not file.is_file():
            partial = file.with_name(f"{_SETTINGS}.{uuid.uuid4().hex}")
            partial.write_text(json.dumps(self._settings, indent=2), encoding="utf-8")
            partial.replace(file)

    def _files(self) -> list[Path]:
        return sorted(self.folder.glob("*.logps"))

    def _digest(self, body: bytes) -> bytes:
        # with the folder's key: a file that was moved to another reference's folder is no good
        return hashlib.sha256(self.key.encode() + body).digest()

    def _chunks(self, file: Path) -> Iterator[npt.NDArray[np.void]]:
        data = file.read_bytes()
        place = 0
        while len(data) - place >= _HEAD:
            head = data[place : place + _HEAD]
            crc = int.from_bytes(head[-4:], "little")
            if not head.startswith(_MAGIC) or zlib.crc32(head[:-4]) != crc:
                _refuse(file, place)
            number = int.from_bytes(head[len(_MAGIC) : -4], "little")
            end = place + _HEAD + number * PAIR.itemsize
            if len(data) < end + _TAIL:
                return  # torn by a kill, or being written just now
            if self._digest(data[place:end]) != data[end : end + _TAIL]:
                _refuse(file, place)
            yield np.frombuffer(data, PAIR, number, place + _HEAD)
            place = end + _TAIL

    def _fail(self, error: OSError) -> NoReturn:
        where = error.filename or self.folder
        raise UserError(f"{where}: {error.strerror or error} (see reference_cache_dir)") from None


def _refuse(file: Path, place: int) -> NoReturn:
    raise UserError(
        f"{file}: damaged at byte {place}, or of another reference; delete it, and what it held "
        "is computed again"
    )
