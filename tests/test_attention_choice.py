"""Which backend computes: forced, measured, refused; with fakes in the place of CUDA's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed import HashStore
from transformers import GptOssConfig, Qwen2Config, Qwen3Config, Qwen3MoeConfig

from internvl.attention import (
    BACKENDS,
    Backend,
    Case,
    Segment,
    backends,
    build_layout,
    check_backend,
    check_language_model,
    choice,
    choose,
    forget_choices,
)
from internvl.attention.layout import AttentionLayout
from internvl.attention.segments import attend_segments
from internvl.errors import UserError
from training.arguments import PackedTrainingArguments
from training.attention import check_attention

CPU = torch.device("cpu")
CASE = Case("cpu", torch.float32, 4, 2, 8)
LAYOUT = build_layout([Segment(0, 0, 0, 7), Segment(0, 5, 7, 10)], 10)


@pytest.fixture(autouse=True)
def anew() -> Iterator[None]:
    forget_choices()
    yield
    forget_choices()


def fake(
    name: str, lack: str | None = None, change: Callable[[Tensor], Tensor] = lambda out: out
) -> Backend:
    """A backend that computes as `segments` does, and then changes the result."""

    def attend(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        layout: AttentionLayout,
        scale: float | None,
        dropout: float,
    ) -> Tensor:
        return change(attend_segments(q, k, v, layout, scale, dropout))

    return Backend(name, attend, lambda case: lack)


def fail(out: Tensor) -> Tensor:
    raise NotImplementedError("no kernel image\n is available")


class Turned(torch.autograd.Function):
    """The output as it is, and a gradient that is wrong."""

    @staticmethod
    def forward(ctx: Any, out: Tensor) -> Tensor:
        return out.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.flip(0)


def by_name(seconds: dict[str, float]) -> tuple[list[str], Callable[[Callable[[], Any]], float]]:
    """A clock that runs the call and tells each backend's time from a table."""
    ran: list[str] = []

    def clock(call: Any) -> float:
        call()
        ran.append(call.args[0].name)
        return seconds[call.args[0].name]

    return ran, clock


def test_the_fastest_that_is_right_is_taken(capsys: pytest.CaptureFixture[str]) -> None:
    others = [
        fake("absent", "the package is not installed"),
        fake("broken", change=fail),
        fake("shifted", change=lambda out: out.roll(1, 0)),
        fake("turned", change=Turned.apply),
        fake("empty", change=lambda out: out * torch.nan),
        fake("slow"),
        fake("fast"),
    ]
    times = {"segments": 0.003, "slow": 0.002, "fast": 0.00125}
    ran, clock = by_name(times)
    state = torch.get_rng_state()
    best = choice.measure(CASE, LAYOUT, CPU, clock, [BACKENDS["segments"], *others])
    assert torch.equal(torch.get_rng_state(), state)  # a measured run draws what another would
    assert best.name == "fast" and ran == list(times)
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("attention_backend auto: fast, by a layer's attention on 10 tokens")
    for said in (
        "segments 3.00 ms",
        "absent out (the package is not installed)",
        "broken out (NotImplementedError: no kernel image is available)",
        "shifted out (its output differs from that of segments by",
        "turned out (its gradient of q differs from that of segments by",
        "empty out (its output differs from that of segments by nan)",
        "slow 2.00 ms, fast 1.25 ms",
    ):
        assert said in line


def test_a_real_measurement(capsys: pytest.CaptureFixture[str]) -> None:
    """With the backends that there are, by the clock on the wall; random numbers only."""
    best = choice.measure(CASE, LAYOUT, CPU)
    assert best.name in ("segments", "split")
    line = capsys.readouterr().out
    assert "varlen out (it needs a CUDA device), flash out (the package flash-attn" in line
    assert "flex out (FlexAttention has no backward on a CPU" in line


