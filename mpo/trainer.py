"""The MPO stage on PackedTrainer: a pair is one prompt with two completions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import InternVLProcessor

from internvl.data import Row
from internvl.logprobs import TokenScores
from internvl.packing import Example, PackedBatch
from mpo.config import MPOConfig
from mpo.losses import RewardShift, mpo_loss, pair_terms
from mpo.reference import open_reference
from training.metrics import Metrics, sum_over_ranks
from training.trainer import PackedTrainer

FIRST_LOSS_TOLERANCE = 1e-3


class MPOTrainer(PackedTrainer):
    """Mixed preference optimisation of InternVL on rows of kind "pair".

    The model as it is given, with its adapter if it has one, is the reference (mpo/reference.py),
    also where a checkpoint is loaded then.
    """

    progress_metrics = ("loss", "rewards/margins", "rewards/accuracies")

    def __init__(
        self,
        model: nn.Module,
        args: MPOConfig,
        train_dataset: Sequence[Row],
        processing_class: InternVLProcessor,
        eval_dataset: Sequence[Row] | None = None,
        **kwargs: Any,
    ):
        self.shift = RewardShift()
        self._step_rewards = {"total": 0.0, "count": 0.0}
        self._announced = False
        super().__init__(model, args, train_dataset, processing_class, eval_dataset, **kwargs)
        self._weights = args.weights
        self.reference = open_reference(self)
        self.completion_value_names = self.reference.value_names
        self.train_dataset: Any = self.reference.rows(train_dataset, "train")
        if eval_dataset is not None:
            self.eval_dataset: Any = self.reference.rows(eval_dataset, "eval")

    @property
    def mpo_args(self) -> MPOConfig:
        """The options, with our type."""
        assert isinstance(self.args, MPOConfig)
        return self.args

    # ---- what PackedTrainer asks for ----

    def encode(self, row: Any) -> Example:
        """A pair as one prompt with two completions and their reference log-probabilities."""
        return self.reference.encode(row)

    def count(self, examples: Sequence[Example]) -> dict[str, float]:
        """The number of pairs."""
        return {"examples": float(len(examples))}

    def loss(
        self, scores: TokenScores, batch: PackedBatch, counts: dict[str, float]
    ) -> tuple[Tensor, Metrics]:
        """w_p L_p + w_q L_q + w_g L_g over the step's pairs."""
        logps = batch.sum_by_completion(scores.logprobs)
        ref_logps = self.reference.logps(batch).to(logps.dtype)
        chosen, rejected = slice(0, None, 2), slice(1, None, 2)
        terms = pair_terms(
            logps[chosen],
            logps[rejected],
            ref_logps[chosen],
            ref_logps[rejected],
            batch.lengths[chosen],
            beta=self.mpo_args.beta,
            delta=self.shift.delta,
        )
        if torch.is_grad_enabled():
            rewards = torch.cat([terms.chosen_rewards, terms.rejected_rewards])
            self._step_rewards["total"] += float(rewards.cpu().double().sum())  # MPS has no double
            self._step_rewards["count"] += len(rewards)
        metrics = Metrics()
        metrics.mean("loss/dpo", terms.preference)
        metrics.mean("loss/bco", terms.quality)
        metrics.mean("loss/sft", terms.generation)
        metrics.mean("rewards/chosen", terms.chosen_rewards)
        metrics.mean("rewards/rejected", terms.rejected_rewards)
        metrics.mean("rewards/margins", terms.chosen_rewards - terms.rejected_rewards)
        right = (terms.chosen_rewards > terms.rejected_rewards).float()
        metrics.mean("rewards/accuracies", right)
        metrics.mean("logps/chosen", logps[chosen])
        metrics.mean("logps/rejected", logps[rejected])
        metrics.ratio("bco/delta", self.shift.delta * len(right), len(right))
        return mpo_loss(terms, self._weights, counts["examples"]), metrics

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None
    ) -> Tensor:
        """PackedTrainer's step; then delta takes the step's rewards in, once."""
        self._step_rewards = {"total": 0.0, "count": 0.0}
        loss = super().training_step(model, inputs, num_items_in_batch)
        self.shift.update(**sum_over_ranks(self._step_rewards, self.args.device))
        if self.state.global_step == 0 and not self._announced:
            self._announce(float(loss))
        return loss

    def _announce(self, loss: float) -> None:
        """Print the first loss beside what it must be while policy = reference."""
        self._announced = True
        so_far = Metrics()
        so_far.merge(self._metrics)
        so_far.reduce(self.args.device)
        nll = so_far.values()["loss/sft"]
        expected = self._weights.first_loss(nll)
        if not self.is_world_process_zero():
            return
        w = self._weights
        print(
            f"first loss {loss:.6f}, expected {expected:.6f} = {w.preference:g} ln2 + "
            f"{w.quality:g} * 2 ln2 + {w.generation:g} * nll, nll {nll:.6f}"
        )
        if abs(loss - expected) > FIRST_LOSS_TOLERANCE:
            print(
                f"WARNING: the first loss is off by {loss - expected:+.6f}: policy and reference "
                "differ before the first step (dropout, another image path, stale reference?)"
            )

    def stage_state(self) -> dict[str, Any]:
        """delta's sum and count, and what the reference was computed from."""
        return {
            "reward_total": self.shift.total,
            "reward_count": self.shift.count,
            "reference": self.reference.keys["train"],
        }

    def load_stage_state(self, state: dict[str, Any]) -> None:
        """Restore delta; raises `UserError` when the reference or the pairs are others now."""
        self.reference.refuse_other(state["reference"])
        self.shift = RewardShift(state["reward_total"], state["reward_count"])
