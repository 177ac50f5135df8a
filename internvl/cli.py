"""The command line of internvl: bring a checkpoint in, look at it, take one out."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from internvl.errors import UserError
from internvl.terminal import Command, command_parser, run_command

_ABOUT = "Checkpoints in and out: convert, compose, merge, look at, and talk to an InternVL."
_EXAMPLE = """\
example, from a published InternVLChatModel to one that everything here (and vLLM) loads:

  internvl convert InternVL3-1B ckpt --to hf      published custom-code layout -> HF-native
  internvl info ckpt --image chart.png            sizes, tokens an image costs, training memory
  internvl chat ckpt chart.png "Which bar is the highest?"
  internvl compose Qwen3-8B ckpt ckpt-8b          its vision tower under another language model
  internvl merge out/mpo-lora ckpt-mpo            a LoRA adapter into its base
  internvl convert ckpt-mpo release --to chat     HF-native -> published layout

No code of a checkpoint is ever run: config.json and tensors are read, names are mapped.
`internvl COMMAND --help` tells the rest. An error is one line, with exit code 2."""


def _convert(args: argparse.Namespace) -> None:
    from internvl.conversion.convert import convert

    convert(args.source, args.output, to=args.to, allow_pickle=args.allow_pickle)
    print(f"{args.output}: written in the {args.to} layout")


def _compose(args: argparse.Namespace) -> None:
    from internvl.conversion.compose import check_composition, compose

    composition = check_composition(
        args.llm, args.vision, seed=args.seed, add_chat_tokens=args.add_chat_tokens
    )
    compose(composition, args.output, allow_pickle=args.allow_pickle)
    print(f"{args.output}: {composition.described()}")


def _merge(args: argparse.Namespace) -> None:
    from internvl.conversion.merge import merge_adapter

    merge_adapter(args.adapter, args.output, base=args.base)
    print(f"{args.output}: base and adapter in one")


def _info(args: argparse.Namespace) -> None:
    from internvl.info import print_info

    for name in ("max_tiles", "max_tokens_per_microbatch"):
        if vars(args)[name] < 1:
            raise UserError(f"--{name.replace('_', '-')} is {vars(args)[name]}; give 1 or more")
    print_info(
        args.model,
        images=args.image,
        max_tiles=args.max_tiles,
        tokens=args.max_tokens_per_microbatch,
    )


def _chat(args: argparse.Namespace) -> None:
    from internvl.first_look import ask

    ask(
        args.model,
        [args.image, *args.more_images],
        args.question,
        system=args.system,
        max_tiles=args.max_tiles,
        max_tokens=args.max_tokens,
        temperature=args.temperature,
        num_frames=args.num_frames,
        backend=args.backend,
        seed=args.seed,
    )


def _add_convert(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", type=Path, metavar="IN", help="the checkpoint folder to read")
    parser.add_argument("output", type=Path, metavar="OUT", help="the new folder to write")
    parser.add_argument(
        "--to",
        choices=("hf", "chat"),
        required=True,
        help="hf: InternVLForConditionalGeneration; chat: the published InternVLChatModel",
    )
    parser.add_argument(
        "--allow-pickle",
        action="store_true",
        help="read pytorch_model*.bin, too (tensors only: no other object is unpickled)",
    )


def _add_compose(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "llm",
        type=Path,
        metavar="LLM",
        help="a causal language model (Qwen2, Qwen3, LLaMA), or an InternVL for its own",
    )
    parser.add_argument(
        "vision", type=Path, metavar="VISION", help="the InternVL whose vision tower is taken"
    )
    parser.add_argument("output", type=Path, metavar="OUT", help="the new folder to write")
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        metavar="N",
        help="of a new projector, where VISION's is of another width (default: %(default)s)",
    )
    parser.add_argument(
        "--add-chat-tokens",
        action="store_true",
        help="add <|im_start|> and <|im_end|> where the LLM's tokenizer has none",
    )
    parser.add_argument(
        "--allow-pickle",
        action="store_true",
        help="read pytorch_model*.bin, too (tensors only: no other object is unpickled)",
    )


def _add_merge(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("adapter", type=Path, help="the folder with adapter_config.json")
    parser.add_argument("output", type=Path, metavar="OUT", help="the new folder to write")
    parser.add_argument(
        "--base", type=Path, metavar="DIR", help="the base (default: the one the adapter names)"
    )


def _add_info(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", type=Path, help="the checkpoint folder, in either layout")
    parser.add_argument(
        "--image",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="an image whose cost to tell; may be given more than once",
    )
    parser.add_argument(
        "--max-tiles",
        type=int,
        default=12,
        metavar="N",
        help="tile budget of a prompt (default: %(default)s)",
    )
    parser.add_argument(
        "--max-tokens-per-microbatch",
        type=int,
        default=16384,
        metavar="N",
        help="what runs at once in training (default: %(default)s)",
    )


def _add_chat(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", type=Path, help="the checkpoint folder, HF-native")
    parser.add_argument("image", type=Path, help="an image, a video, or a folder of frames")
    parser.add_argument("question", help='the question, in quotes; "<image>" is put before it')
    parser.add_argument(
        "--more-images",
        type=Path,
        nargs="+",
        default=[],
        metavar="FILE",
        help="further images, in the order of the question's <image> placeholders",
    )
    parser.add_argument("--system", metavar="TEXT", help="a system prompt")
    parser.add_argument(
        "--max-tiles",
        type=int,
        default=12,
        metavar="N",
        help="tile budget of the prompt (default: %(default)s)",
    )
    parser.add_argument(
        "--max-tokens",
        type=int,
        default=1024,
        metavar="N",
        help="length of the reply (default: %(default)s)",
    )
    parser.add_argument(
        "--temperature",
        type=float,
        default=0.0,
        metavar="T",
        help="0 takes the likeliest token (default: %(default)s)",
    )
    parser.add_argument(
        "--num-frames",
        type=int,
        default=8,
        metavar="N",
        help="frames taken of a video (default: %(default)s)",
    )
    parser.add_argument(
        "--backend",
        choices=("auto", "vllm", "transformers"),
        default="transformers",
        help="vllm starts slowly and samples fast (default: %(default)s)",
    )
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N", help="of the sampling (default: %(default)s)"
    )


_COMMANDS = (
    Command("convert", "published custom-code layout <-> HF-native", _add_convert, _convert),
    Command("compose", "a language model and another's vision tower", _add_compose, _compose),
    Command("merge", "a LoRA adapter into its base", _add_merge, _merge),
    Command("info", "sizes, tokens an image costs, memory of training", _add_info, _info),
    Command("chat", "one question about one image, for a first look", _add_chat, _chat),
)


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    return command_parser("internvl", _ABOUT, _EXAMPLE, _COMMANDS)


def main(argv: Sequence[str] | None = None) -> None:
    """Run one command; see `internvl --help`."""
    run_command(build_parser(), argv)
