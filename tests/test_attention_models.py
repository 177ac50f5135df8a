"""Packed rows of Qwen2, Qwen3, Qwen3-MoE and LLaMA behind InternVL against their plain forward.

Beside invariant 1 (see test_packing.py, which has more shapes of rows, on Qwen3): gradient
checkpointing of both kinds, bfloat16 autocast and LoRA, on each language model.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from packed_cases import Cases, mean_nll, packed_loss
from peft import LoraConfig, get_peft_model
from plain import gradient_error, gradients, plain_logprobs
from tiny_llms import FAMILIES, make_family
from torch import Tensor

from internvl.attention import BACKENDS, Case, forget_choices
from internvl.packing import PackedBatch, pack

CHOSEN = [0, 1, 3]  # one and three completions with an image, two with two images


@dataclass
class Family:
    """The cases of a language model, and what its plain forward says of them."""

    cases: Cases
    batch: PackedBatch
    completions: int
    logprobs: Tensor
    loss: float
    gradients: dict[str, Tensor]

    def run(self) -> tuple[float, dict[str, Tensor]]:
        """Loss and gradients of the packed row."""
        loss = packed_loss(self.cases, self.batch, self.completions)
        loss.backward()
        return loss.item(), gradients(self.cases.model)

    def check_plain(self) -> None:
        loss, found = self.run()
        assert abs(loss - self.loss) < 1e-6 * self.loss
        error = gradient_error(found, self.gradients)
        print(f"gradients differ by {error:.1e}")
        assert error < 1e-5


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Family:
    folder = tmp_path_factory.mktemp(request.param)
    make_family(folder / "model", request.param)
    (folder / "images").mkdir()
    cases = Cases(folder / "model", folder / "images")
    model: Any = cases.plain_model
    parts = [part for index in CHOSEN for part in plain_logprobs(model, cases.plain[index])]
    loss = mean_nll(parts, len(parts))
    loss.backward()
    batch = pack(cases.examples, CHOSEN)
    expected = gradients(model, all_reached=False)
    return Family(cases, batch, len(parts), torch.cat(parts).detach(), loss.item(), expected)


@pytest.fixture
def backend(request: Any, family: Family) -> Iterator[str]:
    family.cases.model.attention_backend = request.param
    yield request.param
    del family.cases.model.attention_backend


@pytest.fixture
def seen(backend: str, monkeypatch: pytest.MonkeyPatch) -> list[Case]:
    """What the backend was asked to compute, layer after layer."""
    asked: list[Case] = []
    real = BACKENDS[backend]

    def lack(case: Case) -> str | None:
        asked.append(case)
        return real.lack(case)

    monkeypatch.setitem(BACKENDS, backend, replace(real, lack=lack))
    return asked


both = pytest.mark.parametrize("backend", ["segments", "split"], indirect=True)


@both
def test_packed_is_plain(family: Family, backend: str) -> None:
    """Log-probs to 1e-5, loss to 1e-6, every parameter's gradient to 1e-5."""
    with torch.no_grad():
        scores = family.cases.score(family.batch)
    assert (scores.logprobs - family.logprobs).abs().max() < 1e-5
    family.check_plain()


@both
@pytest.mark.parametrize("reentrant", [pytest.param(True, marks=pytest.mark.slow), False])
def test_gradient_checkpointing_changes_nothing(
    family: Family, backend: str, seen: list[Case], reentrant: bool
) -> None:
    """To the bit: the same operations, once more."""
    model: Any = family.cases.model
    loss, expected = family.run()
    assert len(seen) == 2  # layers
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    try:
        again, found = family.run()
    finally:
        model.gradient_checkpointing_disable()
    assert len(seen) == 2 + 4 and again == loss
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@both
def test_bf16_autocast(family: Family, backend: str, seen: list[Case]) -> None:
    """The backend is given bfloat16; the loss is the plain forward's under autocast."""
    model: Any = family.cases.plain_model
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = packed_loss(family.cases, family.batch, family.completions)
        with torch.no_grad():
            plain = [family.cases.plain[index] for index in CHOSEN]
            parts = [part.float() for p in plain for part in plain_logprobs(model, p)]
    loss.backward()
    found = gradients(family.cases.model)
    assert {case.dtype for case in seen} == {torch.bfloat16}
    expected = float(mean_nll(parts, len(parts)))
    assert loss.item() == pytest.approx(expected, rel=5e-3)
    ours = torch.cat([found[name].flatten() for name in sorted(found)])
    exact = torch.cat([family.gradients[name].flatten() for name in sorted(found)])
    assert torch.cosine_similarity(ours, exact, dim=0) > 0.995


def test_lora_on_a_packed_row(family: Family) -> None:
    """Adapters that are not zero, against the same ones on the plain model."""
    config = LoraConfig(
        r=4,
        target_modules=r".*language_model.*(q_proj|v_proj|o_proj)",
        init_lora_weights=False,
    )
    wrapped = []
    for model in (family.cases.model, family.cases.plain_model):
        torch.manual_seed(0)
        wrapped.append(get_peft_model(model, config))
    try:
        pixels = family.cases.pixels(family.batch)
        scores = wrapped[0](packed=family.batch, pixel_values=pixels)
        loss = mean_nll(scores.logprobs.split(family.batch.lengths.tolist()), family.completions)
        plain = [family.cases.plain[index] for index in CHOSEN]
        parts = [part for p in plain for part in plain_logprobs(wrapped[1], p)]
        expected = mean_nll(parts, family.completions)
        assert loss.item() != pytest.approx(family.loss, rel=1e-3)
        assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
        loss.backward()
        expected.backward()
        ours, theirs = gradients(wrapped[0]), gradients(wrapped[1])
        assert ours and all("lora_" in name for name in ours)
        assert gradient_error(ours, theirs) < 1e-5
    finally:
        for peft in wrapped:
            peft.unload()
            peft.get_base_model().requires_grad_(True)
    forget_choices()
