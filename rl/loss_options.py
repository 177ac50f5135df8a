"""Options of the policy's loss and of the advantages; names are TRL's GRPOConfig's."""

from __future__ import annotations

from dataclasses import dataclass, field

from internvl.errors import UserError
from rl.advantages import ESTIMATORS, SCALES
from rl.losses import CORRECTIONS, LEVELS, LOSS_TYPES, Objective

# eps_low, eps_high: GSPO's (arXiv 2507.18071) for a sequence's ratio, DAPO's for a token's
_CLIPS = {"sequence": (3e-4, 4e-4), "sequence_token": (3e-4, 4e-4), "token": (0.2, 0.28)}


@dataclass
class LossOptions:
    """Which loss is minimised, and what the advantages are divided by; by default GSPO's.

    As in the published code, whose only KL term is 0. See rl/losses.py and rl/advantages.py.
    """

    importance_sampling_level: str = field(
        default="sequence",
        metadata={"help": "Of the ratio: sequence (GSPO), sequence_token (GSPO-token), token."},
    )
    loss_type: str = field(
        default="grpo",
        metadata={
            "help": "How the loss is summed up: grpo (each completion alike), bnpo, dapo (each "
            "token alike), dr_grpo (by max_completion_length), luspo (a completion by its length)."
        },
    )
    epsilon: float | None = field(
        default=None,
        metadata={"help": "Lower clip, eps_low; by default 3e-4, and 0.2 at level token."},
    )
    epsilon_high: float | None = field(
        default=None,
        metadata={
            "help": "Upper clip, eps_high; by default epsilon where that is given, otherwise 4e-4, "
            "and 0.28 at level token."
        },
    )
    beta: float = field(
        default=0.0,
        metadata={
            "help": "Weight of the KL divergence from the model that the stage starts from; with "
            "it the reference is scored once a rollout batch (without LoRA: a second model)."
        },
    )
    use_bias_correction_kl: bool = field(
        default=True, metadata={"help": "Weigh the KL term by the ratio, as in DeepSeek-V3.2."}
    )
    entropy_coef: float = field(
        default=0.0, metadata={"help": "Weight of the bonus for entropy, a mean over tokens."}
    )
    advantage_estimator: str = field(
        default="grpo",
        metadata={"help": "What a reward is compared with: grpo (the mean), rloo (the others')."},
    )
    scale_rewards: str = field(
        default="group",
        metadata={
            "help": "What advantages are divided by: the standard deviation of the group, of the "
            "rollout batch (batch), or nothing (none)."
        },
    )
    mask_truncated_completions: bool = field(
        default=False,
        metadata={"help": "A completion that was cut by its length takes no part in the loss."},
    )
    vllm_importance_sampling_correction: bool = field(
        default=False,
        metadata={
            "help": "Weigh each completion by how much likelier the trainer makes it than the "
            "sampler did (whichever sampler it is)."
        },
    )
    vllm_importance_sampling_mode: str = field(
        default="sequence_mask",
        metadata={
            "help": "token_truncate, token_mask, sequence_truncate, sequence_mask: a weight per "
            "token or per completion, out of its bounds clamped to them or made 0."
        },
    )
    vllm_importance_sampling_clip_max: float | None = field(
        default=3.0, metadata={"help": "Upper bound of these weights."}
    )
    vllm_importance_sampling_clip_min: float | None = field(
        default=None, metadata={"help": "Lower bound of these weights."}
    )

    def check_loss_options(self) -> None:
        """Raise `UserError` for what is unknown or does not go together; fill in the clips."""
        self.scale_rewards = _scale_of(self.scale_rewards)
        for name, known in (
            ("importance_sampling_level", LEVELS),
            ("loss_type", LOSS_TYPES),
            ("advantage_estimator", ESTIMATORS),
            ("scale_rewards", SCALES),
            ("vllm_importance_sampling_mode", CORRECTIONS),
        ):
            value = getattr(self, name)
            if value not in known:
                raise UserError(f"{name} is {value!r}; it is one of {', '.join(known)}")
        low, high = _CLIPS[self.importance_sampling_level]
        if self.epsilon_high is None:
            self.epsilon_high = high if self.epsilon is None else self.epsilon
        self.epsilon = low if self.epsilon is None else self.epsilon
        if not (0 < self.epsilon < 1 and self.epsilon_high > 0):
            raise UserError("epsilon and epsilon_high are clips around 1: 0 < epsilon < 1")
        for name in ("beta", "entropy_coef"):
            if getattr(self, name) < 0:
                raise UserError(f"{name} is {getattr(self, name):g}; 0 (off) or above")
        self._check_together()

    def _check_together(self) -> None:
        if self.loss_type == "luspo" and self.importance_sampling_level != "sequence":
            raise UserError("loss_type luspo goes with importance_sampling_level sequence")
        if self.advantage_estimator == "rloo" and self.scale_rewards == "group":
            raise UserError(
                "advantage_estimator rloo divided by the group's standard deviation is grpo's "
                "times G / (G - 1): give scale_rewards none, or batch"
            )
        if self.beta == 0 and not self.use_bias_correction_kl:
            raise UserError("use_bias_correction_kl is given, but beta is 0: there is no KL term")
        bounds = (self.vllm_importance_sampling_clip_min, self.vllm_importance_sampling_clip_max)
        given = bounds != (None, 3.0) or self.vllm_importance_sampling_mode != "sequence_mask"
        if not self.vllm_importance_sampling_correction:
            if given:
                raise UserError(
                    "vllm_importance_sampling_mode or a clip is given, but "
                    "vllm_importance_sampling_correction is not"
                )
            return
        least, most = bounds
        if any(bound is not None and bound < 0 for bound in bounds) or (
            least is not None and most is not None and least > most
        ):
            raise UserError(
                f"vllm_importance_sampling_clip_min is {least} and _clip_max {most}; bounds of a "
                "ratio, the lower one first"
            )
        if bounds == (None, None):
            raise UserError(
                "vllm_importance_sampling_mode masks or clamps what is out of bounds, but there "
                "are none: give vllm_importance_sampling_clip_max"
            )

    def objective(self, max_completion_length: int) -> Objective:
        """The loss that these options ask for, once they were checked."""
        assert self.epsilon is not None and self.epsilon_high is not None
        return Objective(
            importance_sampling_level=self.importance_sampling_level,
            loss_type=self.loss_type,
            epsilon_low=self.epsilon,
            epsilon_high=self.epsilon_high,
            beta=self.beta,
            use_bias_correction_kl=self.use_bias_correction_kl,
            entropy_coef=self.entropy_coef,
            max_completion_length=max_completion_length,
        )


def _scale_of(value: object) -> str:
    """TRL's other spellings: true is group, false is none."""
    return {"true": "group", "false": "none"}.get(str(value).lower(), str(value))
