"""What the commands share: the options of every command, the quarantine, small talk."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from internvl.data import Quarantine
from internvl.errors import UserError


def add_common(parser: argparse.ArgumentParser, *, output: str | None) -> None:
    if output is not None:
        parser.add_argument(
            "--output", type=Path, required=True, metavar="FILE", help=f"the {output} to write"
        )
        parser.add_argument(
            "--quarantine",
            type=Path,
            metavar="FILE",
            help="where unusable rows go, begun anew each time (default: OUTPUT.quarantine.jsonl)",
        )
    parser.add_argument(
        "--max-bad",
        type=float,
        default=0.05,
        metavar="X",
        help="share (<1) or number (>=1) of bad rows that is borne (default: %(default)s)",
    )


def add_sampling(parser: argparse.ArgumentParser, what: str) -> None:
    """How completions are drawn, and by which engine in this process; what: of which replies."""
    add = parser.add_argument
    add("--temperature", type=float, default=1.0, help="(default: %(default)s)")
    add("--top-p", type=float, default=1.0, help="(default: %(default)s, off)")
    add("--top-k", type=int, default=0, help="(default: %(default)s, off)")
    add("--max-tokens", type=int, default=1024, help=f"of a {what} (default: %(default)s)")
    add("--backend", choices=("auto", "vllm", "transformers"), default="auto", help="the sampler")
    add("--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help="of the weights")
    add("--max-model-len", type=int, metavar="N", help=f"prompt + {what} (default: the model's)")


def beside(output: Path, suffix: str) -> Path:
    return output.with_name(output.name + suffix)


def open_quarantine(args: argparse.Namespace) -> Quarantine:
    path: Path = args.quarantine or beside(args.output, ".quarantine.jsonl")
    if path.resolve() == args.output.resolve():
        raise UserError(f"--quarantine and --output are both {path}")
    for name, value in vars(args).items():  # what is begun anew must be nothing else
        if name != "quarantine" and isinstance(value, Path) and value.resolve() == path.resolve():
            raise UserError(f"--quarantine {path} is the {name.replace('_', '-')} itself")
    quarantine = Quarantine(path, args.max_bad)
    path.unlink(missing_ok=True)  # it tells of this run only: a restart finds the same rows again
    return quarantine


def refuse_overwrite(source: Path, output: Path) -> None:
    if source.resolve() == output.resolve():
        raise UserError(f"--output {output} is the input itself")


def tell_bad(quarantine: Quarantine) -> None:
    if quarantine.count:
        print(f"{quarantine.count} bad row(s) put aside in {quarantine.path}")


def tell_image_root(image: str | list[str] | None, output: Path) -> None:
    """Say so when the images, whose paths stay as they were, do not lie beside the output."""
    name = image[0] if isinstance(image, list) else image
    if name is not None and not (output.parent / name).is_file():
        print(
            f"image paths are as in the questions ({name}) and do not start from "
            f"{output.parent}: give --image-root to what reads {output.name}"
        )


def share(part: float, whole: float) -> str:
    return f"{part / whole:.1%}" if whole else "-"


@contextmanager
def told_to_the_user(kind: type[ValueError] = ValueError) -> Iterator[None]:
    """What `rewards` cannot honour (an error of this kind), as a `UserError`."""
    try:
        yield
    except UserError:
        raise
    except kind as error:
        raise UserError(str(error)) from None
