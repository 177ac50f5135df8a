"""Which backend computes: the one that was asked for, or the fastest that is there and right.

`auto` is decided at the first packed row. On a CPU it is `split` (1.5 to 1.8 times faster than
`segments` there), with attention dropout `segments`. On CUDA every backend that can is run on
random numbers of that row's layout, shapes and dtype, forward and backward; one that fails or
differs from `segments` is out, and the fastest of the others is taken. In a run of several
processes the first that has measured decides for all.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from internvl.attention.backends import BACKENDS, Backend, Case
from internvl.attention.layout import AttentionLayout, Segment, build_layout
from internvl.errors import UserError

AUTO = "auto"
# as large a difference from `segments` as rounding makes, relative to the largest number
TOLERANCES = {torch.bfloat16: 3e-2, torch.float16: 5e-3, torch.float32: 1e-4}
ROUNDS = 3
# a prompt with three completions and one without any: unequal numbers of queries and keys
_SMALL = build_layout(
    [Segment(0, 0, 0, 70), Segment(0, 40, 70, 90), Segment(0, 40, 90, 91), Segment(0, 0, 91, 99)],
    99,
)

Clock = Callable[[Callable[[], object]], float]


def backend_names() -> tuple[str, ...]:
    """What the option `attention_backend` may be."""
    return (AUTO, *BACKENDS)


def check_backend(name: str, case: Case) -> None:
    """Raise `UserError` where `name` is no backend, or cannot compute `case`."""
    if name not in backend_names():
        raise UserError(f"attention_backend is {name!r}; it is one of {', '.join(backend_names())}")
    if name != AUTO and (lack := BACKENDS[name].lack(case)):
        raise UserError(f"attention_backend {name!r} cannot run here: {lack}")


def check_language_model(config: Any) -> None:
    """Raise `UserError` for a text_config whose attention or routing a packed row does not do.

    Sliding windows, attention sinks, capped scores and router losses. (attention_dropout is done
    by `segments` alone: see `check_backend`.)
    """
    kind = config.model_type
    layers = getattr(config, "layer_types", None) or []
    slides = getattr(config, "sliding_window", None) is not None
    # Qwen2 and Qwen3 list the window that no layer uses; Qwen3-MoE's one is for every layer
    if any("full" not in layer for layer in layers) or (slides and not layers):
        raise UserError(
            f"the language model ({kind}) has sliding-window attention: it cannot share prefixes"
        )
    if kind == "gpt_oss":
        raise UserError(f"the language model ({kind}) has attention sinks, which are not done here")
    if getattr(config, "attn_logit_softcapping", None) is not None:
        raise UserError(f"the language model ({kind}) caps its scores, which is not done here")
    if getattr(config, "output_router_logits", False):
        raise UserError(
            "text_config.output_router_logits is true, but a packed row has no router loss: set it "
            "to false"
        )


_chosen: dict[tuple[str, Case], Backend] = {}  # one answer for all models of a shape


def forget_choices() -> None:
    """Decide anew at the next row."""
    _chosen.clear()


def choose(name: str, case: Case, layout: AttentionLayout, device: torch.device) -> Backend:
    """The backend for a case: `name`, proved where it was never run, or by measuring (`auto`)."""
    # a reference pass, evaluation and the first forward of a checkpointed layer have no gradients,
    # but take what training takes
    trained = replace(case, grad=True)
    if name != AUTO:
        check_backend(name, case)
        backend = BACKENDS[name]
        proved = device.type == "cpu" or name == "segments" or (name, trained) in _chosen
        if not proved and (fault := difference(backend, trained, _SMALL.on(device), device)):
            raise UserError(f"attention_backend {name!r} is wrong here: {fault}")
        _chosen[name, trained] = backend
        return backend
    if (AUTO, trained) not in _chosen:
        if device.type == "cuda":
            said = f"{AUTO} {trained}"
            _chosen[AUTO, trained] = agree(said, lambda: measure(trained, layout, device))
        else:
            able = device.type == "cpu" and BACKENDS["split"].lack(case) is None
            _chosen[AUTO, trained] = BACKENDS["split" if able else "segments"]
    return _chosen[AUTO, trained]


def agree(key: str, decide: Callable[[], Backend]) -> Backend:
    """What the first process that decided says; no process ever waits for another.

    So it may be asked for at any moment, also by some processes only (a reference pass whose rows
    are cached on one of them).
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return decide()
    store = dist.distributed_c10d._get_default_store()
    return BACKENDS[first_word(store, f"internvl.attention {key}", lambda: decide().name)]


