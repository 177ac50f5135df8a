"""PackedTrainer through SFT and MPO, in one process: budgets, plain gradients, LoRA, refusals."""

from __future__ import annotations

import copy
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import IA3Config, LoraConfig, get_peft_model
from plain import Plain, call_processor, gradient_error, gradients, load_plain, plain_logprobs
from torch import Tensor
from torch.nn.functional import logsigmoid
from trainer_cases import (
    LARGE,
    MAX_TILES,
    SMALL,
    Recorded,
    conversations,
    make_trainer,
    pairs,
    train,
    write_images,
)

from internvl.checkpoint import checksum, full_weights, load_model
from internvl.data import Row
from internvl.errors import UserError
from training.batches import StepSampler

LORA = r".*language_model\.layers\..*_proj"


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    write_images(folder, 10)
    return folder


# ---------------------------------------------------------------- which rows a rank takes


@given(st.integers(1, 50), st.integers(1, 5), st.integers(1, 4), st.integers(0, 3))
def test_shares_are_the_steps_of_one_process(
    length: int, batch: int, world: int, epoch: int
) -> None:
    """Equal numbers of steps on all ranks, each row once, each step the one process's rows."""

    def steps(batch_size: int, rank: int, world_size: int) -> list[list[int]]:
        sampler = StepSampler(
            *(length, batch_size), rank=rank, world_size=world_size, seed=7, shuffle=True
        )
        sampler.set_epoch(epoch)
        found = list(sampler)
        assert len(found) == len(sampler)
        return found

    ranks = [steps(batch, rank, world) for rank in range(world)]
    together = [list(chain(*shares)) for shares in zip(*ranks, strict=True)]
    assert together == steps(batch * world, 0, 1)
    assert sorted(chain(*together)) == list(range(length))


# ---------------------------------------------------------------- budgets


@pytest.mark.parametrize(("stage", "rows"), [("mpo", pairs), ("sft", conversations)])
def test_budget_changes_nothing(
    stage: str, rows: Any, tiny_model: Path, images: Path, tmp_path: Path
) -> None:
    """Gradients, loss, norm, delta and evaluation of two steps (6 and 4 rows), in 2 and 7 parts."""
    one, many = (
        train(
            *(stage, tiny_model, tmp_path / str(budget), rows(images, 10)),
            per_device_train_batch_size=6,
            max_tokens_per_microbatch=budget,
        )
        for budget in (LARGE, SMALL)
    )
    assert one.microbatches == [1, 1] and min(many.microbatches) >= 3
    assert one.rows == many.rows
    seen = [log["num_tokens"] for log in one.logs]
    assert 0 < seen[0] < seen[1] and [log["num_tokens"] for log in many.logs] == seen
    assert many.losses == pytest.approx(one.losses, rel=1e-6)
    assert many.norms == pytest.approx(one.norms, rel=1e-6)
    for step, expected in enumerate(one.gradients):
        assert gradient_error(many.gradients[step], expected) < 1e-5
    for key, value in one.evaluation.items():
        assert many.evaluation[key] == pytest.approx(value, rel=1e-4), key
    assert one.delta == pytest.approx(many.delta, rel=1e-6, nan_ok=True)
    assert [log["loss"] for log in one.logs] == pytest.approx(one.losses, rel=1e-6)


def test_gradients_are_synchronised_at_the_last_microbatch(
    tiny_model: Path, images: Path, tmp_path: Path
) -> None:
    """DeepSpeed would step, and DDP reduce, at each backward that accelerate calls synchronised."""
    options: dict[str, Any] = {"max_tokens_per_microbatch": SMALL, "max_steps": 1}
    rows = conversations(images, 4)
    trainer = make_trainer(
        "sft", tiny_model, tmp_path, rows, Recorded(), per_device_train_batch_size=4, **options
    )
    synchronised = []
    backward = trainer.accelerator.backward

    def watched(loss: Tensor, **kwargs: Any) -> None:
        synchronised.append(trainer.accelerator.sync_gradients)
        backward(loss, **kwargs)

    trainer.accelerator.backward = watched
    trainer.train()
    assert synchronised == [False, False, False, True]


# ---------------------------------------------------------------- against the plain computation


def plain_pair(processor: Any, row: Row) -> Plain:
    pictures = row.load_images()
    message = {"role": "user", "content": row.data["question"]}
    ids, pixels = call_processor(processor, [message], pictures, MAX_TILES)
    end = processor.tokenizer.eos_token_id
    texts = (row.data["chosen"], row.data["rejected"])
    completions = [[*processor.tokenizer(text)["input_ids"], end] for text in texts]
    return Plain(ids, pixels, completions, [[True] * len(ids) for ids in completions])


