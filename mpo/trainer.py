"""The MPO stage on PackedTrainer: a pair is one prompt with two completions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import InternVLProcessor

from internvl.data import Row
from internvl.errors import UserError
from internvl.logprobs import TokenScores
from internvl.packing import Example, PackedBatch
from mpo.config import MPOConfig
from mpo.loss_set import Pairs
from mpo.losses import RewardShift
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
        if kwargs.pop("ref_model", None) is not None:
            raise UserError("ref_model: the reference is the model that training starts from")
        super().__init__(model, args, train_dataset, processing_class, eval_dataset, **kwargs)
        self._losses = args.losses
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
        return self.reference.encode(row, self.encoder)

    def encode_held_out(self, row: Any) -> Example:
        """The same of a pair that is evaluated on, its images as they are."""
        return self.reference.encode(row, self.held_out_encoder)

    def count(self, examples: Sequence[Example]) -> dict[str, float]:
        """The number of pairs."""
        return {"examples": float(len(examples))}

    def score_options(self) -> dict[str, Any]:
        """The entropy where it is to be logged."""
        return {"with_entropy": True} if self.mpo_args.log_entropy else {}

    def loss(
        self, scores: TokenScores, batch: PackedBatch, counts: dict[str, float]
    ) -> tuple[Tensor, Metrics]:
        """The weighted losses over the step's pairs; MPO's: w_p L_p + w_q L_q + w_g L_g."""
        logps = batch.sum_by_completion(scores.logprobs)
        needs_reference = self._losses.needs_reference
        ref_logps = self.reference.logps(batch).to(logps.dtype) if needs_reference else None
        pairs = Pairs.alternating(logps, batch.lengths, ref_logps)
        terms = self._losses.terms(pairs, self.shift.delta)
        metrics = self._pair_metrics(pairs, terms)
        if scores.entropy is not None:
            metrics.mean("entropy", scores.entropy)
        return self._losses.total(terms, counts["examples"]), metrics

    def _pair_metrics(self, pairs: Pairs, terms: Mapping[str, Tensor]) -> Metrics:
        """TRL's keys, and every loss; in training the rewards are put aside for delta."""
        metrics = Metrics()
        for name, term in terms.items():
            metrics.mean(f"loss/{name}", term)
        # without a reference the mean log-probabilities are compared, as TRL's ORPOTrainer does
        needs_reference = self._losses.needs_reference
        rewards = pairs.rewards(self._losses.beta) if needs_reference else pairs.mean_logps
        chosen, rejected = (values.detach() for values in rewards)
        metrics.mean("rewards/chosen", chosen)
        metrics.mean("rewards/rejected", rejected)
        metrics.mean("rewards/margins", chosen - rejected)
        metrics.mean("rewards/accuracies", (chosen > rejected).float())
        metrics.mean("logps/chosen", pairs.chosen_logps)
        metrics.mean("logps/rejected", pairs.rejected_logps)
        if self._losses.needs_delta:
            metrics.ratio("bco/delta", self.shift.delta * len(chosen), len(chosen))
            if torch.is_grad_enabled():
                both = torch.cat([chosen, rejected]).cpu().double()  # MPS has no double
                self._step_rewards["total"] += float(both.sum())
                self._step_rewards["count"] += len(both)
        return metrics

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None
    ) -> Tensor:
        """PackedTrainer's step; then delta takes the step's rewards in, once."""
        self._step_rewards = {"total": 0.0, "count": 0.0}
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self._losses.needs_delta:
            self.shift.update(**sum_over_ranks(self._step_rewards, self.args.device))
        if self.state.global_step == 0 and not self._announced:
            self._announce(float(loss))
        return loss

    def _announce(self, loss: float) -> None:
        """Print the first loss, above the bar, beside what it must be while policy = reference."""
        self._announced = True
        so_far = Metrics()
        so_far.merge(self._metrics)
        so_far.reduce(self.args.device)
        if not self.is_world_process_zero():
            return
        means = so_far.values()
        measured = {name: means[f"loss/{name}"] for name in self._losses.weights}
        expected = self._losses.first_loss(measured)
        if expected is None:
            names = " and ".join(self._losses.weights)
            tqdm.write(
                f"first loss {loss:.6f}; {names} can be anything there, so it is not checked"
            )
            return
        parts = [f"{words} {measured[name]:.6f}" for name, words in self._losses.measured.items()]
        tqdm.write(
            f"first loss {loss:.6f}, expected {expected:.6f} = "
            + ", ".join([self._losses.first_loss_words, *parts])
        )
        if abs(loss - expected) > FIRST_LOSS_TOLERANCE:
            tqdm.write(
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
