"""A trainer's weights to vLLM servers, through a folder that all of them see.

    parameters --one at a time--> FOLDER/weights-<n>/*.safetensors --reload_weights-> every server
    adapter    -----------------> FOLDER/adapter-<n>/           --load_lora_adapter-> every server

A version's folder appears whole or not at all, and stays until the next one has been written: a
server that was started anew reads it again before it is asked anything. After a reload three caches
are emptied (prefixes, images, their features: all hold the old weights' numbers), and the server is
told the version's name, which it forgets when it dies. What a server of vLLM 0.31 needs:

    VLLM_SERVER_DEV_MODE=1               for /collective_rpc, the resets and /weight_info
    VLLM_ALLOW_RUNTIME_LORA_UPDATING=1   and --enable-lora --max-lora-rank R, for adapters

Both let whoever reaches the server do as they like: loopback or a private network only.
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from internvl.errors import UserError
from internvl.server_wire import clip
from internvl.servers import ServerPool, Unreachable

if TYPE_CHECKING:
    from torch import Tensor

SHARD_BYTES = 2 << 30  # of one file: no more than this is held beside the model
RESETS = ("/reset_prefix_cache", "/reset_mm_cache", "/reset_encoder_cache")


class SharedWeights:
    """The newest weights in a shared folder, and the calls by which a server takes them over.

    folder: seen by the servers under this very path. dtype: what weights are written in, the
    servers' own (None: as they come). timeout: seconds for a server to read them. run: a name that
    no run before had, the same in all processes of a training. lead: whether this process writes
    and pushes; the others walk along, for parameters that only all of them can gather. adapters:
    whether adapters are given by themselves.
    """

    def __init__(
        self,
        folder: Path,
        *,
        dtype: str | None = None,
        timeout: float = 600.0,
        run: str | None = None,
        lead: bool = True,
        adapters: bool = False,
    ):
        self.folder = folder.absolute()
        self.adapters = adapters
        self.version: str | None = None  # the newest one's name, as servers are told it
        self.adapter_name: str | None = None  # what requests must ask for, where it is an adapter
        self._run = run or uuid.uuid4().hex[:8]
        self._dtype, self._timeout, self._lead = dtype, timeout, lead
        self._number = 0
        self._current: Path | None = None
        self._adapter_before: str | None = None

    def owns(self, name: str) -> bool:
        """Whether a served name is an adapter that was pushed, in this run or an earlier one."""
        return "-adapter-" in name

    # ---------------------------------------------------------------- this side

    def write(self, named_parameters: Iterable[tuple[str, Tensor]]) -> None:
        """Write all weights as a new version; `UserError` where that cannot be done."""
        target = self._next("weights")
        if not self._lead:
            for _ in named_parameters:
                pass
        else:
            try:
                partial = _fresh(target)
                _write_shards(named_parameters, partial, self._dtype)
                _appear(partial, target)
            except OSError as error:
                raise self._unwritable(error) from None
        self._take(target, adapter=False)

    def copy_adapter(self, folder: Path) -> None:
        """Take an adapter's folder as a new version; `UserError` where that cannot be done."""
        target = self._next("adapter")
        if self._lead:
            try:
                partial = _fresh(target)
                shutil.copytree(folder, partial, dirs_exist_ok=True)
                _appear(partial, target)
            except OSError as error:
                raise self._unwritable(error) from None
        self._take(target, adapter=True)

    def _next(self, kind: str) -> Path:
        self._number += 1
        return self.folder / f"{kind}-{self._number}"

    def _unwritable(self, error: OSError) -> UserError:
        return UserError(f"{self.folder}: the servers' weights cannot be written there: {error}")

    def _take(self, target: Path, *, adapter: bool) -> None:
        before, self._current = self._current, target
        self._adapter_before = self.adapter_name
        self.version = f"{self._run}-{target.name}"
        self.adapter_name = self.version if adapter else None
        if self._lead and before is not None:
            shutil.rmtree(before, ignore_errors=True)

    # ---------------------------------------------------------------- a server

    def push_if_other(self, url: str) -> None:
        """Give a server the newest version unless it says that it has it, or there is none."""
        if self.version is None:
            return
        if self._call("GET", url, "/weight_info").get("weight_version") == self.version:
            return
        if not self._lead:
            raise Unreachable(f"it has not got weights {self.version} yet")
        self.push(url)

    def push(self, url: str) -> None:
        """Give a server the newest version; `Unreachable` where it does not take it."""
        if not self._lead:
            return
        if self.adapter_name is not None:
            body: dict[str, Any] = {"lora_name": self.version, "lora_path": str(self._current)}
            self._call("POST", url, "/v1/load_lora_adapter", {**body, "load_inplace": True})
            if self._adapter_before is not None:  # a server that was started anew never had it
                body = {"lora_name": self._adapter_before}
                self._call("POST", url, "/v1/unload_lora_adapter", body, refused=True)
        else:
            arguments = {"weights_path": str(self._current)}
            body = {"method": "reload_weights", "kwargs": arguments}
            self._call("POST", url, "/collective_rpc", body)
        for path in RESETS:
            if self._call("POST", url, path).get("success") is False:
                raise Unreachable(f"{path}: it is at work for others, and keeps what it cached")
        self._call("POST", url, "/update_weight_version", {"new_version": self.version})

    def _call(
        self,
        method: str,
        url: str,
        path: str,
        body: dict[str, Any] | None = None,
        *,
        refused: bool = False,
    ) -> dict[str, Any]:
        """One call of a server's own endpoints, which lie beside /v1.

        refused: whether the server may say no.
        """
        import httpx

        root = url.removesuffix("/v1")
        key = os.environ.get("OPENAI_API_KEY")
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        try:
            answer = httpx.request(
                method, root + path, json=body, headers=headers, timeout=self._timeout
            )
        except httpx.HTTPError as error:
            raise Unreachable(f"{path}: {clip(str(error) or type(error).__name__)}") from None
        if refused and answer.status_code in (400, 404):
            return {}
        if answer.status_code == 404:
            need = "VLLM_SERVER_DEV_MODE=1"
            if path.endswith("lora_adapter"):
                need = "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 and --enable-lora"
            raise UserError(
                f"{url} has no {path}: start it with {need}, on a private network only. It said: "
                f"{clip(answer.text)}"
            )
        if answer.status_code >= 400:
            raise Unreachable(f"{path}: HTTP {answer.status_code}: {clip(answer.text)}")
        try:
            told = json.loads(answer.text)
        except ValueError:
            return {}
        return told if isinstance(told, dict) else {}