def test_auto_on_a_cpu_measures_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same choice on every run: a resumed one ends with the same bits."""
    monkeypatch.setattr(choice, "measure", fail)
    assert choose("auto", CASE, LAYOUT, CPU).name == "split"
    assert choose("auto", replace(CASE, dropout=0.1), LAYOUT, CPU).name == "segments"
    assert choose(
        "auto", Case("mps", torch.float32, 4, 2, 8), LAYOUT, torch.device("mps")
    ).name == ("segments")


def test_auto_on_cuda_measures_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """At the first row; what has no gradients takes what training takes."""
    asked = []

    def measure(case: Case, layout: AttentionLayout, device: torch.device) -> Backend:
        asked.append(case)
        return BACKENDS["varlen"]

    monkeypatch.setattr(choice, "measure", measure)
    case = Case("cuda", torch.bfloat16, 4, 2, 64, grad=False)
    assert choose("auto", case, LAYOUT, torch.device("cuda")).name == "varlen"
    assert choose("auto", replace(case, grad=True), LAYOUT, torch.device("cuda")).name == "varlen"
    assert asked == [replace(case, grad=True)]
    choose("auto", replace(case, dtype=torch.float32), LAYOUT, torch.device("cuda"))
    assert len(asked) == 2


def test_a_forced_backend_is_proved_where_it_was_never_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """On anything but a CPU its result is compared with that of segments, once."""
    compared = []

    def difference(backend: Backend, *_: Any) -> str | None:
        compared.append(backend.name)
        return "its output differs" if backend.name == "wrong" else None

    monkeypatch.setattr(choice, "difference", difference)
    monkeypatch.setattr(AttentionLayout, "on", lambda self, device: self)
    for name in ("right", "wrong"):
        monkeypatch.setitem(BACKENDS, name, fake(name))
    cuda, case = torch.device("cuda"), replace(CASE, device="cuda")
    for _ in range(3):
        assert choose("right", case, LAYOUT, cuda).name == "right"
        assert choose("segments", case, LAYOUT, cuda).name == "segments"
    assert compared == ["right"]
    with pytest.raises(UserError, match="attention_backend 'wrong' is wrong here: its output diff"):
        choose("wrong", case, LAYOUT, cuda)


def test_processes_agree_and_nobody_waits() -> None:
    """The first that has decided decides for all, in whatever order they come."""
    store = HashStore()
    assert choice.first_word(store, "row", lambda: "flash") == "flash"
    assert choice.first_word(store, "row", lambda: pytest.fail("measured again")) == "flash"
    # both measured at once: the word that came first holds for the other, too
    late = lambda: store.compare_set("other", "", "varlen").decode() and "split"  # noqa: E731
    assert choice.first_word(store, "other", late) == "varlen"


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """What there would be on an Ampere GPU with flash-attn."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(backends, "_compute_capability", lambda: (8, 0))
    found = SimpleNamespace(find_spec=lambda name: name)
    monkeypatch.setattr(backends, "importlib", SimpleNamespace(util=found))


BF16 = Case("cuda", torch.bfloat16, 16, 8, 128)


@pytest.mark.parametrize("name", ["segments", "split", "varlen", "flash", "flex"])
def test_all_can_run_on_cuda(name: str, cuda: None) -> None:
    check_backend(name, BF16)


@pytest.mark.parametrize(
    ("names", "case", "reason"),
    [
        (("varlen", "flash", "split"), replace(BF16, dtype=torch.float32), "not float32"),
        (("varlen", "flash", "split"), replace(BF16, head_dim=320), "heads of up to 256"),
        (("varlen", "flash", "split"), replace(BF16, head_dim=36), "in steps of 8, not of 36"),
        (("varlen", "flash", "split", "flex"), replace(BF16, dropout=0.1), "no attention_dropout"),
        (("varlen", "flash", "split", "flex"), replace(BF16, device="mps"), "a CUDA device"),
        (("varlen", "flash", "flex"), replace(BF16, device="cpu"), "CUDA|on a CPU"),
        (("split",), replace(BF16, device="cpu", dropout=0.1), "no attention_dropout"),
    ],
)
def test_what_a_backend_lacks(names: tuple[str, ...], case: Case, reason: str, cuda: None) -> None:
    for name in names:
        with pytest.raises(UserError, match=reason) as told:
            check_backend(name, case)
        assert str(told.value).startswith(f"attention_backend {name!r} cannot run here: ")
        assert "\n" not in str(told.value)


def test_old_gpus_and_old_torch(cuda: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "_varlen_options", lambda: frozenset({"window_size"}))
    check_backend("varlen", BF16)
    with pytest.raises(UserError, match=r"'split' cannot run here: it needs torch 2\.12"):
        check_backend("split", BF16)
    monkeypatch.setattr(backends, "_compute_capability", lambda: (7, 5))
    for name in ("varlen", "flash"):
        with pytest.raises(UserError, match="needs an Ampere GPU"):
            check_backend(name, BF16)


def test_options_are_refused_before_a_model_is_loaded(tmp_path: Path) -> None:
    def options(name: str) -> PackedTrainingArguments:
        return PackedTrainingArguments(output_dir=str(tmp_path), attention_backend=name)

    for name in ("auto", "segments", "split"):
        assert options(name).attention_backend == name
        assert name == "auto" or "attention_backend" in PackedTrainingArguments.free_on_resume
    with pytest.raises(UserError, match="it is one of auto, segments, split, varlen, flash, flex"):
        options("sdpa")
    with pytest.raises(UserError, match="flash-attn is not installed"):
        options("flash")
    with pytest.raises(UserError, match="'varlen' cannot run here: it needs a CUDA device"):
        options("varlen")
    with pytest.raises(UserError, match="no backward on a CPU"):
        options("flex")
    text = Qwen3Config(attention_dropout=0.1)
    check_attention(options("auto"), text, torch.float32)
    check_attention(options("segments"), text, torch.float32)
    with pytest.raises(UserError, match=r"no attention_dropout \(here 0\.1\)"):
        check_attention(options("split"), text, torch.float32)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (Qwen2Config(use_sliding_window=True, max_window_layers=1), "qwen2.*sliding-window"),
        (Qwen3MoeConfig(use_sliding_window=True), "qwen3_moe.*sliding-window"),
        (GptOssConfig(layer_types=["full_attention"] * 36, sliding_window=None), "attention sinks"),
        (SimpleNamespace(model_type="gemma2", attn_logit_softcapping=50.0), "caps its scores"),
        (Qwen3MoeConfig(output_router_logits=True), "has no router loss"),
    ],
)
def test_language_models_that_cannot_be_packed(config: Any, reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        check_language_model(config)
