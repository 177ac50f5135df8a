"""The online stage on servers: weights through a shared folder, a canary, faults, one batch ahead.

The servers answer from transformers (tests/policy_server.py); real ones are in test_rl_vllm.py.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from policy_server import RESETS, PolicyServer
from stage_runs import parity
from trainer_cases import COMMON, LARGE, questions, write_images

from internvl.chat import load_processor
from internvl.checkpoint import load_model
from internvl.data import Row
from internvl.errors import UserError
from internvl.server_sampler import open_servers
from internvl.server_weights import SharedWeights
from rl.config import RLConfig
from rl.trainer import RLTrainer

OPTIONS: dict[str, Any] = {
    "per_device_train_batch_size": 1,
    "max_tokens_per_microbatch": LARGE,
    "num_generations": 4,
    "steps_per_generation": 2,
    "max_steps": 4,
    "temperature": 0.7,
    "max_completion_length": 6,
    "learning_rate": 0.004,
    "freeze_vit": False,
    "sampler": "server",
    "canary_questions": 2,
    "max_logprob_gap": 1e-4,
    "log_completions": True,
    "save_strategy": "steps",
    "save_steps": 100,
    "reward_funcs": ["accuracy"],
}
AHEAD = {"max_staleness": 1, "vllm_importance_sampling_correction": True}
Start = Callable[..., PolicyServer]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[Row]:
    folder = tmp_path_factory.mktemp("images")
    write_images(folder, 6)
    return questions(folder, ["other"] * 6)


@pytest.fixture
def start(tiny_model: Path) -> Iterator[Start]:
    started: list[PolicyServer] = []

    def make(**options: Any) -> PolicyServer:
        started.append(PolicyServer(tiny_model, **options))
        return started[-1]

    yield make
    for server in started:
        server.stop()


def make_run(
    model: Path, output: Path, rows: list[Row], servers: list[PolicyServer], **changes: Any
) -> RLTrainer:
    """A trainer whose rollouts come from these servers."""
    options = {**COMMON, **OPTIONS, **changes}
    patience = options.pop("patience", 2.0)
    urls = [server.url for server in servers]
    weights = SharedWeights(output / "weights")
    sampler = open_servers(model, urls, seed=0, patience=patience, weights=weights)
    sampler._pool.pause = 0.1
    return RLTrainer(
        model=load_model(model),
        args=RLConfig(output_dir=str(output), server=urls, **options),
        train_dataset=rows,
        processing_class=load_processor(str(model)),
        sampler=sampler,
        verify=parity,
    )


def records(output: Path) -> list[dict[str, Any]]:
    lines = (output / "rollouts" / "rank0.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def weights_of(trainer: RLTrainer) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


def assert_equal(some: dict[str, torch.Tensor], others: dict[str, torch.Tensor]) -> None:
    assert some.keys() == others.keys()
    assert all(torch.equal(some[name], others[name]) for name in some)


@pytest.fixture(scope="module")
def alone(
    tiny_model: Path, rows: list[Row], tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]], list[dict[str, float]]]:
    """A run on one server without a fault: its weights, its rollouts, its log."""
    output = tmp_path_factory.mktemp("alone")
    server = PolicyServer(tiny_model)
    trainer = make_run(tiny_model, output, rows, [server])
    trainer.train()
    server.stop()
    assert server.read == ["weights-1", "weights-2"]
    assert server.calls == ["/collective_rpc", *RESETS, "/update_weight_version"] * 2
    assert [path.name for path in (output / "weights").iterdir()] == ["weights-2"]
    return weights_of(trainer), records(output), trainer.state.log_history


def test_sampler_and_trainer_agree_after_every_update(alone: Any) -> None:
    """By the canary and by each sampled token, with all parts of the model training."""
    _, rollouts, logs = alone
    assert [record["weight_version"] for record in rollouts] == [0, 0, 2, 2]
    gaps = [log["sampling/canary_gap"] for log in logs if "sampling/canary_gap" in log]
    assert len(gaps) == 2 and max(gaps) < 1e-4
    steps = [log for log in logs if "loss" in log]
    assert sum(log["grad_norm"] > 0 for log in steps) >= 2
    assert steps[0]["sampling/staleness"] == 0.0


def test_a_server_that_dies_and_is_started_anew_gets_the_weights_again(
    tiny_model: Path, rows: list[Row], start: Start, tmp_path: Path, alone: Any
) -> None:
    """Killed in the second rollout batch; the other answers meanwhile, nothing else changes."""
    other = start()

    def behave(number: int, body: Any) -> None:
        drawn = "logprob_token_ids" not in body
        if drawn and not died and dying.version.endswith("weights-2"):
            died.append(number)
            dying.stop()
            dying.start()
            raise ConnectionError

    died: list[int] = []
    dying = start(behave=behave)
    trainer = make_run(tiny_model, tmp_path, rows, [dying, other])
    trainer.train()
    assert died and dying.read[-1] == other.read[-1] == "weights-2"
    assert_equal(weights_of(trainer), alone[0])
    assert records(tmp_path) == alone[1]


def test_servers_that_are_gone_stop_the_run_with_a_checkpoint(
    tiny_model: Path, rows: list[Row], start: Start, tmp_path: Path, alone: Any
) -> None:
    def behave(number: int, body: Any) -> None:
        if server.version.endswith("weights-2") and not gone:
            gone.append(number)
            server.stop()
            raise ConnectionError

    gone: list[int] = []
    server = start(behave=behave)
    trainer = make_run(tiny_model, tmp_path, rows, [server], patience=0.3)
    with pytest.raises(UserError, match=r"no server has answered for 0.3 s: .*refused"):
        trainer.train()
    server.start()
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]
    again = make_run(tiny_model, tmp_path, rows, [server])
    again.run()
    assert again.state.log_history[-1]["step"] == 4
    assert_equal(weights_of(again), alone[0])
    assert records(tmp_path) == alone[1]


@pytest.mark.parametrize(
    "part", ["multi_modal_projector", pytest.param("layers.1", marks=pytest.mark.slow)]
)
def test_one_weight_that_does_not_arrive_stops_the_run(
    part: str, tiny_model: Path, rows: list[Row], start: Start, tmp_path: Path
) -> None:
    """From the second update on, one tensor reaches the engine a little off."""

    def spoil(weights: dict[str, torch.Tensor]) -> None:
        if server.read[-1] == "weights-2":
            name = next(name for name in weights if part in name and weights[name].ndim == 2)
            weights[name] *= 1.02

    server = start(spoil=spoil)
    trainer = make_run(tiny_model, tmp_path, rows, [server])
    said = r"step 2: after the weights were handed over, http.* differ by .*over 0.0001 \(max_log"
    with pytest.raises(UserError, match=said):
        trainer.train()
    assert len(records(tmp_path)) == 2, "nothing was sampled from it"
    assert (tmp_path / "checkpoint-2" / "rollouts_0.json").is_file()


@pytest.mark.slow
def test_one_batch_ahead(
    tiny_model: Path, rows: list[Row], start: Start, tmp_path: Path, alone: Any
) -> None:
    """A batch comes from the weights of the batch before; a checkpoint holds the one in flight."""
    servers = [start(), start()]
    changes = {**AHEAD, "max_steps": 6, "save_steps": 3}
    whole = make_run(tiny_model, tmp_path / "whole", rows, servers, **changes)
    whole.train()
    rollouts = records(tmp_path / "whole")
    assert [record["weight_version"] for record in rollouts] == [0, 0, 0, 0, 2, 2]
    assert rollouts[:2] == alone[1][:2]
    stale = [log.get("sampling/staleness") for log in whole.state.log_history if "loss" in log]
    assert stale == [0.0, None, 2.0, None, 2.0, None]
    state = json.loads((tmp_path / "whole/checkpoint-3/rollouts_0.json").read_text())
    assert state["ahead"]["batch"] == 2 and state["ahead"]["weight_version"] == 2

    stopped = make_run(tiny_model, tmp_path / "killed", rows, servers, **changes)
    original = stopped.training_step

    def training_step(*args: Any, **kwargs: Any) -> Any:
        if stopped.state.global_step == 4:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    stopped.training_step = training_step  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        stopped.train()
    again = make_run(tiny_model, tmp_path / "killed", rows, servers, **changes)
    again.run()
    assert_equal(weights_of(again), weights_of(whole))
    assert records(tmp_path / "killed") == rollouts


def test_a_server_without_the_means_is_told_so(
    tiny_model: Path, rows: list[Row], start: Start, tmp_path: Path
) -> None:
    class Stock(PolicyServer):
        def post(self, path: str, body: dict[str, Any]) -> tuple[int, str] | None:
            return (404, "Not Found") if path == "/collective_rpc" else super().post(path, body)

    server = Stock(tiny_model)
    trainer = make_run(tiny_model, tmp_path, rows, [server])
    with pytest.raises(UserError, match="has no /collective_rpc: start it with VLLM_SERVER_DEV_MO"):
        trainer.train()
    server.stop()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sampler": "server"}, "sampler is 'server', but server names none"),
        ({"server": ["http://x/v1"], "sampler": "vllm"}, "server is given, but sampler is 'vllm'"),
        ({"max_staleness": 2}, "max_staleness is 2; 0 or 1"),
        ({"max_staleness": 1}, "max_staleness is given, but rollouts are not sampled by servers"),
        ({"server_model": "x"}, "server_model is given, but rollouts are not sampled by servers"),
        ({"lora_sync": "never"}, "lora_sync is 'never'"),
        (
            {"server": ["http://x/v1"], "max_staleness": 1},
            "max_staleness trains on completions of older weights",
        ),
        ({"vllm_enable_sleep_mode": True, "sampler": "transformers"}, "is of vLLM in this process"),
    ],
)
def test_options_that_cannot_be_honoured(
    options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        RLConfig(output_dir=str(tmp_path), train_file="x.jsonl", max_steps=1, **options)
