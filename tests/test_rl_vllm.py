"""vLLM in the loop: its log-probabilities are the trainer's before and after every update."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from stage_runs import parity
from trainer_cases import COMMON, LARGE, questions, write_images

from internvl.chat import load_processor
from internvl.checkpoint import load_model
from internvl.data import Row
from internvl.sampler import open_sampler
from internvl.server_sampler import open_servers
from internvl.server_weights import SharedWeights
from rl.config import RLConfig
from rl.trainer import RLTrainer

pytestmark = pytest.mark.xdist_group("vllm")
BOUND = 1e-4  # float32, one thread
OPTIONS: dict[str, Any] = {
    "per_device_train_batch_size": 1,
    "max_tokens_per_microbatch": LARGE,
    "num_generations": 4,
    "steps_per_generation": 1,
    "max_completion_length": 8,
    "learning_rate": 0.002,
    "freeze_vit": False,
    "canary_questions": 3,
    "max_logprob_gap": BOUND,
    "reward_funcs": ["accuracy"],
}


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[Row]:
    folder = tmp_path_factory.mktemp("images")
    write_images(folder, 6)
    return questions(folder, ["other"] * 6)


def trained(
    model: Path, output: Path, rows: list[Row], engine: Any, peft: Any = None, **changes: Any
) -> RLTrainer:
    """A run to its end; every update's canary and every sampled token was within BOUND."""
    trainer = RLTrainer(
        model=load_model(model),
        args=RLConfig(output_dir=str(output), **{**COMMON, **OPTIONS, **changes}),
        train_dataset=rows,
        processing_class=load_processor(str(model)),
        sampler=engine,
        verify=parity,
        peft_config=peft,
    )
    trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    steps = changes["max_steps"]
    gaps = [log["sampling/canary_gap"] for log in logs]
    assert len(gaps) == steps and max(gaps) < BOUND
    sampled = [log["sampling/logprob_gap_max"] for log in logs if "sampling/logprob_gap_max" in log]
    assert sampled and max(sampled) < BOUND
    assert sum(log["grad_norm"] > 0 for log in logs) > steps / 2
    return trainer


def assert_all_parts_moved(trainer: RLTrainer, model: Path) -> None:
    before = dict(load_model(model).named_parameters())
    moved = {n.split(".")[1] for n, p in trainer.model.named_parameters() if (p != before[n]).any()}
    assert {"vision_tower", "multi_modal_projector", "language_model"} <= moved


def test_vllm_in_the_process(
    tiny_model: Path, rows: list[Row], vllm_sampler: Any, tmp_path: Path
) -> None:
    try:
        run = trained(
            tiny_model, tmp_path, rows, vllm_sampler, max_steps=3, temperature=0.7, sampler="vllm"
        )
        assert_all_parts_moved(run, tiny_model)
    finally:
        vllm_sampler.update_weights(load_model(tiny_model).named_parameters())


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_vllm_in_the_process_over_twenty_steps(
    temperature: float, tiny_model: Path, rows: list[Row], vllm_sampler: Any, tmp_path: Path
) -> None:
    try:
        run = trained(
            *(tiny_model, tmp_path, rows, vllm_sampler),
            max_steps=20,
            temperature=temperature,
            sampler="vllm",
        )
        assert_all_parts_moved(run, tiny_model)
    finally:
        vllm_sampler.update_weights(load_model(tiny_model).named_parameters())


def lora() -> Any:
    from peft import LoraConfig

    return LoraConfig(
        r=4, lora_alpha=64, target_modules=r".*language_model\.layers\..*_proj", lora_dropout=0.0
    )


