"""A data tool from its input to its files: `sft filter` and `sft translate`."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from internvl.data import Row
from rewards.endpoint import Endpoint
from sft.data_tools.inputs import Part, output_files, read_parts, write_meta
from sft.data_tools.options import cache_faults_told, open_quarantine
from sft.data_tools.working import Counts, Decision, decide_rows


def run_tool(
    args: argparse.Namespace,
    decide: Callable[[Part, Row], Decision],
    endpoint: Endpoint | None,
    check: Callable[[Endpoint], None],
    *,
    what: tuple[str, str],
    rejects: bool = False,
    suffix: str = "",
) -> Counts:
    """Read the rows, decide on each, and write all files; the endpoint is closed at the end.

    check: called with the endpoint before the first row. what: "filtering" and "kept". rejects:
    whether the tool rejects rows at all. suffix: for the names of data sets.
    """
    doing, done = what
    quarantine = open_quarantine(args.output)
    parts = read_parts(args.input, quarantine, image_root=args.image_root, max_bad=args.max_bad)
    files = output_files(args.output, parts, suffix)
    try:
        with cache_faults_told():
            if endpoint is not None:
                check(endpoint)
            counts, kept = decide_rows(
                parts,
                decide,
                output=args.output,
                files=files,
                quarantine=quarantine,
                workers=args.workers,
                what=doing,
                rejects=rejects,
            )
    finally:
        if endpoint is not None:
            endpoint.close()
    if parts[0].name is not None:
        for name in write_meta(args.output, parts, files, kept, suffix):
            print(f"data set {name}: no row is {done}, so {args.output.name} does not list it")
    return counts
