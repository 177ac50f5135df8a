"""Every shipped example parses into the stage that its file name says, and makes two steps.

accelerate's configurations are read by accelerate itself, and taken by our own checks.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from accelerate import DistributedType
from accelerate.commands import launch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env
from stage_runs import StageRun
from test_faults import Command
from test_faults import command as command
from tiny_llms import make_family

from mpo.config import MPOConfig
from rl.config import RLConfig
from sft.config import SFTConfig
from training import refusals
from training.cli import ModelArguments, parse_config

EXAMPLES = Path(__file__).parent.parent / "examples"
STAGES = {"sft": SFTConfig, "mpo": MPOConfig, "rl": RLConfig}
# the others are read by accelerate, and by `cascade run` (test_example_recipes.py)
FILES = sorted(
    f
    for f in EXAMPLES.glob("*/*.yaml")
    if f.parent.name != "accelerate" and "\nstages:" not in f.read_text()
)
ACCELERATE = sorted((EXAMPLES / "accelerate").glob("*.yaml"))


def name_of(file: Path) -> str:
    return f"{file.parent.name}/{file.stem}"


def stage_of(file: Path) -> str:
    """The command that reads a file: sft.yaml, or 1_mlp_warmup.sft.yaml."""
    return file.stem.rpartition(".")[2]


def test_there_are_examples() -> None:
    assert {stage_of(file) for file in FILES} == {"sft", "mpo", "rl"}
    assert {file.stem for file in ACCELERATE} == {"ddp", "fsdp2", "zero2", "zero3", "multi_node"}
    for folder in {file.parent for file in [*FILES, *ACCELERATE]}:
        assert (folder / "README.md").is_file()
        assert f"]({folder.name}/README.md)" in (EXAMPLES / "README.md").read_text()


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_example_parses(file: Path) -> None:
    config_type = STAGES[stage_of(file)]
    # bf16 needs a GPU to be accepted by transformers; all else is checked as it stands
    argv = ["--config", str(file), "--bf16", "false"]
    config, model = parse_config([config_type, ModelArguments], stage_of(file), argv)
    assert config.output_dir.startswith("out/")
    # what is trained whole is held in float32: at these rates 16 bits would round updates away
    assert model.dtype == ("bfloat16" if model.use_peft else "float32")


# one of each kind at every change, the others in the long run
QUICK = ("sft_lora/sft", "mpo_lora/mpo", "rl_lora/rl")
EACH = [
    pytest.param(file, marks=() if name_of(file) in QUICK else pytest.mark.slow) for file in FILES
]


@pytest.mark.parametrize("file", EACH, ids=name_of)
def test_example_makes_two_steps(
    file: Path, command: Command, tiny_model: Path, tiny_world: Path, tmp_path: Path
) -> None:
    """The file as it is, but for model, data, sizes, and what a CPU has not got."""
    stage = stage_of(file)
    rows = [json.loads(line) for line in (tiny_world / "rl.jsonl").read_text().splitlines()]
    pairs = tmp_path / "pairs.jsonl"
    with pairs.open("w") as out:
        for row in rows[:4]:
            pair = {name: row[name] for name in ("image", "question")}
            pair |= {"chosen": row["solution"], "rejected": "Final Answer: 11"}
            out.write(json.dumps(pair) + "\n")
    options: dict[str, Any] = {
        "model_name_or_path": tiny_model,
        "train_file": pairs if stage == "mpo" else tiny_world / f"{stage}.jsonl",
        "image_root": tiny_world,
        "output_dir": tmp_path / "out",
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "logging_steps": 1,
        "bf16": "false",
        "use_cpu": "true",
        "disable_tqdm": "true",
        "report_to": "none",
        "dataloader_num_workers": 0,
    }
    given = yaml.safe_load(file.read_text())
    if "vision_from" in given:
        options["vision_from"] = make_family(tmp_path / "donor", "qwen2")
    if given.get("packing"):
        options |= {"max_tokens_per_microbatch": 512, "dataloader_num_workers": 0}
    if stage == "rl":
        # refused beside the other sampler that a CPU has
        of_sampler = ("vllm_gpu_memory_utilization", "sampler", "server", "server_weights_dir")
        taken = [given.pop(name, None) for name in (*of_sampler, "max_staleness")]
        assert taken[0] == 0.3 or taken[1] == "server"
        options |= {"sampler": "transformers", "max_completion_length": 8}
        options |= {"num_generations": 2, "steps_per_generation": 2}
    words = [word for key, value in options.items() for word in (f"--{key}", str(value))]
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(given))
    ended = command(stage, "--config", str(config), *words)
    assert ended.code == 0, ended.err
    run = StageRun(stage, options)
    assert [entry["step"] for entry in run.logged() if "loss" in entry] == [1, 2]
    adapter = bool(given.get("use_peft"))
    assert (tmp_path / "out/adapter_config.json").is_file() is adapter
    assert "WARNING" not in ended.out


def launched(file: Path) -> tuple[Any, dict[str, str]]:
    """What `accelerate launch --config_file FILE -m mpo` makes of it: options, environment."""
    parser = launch.launch_command_parser()
    args = parser.parse_args(["--config_file", str(file), "-m", "mpo", "--config", "mpo.yaml"])
    before = dict(os.environ)
    args, _, _ = launch._validate_launch_command(args)
    if args.use_deepspeed:
        args.deepspeed_fields_from_accelerate_config = ""
        return args, prepare_deepspeed_cmd_env(args)[1]
    found = prepare_multi_gpu_env(args)
    return args, {name: value for name, value in found.items() if before.get(name) != value}


@pytest.mark.parametrize("file", ACCELERATE, ids=name_of)
def test_accelerate_reads_its_configuration(file: Path) -> None:
    """By its own loader, which refuses unknown keys; those of its sections are its options."""
    config = load_config_from_file(str(file))
    known = vars(launch.launch_command_parser().parse_args(["x.py"]))
    assert set(config.fsdp_config) | set(config.deepspeed_config) <= set(known)
    assert config.num_processes == 8 * config.num_machines
    assert config.mixed_precision == "bf16"


def read_deepspeed(environment: dict[str, str]) -> SimpleNamespace:
    """What accelerate's DeepSpeedPlugin reads from the environment, as far as our checks look."""
    names = ("ZERO_STAGE", "ZERO3_INIT", "ZERO3_SAVE_16BIT_MODEL")
    stage, init, save = (environment.get(f"ACCELERATE_DEEPSPEED_{n}", "false") for n in names)
    gather = "stage3_gather_16bit_weights_on_model_save"
    return SimpleNamespace(
        zero_stage=int(stage),
        zero3_init_flag=init == "true",
        deepspeed_config={"zero_optimization": {gather: save == "true"}},
    )