def plain_conversation(processor: Any, row: Row) -> Plain:
    """Scored: all tokens of an answer and the end of its turn."""
    pictures = row.load_images()
    turns = row.data["conversations"]
    named = [
        {"role": ("user", "assistant")[i % 2], "content": t["value"]} for i, t in enumerate(turns)
    ]
    ids, pixels = call_processor(processor, named, pictures, MAX_TILES)
    mask: list[bool] = []
    for place in range(1, len(named), 2):
        shown = pictures[: sum(said["content"].count("<image>") for said in named[:place])]
        before, _ = call_processor(processor, named[:place], shown, MAX_TILES)
        answer = processor.tokenizer(named[place]["content"])["input_ids"]
        mask += [False] * (len(before) - len(mask)) + [True] * (len(answer) + 1)
    return Plain(ids[:1], pixels, [ids[1 : len(mask)]], [mask[1:]])


def mpo_by_hand(policy: list[list[Tensor]], reference: list[list[Tensor]], delta: float) -> Tensor:
    """The paper's loss of a batch, from token log-probabilities [pair][chosen, rejected]."""
    total = torch.zeros(())
    for (chosen, rejected), (ref_chosen, ref_rejected) in zip(policy, reference, strict=True):
        r_c = 0.1 * (chosen.sum() - ref_chosen.sum())
        r_r = 0.1 * (rejected.sum() - ref_rejected.sum())
        quality = -logsigmoid(r_c - delta) - logsigmoid(-(r_r - delta))
        total = total - 0.8 * logsigmoid(r_c - r_r) + 0.2 * quality - chosen.mean()
    return total / len(policy)


def load_step(model: Any, recorded: Recorded, step: int) -> None:
    model.load_state_dict(recorded.weights[step], strict=False)


def num_tokens(plain: Plain) -> int:
    """Tokens of a prompt and of all its completions."""
    return len(plain.ids) + sum(len(ids) for ids in plain.completions)


def test_mpo_steps_are_plain(tiny_model: Path, images: Path, tmp_path: Path) -> None:
    """Both steps' gradients from transformers' own forward; the second with its delta."""
    rows = pairs(images, 10)
    run = train(
        *("mpo", tiny_model, tmp_path, rows),
        per_device_train_batch_size=6,
        max_tokens_per_microbatch=SMALL,
    )
    model, processor = load_plain(tiny_model)
    plain = {row.data["id"]: plain_pair(processor, row) for row in rows}
    with torch.no_grad():
        reference = {name: plain_logprobs(model, p) for name, p in plain.items()}
    for pair in run.trainer.train_dataset:
        chosen, rejected = (float(part.sum()) for part in reference[pair.row.data["id"]])
        assert pair.ref_chosen_logps == pytest.approx(chosen, rel=1e-6)
        assert pair.ref_rejected_logps == pytest.approx(rejected, rel=1e-6)
    delta, rewards = 0.0, []
    for step, names in enumerate((run.rows[:6], run.rows[6:])):
        load_step(model, run, step)
        policy = [plain_logprobs(model, plain[name]) for name in names]
        loss = mpo_by_hand(policy, [reference[name] for name in names], delta)
        loss.backward()
        assert run.losses[step] == pytest.approx(loss.item(), rel=1e-6)
        error = gradient_error(run.gradients[step], gradients(model))
        print(f"MPO step {step}: gradients differ by {error:.1e}")
        assert error < 1e-5
        for name, parts in zip(names, policy, strict=True):
            rewards += [
                0.1 * float(part.detach().sum() - ref.sum())
                for part, ref in zip(parts, reference[name], strict=True)
            ]
        delta = sum(rewards) / len(rewards)
    assert delta != 0.0 and run.delta == pytest.approx(delta, rel=1e-5)
    seen = [sum(num_tokens(plain[name]) for name in run.rows[:end]) for end in (6, 10)]
    assert [log["num_tokens"] for log in run.logs] == seen
    ended = run.trainer.state.log_history[-2]  # the last one is of an evaluation
    assert ended["num_tokens"] == seen[-1]
    speed = seen[-1] / ended["train_runtime"]
    assert ended["train_tokens_per_second"] == pytest.approx(speed, abs=1e-3)
    nll = run.logs[0]["loss/sft"]
    assert run.losses[0] == pytest.approx(1.2 * 0.6931471805599453 + nll, rel=1e-6)


@pytest.mark.parametrize("average", ["token", "sample", "square"])
def test_sft_step_is_plain(average: str, tiny_model: Path, images: Path, tmp_path: Path) -> None:
    rows = conversations(images, 4)
    run = train(
        *("sft", tiny_model, tmp_path, rows),
        per_device_train_batch_size=4,
        max_tokens_per_microbatch=SMALL,
        loss_average=average,
    )
    assert run.microbatches == [4]
    model, processor = load_plain(tiny_model)
    exponent = {"token": 0.0, "sample": 1.0, "square": 0.5}[average]
    above, below = torch.zeros(()), 0.0
    for row in rows:
        (logprobs,) = plain_logprobs(model, plain_conversation(processor, row))
        weight = len(logprobs) ** -exponent
        above, below = above - weight * logprobs.sum(), below + weight * len(logprobs)
    loss = above / below
    loss.backward()
    assert run.losses[0] == pytest.approx(loss.item(), rel=1e-6)
    assert gradient_error(run.gradients[0], gradients(model)) < 1e-5
    seen = sum(num_tokens(plain_conversation(processor, row)) for row in rows)
    assert run.logs[0]["num_tokens"] == seen


