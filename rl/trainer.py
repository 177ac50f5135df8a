"""The online stage on PackedTrainer: GSPO over rollouts made one step ahead of their use.

    every `steps_per_generation` optimizer steps:
        weights -> sampler -> rollout batch (groups) -> old log-probs -> that many StepBatches

One StepBatch is handed out for one optimizer step, made only when it is asked for; the loader does
not pass through accelerate, which would read one ahead and sample from stale weights.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import InternVLProcessor
from transformers.trainer_utils import EvalLoopOutput

from internvl.chat import forbidden_token_ids
from internvl.data import Row
from internvl.errors import UserError
from internvl.logprobs import TokenScores
from internvl.packing import Example, PackedBatch
from internvl.sampler import NO_V2PE, StreamSampler
from rewards.pool import shared_pool
from rl.ahead import Ahead, Made
from rl.config import RLConfig
from rl.evaluation import HeldOut, make_held_out
from rl.frozen_vision import FrozenVision
from rl.groups import GroupEncoder, StartWeights
from rl.guards import CollapseError, CollapseGuard, StepTotals
from rl.loader import RolloutLoader
from rl.losses import Counts, PolicyTokens, policy_loss
from rl.phases import Phases
from rl.policy_metrics import add_loss_metrics, weigh
from rl.ranks import everywhere, gather
from rl.refill import fill, scale_by_batch
from rl.rewarding import Rewarder, Verify, make_terms, make_verifier
from rl.rollout_log import RolloutLog, add_group_metrics
from rl.rollouts import Group, RolloutMaker, RolloutSettings
from rl.sampling import switch_off_dropout
from rl.syncing import check_gap, make_sync
from rl.tracker_table import log_table, table_rows
from training.batches import BadRow, StepBatch
from training.late_checks import LateChecks, late_quarantine
from training.metrics import Metrics, sum_over_ranks
from training.refusals import refuse_sharded
from training.trainer import PackedTrainer


class RLTrainer(PackedTrainer):
    """GSPO for InternVL on rows of kind "question".

    sampler: draws the rollouts; it is given the policy's weights before each rollout batch. verify:
    judges them; by default this process's pool does, with the judge that the options name.
    """

    progress_metrics = ("reward", "rewards/accuracy/mean", "sampling/logprob_gap_max", "pass@1")
    completion_value_names = ("advantages",)

    def __init__(
        self,
        model: nn.Module,
        args: RLConfig,
        train_dataset: Sequence[Row],
        processing_class: InternVLProcessor,
        *,
        sampler: StreamSampler,
        verify: Verify | None = None,
        **kwargs: Any,
    ):
        self.sampler = sampler
        self._times = Phases()
        self.rows = train_dataset
        self._pending: list[list[Group]] = []  # one entry an optimizer step, this rank's groups
        self._rollout_tokens = 0.0  # of the rollout batch that they are of, a step's share
        self.objective = args.objective(args.max_completion_length)
        reference = ("ref_logprobs",) if self.objective.beta else ()
        self.token_value_names = ("sampler_logprobs", "old_logprobs", *reference)
        self._next_batch = 0
        self._next_place = 0  # in the stream of questions
        self._bad: list[BadRow] = []  # questions of the last rollout batch that could not be asked
        self._synced_at: int | None = None
        super().__init__(model, args, train_dataset, processing_class, **kwargs)
        switch_off_dropout(self.accelerator.unwrap_model(self.model))
        vocab_size = self.accelerator.unwrap_model(self.model).config.text_config.vocab_size
        self._forbidden = forbidden_token_ids(processing_class, vocab_size)
        if sampler.name in ("vllm", "servers") and self.encoder.position_steps != (1.0,):
            raise UserError(f"position_step is {self.encoder.position_steps[0]:g}: {NO_V2PE}")
        settings = RolloutSettings.of(args)
        if verify is None:
            verify = make_verifier(args, shared_pool()).verdicts
        rewarder = Rewarder(train_dataset, make_terms(args), verify, args.reward_timeout)
        self.maker = RolloutMaker(train_dataset, sampler, settings, rewarder, self._times)
        self._ahead = Ahead(self.maker)
        self._sync = make_sync(self, settings.sampling)
        self._frozen = FrozenVision(self).of_model()
        self.groups = GroupEncoder(
            train_dataset,
            self.encoder,
            self.objective,
            mask_truncated=args.mask_truncated_completions,
            vision=None if self._frozen is None else self._frozen.features,
        )
        if self.objective.beta:
            refuse_sharded(self, "beta (the start's weights are put in the model's place)")
        model = self.accelerator.unwrap_model(self.model)
        self._start = StartWeights(model) if self.objective.beta else None
        self._guard = CollapseGuard(args)
        self._totals = StepTotals()
        self._collapsed: str | None = None
        self._latest: list[Group] = []  # the last rollout batch's, for the trackers
        self._held_out: HeldOut | None = None
        folder = Path(args.output_dir or "")
        if self.eval_dataset is not None:
            self._held_out = make_held_out(args, self.eval_dataset, settings, verify)
        self._log = RolloutLog(folder / "rollouts", args.process_index, train_dataset)
        self.late_checks = LateChecks(
            late_quarantine(args), args.max_bad, rank=args.process_index, device=args.device
        )

    @property
    def rl_args(self) -> RLConfig:
        """The options, with our type."""
        assert isinstance(self.args, RLConfig)
        return self.args

    # ---- rollouts ----

    def get_train_dataloader(self) -> Any:
        """The rollout stream; not passed through accelerate (see the module's docstring)."""
        return RolloutLoader(self.next_step)

    def next_step(self) -> StepBatch:
        """The next optimizer step's groups of this rank, sampled now if none are left."""
        self._times.note("other")
        if not self._pending:
            self._roll_out()
            self._times.note("other")
        step = self._step_batch(self._pending.pop(0))
        step.bad, self._bad = self._bad, []
        step.rows = self.args.per_device_train_batch_size + len(step.bad)
        return step

    def sync_weights(self) -> None:
        """Give the sampler the policy's weights, unless it has this version; see rl/syncing.py."""
        with everywhere():
            self._ahead.wait()  # no server is given weights while it samples
        if self._synced_at != self.state.global_step:
            model = self.accelerator.unwrap_model(self.model)
            gap = self._sync.push(model, self.state.global_step)
            if gap is not None:
                self._metrics.maximum("sampling/canary_gap", torch.tensor([gap]))
            self._synced_at = self.state.global_step
            self._times.note("sync")

    def _roll_out(self) -> None:
        args, version, start = self.rl_args, self.state.global_step, self._next_place
        try:
            with everywhere():
                ahead = self._ahead.wait()
            self._times.note("sampling")
            self.sync_weights()
            with everywhere():  # of all ranks, whether this one holds a batch made ahead or not
                if ahead is None:
                    made = self.maker.make(self._next_batch, version, self.state, start=start)
                    ahead = Made(self._next_batch, start, version, made)
            assert (ahead.batch, ahead.start) == (self._next_batch, start)
            filled = fill(
                *(self.maker, ahead.groups, self._next_batch, start, version, self.state),
                rounds=args.max_resample_times if args.dynamic_sample else 0,
            )
        except UserError:  # the sampler is gone, or not what it should be: the training is not
            self._save_before_stopping()
            raise
        self._ahead.take()
        self._metrics.maximum("sampling/staleness", torch.tensor([version - ahead.weight_version]))
        groups = filled.groups
        if args.scale_rewards == "batch":
            scale_by_batch(groups, args.advantage_estimator)
        self._bad = filled.bad
        self._next_place += filled.taken
        self.groups.forget()
        size = self.args.per_device_train_batch_size
        self._pending = [groups[start : start + size] for start in range(0, len(groups), size)]
        self._rollout_tokens = self.groups.tokens(groups) / len(self._pending)
        # the first step's old log-probs are those of its own forward: the weights are the same
        for later in self._pending[1:]:
            self._add_logprobs(later, "old_logprobs")
        self._times.note("old_logprobs")
        if self._start is not None:
            with self._start.in_place(self.accelerator.unwrap_model(self.model)):
                for step in self._pending:
                    self._add_logprobs(step, "ref_logprobs")
        self._times.note("ref_logprobs")
        add_group_metrics(self._metrics, groups)
        self._latest = groups
        if args.dynamic_sample:
            sampled = len(groups) + len(filled.discarded)
            self._metrics.ratio("frac_groups_discarded", len(filled.discarded), sampled)
        if args.log_completions:
            self._log.write(version, self._next_batch, groups, filled.discarded)
        self._next_batch += 1
        more = self._next_batch * args.steps_per_generation < args.max_steps
        if args.max_staleness and more:
            self._ahead.begin(self._next_batch, self._next_place, version, self.state)
        self._put_to_sleep()

    def _put_to_sleep(self) -> None:
        """The sampler's memory is the training's, until it is asked again."""
        if self.rl_args.vllm_enable_sleep_mode:
            self.sampler.sleep()
            self._synced_at = None  # it wakes with new weights

    def _save_before_stopping(self) -> None:
        """A checkpoint of the steps that were taken, unless there is one."""
        folder = Path(self.args.output_dir or "") / f"checkpoint-{self.state.global_step}"
        there = gather([folder.exists()])  # asked of all before the first makes it
        if self.state.global_step and not any(map(any, there)) and self.args.save_strategy != "no":
            self._save_checkpoint(self.model, trial=None)

    # ---- groups to steps ----

    def encode(self, row: Group) -> Example:
        """A group as one prompt with its completions."""
        return self.groups.example(row)

    def count(self, examples: Sequence[Example]) -> dict[str, float]:
        """Groups; what the loss is normalised by is counted over all of a step's, see _counts."""
        return {"examples": float(len(examples))}

    def _counts(self, groups: Sequence[Group]) -> dict[str, float]:
        """Totals of a step, those of groups without a gradient included."""
        return {
            "examples": float(len(groups)),
            "sequences": float(sum(len(group.completions) for group in groups)),
            "tokens": float(self.groups.tokens(groups)),
            "rollout_tokens": self._rollout_tokens,
        }

    def _step_batch(self, groups: Sequence[Group]) -> StepBatch:
        """Pack the groups that carry a gradient; the others are counted, and cost nothing."""
        kept = filter(self.groups.carries_gradient, groups)
        batch = self.collator.batch([self.encode(group) for group in kept])
        batch.counts = self._counts(groups)
        self._totals = StepTotals.of(groups)
        return batch

    @torch.no_grad()
    def _add_logprobs(self, groups: Sequence[Group], name: str) -> None:
        """Score groups under the model as it is now, and keep that as one of their values."""
        model = self.accelerator.unwrap_model(self.model)
        model.eval()
        kept = list(filter(self.groups.carries_gradient, groups))
        step = self.collator.batch([self.encode(group) for group in kept])
        for batch, _ in self._microbatches(step):  # as many on every rank: shards are gathered
            logprobs = self.score(model, batch).logprobs.cpu()
            if batch.real:
                self.groups.keep(kept, batch, logprobs, name)

    def vision_inputs(self, batch: PackedBatch) -> dict[str, Tensor]:
        """The kept features where the vision tower is frozen, otherwise pixels."""
        return super().vision_inputs(batch) if self._frozen is None else self._frozen.inputs(batch)

    def score_options(self) -> dict[str, Any]:
        """The sampler's own temperature and forbidden ids, so that log-probabilities compare."""
        entropy = "grad" if self.objective.entropy_coef else True
        return {
            "temperature": self.rl_args.temperature,
            "forbidden": self._forbidden,
            "with_entropy": entropy if torch.is_grad_enabled() else False,
        }

    def loss(
        self, scores: TokenScores, batch: PackedBatch, counts: dict[str, float]
    ) -> tuple[Tensor, Metrics]:
        """The policy's loss over the step's completions; see rl/losses.py."""
        stored = batch.token_values["old_logprobs"]
        tokens = PolicyTokens(
            scores.logprobs,
            torch.where(stored.isnan(), scores.logprobs.detach(), stored),
            batch.completion_of_token,
            batch.lengths,
            batch.completion_values["advantages"],
            batch.token_values.get("ref_logprobs"),
            scores.entropy,
        )
        metrics = Metrics()
        drawn = batch.token_values["sampler_logprobs"]
        gap = (tokens.old_logprobs - drawn).abs()
        check_gap(gap, self.state.global_step, self.rl_args)
        metrics.mean("sampling/logprob_gap_mean", gap)
        metrics.maximum("sampling/logprob_gap_max", gap)
        if self.rl_args.vllm_importance_sampling_correction:
            weigh(tokens, drawn, self.rl_args, metrics)
        totals = Counts(counts["sequences"], counts["tokens"], counts["rollout_tokens"])
        result = policy_loss(tokens, self.objective, totals)
        assert scores.entropy is not None
        add_loss_metrics(metrics, result, scores.entropy)
        self._totals.entropy += float(scores.entropy.detach().double().sum())
        self._totals.tokens += len(scores.entropy)
        return result.loss, metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """PackedTrainer's log; an epoch is a pass over the questions, also after a resume."""
        taken = self.args.per_device_train_batch_size * self.args.world_size
        self.state.epoch = self.state.global_step * taken / len(self.rows)
        super().log(logs, start_time)
        args = self.rl_args
        if args.log_completions and "loss" in logs and self.is_world_process_zero():
            table = table_rows(self.state.global_step, self.rows, self._latest)
            trackers = self.callback_handler.callbacks
            log_table(trackers, self.state.global_step, table, images=args.log_multimodal)

    # ---- guards ----

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """PackedTrainer's, and a look at the step's totals over all ranks."""
        loss = super().training_step(*args, **kwargs)
        if self.rl_args.watches_for_collapse:
            totals = sum_over_ranks(vars(self._totals), self.args.device)
            self._collapsed = self._guard.look(StepTotals(**totals))
        return loss

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        """Transformers' own; a run that has collapsed ends here, with a checkpoint."""
        self._times.note("train")
        self._times.add_to(self._metrics)
        if self._collapsed is not None:
            self.control.should_log = self.control.should_save = True
        super()._maybe_log_save_evaluate(*args, **kwargs)
        if self._collapsed is not None:
            raise CollapseError(f"step {self.state.global_step}: {self._collapsed}")

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """Nothing: held-out questions are answered, not loaded."""
        return None

    def evaluation_loop(
        self, dataloader: Any, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any
    ) -> EvalLoopOutput:
        """Answer the held-out questions with the current weights; see rl/evaluation.py."""
        if self._held_out is None:
            raise UserError("evaluation needs an eval_dataset")
        self._times.note("other")
        try:
            self.sync_weights()
            values = self._held_out.evaluate(self.sampler, self.state.global_step, self.state)
        except UserError:  # as in `_roll_out`
            if self.is_in_train:
                self._save_before_stopping()
            raise
        self._put_to_sleep()
        self._times.note("evaluation")
        named = {f"{metric_key_prefix}_{name}": value for name, value in values.items()}
        return EvalLoopOutput(None, None, named, len(self._held_out.rows))

    # ---- checkpoints ----

    def stage_state(self) -> dict[str, Any]:
        """How many questions were asked and could not be; how close the run is to a collapse."""
        assert self.late_checks is not None
        counts = {"rows_seen": self.late_checks.seen, "rows_bad": self.late_checks.bad}
        start = None if self._start is None else self._start.checksum
        return {**counts, "collapse_streaks": self._guard.streaks, "start": start}

    def load_stage_state(self, state: dict[str, Any]) -> None:
        """Go on with these counts."""
        assert self.late_checks is not None
        if self._start is not None:
            self._start.refuse_other(state.get("start"))
        self._guard.streaks = state.get("collapse_streaks", {})
        self.late_checks.go_on(state.get("rows_seen", 0), state.get("rows_bad", 0))

    def save_rank_state(self, folder: Path) -> None:
        """This rank's place in the stream and the steps of the rollout batch not yet taken."""
        made = self._ahead.settle()
        state = {
            "next_batch": self._next_batch,
            "next_place": self._next_place,
            "log_size": self._log.size,
            "rollout_tokens": self._rollout_tokens,
            "ahead": made and made.to_json(),
            "pending": [[group.to_json() for group in groups] for groups in self._pending],
        }
        path = folder / f"rollouts_{self.args.process_index}.json"
        path.write_text(json.dumps(state), encoding="utf-8")

    def load_rank_state(self, folder: Path) -> None:
        """Go on in the stream where `save_rank_state` left it."""
        path = folder / f"rollouts_{self.args.process_index}.json"
        state = json.loads(path.read_text(encoding="utf-8"))
        self._next_batch, self._next_place = state["next_batch"], state["next_place"]
        self._log.go_on(state["log_size"])
        self._rollout_tokens = state["rollout_tokens"]
        self._ahead.put(state["ahead"] and Made.from_json(state["ahead"]))
        self._pending = [[Group(**group) for group in groups] for groups in state["pending"]]
