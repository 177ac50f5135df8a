"""The options of commands that sample, said once: an engine in this process, or servers.

--model CKPT [--backend ..]      a checkpoint folder, in vLLM or transformers
--model ADAPTER                  a LoRA adapter: vLLM serves its base and puts the adapter on
--model CKPT --server URL ..     OpenAI-compatible servers that serve that folder
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from internvl.adapters import adapter_settings, is_adapter, named_base
from internvl.errors import UserError

if TYPE_CHECKING:
    from internvl.sampler import StreamSampler

# options that say how an engine in this process is started, and what they are by default
_OF_AN_ENGINE = {"backend": "auto", "dtype": "auto", "max_model_len": None}
_OF_SERVERS = ("concurrency", "server_timeout", "server_patience", "server_model")


def add_servers(parser: argparse.ArgumentParser) -> None:
    """The options of servers, which are asked instead of an engine in this process."""
    add = parser.add_argument_group("OpenAI-compatible servers, instead of a backend").add_argument
    add(
        "--server",
        action="append",
        metavar="URL",
        help="http://host:8000/v1 of a vLLM server that serves --model with "
        "--trust-request-mm-kwargs; may be given several times",
    )
    add("--server-model", metavar="NAME", help="its name there, where servers offer several")
    add("--concurrency", type=int, metavar="N", help="requests at a time and server (512 / n)")
    add("--server-timeout", type=float, metavar="S", help="for one request (default: 600)")
    add(
        "--server-patience",
        type=float,
        metavar="S",
        help="how long to wait while no server answers (default: 300)",
    )


def check_sampler_options(args: argparse.Namespace) -> None:
    """Raise `UserError` for options of an engine or of servers that cannot be honoured."""
    for name in ("max_model_len", "concurrency"):
        value = vars(args)[name]
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} is {value}; it must be at least 1")
    for name in ("server_timeout", "server_patience"):
        value = vars(args)[name]
        if value is not None and not value > 0:
            raise UserError(f"--{name.replace('_', '-')} is {value}; give seconds, above 0")
    for name in _OF_SERVERS:
        if not args.server and vars(args)[name] is not None:
            raise UserError(f"--{name.replace('_', '-')} has no meaning without --server")
    for name, default in _OF_AN_ENGINE.items():
        if args.server and vars(args)[name] != default:
            raise UserError(
                f"--{name.replace('_', '-')} has no meaning with --server: servers are started "
                "with options of their own"
            )


def open_asked(args: argparse.Namespace) -> StreamSampler:
    """The sampler that the options ask for; nobody reads the log-probabilities of its tokens.

    Raises `UserError` for a LoRA adapter that vLLM cannot put on its base by itself.
    """
    if is_adapter(args.model):
        return _open_adapter(args)
    if not args.server:
        return _open_engine(args, Path(args.model))
    from internvl.server_sampler import open_servers

    given: dict[str, Any] = {
        "concurrency": args.concurrency,
        "timeout": args.server_timeout,
        "patience": args.server_patience,
        "served_name": args.server_model,
    }
    given = {name: value for name, value in given.items() if value is not None}
    return open_servers(args.model, args.server, seed=args.seed, logprobs=False, **given)


def _open_engine(args: argparse.Namespace, folder: Path, **more: Any) -> StreamSampler:
    from internvl.sampler import open_sampler

    return open_sampler(
        folder,
        backend=args.backend,
        seed=args.seed,
        max_model_len=args.max_model_len,
        dtype=args.dtype,
        logprobs=False,
        **more,
    )


def _open_adapter(args: argparse.Namespace) -> StreamSampler:
    from internvl.sampler import choose_backend

    folder = Path(args.model)
    cure = f"make one checkpoint of it and its base: internvl merge {folder} OUTPUT"
    settings = adapter_settings(folder)
    if args.server:
        raise UserError(f"{folder}: a LoRA adapter; servers are asked for a whole model: {cure}")
    base = named_base(folder)
    if choose_backend(base, args.backend) != "vllm":
        raise UserError(
            f"{folder}: a LoRA adapter, which transformers does not sample from: {cure}"
        )
    if fault := _not_by_itself(folder, settings):
        raise UserError(f"{folder}: {fault}: {cure}")
    ranks = [settings.get("r") or 8, *(settings.get("rank_pattern") or {}).values()]
    sampler = _open_engine(args, base, max_lora_rank=max(ranks))
    sampler.update_adapter(folder)
    return sampler


def _not_by_itself(folder: Path, settings: dict[str, Any]) -> str | None:
    """Why vLLM cannot put an adapter on its base, or None; it adds to the language model alone."""
    from safetensors import safe_open

    from internvl.adapters import WEIGHTS

    if settings.get("modules_to_save"):
        return "the adapter holds whole modules (modules_to_save)"
    if settings.get("use_dora"):
        return "the adapter is a DoRA"
    with safe_open(folder / WEIGHTS, framework="numpy") as file:
        other = [name for name in file.keys() if ".language_model." not in name]  # noqa: SIM118
    return f"the adapter is not of the language model alone ({other[0]})" if other else None