@pytest.mark.parametrize("file", ACCELERATE, ids=name_of)
def test_our_checks_take_it(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is refused with FSDP or DeepSpeed is not in the files."""
    args, environment = launched(file)
    assert args.mixed_precision == "bf16"
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    kind = DistributedType.MULTI_GPU
    state = SimpleNamespace()
    if file.stem in ("fsdp2", "multi_node"):
        kind, state.fsdp_plugin = DistributedType.FSDP, FullyShardedDataParallelPlugin()
        blocks = environment["FSDP_TRANSFORMER_CLS_TO_WRAP"].split(",")
        assert blocks == ["Qwen3DecoderLayer", "InternVLVisionLayer"]
    if file.stem.startswith("zero"):  # its plugin cannot be made where DeepSpeed is not installed
        kind, state.deepspeed_plugin = DistributedType.DEEPSPEED, read_deepspeed(environment)
        assert state.deepspeed_plugin.zero_stage == int(file.stem[-1])
    options: Any = SimpleNamespace(fsdp=None, deepspeed=None)
    accelerator: Any = SimpleNamespace(distributed_type=kind, state=state)
    refusals.refuse_other_backend(options, accelerator)


def test_sharding_on_a_cpu_is_refused(
    command: Command,
    tiny_model: Path,
    tiny_world: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """accelerate itself passes over it without a word."""
    _, environment = launched(EXAMPLES / "accelerate/fsdp2.yaml")
    for name, value in environment.items():
        if name.startswith(("FSDP_", "ACCELERATE_USE_FSDP")):
            monkeypatch.setenv(name, value)
    words: dict[str, Any] = {
        "model_name_or_path": tiny_model,
        "train_file": tiny_world / "sft.jsonl",
    }
    words |= {"output_dir": tmp_path / "out", "use_cpu": "true", "disable_tqdm": "true"}
    flags = [word for key, value in words.items() for word in (f"--{key}", str(value))]
    said = command("sft", *flags, "--max_steps", "1").error
    assert said == "error: FSDP was asked for, but accelerate runs NO here"