class TakesWeights:
    """The half of a sampler of servers that hands weights on."""

    _weights: SharedWeights | None
    _pool: ServerPool[Any, Any]

    def update_weights(self, named_parameters: Iterable[tuple[str, Tensor]]) -> None:
        """See `internvl.sampler.Sampler.update_weights`; every server reads the shared folder.

        One that cannot is taken out until it has read them; `UserError` where none can.
        """
        weights = self._weights_or_refuse()
        weights.write(named_parameters)
        self._pool.each(lambda server: weights.push(server.url))

    def update_adapter(self, folder: Path) -> None:
        """See `internvl.sampler.Sampler.update_adapter`."""
        weights = self._weights_or_refuse()
        weights.copy_adapter(folder)
        self._pool.each(lambda server: weights.push(server.url))

    def sleep(self) -> None:
        """Nothing: servers have devices of their own."""

    def _weights_or_refuse(self) -> SharedWeights:
        if self._weights is None:
            raise UserError("weights cannot be handed to servers that were opened without a folder")
        return self._weights

    def _checked(self, url: str) -> None:
        if self._weights is not None:
            self._weights.push_if_other(url)


def _fresh(target: Path) -> Path:
    """An empty folder beside `target`, to be filled before it takes that name."""
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    return partial


def _appear(partial: Path, target: Path) -> None:
    shutil.rmtree(target, ignore_errors=True)  # of a run that was killed
    os.replace(partial, target)


def _write_shards(named: Iterable[tuple[str, Tensor]], folder: Path, dtype: str | None) -> None:
    """Weights into files of `SHARD_BYTES`, so that hardly more than one file is ever held."""
    import torch
    from safetensors.torch import save_file

    shard: dict[str, Tensor] = {}
    size = number = 0

    def close() -> None:
        nonlocal shard, size, number
        number += 1
        save_file(shard, folder / f"model-{number:05d}.safetensors", metadata={"format": "pt"})
        shard, size = {}, 0

    for name, weight in named:
        kind = weight.dtype if dtype is None else getattr(torch, dtype)
        # a copy: it is written later, when the walk has gone on
        shard[name] = weight.detach().to("cpu", kind, copy=True).contiguous()
        size += shard[name].nbytes
        if size >= SHARD_BYTES:
            close()
    if shard:
        close()