@pytest.mark.slow
def test_an_adapter_by_itself(tiny_model: Path, rows: list[Row], tmp_path: Path) -> None:
    """vLLM adds each version to the base, which is never sent."""
    sampler = open_sampler(tiny_model, backend="vllm", max_model_len=512, max_lora_rank=4)
    base = []
    sampler.update_weights = base.append  # type: ignore[method-assign]
    trained(
        *(tiny_model, tmp_path, rows, sampler, lora()),
        max_steps=8,
        learning_rate=0.01,
        sampler="vllm",
    )
    assert not base
    sampler.close()


class RealServer:
    """vLLM's own API server on this machine's CPU."""

    def __init__(self, model: Path, log: Path):
        self.model, self.log = model, log
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}/v1"

    def start(self) -> None:
        environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
        environment |= {"VLLM_SERVER_DEV_MODE": "1", "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"}
        words = f"--model {self.model} --host 127.0.0.1 --port {self.port} --dtype float32"
        words += " --enforce-eager --max-model-len 512 --trust-request-mm-kwargs"
        words += " --no-enable-chunked-prefill --max-num-batched-tokens 4096"
        words += " --logprobs-mode processed_logprobs --enable-lora --max-lora-rank 8"
        module = "vllm.entrypoints.openai.api_server"
        with self.log.open("ab") as out:
            self.process = subprocess.Popen(
                [sys.executable, "-m", module, *words.split()],
                env=environment,
                stdout=out,
                stderr=out,
                start_new_session=True,
            )

    def wait(self) -> None:
        end = time.monotonic() + 300
        while time.monotonic() < end:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=5)
                return
            except OSError:
                assert self.process.poll() is None, self.log.read_text()[-3000:]
                time.sleep(1)
        raise AssertionError(self.log.read_text()[-3000:])

    def kill(self) -> None:
        """All its processes at once, as a machine that goes down."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@pytest.fixture(scope="module")
def server(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealServer]:
    pytest.importorskip("vllm")
    server = RealServer(tiny_model, tmp_path_factory.mktemp("server") / "log.txt")
    server.start()
    server.wait()
    yield server
    server.kill()


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_a_server_process_over_twenty_steps(
    temperature: float, server: RealServer, tiny_model: Path, rows: list[Row], tmp_path: Path
) -> None:
    weights = SharedWeights(tmp_path / "weights")
    sampler = open_servers(tiny_model, [server.url], weights=weights)
    options = {"sampler": "server", "server": [server.url], "temperature": temperature}
    run = trained(tiny_model, tmp_path, rows, sampler, max_steps=20, **options)
    assert_all_parts_moved(run, tiny_model)


@pytest.mark.slow
def test_a_server_process_that_is_killed_while_it_samples(
    server: RealServer, tiny_model: Path, rows: list[Row], tmp_path: Path
) -> None:
    """It is started anew with the checkpoint's weights, gets the newest, and training goes on."""
    weights = SharedWeights(tmp_path / "weights")
    sampler = open_servers(tiny_model, [server.url], weights=weights, patience=300.0)
    original, killed = sampler._completion, []

    def completion(choice: Any) -> Any:
        if weights.version and weights.version.endswith("weights-3") and not killed:
            killed.append(server.process.pid)
            server.kill()
            server.start()
        return original(choice)

    sampler._completion = completion  # type: ignore[method-assign]
    options = {"sampler": "server", "server": [server.url], "per_device_train_batch_size": 4}
    trained(tiny_model, tmp_path, rows, sampler, max_steps=5, **options)
    assert killed and killed[0] != server.process.pid


@pytest.mark.slow
def test_adapters_on_a_server_process(
    server: RealServer, tiny_model: Path, rows: list[Row], tmp_path: Path
) -> None:
    weights = SharedWeights(tmp_path / "weights", adapters=True)
    sampler = open_servers(tiny_model, [server.url], weights=weights)
    sampler.update_weights(load_model(tiny_model).named_parameters())  # others were trained before
    options = {"sampler": "server", "server": [server.url], "learning_rate": 0.01}
    trained(tiny_model, tmp_path, rows, sampler, lora(), max_steps=5, **options)