def first_word(store: Any, key: str, decide: Callable[[], str]) -> str:
    """The value of `key` in a torch.distributed store, put there by `decide` if nobody had."""
    if store.check([key]):
        return store.get(key).decode()
    return store.compare_set(key, "", decide()).decode()


def _random(case: Case, layout: AttentionLayout, device: torch.device) -> list[Tensor]:
    """q, k, v and the gradient of the output; the global random state is left alone."""
    assert case.heads and case.key_heads and case.head_dim
    generator = torch.Generator(device).manual_seed(0)
    heads = (case.heads, case.key_heads, case.key_heads, case.heads)
    return [
        torch.randn(
            (layout.length, number, case.head_dim),
            generator=generator,
            device=device,
            dtype=case.dtype,
        ).requires_grad_(case.grad)
        for number in heads
    ]


def _step(backend: Backend, layout: AttentionLayout, states: list[Tensor]) -> list[Tensor]:
    """Output and, where they are wanted, gradients."""
    q, k, v, grad = states
    with torch.enable_grad(), torch.autocast(q.device.type, enabled=False):
        out = backend.attend(q, k, v, layout, None, 0.0)
        if not q.requires_grad:
            return [out]
        return [out.detach(), *torch.autograd.grad(out, (q, k, v), grad.detach())]


def difference(
    backend: Backend, case: Case, layout: AttentionLayout, device: torch.device
) -> str | None:
    """How the backend's result differs from that of `segments` beyond rounding, or None."""
    states = _random(case, layout, device)
    names = ("output", "gradient of q", "gradient of k", "gradient of v")
    expected = _step(BACKENDS["segments"], layout, states)
    try:
        found = _step(backend, layout, states)
    except Exception as error:  # a kernel that cannot run says so in many ways: it is told on
        return " ".join(f"{type(error).__name__}: {error}".split())[:200]
    for name, one, other in zip(names, found, expected, strict=False):
        off = float((one - other).abs().max()) / max(float(other.abs().max()), 1e-30)
        if not off <= TOLERANCES.get(one.dtype, 1e-4):  # a NaN is no small difference
            return f"its {name} differs from that of segments by {off:.1e}"
    return None


def wall_clock(device: torch.device) -> Clock:
    """Seconds of a call on a device: the median of a few, after one that is not counted."""

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    def clock(call: Callable[[], object]) -> float:
        seconds = []
        for _ in range(ROUNDS + 1):
            wait()
            start = time.perf_counter()
            call()
            wait()
            seconds.append(time.perf_counter() - start)
        return sorted(seconds[1:])[ROUNDS // 2]

    return clock


def measure(
    case: Case,
    layout: AttentionLayout,
    device: torch.device,
    clock: Clock | None = None,
    backends: Iterable[Backend] | None = None,
) -> Backend:
    """The fastest backend that can, and is right, on a row like this; one line says the times."""
    clock = clock or wall_clock(device)
    states = _random(case, layout, device)
    said, times = [], {}
    for backend in BACKENDS.values() if backends is None else backends:
        reason = backend.lack(case)
        if reason is None and backend.name != "segments":
            reason = difference(backend, case, layout, device)
        if reason is not None:
            said.append(f"{backend.name} out ({reason})")
            continue
        times[backend] = clock(partial(_step, backend, layout, states))
        said.append(f"{backend.name} {1e3 * times[backend]:.2f} ms")
    best = min(times, key=lambda backend: times[backend])
    print(
        f"attention_backend auto: {best.name}, by a layer's attention on {layout.length} tokens, "
        f"forward and backward: {', '.join(said)}"
    )
    return best
