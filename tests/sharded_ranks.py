"""Run as a script: whole trainings on two gloo processes by accelerate's own FSDP2 or DeepSpeed.

    python tests/sharded_ranks.py BACKEND MODEL FOLDER CASE...

On a CPU accelerate runs plain DDP whatever it is asked for. Here it is made to believe: the type of
distribution is set, and all that follows is its own code and that of torch and DeepSpeed. Every
rank writes FOLDER/<case>-<rank>.pt. BACKEND: fsdp2, zero2 or zero3 (with DeepSpeed importable).
"""

from __future__ import annotations

import os
import signal
import socket
import sys
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing
import transformers.training_args
from accelerate import DistributedType
from accelerate.state import AcceleratorState, PartialState
from torch import distributed as dist
from trainer_cases import SMALL, Recorded, conversations, make_trainer, pairs, questions
from transformers import TrainerCallback
from two_ranks import KINDS, RL

from internvl.errors import UserError
from training.cli import ModelArguments, peft_config

WORLD = 2
ROWS = 8  # six a step: the second step of an epoch has two, none of them on the second rank
RATES = {"vit_learning_rate": 2e-3, "projector_learning_rate": 5e-4, "vit_layer_decay": 0.5}
# what a case does beyond what make_trainer takes
KILLED = "killed"  # the step before which every rank kills itself
ADAPTER = "adapter"  # the adapter's options
HEAD = {"stage": "sft", ADAPTER: {"lora_target_modules": ["q_proj", "lm_head"]}}  # is refused
CASES: dict[str, dict[str, Any]] = {
    "sft": {"stage": "sft", **RATES},
    "killed": {"stage": "sft", **RATES, KILLED: 5},
    "mpo": {"stage": "mpo", "gradient_checkpointing": True},
    "bf16": {"stage": "sft", "bf16": True, "position_steps": [0.25]},
    "lora": {
        "stage": "sft",
        ADAPTER: {"lora_parts": ["llm", "vit"], "lora_modules_to_save": ["multi_modal_projector"]},
    },
    "rl": {
        **RL,
        "stage": "rl",
        "freeze_vit": True,
        "steps_per_generation": 2,
        "max_steps": 6,
        "per_device_train_batch_size": 2,
    },
}
FSDP = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
}
DEEPSPEED = {
    "ACCELERATE_USE_DEEPSPEED": "true",
    "ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL": "true",
    "ACCELERATE_DEEPSPEED_ZERO3_INIT": "false",
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "1",
    "DS_ACCELERATOR": "cpu",
}


def believe_in_fsdp() -> None:
    """Make accelerate take two CPU processes for what it takes two GPU processes for."""
    own = AcceleratorState.__init__

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        own(self, *args, **kwargs)
        plugin = kwargs.get("fsdp_plugin")
        if plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.FSDP
            if self._mixed_precision != "no":
                plugin.set_mixed_precision(self._mixed_precision)
            self.fsdp_plugin = plugin
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    AcceleratorState.__init__ = init


def believe_in_deepspeed() -> None:
    """Make accelerate start DeepSpeed over gloo where there is no GPU."""
    PartialState._prepare_backend = lambda *args, **kwargs: ("gloo", DistributedType.MULTI_CPU)
    transformers.training_args.is_torch_bf16_gpu_available = lambda: True


class _Kill(TrainerCallback):
    def __init__(self, step: int):
        self.step = step

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step - 1:
            os.kill(os.getpid(), signal.SIGKILL)


