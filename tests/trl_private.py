"""All that our tests know of TRL's private names, in one place.

`DPOTrainer._compute_loss` and `GRPOTrainer._compute_loss` are TRL's own losses. They are called as
they are: on a real trainer, or on a stand-in for it that holds only what they read, so that value
and gradient can be compared on the same numbers. `USED` says which arguments they have and what
they read of the trainer; `changes` names what another TRL does differently (test_trl_private.py).
"""

from __future__ import annotations

import ast
import importlib.util
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

trl = pytest.importorskip("trl")

WRITTEN_FOR = "1.16"


@dataclass(frozen=True)
class Private:
    """A private method of TRL's: its parameters, and what it reads of self, inputs and outputs."""

    parameters: tuple[str, ...]
    reads: frozenset[str]


def _names(words: str) -> frozenset[str]:
    return frozenset(words.split())


USED: dict[str, Private] = {
    "DPOTrainer._compute_loss": Private(
        ("self", "model", "inputs", "return_outputs"),
        _names(
            """
            inputs[attention_mask] inputs[completion_mask] inputs[input_ids]
            inputs[ref_chosen_logps] inputs[ref_rejected_logps]
            outputs.aux_loss outputs.entropy outputs.is_top1 outputs.log_probs
            outputs.log_sum_sq_probs outputs.mean_logits
            self._metrics self._total_train_tokens self._tp_size self.accelerator self.args
            self.aux_loss_enabled self.beta self.f_alpha_divergence_coef self.f_divergence_type
            self.label_smoothing self.ld_alpha self.loss_types self.loss_weights self.model
            self.precompute_ref_logps self.ref_model self.router_aux_loss_coef self.use_weighting
            """
        ),
    ),
    "GRPOTrainer._compute_loss": Private(
        ("self", "model", "inputs"),
        _names(
            """
            inputs[advantages] inputs[completion_ids] inputs[completion_mask]
            inputs[image_grid_thw] inputs[image_position_ids] inputs[image_sizes]
            inputs[importance_sampling_ratio] inputs[mm_token_type_ids]
            inputs[num_images] inputs[num_items_in_batch] inputs[num_tiles]
            inputs[old_per_token_logps] inputs[pixel_attention_mask] inputs[pixel_values]
            inputs[prompt_ids] inputs[prompt_mask] inputs[ref_per_token_logps]
            inputs[sampling_per_token_logps] inputs[spatial_shapes] inputs[token_type_ids]
            inputs[tool_mask]
            self._entropy_bonus_enabled self._entropy_window_stats
            self._get_per_token_logps_and_entropies self._last_world_entropy self._metrics
            self.accelerator self.args self.aux_loss_enabled self.beta
            self.current_gradient_accumulation_steps self.entropy_coef self.epsilon_high
            self.epsilon_low self.get_gamma_weights self.get_high_entropy_mask
            self.get_off_policy_mask self.importance_sampling_level self.loss_type
            self.max_completion_length self.model self.off_policy_mask_threshold
            self.router_aux_loss_coef self.top_entropy_quantile self.use_adaptive_entropy
            self.use_vllm self.vllm_importance_sampling_correction
            """
        ),
    ),
}


def find(name: str) -> ast.FunctionDef | None:
    """The source of "Class.method" in this TRL, or None; its trainers are not imported for it."""
    owner, _, method = name.partition(".")
    module = f"trl.trainer.{owner.removesuffix('Trainer').lower()}_trainer"
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        return None
    for node in ast.parse(Path(spec.origin).read_text()).body:
        if isinstance(node, ast.ClassDef) and node.name == owner:
            for item in node.body:
                if isinstance(item, ast.FunctionDef) and item.name == method:
                    return item
    return None


def changes(name: str, method: ast.FunctionDef | None, used: Private) -> list[str]:
    """What a method does otherwise than `used` says, one line each with its name and TRL's version.

    name: "Class.method". method: as this TRL has it, or None where it has none.
    """
    here = f"TRL {trl.__version__} (these tests are written for {WRITTEN_FOR}): {name}"
    if method is None:
        return [f"{here} is gone"]
    out = []
    parameters = tuple(argument.arg for argument in method.args.args)
    if parameters != used.parameters:
        out.append(f"{here} takes {parameters}, not {used.parameters}")
    reads = _reads(method)
    out += [f"{here} reads {what} now" for what in sorted(reads - used.reads)]
    out += [f"{here} reads {what} no more" for what in sorted(used.reads - reads)]
    return out


def _reads(method: ast.FunctionDef) -> frozenset[str]:
    """self.x, outputs.x and inputs[x] (or .get) that occur in a method."""
    out = set()
    for node in ast.walk(method):
        match node:
            case ast.Attribute(value=ast.Name(id="self" | "outputs" as owner), attr=attribute):
                out.add(f"{owner}.{attribute}")
            case ast.Subscript(value=ast.Name(id="inputs"), slice=ast.Constant(value=key)):
                out.add(f"inputs[{key!s}]")
            case ast.Call(
                func=ast.Attribute(value=ast.Name(id="inputs"), attr="get"),
                args=[ast.Constant(value=key), *_],
            ):
                out.add(f"inputs[{key!s}]")
    return frozenset(out)


