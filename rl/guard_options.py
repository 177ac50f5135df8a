"""Options of what watches over a run: held-out evaluation and the stop on collapse."""

from __future__ import annotations

from dataclasses import dataclass, field

from internvl.errors import UserError


@dataclass
class GuardOptions:
    """Held-out questions, and bounds past which a run stops; see rl/evaluation.py, rl/guards.py."""

    eval_file: str | None = field(
        default=None,
        metadata={
            "help": "Held-out questions, answered by the current weights every eval_steps steps."
        },
    )
    num_generations_eval: int | None = field(
        default=None,
        metadata={"help": "Completions of a held-out question; by default num_generations."},
    )
    eval_temperature: float | None = field(
        default=None,
        metadata={
            "help": "Of the held-out completions, by default temperature; 0 is greedy, with "
            "num_generations_eval 1."
        },
    )
    eval_pass_k: list[int] | None = field(
        default=None,
        metadata={"help": "The k of eval_pass@k; by default 1 and num_generations_eval."},
    )
    collapse_min_entropy: float | None = field(
        default=None, metadata={"help": "Stop when a step's mean entropy stays below this."}
    )
    collapse_min_length: float | None = field(
        default=None, metadata={"help": "Stop when completions stay shorter, on average."}
    )
    collapse_max_length: float | None = field(
        default=None, metadata={"help": "Stop when completions stay longer, on average."}
    )
    collapse_no_spread: bool = field(
        default=False, metadata={"help": "Stop when no group's rewards differ any more."}
    )
    collapse_steps: int = field(
        default=20, metadata={"help": "Optimizer steps in a row that make it a collapse."}
    )

    @property
    def watches_for_collapse(self) -> bool:
        """Whether any of the bounds is given."""
        bounds = (self.collapse_min_entropy, self.collapse_min_length, self.collapse_max_length)
        return self.collapse_no_spread or any(bound is not None for bound in bounds)

    def check_guard_options(self, num_generations: int, evaluates: bool) -> None:
        """Raise `UserError` for what does not go together.

        evaluates: whether eval_strategy or eval_on_start asks for an evaluation.
        """
        if self.collapse_steps < 1:
            raise UserError(f"collapse_steps is {self.collapse_steps}, at least 1")
        if self.collapse_steps != 20 and not self.watches_for_collapse:
            raise UserError("collapse_steps is given, but no collapse_... bound is")
        if (self.eval_file is not None) != evaluates:
            raise UserError('eval_file goes with eval_strategy "steps" or eval_on_start: give both')
        given = {"num_generations_eval", "eval_temperature", "eval_pass_k"}
        if self.eval_file is None:
            for name in sorted(given):
                if getattr(self, name) is not None:
                    raise UserError(f"{name} is given, but eval_file is not")
            return
        n = num_generations if self.num_generations_eval is None else self.num_generations_eval
        if n < 1:
            raise UserError(f"num_generations_eval is {n}, at least 1")
        if self.eval_temperature is not None and self.eval_temperature < 0:
            raise UserError(f"eval_temperature is {self.eval_temperature:g}; 0 is greedy")
        if self.eval_temperature == 0 and n != 1:
            raise UserError("eval_temperature is 0 (greedy): give num_generations_eval 1")
        for k in self.eval_pass_k or []:
            if not 1 <= k <= n:
                raise UserError(
                    f"eval_pass_k names {k}; pass@k needs 1 to num_generations_eval ({n}) of them"
                )