def trainer_of(name: str, world: int, model: Path, folder: Path, output: Path) -> Any:
    """The case's trainer, of one of `world` processes; its Recorded is `trainer.recorded`."""
    options = {"per_device_train_batch_size": 3, **(HEAD if name == "head" else CASES[name])}
    stage, killed = options.pop("stage"), options.pop(KILLED, None)
    if adapter := options.pop(ADAPTER, None):
        options["peft_config"] = peft_config(ModelArguments("m", use_peft=True, **adapter))
    if stage == "rl":
        rows = questions(folder, KINDS)
    else:
        rows = (pairs if stage == "mpo" else conversations)(folder, ROWS)
        options["per_device_eval_batch_size"] = 2 * WORLD // world
    options["per_device_train_batch_size"] *= WORLD // world
    options = {
        "optim": "adamw_torch",
        "adam_epsilon": 1e-3,  # or Adam would blow rounding up where a gradient is nearly zero
        "learning_rate": 1e-3,
        "lr_scheduler_type": "linear",
        "max_tokens_per_microbatch": SMALL,
        "num_train_epochs": 3,
        "save_strategy": "steps",
        "save_steps": 3,  # in the middle of the second epoch
        "use_cpu": not os.environ.get("ACCELERATE_USE_DEEPSPEED"),
        **options,
    }
    recorded = Recorded()
    trainer = make_trainer(stage, model, output, rows, recorded, **options)
    for callback in list(trainer.callback_handler.callbacks):
        if type(callback).__name__ == "_Recorder":  # it copies gradients, which are sharded
            trainer.remove_callback(callback)
    if killed is not None and not any(output.glob("checkpoint-*")):
        trainer.add_callback(_Kill(killed))
    trainer.recorded = recorded
    return trainer


def run_case(name: str, world: int, model: Path, folder: Path, output: Path) -> dict[str, Any]:
    """The case's whole run by the stage's own entry, and what was seen of it."""
    trainer = trainer_of(name, world, model, folder, output)
    trainer.run()
    logs = [log for log in trainer.state.log_history if "grad_norm" in log]
    evaluation = 0.0 if CASES[name]["stage"] == "rl" else trainer.evaluate()["eval_loss"]
    return {
        "kind": trainer.accelerator.distributed_type.value,
        "model": type(trainer.model_wrapped).__name__,
        "losses": trainer.recorded.losses,
        "microbatches": trainer.recorded.microbatches,
        "norms": [log["grad_norm"] for log in logs],
        "evaluation": evaluation,
    }


BAD = {  # settings with which nothing right would be saved
    "fsdp2": {
        "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
        "FSDP_VERSION": "1",
        "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",
    },
    "zero2": {},
    "zero3": {
        "ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL": "false",
        "ACCELERATE_DEEPSPEED_ZERO3_INIT": "true",
    },
}


def refusals(backend: str, model: Path, folder: Path) -> list[str]:
    """What is said of an adapter on the head, and of bad settings."""
    said = []
    for name, setting in [("head", {}), *(("sft", {k: v}) for k, v in BAD[backend].items())]:
        before = dict(os.environ)
        os.environ |= setting
        AcceleratorState._reset_state()
        try:
            trainer_of(name, WORLD, model, folder, folder / "refused")
            said.append("nothing")
        except UserError as error:
            said.append(str(error))
        for key in setting:
            os.environ.pop(key)
        os.environ |= before
    return said


def rank_main(
    rank: int, port: int, backend: str, model: Path, folder: Path, names: list[str]
) -> None:
    """The cases named, as one of the two ranks."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(WORLD)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"LOCAL_WORLD_SIZE": str(WORLD)}
    if backend == "fsdp2":
        os.environ |= {**FSDP, "ACCELERATE_USE_CPU": "true"}
        believe_in_fsdp()
    else:
        os.environ |= {**DEEPSPEED, "ACCELERATE_DEEPSPEED_ZERO_STAGE": backend[-1]}
        believe_in_deepspeed()
    for name in names:
        if name == "refusals":
            seen: Any = refusals(backend, model, folder)
        else:
            seen = run_case(name, WORLD, model, folder, folder / name)
        torch.save(seen, folder / f"{name}-{rank}.pt")
        AcceleratorState._reset_state()
    dist.destroy_process_group()


if __name__ == "__main__":
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        number = free.getsockname()[1]
    places = (Path(sys.argv[2]), Path(sys.argv[3]))
    torch.multiprocessing.start_processes(
        rank_main, (number, sys.argv[1], *places, sys.argv[4:]), nprocs=WORLD, start_method="fork"
    )