# ---------------------------------------------------------------- stand-ins


def one_process() -> SimpleNamespace:
    """Accelerator of a single process."""
    same = SimpleNamespace(
        device=torch.device("cpu"), num_processes=1, gather=lambda x: x, sync_gradients=True
    )
    same.gather_for_metrics = same.gather
    same.reduce = lambda x, reduction: x
    return same


def dpo_loss(
    logprobs: Tensor, mask: Tensor, ref: Tensor, losses: Mapping[str, float], **options: Any
) -> tuple[Tensor, dict[str, list[float]]]:
    """DPOTrainer's loss of pairs and its metrics.

    logprobs: [2P, T], chosen then rejected. mask: [2P, T], 1 at a completion's tokens. ref: [2P],
    sums under the reference. losses: {loss type: weight}. options: over the trainer's attributes
    (beta 0.1, label_smoothing 0).
    """
    metrics: dict[str, Any] = {"train": defaultdict(list)}
    attributes = {
        "model": SimpleNamespace(training=True),
        "accelerator": one_process(),
        "aux_loss_enabled": False,
        "ld_alpha": None,
        "precompute_ref_logps": True,
        "f_divergence_type": "reverse_kl",
        "loss_types": list(losses),
        "loss_weights": list(losses.values()),
        "label_smoothing": 0.0,
        "beta": 0.1,
        "use_weighting": False,
        "_metrics": metrics,
        "_total_train_tokens": 0,
        "_tp_size": 1,
    }
    ids = torch.zeros(len(mask), mask.shape[1] + 1, dtype=torch.long)
    outputs = SimpleNamespace(
        log_probs=logprobs * mask,
        entropy=torch.zeros_like(logprobs),
        mean_logits=torch.zeros_like(logprobs),
        is_top1=torch.zeros_like(mask, dtype=torch.bool),
    )
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        # one prompt token before the completion
        "completion_mask": torch.cat([torch.zeros(len(mask), 1, dtype=torch.long), mask], 1),
        "ref_chosen_logps": ref[: len(ref) // 2],
        "ref_rejected_logps": ref[len(ref) // 2 :],
    }
    trainer = SimpleNamespace(**{**attributes, **options})
    loss = trl.DPOTrainer._compute_loss(trainer, lambda **_: outputs, inputs, return_outputs=False)
    return loss, metrics["train"]


def dpo_trainer_loss(trainer: Any, inputs: dict[str, Any]) -> tuple[Tensor, dict[str, list[float]]]:
    """The loss and metrics of a real DPOTrainer on a batch of its own collator."""
    loss: Tensor = trainer._compute_loss(trainer.model, inputs, return_outputs=False)
    return loss, trainer._metrics["train"]


def orpo_loss(chosen_mean_logps: Tensor, rejected_mean_logps: Tensor, weight: float) -> Tensor:
    """The odds-ratio part of ORPOTrainer's loss, which adds -weight (its beta) times this mean."""
    from trl.experimental.orpo import ORPOTrainer

    trainer = SimpleNamespace(beta=weight, accelerator=one_process())
    losses = ORPOTrainer.odds_ratio_loss(trainer, chosen_mean_logps, rejected_mean_logps)[0]
    return -losses.mean()


def grpo_loss(
    logprobs: Tensor,
    old: Tensor,
    mask: Tensor,
    advantages: Tensor,
    *,
    entropies: Tensor | None = None,
    inputs: Mapping[str, Tensor] | None = None,
    **options: Any,
) -> tuple[Tensor, dict[str, list[float]]]:
    """GRPOTrainer's loss of a rollout batch and its metrics; by default GSPO's, sequence level.

    logprobs, old, mask, entropies: [G, T]. advantages: [G]. inputs: beside these, what the loss
    reads of a batch. options: over the trainer's attributes.
    """
    metrics: dict[str, Any] = {"train": defaultdict(list)}
    attributes = {
        "model": SimpleNamespace(training=True),
        "accelerator": one_process(),
        "args": SimpleNamespace(delta=None),
        "aux_loss_enabled": False,
        "top_entropy_quantile": 1.0,
        "off_policy_mask_threshold": None,
        "importance_sampling_level": "sequence",
        "beta": 0.0,
        "loss_type": "grpo",
        "epsilon_low": 3e-4,
        "epsilon_high": 4e-4,
        "use_vllm": False,
        "current_gradient_accumulation_steps": 1,
        "_entropy_bonus_enabled": False,
        "_metrics": metrics,
        "_get_per_token_logps_and_entropies": lambda *_, **__: (
            *(logprobs, torch.zeros_like(logprobs) if entropies is None else entropies, None),
        ),
    }
    ids = torch.zeros_like(mask)
    batch = {
        "prompt_ids": ids[:, :1],
        "prompt_mask": torch.ones_like(ids[:, :1]),
        "completion_ids": ids,
        "completion_mask": mask,
        "advantages": advantages,
        "old_per_token_logps": old,
        **(inputs or {}),
    }
    trainer = SimpleNamespace(**{**attributes, **options})
    return trl.GRPOTrainer._compute_loss(trainer, None, batch), metrics["train"]
