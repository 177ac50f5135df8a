"""Every command explains itself, and real processes end as those called in the tests do."""

from __future__ import annotations

import argparse
import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from internvl.errors import cli_guard

# what it is for, an option of its own, and a line of its example
STAGES = {
    "sft": (
        "Supervised fine-tuning of InternVL",
        "--loss_average VALUE",
        "accelerate launch -m sft --config sft.yaml --learning_rate 1e-5 --use_peft true",
    ),
    "mpo": (
        "Mixed preference optimisation of InternVL",
        "--loss_weights VALUE ...",
        "accelerate launch -m mpo --config mpo.yaml --learning_rate 2e-7 --use_peft true",
    ),
    "rl": (
        "Online reinforcement learning of InternVL by GSPO",
        "--num_generations VALUE",
        "accelerate launch -m rl --config rl.yaml --learning_rate 1e-6 --sampler vllm",
    ),
}


def run(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A real process of this interpreter, without network."""
    return subprocess.run(
        [sys.executable, *words],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **environment},
    )


@pytest.mark.parametrize("stage", STAGES)
def test_help_of_a_stage(
    stage: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Purpose first, then our own options, transformers' after them, and an example last."""
    monkeypatch.setattr(sys, "argv", [stage, "--help"])
    with pytest.raises(SystemExit) as stop:
        cli_guard(importlib.import_module(f"{stage}.__main__").main)
    assert stop.value.code == 0
    text = capsys.readouterr().out
    purpose, own_option, example = STAGES[stage]
    parts = [
        f"usage: python -m {stage} --config FILE.yaml",
        purpose,
        "options of this stage:",
        "--train_file VALUE",
        own_option,
        "options of every stage:",
        "--max_tokens_per_microbatch VALUE",
        "the model:",
        "--model_name_or_path VALUE",
        "options of transformers' TrainingArguments:",
        "--learning_rate VALUE",
        f"example, {stage}.yaml:",
        example,
        "goes on from its newest complete checkpoint",
    ]
    places = [text.index(part) for part in parts]
    assert places == sorted(places)
    assert "--learning-rate" not in text  # one spelling is enough


@pytest.mark.parametrize("tool", ["mmpr", "cascade", "internvl", "sft"])
def test_help_of_a_tool(tool: str, capsys: pytest.CaptureFixture[str]) -> None:
    """An example at the top, and a word on every option of every command."""
    module = importlib.import_module(f"{tool}.cli")
    with pytest.raises(SystemExit) as stop:
        module.main(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert text.startswith(f"usage: {tool} ")
    assert "\nexample" in text
    commands = next(
        action
        for action in module.build_parser()._actions
        if isinstance(action, argparse._SubParsersAction)
    ).choices
    assert len(commands) >= 3
    for name, parser in commands.items():
        assert re.search(rf"\n    {name}\s", text)
        for action in parser._actions:
            assert action.help, f"{tool} {name} {action.option_strings or action.dest}"
        with pytest.raises(SystemExit) as stop:
            module.main([name, "--help"])
        assert stop.value.code == 0
        assert capsys.readouterr().out.startswith(f"usage: {tool} {name} ")


@pytest.mark.parametrize("tool", ["mmpr", "cascade", "internvl", "sft"])
def test_a_tool_as_a_process(tool: str) -> None:
    ended = run("-m", tool, "nonsense")
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr.startswith("error: argument COMMAND: invalid choice: 'nonsense'")
    assert ended.stderr.count("\n") == 1


def test_a_stage_as_a_process(tmp_path: Path) -> None:
    config = tmp_path / "mpo.yaml"
    config.write_text("model_name_or_path: m\ntrain_file: t\noutput_dir: o\nbetta: 0.1\n")
    ended = run("-m", "mpo", "--config", str(config))
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr == f"error: {config}: unknown key 'betta'; did you mean 'beta'?\n"


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_under_accelerate(stage: str, tmp_path: Path) -> None:
    """Started as the cascade starts it: the launcher adds nothing to the one line."""
    from cascade.plan import LAUNCH

    words = ["--config", str(tmp_path / "none.yaml")]
    ended = run("-m", "accelerate.commands.launch", *LAUNCH, "-m", stage, *words)
    assert ended.returncode == 1  # the launcher's own; the stage's is 2
    assert ended.stderr == f"error: --config {tmp_path}/none.yaml: no such file\n"


def test_a_reader_that_has_seen_enough():
    """`mmpr stats ... | head` ends without a traceback, as other tools do."""
    code = (
        "import sys\nfrom internvl.errors import cli_guard\n"
        "cli_guard(lambda: [print('line ' * 1000) for _ in range(1000)])\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait() == 141
