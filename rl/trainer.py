"""The online stage on PackedTrainer: GSPO over rollouts made one step ahead of their use.

    every `steps_per_generation` optimizer steps:
        weights -> sampler -> rollout batch (groups) -> old log-probs -> that many StepBatches

One StepBatch is handed out for one optimizer step, made only when it is asked for; the loader does
not pass through accelerate, which would read one ahead and sample from stale weights.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import InternVLProcessor

from internvl.chat import forbidden_token_ids, normalize_tiles
from internvl.checkpoint import full_weights
from internvl.data import Row
from internvl.errors import UserError
from internvl.logprobs import TokenScores
from internvl.packing import Example, PackedBatch
from internvl.sampler import NO_V2PE, Sampler, SamplingConfig
from rewards.pool import shared_pool
from rl.config import RLConfig
from rl.groups import GroupEncoder, StartWeights
from rl.losses import Counts, PolicyTokens, correction_weights, policy_loss
from rl.rewarding import Rewarder, Verify, make_terms, make_verifier
from rl.rollout_log import RolloutLog, add_group_metrics
from rl.rollouts import Group, RolloutMaker, RolloutSettings
from training.batches import STEP_BATCH, StepBatch
from training.metrics import Metrics
from training.refusals import refuse_sharded
from training.trainer import PackedTrainer


class RolloutLoader:
    """What Trainer iterates over: the next StepBatch, made when it is asked for."""

    def __init__(self, trainer: RLTrainer):
        self.trainer = trainer

    def __iter__(self) -> Iterator[dict[str, StepBatch]]:
        while True:
            yield {STEP_BATCH: self.trainer.next_step()}


class RLTrainer(PackedTrainer):
    """GSPO for InternVL on rows of kind "question".

    sampler: draws the rollouts; it is given the policy's weights before each rollout batch. verify:
    judges them; by default this process's pool does, with the judge that the options name.
    """

    progress_metrics = ("reward", "rewards/accuracy/mean", "sampling/logprob_gap_max")
    completion_value_names = ("advantages",)

    def __init__(
        self,
        model: nn.Module,
        args: RLConfig,
        train_dataset: Sequence[Row],
        processing_class: InternVLProcessor,
        *,
        sampler: Sampler,
        verify: Verify | None = None,
        **kwargs: Any,
    ):
        self.sampler = sampler
        self.rows = train_dataset
        self._pending: list[list[Group]] = []  # one entry an optimizer step, this rank's groups
        self._rollout_tokens = 0.0  # of the rollout batch that they are of, a step's share
        self.objective = args.objective(args.max_completion_length)
        reference = ("ref_logprobs",) if self.objective.beta else ()
        self.token_value_names = ("sampler_logprobs", "old_logprobs", *reference)
        self._next_batch = 0
        self._synced_at: int | None = None
        super().__init__(model, args, train_dataset, processing_class, **kwargs)
        vocab_size = self.accelerator.unwrap_model(self.model).config.text_config.vocab_size
        self._forbidden = forbidden_token_ids(processing_class, vocab_size)
        if sampler.name == "vllm" and self.encoder.position_steps != (1.0,):
            raise UserError(f"position_step is {self.encoder.position_steps[0]:g}: {NO_V2PE}")
        refuse_sharded(self, "handing the policy's weights to the sampler")
        settings = RolloutSettings(
            sampling=SamplingConfig(
                n=args.num_generations,
                temperature=args.temperature,
                max_tokens=args.max_completion_length,
                max_tiles=args.max_tiles,
            ),
            questions=args.per_device_train_batch_size,
            steps=args.steps_per_generation,
            seed=args.seed,
            rank=args.process_index,
            world_size=args.world_size,
            scale_rewards=args.scale_rewards,
            advantage_estimator=args.advantage_estimator,
        )
        if verify is None:
            verify = make_verifier(args, shared_pool()).verdicts
        rewarder = Rewarder(train_dataset, make_terms(args), verify)
        self.maker = RolloutMaker(train_dataset, sampler, settings, rewarder)
        model = self.accelerator.unwrap_model(self.model)
        frozen = not any(p.requires_grad for p in self._vision_parameters(model))
        self.groups = GroupEncoder(
            train_dataset,
            self.encoder,
            self.objective,
            mask_truncated=args.mask_truncated_completions,
            vision=self._vision_features if frozen else None,
        )
        self._start = StartWeights(model) if self.objective.beta else None

    @property
    def rl_args(self) -> RLConfig:
        """The options, with our type."""
        assert isinstance(self.args, RLConfig)
        return self.args

    # ---- rollouts ----

    def get_train_dataloader(self) -> Any:
        """The rollout stream; not passed through accelerate (see the module's docstring)."""
        return RolloutLoader(self)

    def next_step(self) -> StepBatch:
        """The next optimizer step's groups of this rank, sampled now if none are left."""
        if not self._pending:
            self._roll_out()
        return self._step_batch(self._pending.pop(0))

    def sync_weights(self) -> None:
        """Give the sampler the policy's weights, unless it has this version."""
        if self._synced_at != self.state.global_step:
            model = self.accelerator.unwrap_model(self.model)
            self.sampler.update_weights(full_weights(model))
            self._synced_at = self.state.global_step

    def _roll_out(self) -> None:
        self.sync_weights()
        groups = self.maker.make(self._next_batch, self.state.global_step, self.state)
        self._next_batch += 1
        self.groups.forget()
        size = self.args.per_device_train_batch_size
        self._pending = [groups[start : start + size] for start in range(0, len(groups), size)]
        self._rollout_tokens = self.groups.tokens(groups) / len(self._pending)
        # the first step's old log-probs are those of its own forward: the weights are the same
        for later in self._pending[1:]:
            self._add_logprobs(later, "old_logprobs")
        if self._start is not None:
            with self._start.in_place(self.accelerator.unwrap_model(self.model)):
                for step in self._pending:
                    self._add_logprobs(step, "ref_logprobs")
        self._log_rollouts(groups)

    def _log_rollouts(self, groups: Sequence[Group]) -> None:
        add_group_metrics(self._metrics, groups)
        if self.rl_args.log_completions:
            folder = Path(self.args.output_dir or "") / "rollouts"
            log = RolloutLog(folder, self.args.process_index, self.rows)
            log.write(self.state.global_step, groups)

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
        return batch

    @torch.no_grad()
    def _add_logprobs(self, groups: Sequence[Group], name: str) -> None:
        """Score groups under the model as it is now, and keep that as one of their values."""
        model = self.accelerator.unwrap_model(self.model)
        model.eval()
        kept = list(filter(self.groups.carries_gradient, groups))
        for batch in self.collator.batch([self.encode(group) for group in kept]).microbatches:
            logprobs = self.score(model, batch).logprobs.cpu()
            by_completion = iter(logprobs.split(batch.lengths.tolist()))
            for index in batch.example_index.tolist():
                group = kept[index]
                values: list[list[float]] = [[] for _ in group.completions]
                for place in self.groups.taking_part(group):
                    values[place] = next(by_completion).tolist()
                setattr(group, name, values)

    @staticmethod
    def _vision_parameters(model: nn.Module) -> list[nn.Parameter]:
        named = model.named_parameters()
        return [parameter for name, parameter in named if "vision_tower." in name]

    @torch.no_grad()
    def _vision_features(self, tiles: Tensor) -> Tensor:
        """The frozen vision tower's features of uint8 tiles, on the CPU."""
        if not len(tiles):
            return self._no_features(0)
        model = self.accelerator.unwrap_model(self.model)
        training = model.training
        model.eval()
        pixels = normalize_tiles(self.processing_class, tiles.to(self.args.device))
        with self.accelerator.autocast():
            features = model(vision_of=pixels).cpu()
        model.train(training)
        return features

    def _no_features(self, tiles: int) -> Tensor:
        config = self.accelerator.unwrap_model(self.model).config
        width = int(config.vision_config.hidden_size / config.downsample_ratio**2)
        return torch.zeros(tiles, self.processing_class.image_seq_length, width)

    def vision_inputs(self, batch: PackedBatch) -> dict[str, Tensor]:
        """The kept features where the vision tower is frozen, otherwise pixels."""
        if self.groups.vision is None:
            return super().vision_inputs(batch)
        features = batch.vision_features
        if features is None or not len(features):
            features = self._no_features(1).to(self.args.device)
        return {"vision_features": features}

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
        self._check_gap(gap)
        metrics.mean("sampling/logprob_gap_mean", gap)
        metrics.maximum("sampling/logprob_gap_max", gap)
        if self.rl_args.vllm_importance_sampling_correction:
            self._correct(tokens, drawn, metrics)
        totals = Counts(counts["sequences"], counts["tokens"], counts["rollout_tokens"])
        result = policy_loss(tokens, self.objective, totals)
        metrics.mean("clip_ratio/low_mean", result.clipped_low.float())
        metrics.mean("clip_ratio/high_mean", result.clipped_high.float())
        metrics.mean("clip_ratio/region_mean", (result.clipped_low | result.clipped_high).float())
        if result.kl is not None:
            metrics.mean("kl", result.kl)
        assert scores.entropy is not None
        metrics.mean("entropy", scores.entropy)
        return result.loss, metrics

    def _correct(self, tokens: PolicyTokens, drawn: Tensor, metrics: Metrics) -> None:
        """Weigh the tokens by how far the sampler's probabilities were off."""
        args = self.rl_args
        weights = correction_weights(
            *(tokens.old_logprobs, drawn, tokens.completion_of_token, tokens.lengths),
            mode=args.vllm_importance_sampling_mode,
            clip_min=args.vllm_importance_sampling_clip_min,
            clip_max=args.vllm_importance_sampling_clip_max,
        )
        if args.vllm_importance_sampling_mode.startswith("sequence"):
            tokens.completion_weights = weights
        else:
            tokens.token_weights = weights
        metrics.mean("sampling/importance_sampling_ratio/mean", weights)
        metrics.maximum("sampling/importance_sampling_ratio/max", weights)

    def _check_gap(self, gap: Tensor) -> None:
        bound = self.rl_args.max_logprob_gap
        if bound is not None and gap.numel() and float(gap.max()) > bound:
            raise UserError(
                f"step {self.state.global_step}: sampler and trainer differ by "
                f"{float(gap.max()):.3g} in a token's log-probability, over max_logprob_gap "
                f"{bound:g}. Look at: dtype of the two, image tiling and preprocessing, tied "
                "embeddings and caches after a weight update, the sampler's temperature and top-k."
            )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """PackedTrainer's log; an epoch is a pass over the questions, also after a resume."""
        taken = self.args.per_device_train_batch_size * self.args.world_size
        self.state.epoch = self.state.global_step * taken / len(self.rows)
        super().log(logs, start_time)

    # ---- checkpoints ----

    def save_rank_state(self, folder: Path) -> None:
        """This rank's place in the stream and the steps of the rollout batch not yet taken."""
        state = {
            "next_batch": self._next_batch,
            "rollout_tokens": self._rollout_tokens,
            "pending": [[group.to_json() for group in groups] for groups in self._pending],
        }
        path = folder / f"rollouts_{self.args.process_index}.json"
        path.write_text(json.dumps(state), encoding="utf-8")

    def load_rank_state(self, folder: Path) -> None:
        """Go on in the stream where `save_rank_state` left it."""
        path = folder / f"rollouts_{self.args.process_index}.json"
        state = json.loads(path.read_text(encoding="utf-8"))
        self._next_batch = state["next_batch"]
        self._rollout_tokens = state["rollout_tokens"]
        self._pending = [[Group(**group) for group in groups] for groups in state["pending"]]