# ---------------------------------------------------------------- LoRA


def lora(target: str = LORA, **options: Any) -> LoraConfig:
    return LoraConfig(r=4, lora_alpha=8, target_modules=target, **options)


def test_lora_starts_from_its_base_and_leaves_it(
    tiny_model: Path, images: Path, tmp_path: Path
) -> None:
    """The first loss is 1.2 ln2 + nll, the reference is the base, and only adapters change."""
    rows = pairs(images, 6)
    run = train(
        *("mpo", tiny_model, tmp_path, rows),
        per_device_train_batch_size=3,
        peft_config=lora(),
        learning_rate=0.5,
    )
    nll = run.logs[0]["loss/sft"]
    assert run.losses[0] == pytest.approx(1.2 * 0.6931471805599453 + nll, rel=1e-6)
    assert all("lora_" in name for name in run.gradients[0])
    model, processor = load_plain(tiny_model)
    with torch.no_grad():
        for pair in run.trainer.train_dataset:
            parts = plain_logprobs(model, plain_pair(processor, pair.row))
            assert pair.ref_chosen_logps == pytest.approx(float(parts[0].sum()), rel=1e-6)
            assert pair.ref_rejected_logps == pytest.approx(float(parts[1].sum()), rel=1e-6)
    base = dict(load_model(tiny_model).named_parameters())
    trained = dict(run.trainer.model.get_base_model().named_parameters())
    for name, weight in trained.items():
        if "lora_" not in name:
            assert torch.equal(weight, base[name.replace(".base_layer.", ".")]), name
    moved = [name for name, weight in trained.items() if "lora_B" in name and weight.any()]
    assert len(moved) == 2 * 7  # every linear layer of both blocks
    changed = {
        name for name, weight in full_weights(run.trainer.model) if not weight.equal(base[name])
    }
    assert len(changed) == 2 * 7 and all("_proj" in name for name in changed)


@pytest.mark.parametrize(
    "config",
    [
        lora(),
        lora(use_rslora=True, bias="lora_only"),
        lora(r".*(embed_tokens|lm_head|fc1|linear_2|q_proj)"),
        lora(r".*fc1", modules_to_save=["lm_head"]),
    ],
    ids=["language", "rslora-bias", "every-kind", "modules-to-save"],
)
def test_full_weights_are_pefts_merge(tiny_model: Path, config: LoraConfig) -> None:
    base = load_model(tiny_model)
    names = [name for name, _ in base.named_parameters()]
    model = get_peft_model(base, config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    before = checksum(model.state_dict().items())
    merged = dict(full_weights(model))
    assert checksum(model.state_dict().items()) == before
    expected = dict(copy.deepcopy(model).merge_and_unload().named_parameters())
    assert sorted(merged) == sorted(expected) == sorted(names)
    for name, weight in expected.items():
        assert (merged[name] - weight).abs().max() < 1e-6, name


def test_full_weights_without_adapters_are_the_parameters(tiny_model: Path) -> None:
    model = load_model(tiny_model)
    assert [(n, w.data_ptr()) for n, w in full_weights(model)] == [
        (name, weight.data_ptr()) for name, weight in model.named_parameters()
    ]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (lora(use_dora=True), "is DoRA"),
        (lora(lora_bias=True), "is LoRA with lora_bias"),
        (IA3Config(target_modules=["v_proj"], feedforward_modules=[]), "is IA3"),
    ],
)
def test_full_weights_refuse_what_is_no_delta(config: Any, message: str, tiny_model: Path) -> None:
    """A wrong merge would go unseen: the sampler would draw from another model."""
    base = load_model(tiny_model)
    if isinstance(config, LoraConfig) and config.lora_bias:
        config.target_modules = r".*vision_tower.*fc1"  # the base layer must have a bias
    with pytest.raises(UserError, match=message):
        list(full_weights(get_peft_model(base, config)))


# ---------------------------------------------------------------- what is told and what is refused


def test_first_loss_that_is_off_is_told(
    tiny_model: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = pairs(images, 3)
    train("mpo", tiny_model, tmp_path / "a", rows, per_device_train_batch_size=3)
    lines = capsys.readouterr().out.splitlines()
    (told,) = [line for line in lines if line.startswith("first loss ")]
    assert not any("WARNING" in line for line in lines)
    assert "= 0.8 * ln2 + 0.2 * 2 ln2 + 1 * nll, nll " in told
    config = lora(lora_dropout=0.9)
    # adapters that are not zero at the start, or dropout would change nothing
    config.init_lora_weights = False
    train(
        "mpo", tiny_model, tmp_path / "b", rows, per_device_train_batch_size=3, peft_config=config
    )
    assert "WARNING: the first loss is off by" in capsys.readouterr().out
