"""mmpr sample on servers as a command: it goes on where they left it; and on a real one."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request

import pytest
from fake_servers import requests, started_servers
from sampling_cases import command

from internvl.sampler import SamplingConfig
from internvl.server_sampler import open_servers

CONFIG = SamplingConfig(n=2, max_tokens=16)


@pytest.fixture
def fakes():
    yield from started_servers()


def test_the_command_goes_on_where_its_servers_left_it(
    tiny_world, tiny_model, fakes, tmp_path, capsys
):
    def until(last):
        return lambda number, body: (404, "gone") if number > last else None

    sampling = ("sample", tiny_world / "rl.jsonl", "--model", tiny_model, "--n", 2,
                "--max-tokens", 8, "--prompt-style", "final", "--batch-questions", 4)  # fmt: skip
    whole, output = tmp_path / "whole.jsonl", tmp_path / "rollouts.jsonl"
    assert command(*sampling, "--server", fakes().url, "--output", whole) == 0
    ends = fakes(behave=until(9))
    one = ("--concurrency", 1, "--output", output)
    assert command(*sampling, "--server", ends.url, *one) == 2
    assert f"error: {ends.url}: HTTP 404: gone" in capsys.readouterr().err
    assert len(output.read_text().splitlines()) == 9 * 2, "all that was answered is on disk"
    left = fakes()
    assert command(*sampling, "--server", left.url, *one) == 0
    assert output.read_bytes() == whole.read_bytes() and len(left.bodies) == 16 - 9
    first = json.loads(output.read_text().splitlines()[0])
    assert first["prompt_style"] == "final" and "Final answer: .." in first["question"]
    assert first["question_orig"] in first["question"]
    assert json.loads((tmp_path / "rollouts.jsonl.meta.json").read_text())["backend"] == "servers"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--server", "http://x/v1", "--backend", "vllm"], "--backend has no meaning with --serv"),
        (["--server", "http://x/v1", "--max-model-len", "9"], "--max-model-len has no meaning"),
        (["--concurrency", "3"], "--concurrency has no meaning without --server"),
        (["--server", "x"], "--server x: expected a URL"),
        (["--server", "http://x/v1", "--server-timeout", "0"], "--server-timeout is 0"),
        (["--language", "zh"], "--language has no meaning without a --prompt-style"),
    ],
)
def test_options_that_cannot_be_honoured(words, message, tiny_world, tiny_model, tmp_path, capsys):
    sampling = ("sample", tiny_world / "rl.jsonl", "--model", tiny_model)
    assert command(*sampling, "--output", tmp_path / "r.jsonl", *words) == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.xdist_group("vllm")
def test_a_real_server_gives_the_completions_of_this_process(
    tiny_world, tiny_model, vllm_sampler, tmp_path, monkeypatch
):
    """`vllm serve` on a CPU: the rollouts are those of --backend vllm, token for token."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
    words = f"--model {tiny_model} --host 127.0.0.1 --port {port} --dtype float32 --enforce-eager"
    words += " --max-model-len 512 --trust-request-mm-kwargs --no-enable-chunked-prefill"
    words += " --max-num-batched-tokens 4096 --logprobs-mode processed_logprobs"
    module = "vllm.entrypoints.openai.api_server"
    with (tmp_path / "server.log").open("w") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", module, *words.split()], stdout=log, stderr=log, env=environment
        )
    try:
        wait_until_served(f"http://127.0.0.1:{port}/v1/models", server)
        here, there = tmp_path / "here.jsonl", tmp_path / "there.jsonl"
        sampling = ("sample", tiny_world / "rl.jsonl", "--model", tiny_model, "--n", 4,
                    "--max-tokens", 24, "--temperature", 0.8, "--max-tiles", 4)  # fmt: skip
        url = f"http://127.0.0.1:{port}/v1"
        assert command(*sampling, "--output", there, "--server", url) == 0
        monkeypatch.setattr("internvl.sampler.open_sampler", lambda *_, **__: vllm_sampler)
        monkeypatch.setattr(vllm_sampler, "close", lambda: None)
        assert command(*sampling, "--output", here) == 0
        assert there.read_bytes() == here.read_bytes()
        sampler = open_servers(tiny_model, [url])
        asked = requests(4)
        assert sampler.sample(asked, CONFIG) == vllm_sampler.sample(asked, CONFIG)
    finally:
        server.terminate()
        server.wait(timeout=60)


def wait_until_served(url, process):
    for _ in range(600):
        assert process.poll() is None, "the server ended"
        try:
            urllib.request.urlopen(url, timeout=1).close()
        except OSError:
            time.sleep(0.2)
        else:
            return
    raise AssertionError("the server did not start in 2 minutes")
