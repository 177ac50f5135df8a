"""Shared-prefix attention, forward and backward: each backend, a dense mask, and the FLOP floor.

    python benchmarks/attention.py                   # on a CPU: segments, split and a dense mask
    python benchmarks/attention.py --device cuda     # every backend that is there; bfloat16
    python benchmarks/attention.py --json            # the last line is one JSON object

One layer's attention at InternVL3.5-1B's shape (16 heads over 8, 128 wide) on random numbers, for
three rows as training packs them: pairs (MPO) and groups of 8 and of 16 (GSPO). The backends run in
turns, and medians over the rounds are given: CPU seconds on one thread, or seconds until a CUDA
device is done. `floor` is what the visible scores alone cost at the speed of a plain matrix product
in the same run: 2 products forward and 5 backward, nothing masked, nothing padded. `dense` is SDPA
with a T x T mask, as one would do it without any of this. `error` is the largest difference from
`segments`, of output and gradients, relative to the largest number. On CUDA `peak` is the memory
that a backend takes beside its inputs, in MiB.

Run here: a CPU alone. docs/attention.md has its numbers.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from internvl.attention import BACKENDS, Backend, Case, Segment, build_layout
from internvl.attention.layout import AttentionLayout, visible

HEADS, KEY_HEADS, HEAD_DIM = 16, 8, 128
TOKENS_A_TILE, TEXT = 256, 60
PRODUCTS = 7  # of queries x keys x head_dim: 2 forward, 5 backward
# tiles of each prompt, completions of each, their least and most tokens
ROWS: dict[str, dict[str, tuple[list[int], int, int, int]]] = {
    "cpu": {
        "mpo": ([1, 3, 4, 1], 2, 50, 200),
        "gspo8": ([5], 8, 50, 200),
        "gspo16": ([3], 16, 50, 200),
    },
    "cuda": {
        "mpo": ([13, 7, 13, 5], 2, 300, 1000),
        "gspo8": ([13], 8, 300, 1000),
        "gspo16": ([13], 16, 300, 1000),
    },
}


def make_row(tiles: list[int], completions: int, least: int, most: int) -> AttentionLayout:
    """Prompts of so many tiles and a little text, each with its completions."""
    rng = np.random.default_rng(0)
    segments, here = [], 0
    for number in tiles:
        start, prompt = here, number * TOKENS_A_TILE + TEXT
        here += prompt
        for branch in range(completions):
            first, here = here, here + int(rng.integers(least, most + 1))
            if branch == 0:
                segments.append(Segment(0, 0, start, here))
            else:
                segments.append(Segment(start, start + prompt, first, here))
    return build_layout(segments, here)


def dense_mask(layout: AttentionLayout) -> Tensor:
    """bool [T, T]."""
    first, last, own = visible(layout)[:, :, None]
    key = torch.arange(layout.length, device=layout.device)[None]
    query = key.T
    return ((key >= first) & (key < last)) | ((key >= own) & (key <= query))


def attend_dense(
    q: Tensor, k: Tensor, v: Tensor, layout: AttentionLayout, scale: float | None, dropout: float
) -> Tensor:
    """SDPA under a mask over the whole row."""
    q, k, v = (states.transpose(0, 1)[None] for states in (q, k, v))
    mask = layout.prepared(dense_mask)
    out = scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=True)
    return out[0].transpose(0, 1)


def step(backend: Backend, layout: AttentionLayout, states: list[Tensor]) -> list[Tensor]:
    """Output, and the gradients of q, k and v."""
    q, k, v, grad = states
    out = backend.attend(q, k, v, layout, None, 0.0)
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), grad)]


def clock(call: Callable[[], object], device: torch.device) -> float:
    """CPU seconds, or those until the device is done."""
    if device.type == "cpu":
        start = time.process_time()
        call()
        return time.process_time() - start
    torch.cuda.synchronize(device)
    start = time.perf_counter()
    call()
    torch.cuda.synchronize(device)
    return time.perf_counter() - start


def matrix_speed(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations a second of a plain matrix product."""
    size = 2048 if device.type == "cpu" else 8192
    one, other = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    seconds = [clock(lambda: one @ other, device) for _ in range(6)]
    return 2 * size**3 / statistics.median(seconds[1:])


def measure_row(
    layout: AttentionLayout, device: torch.device, dtype: torch.dtype, rounds: int
) -> dict[str, Any]:
    """Times, errors and what is out, of every backend on one row."""
    layout = layout.on(device)
    generator = torch.Generator(device).manual_seed(0)
    options: dict[str, Any] = {"generator": generator, "device": device, "dtype": dtype}
    states = [
        torch.randn(layout.length, heads, HEAD_DIM, **options)
        for heads in (HEADS, KEY_HEADS, KEY_HEADS, HEADS)
    ]
    for state in states[:3]:
        state.requires_grad_()
    case = Case(device.type, dtype, HEADS, KEY_HEADS, HEAD_DIM)
    every = [*BACKENDS.values(), Backend("dense", attend_dense, lambda case: None)]
    out: dict[str, str] = {}
    calls: dict[str, Callable[[], list[Tensor]]] = {}
    results: dict[str, dict[str, float]] = {}
    expected = step(BACKENDS["segments"], layout, states)
    for backend in every:
        if lack := backend.lack(case):
            out[backend.name] = lack
            continue
        try:
            found = step(backend, layout, states)
        except RuntimeError as error:  # out of memory, no kernel: the others go on
            out[backend.name] = " ".join(str(error).split())[:200]
            continue
        errors = [
            float((one - other).abs().max() / other.abs().max())
            for one, other in zip(found, expected, strict=True)
        ]
        results[backend.name] = {"error": max(errors)}
        calls[backend.name] = partial(step, backend, layout, states)
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            times[name].append(clock(call, device))
    for name, call in calls.items():
        results[name]["seconds"] = statistics.median(times[name])
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            before = torch.cuda.memory_allocated(device)
            call()
            results[name]["peak"] = (torch.cuda.max_memory_allocated(device) - before) / 2**20
    flop = 2 * PRODUCTS * layout.scores * HEADS * HEAD_DIM
    return {"tokens": layout.length, "flop": flop, "backends": results, "out": out}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="a JSON object as the last line")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: there is no CUDA device")
    torch.set_num_threads(1)
    device = torch.device(args.device)
    kind = args.dtype or ("float32" if args.device == "cpu" else "bfloat16")
    dtype = getattr(torch, kind)
    speed = matrix_speed(device, dtype)
    print(f"{args.device}, {kind}: a matrix product at {speed / 1e9:,.0f} GFLOP/s")
    rows = {}
    for name, shape in ROWS[args.device].items():
        row = rows[name] = measure_row(make_row(*shape), device, dtype, args.rounds)
        row["floor"] = row["flop"] / speed
        print(f"\n{name}: {row['tokens']} tokens, floor {1e3 * row['floor']:.1f} ms")
        for backend, found in row["backends"].items():
            found["over_floor"] = found["seconds"] / row["floor"]
            peak = f"  peak {found['peak']:8.0f} MiB" if "peak" in found else ""
            print(
                f"  {backend:9}{1e3 * found['seconds']:10.1f} ms"
                f"  {found['over_floor']:6.2f} x floor  error {found['error']:.0e}{peak}"
            )
        for backend, reason in row["out"].items():
            print(f"  {backend:9}out: {reason}")
    if args.json:
        print(json.dumps({"device": args.device, "dtype": kind, "flops": speed, "rows": rows}))


if __name__ == "__main__":
    main()
