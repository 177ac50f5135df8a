"""Chunked log-probabilities, their options, and what is computed how often.

Invariants 2 and 3 of the design: an image is seen once and a prompt once; no [tokens, vocabulary].
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from packed_cases import Cases, packed_loss
from plain import gradient_error, gradients, plain_logits, plain_logprobs
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from internvl.chat import forbidden_token_ids
from internvl.errors import UserError
from internvl.logprobs import ScoringHead, score_tokens
from internvl.packing import PackedBatch, pack, plan_microbatches
from training.kernels import use_liger

GPU = torch.device("cuda")


@pytest.fixture(scope="module")
def cases(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Cases:
    return Cases(tiny_model, tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def batch(cases: Cases) -> PackedBatch:
    return pack(cases.examples)


def vocabulary(cases: Cases) -> int:
    return int(cases.model.config.text_config.vocab_size)


# ---------------------------------------------------------------- chunks


def same_gradients(ours: Tensor, theirs: Tensor, hidden: Tensor, head: torch.nn.Linear) -> None:
    found = torch.autograd.grad(ours, (hidden, head.weight))
    wanted = torch.autograd.grad(theirs, (hidden, head.weight), retain_graph=True)
    for one, other in zip(found, wanted, strict=True):
        assert torch.allclose(one, other, atol=1e-5)


@given(st.integers(0, 13), st.integers(1, 15), st.booleans(), st.sampled_from([1.0, 0.7]))
@settings(max_examples=40)
def test_chunks_are_the_whole(tokens: int, rows: int, forbid: bool, temperature: float) -> None:
    """Value and gradient of any chunk size equal one plain log_softmax."""
    vocab = 17
    generator = torch.Generator().manual_seed(tokens)
    head = torch.nn.Linear(5, vocab, bias=False)
    torch.nn.init.normal_(head.weight, generator=generator)
    hidden = torch.randn(tokens, 5, generator=generator).requires_grad_()
    targets = torch.randint(3, vocab, (tokens,), generator=generator)
    forbidden = [0, 2] if forbid else []

    logits = head(hidden) / temperature
    logits[:, forbidden] = -torch.inf
    every = logits.log_softmax(1)
    expected = every[torch.arange(tokens), targets]
    finite = every.masked_fill(every.isneginf(), 0.0)
    entropy = -(every.exp() * finite).sum(1)
    # what a loss hands back differs from token to token
    weights = torch.randn(2, tokens, generator=generator)

    options: dict[str, Any] = {"temperature": temperature, "forbidden": forbidden}
    options |= {"vocab_size": vocab, "max_logits": rows * vocab}
    scores = score_tokens(hidden, targets, head, with_entropy=True, **options)
    assert torch.allclose(scores.logprobs, expected, atol=1e-6)
    assert scores.entropy is not None and not scores.entropy.requires_grad
    assert torch.allclose(scores.entropy, entropy, atol=1e-6)
    same_gradients(
        (scores.logprobs * weights[0]).sum(), (expected * weights[0]).sum(), hidden, head
    )

    scores = score_tokens(hidden, targets, head, with_entropy="grad", **options)
    assert scores.entropy is not None
    same_gradients(
        (scores.logprobs * weights[0] + scores.entropy * weights[1]).sum(),
        (expected * weights[0] + entropy * weights[1]).sum(),
        *(hidden, head),
    )

    scores = score_tokens(hidden, targets, head, with_entropy="grad", **options)
    assert scores.entropy is not None
    same_gradients(scores.entropy.sum(), entropy.sum(), hidden, head)


@pytest.mark.parametrize("tokens", [0, 1, 13])
def test_the_head_is_called_once_for_any_number_of_chunks(tokens: int) -> None:
    """Its hooks are where FSDP2 and ZeRO-3 gather: as often on a rank without any token."""
    vocab = 17
    generator = torch.Generator().manual_seed(tokens)
    head = ScoringHead(5, vocab, bias=False)
    hidden = torch.randn(tokens, 5, generator=generator).requires_grad_()
    targets = torch.randint(0, vocab, (tokens,), generator=generator)
    expected = head(hidden).log_softmax(1)[torch.arange(tokens), targets]
    calls = []
    head.register_forward_hook(lambda *_: calls.append("forward"))
    scores = score_tokens(hidden, targets, head, vocab_size=vocab, max_logits=4 * vocab)
    assert torch.allclose(scores.logprobs, expected, atol=1e-6)
    same_gradients(scores.logprobs.sum(), expected.sum(), hidden, head)
    assert calls == ["forward"]


@pytest.mark.parametrize("rows", [1, 7])
def test_model_in_chunks(cases: Cases, batch: PackedBatch, rows: int) -> None:
    whole = packed_loss(cases, batch, 12)
    whole.backward()
    expected = gradients(cases.model)
    chunked = packed_loss(cases, batch, 12, max_logits=rows * vocabulary(cases))
    chunked.backward()
    assert chunked.item() == pytest.approx(whole.item(), rel=1e-6)
    assert gradient_error(gradients(cases.model), expected) < 1e-5


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_temperature_and_forbidden_ids(
    cases: Cases, batch: PackedBatch, temperature: float
) -> None:
    """As the sampler draws: logits / T, no mass on image tokens; entropy of that distribution."""
    forbidden = forbidden_token_ids(cases.processor, cases.model.config.text_config.vocab_size)
    image_token = cases.processor.image_token_id
    assert len(forbidden) == 4 and image_token in forbidden
    options: dict[str, Any] = {"temperature": temperature, "forbidden": forbidden}
    theirs = [part for p in cases.plain for part in plain_logprobs(cases.plain_model, p, **options)]
    scores = cases.score(batch, with_entropy=True, **options)
    assert (scores.logprobs - torch.cat(theirs)).abs().max() < 1e-5
    without = cases.score(batch).logprobs
    assert (scores.logprobs - without).abs().max() > 1e-4  # the options do something

    plain = cases.plain[0]
    logits = plain_logits(cases.plain_model, plain, plain.completions[0]) / temperature
    logits[:, forbidden] = -torch.inf
    entropy = torch.distributions.Categorical(logits=logits).entropy()
    assert scores.entropy is not None
    assert (scores.entropy[: len(entropy)] - entropy).abs().max() < 1e-5


def test_entropy_is_not_computed_unasked(cases: Cases, batch: PackedBatch) -> None:
    assert cases.score(batch).entropy is None


# ---------------------------------------------------------------- gradient checkpointing


def test_gradient_checkpointing_changes_nothing(cases: Cases, batch: PackedBatch) -> None:
    packed_loss(cases, batch, 12).backward()
    expected = gradients(cases.model)
    runs: Counter[str] = Counter()
    layers = {
        "vision": cases.model.model.vision_tower.encoder.layer[0].mlp,
        "language": cases.model.model.language_model.layers[0].mlp,
    }
    hooks = [
        # a pre-hook: recomputing ends at the last tensor that backward needs, inside the module
        layer.register_forward_pre_hook(lambda *_, name=name: runs.update([name]))
        for name, layer in layers.items()
    ]
    cases.model.gradient_checkpointing_enable({"use_reentrant": False})
    try:
        packed_loss(cases, batch, 12).backward()
    finally:
        cases.model.gradient_checkpointing_disable()
        for hook in hooks:
            hook.remove()
    assert runs == {"vision": 2, "language": 2}  # once forward, once again in backward
    found = gradients(cases.model)
    assert all(torch.equal(found[name], gradient) for name, gradient in expected.items())


# ---------------------------------------------------------------- how often, how large


def test_an_image_and_a_prompt_are_seen_once(cases: Cases) -> None:
    """Over all micro-batches of a step: each tile once, each prompt once, each completion once."""
    seen: Counter[str] = Counter()
    shapes = {"tiles": cases.model.model.vision_tower, "tokens": cases.model.model.language_model}

    def count(name: str, module: torch.nn.Module, args: Any, kwargs: dict[str, Tensor]) -> None:
        if name == "tiles":
            seen[name] += len(kwargs["pixel_values"])
        else:
            seen[name] += kwargs["inputs_embeds"].shape[1]

    hooks = [
        module.register_forward_pre_hook(
            lambda m, a, k, name=name: count(name, m, a, k), with_kwargs=True
        )
        for name, module in shapes.items()
    ]
    plan = plan_microbatches(cases.examples, max_tokens=100)
    assert len(plan) > 2
    for members in plan:
        packed_loss(cases, pack(cases.examples, members), 12).backward()
    for hook in hooks:
        hook.remove()
    cases.model.zero_grad()
    pictureless = sum(not any(cases.examples[i].num_tiles for i in members) for members in plan)
    images = sum(example.num_tiles for example in cases.examples)
    assert seen["tiles"] == images + pictureless  # a dummy tile where a micro-batch has no image
    prompts = sum(len(example.prompt_ids) for example in cases.examples)
    completions = sum(len(ids) for example in cases.examples for ids in example.completions)
    assert seen["tokens"] == prompts + completions


class LargestLogits(TorchDispatchMode):
    """Looks at every tensor that any operation makes, in forward and backward."""

    def __init__(self, vocab: int):
        super().__init__()
        self.vocab = vocab
        self.rows = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in self._tensors(out):
            # [rows, vocab] and not the head's own [hidden, vocab], transposed
            if tensor.ndim == 2 and tensor.shape[1] == self.vocab and tensor.shape[0] != 128:
                self.rows = max(self.rows, tensor.shape[0])
        return out

    def _tensors(self, out: Any) -> Iterable[Tensor]:
        if isinstance(out, Tensor):
            yield out
        elif isinstance(out, tuple | list):
            for item in out:
                yield from self._tensors(item)


def test_no_tensor_of_tokens_by_vocabulary(cases: Cases, batch: PackedBatch) -> None:
    """With max_logits = 5 rows, five rows of logits are the most that is ever made."""
    vocab = vocabulary(cases)
    with LargestLogits(vocab) as watch:
        packed_loss(cases, batch, 12, max_logits=5 * vocab + 1).backward()
    assert watch.rows == 5
    with LargestLogits(vocab) as watch:  # the watch sees what it is meant to see
        packed_loss(cases, batch, 12).backward()
    assert watch.rows == len(batch.targets) > 100
    cases.model.zero_grad()


@pytest.mark.parametrize("rows", [5, None])
def test_no_logits_are_kept_for_backward(
    cases: Cases, batch: PackedBatch, rows: int | None
) -> None:
    """In chunks they are made anew in backward; a single chunk is within the bound and is kept."""
    vocab, kept = vocabulary(cases), 0

    def pack_hook(tensor: Tensor) -> Tensor:
        nonlocal kept
        if tensor.ndim == 2 and tensor.shape[1] == vocab and tensor.shape[0] != 128:
            kept += len(tensor)
        return tensor

    options = {} if rows is None else {"max_logits": rows * vocab}
    with torch.autograd.graph.saved_tensors_hooks(pack_hook, lambda tensor: tensor):
        packed_loss(cases, batch, 12, **options)
    assert kept == 0 if rows else kept >= len(batch.targets)


def test_wrong_number_of_image_slots_is_an_error(cases: Cases) -> None:
    example = cases.examples[0]
    wrong = pack([example])
    wrong.image_positions = wrong.image_positions[1:]
    with pytest.raises(UserError, match="3 image slots but 4 image features"):
        cases.score(wrong)


# ---------------------------------------------------------------- Liger's function


class LigersContract:
    """What LigerFusedLinearScaledCrossEntropyFunction of liger-kernel 0.8.5 promises, plainly."""

    calls = 0

    @classmethod
    def apply(
        cls,
        _input: Tensor,
        weight: Tensor,
        target: Tensor,
        temperature: float = 1.0,
        ignore_index: int = -100,
        m_tiles_per_cluster: int = 1,
        return_entropy: bool = False,
    ) -> Any:
        assert _input.dtype == weight.dtype and len(_input)
        cls.calls += 1
        every = (_input @ weight.t() / temperature).float().log_softmax(1)
        nll = -every.gather(1, target[:, None])[:, 0]
        return (nll, -(every.exp() * every).sum(1)) if return_entropy else nll


@pytest.fixture
def liger(monkeypatch: pytest.MonkeyPatch) -> type[LigersContract]:
    ops = SimpleNamespace(LigerFusedLinearScaledCrossEntropyFunction=LigersContract)
    monkeypatch.setitem(sys.modules, "liger_kernel", SimpleNamespace(ops=ops))
    monkeypatch.setitem(sys.modules, "liger_kernel.ops", ops)
    LigersContract.calls = 0
    return LigersContract


@pytest.mark.parametrize("entropy", [False, True, "grad"])
def test_ligers_scores_are_ours(liger: type[LigersContract], entropy: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    head = torch.nn.Linear(5, 17, bias=False)
    hidden = torch.randn(9, 5, generator=generator).requires_grad_()
    targets = torch.randint(0, 17, (9,), generator=generator)
    weights = torch.randn(2, 9, generator=generator)
    losses = []
    for asked in (False, True):
        scores = score_tokens(
            *(hidden, targets, head),
            temperature=0.7,
            with_entropy=entropy,
            vocab_size=17,
            liger=asked,
        )
        loss = (scores.logprobs * weights[0]).sum()
        if entropy:
            assert scores.entropy is not None
            assert scores.entropy.requires_grad == (entropy == "grad")
            loss = loss + (scores.entropy * weights[1]).sum()
        losses.append(loss)
    assert liger.calls == 1
    assert torch.allclose(*losses, atol=1e-5)
    same_gradients(*losses, hidden, head)


def test_liger_leaves_what_it_cannot_do(liger: type[LigersContract]) -> None:
    """Forbidden ids, no token at all, a bias, and a head with a hook (FSDP, DeepSpeed)."""
    hidden, targets = torch.randn(3, 5), torch.tensor([1, 2, 3])
    head = torch.nn.Linear(5, 17, bias=False)
    score_tokens(hidden, targets, head, forbidden=[0], vocab_size=17, liger=True)
    score_tokens(hidden[:0], targets[:0], head, vocab_size=17, liger=True)
    score_tokens(hidden, targets, torch.nn.Linear(5, 17), vocab_size=17, liger=True)
    handle = head.register_forward_pre_hook(lambda *_: None)
    score_tokens(hidden, targets, head, vocab_size=17, liger=True)
    assert liger.calls == 0
    handle.remove()
    score_tokens(hidden, targets, head, vocab_size=17, liger=True)
    assert liger.calls == 1


def test_use_liger_kernel_is_the_heads_too() -> None:
    def asked(**options: Any) -> bool:
        model = SimpleNamespace(liger_head=False)
        given = {"use_liger_kernel": True, "liger_kernel_config": None, "device": GPU, **options}
        use_liger(cast(Any, model), cast(Any, SimpleNamespace(**given)))
        return model.liger_head

    assert asked()
    assert not asked(use_liger_kernel=False, device=torch.device("cpu"))
    assert not asked(liger_kernel_config={"fused_linear_cross_entropy": False})
    with pytest.raises(UserError, match="use_liger_kernel needs a GPU"):
        asked(device=torch.device("cpu"))
