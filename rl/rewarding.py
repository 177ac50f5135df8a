"""What becomes of completions: their verdicts, the rewards' terms, and one reward each."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Thread
from typing import Any, TypeVar

from internvl.data import Row
from internvl.errors import UserError
from internvl.sampler import Completion
from rewards import Verdict, VerifierPool, load_table
from rewards.functions import (
    BUILT_IN,
    RewardFunction,
    RewardTerm,
    accuracy_reward,
    combine_rewards,
    format_reward,
    overlong_reward,
    repetition_reward,
)
from rewards.judge import Judge
from rewards.judging import Verifier, names_judge
from rewards.loading import OURS, RewardError, call_reward, check_columns, load_reward
from rl.config import RLConfig

# (a question's record, a completion of it), .. -> their verdicts, in order
_T = TypeVar("_T")
Verify = Callable[[Sequence[tuple[Mapping[str, Any], str]]], Iterable[Verdict]]


def make_terms(args: RLConfig) -> list[RewardTerm]:
    """The rewards that the options ask for.

    Raises `UserError` for a function that cannot be loaded or an option that cannot be honoured.
    """
    names = [entry if entry in BUILT_IN else entry.partition(":")[2] for entry in args.reward_funcs]
    weights = args.reward_weights or [BUILT_IN.get(entry, 1.0) for entry in args.reward_funcs]
    terms = []
    for entry, name, weight in zip(args.reward_funcs, names, weights, strict=True):
        # logged by the function's own name, as TRL does, unless another has it, too
        own = entry not in BUILT_IN
        shown = entry if own and (name in BUILT_IN or names.count(name) > 1) else name
        try:
            function = _function_of(entry, args)
        except ValueError as error:
            raise UserError(f"reward_funcs: {error}") from None
        terms.append(RewardTerm(shown, function, weight, decisive=entry == "accuracy"))
    return terms


def _function_of(entry: str, args: RLConfig) -> RewardFunction:
    if entry == "overlong":
        assert args.soft_punish_cache is not None  # RLConfig has seen to it
        return overlong_reward(args.max_completion_length, args.soft_punish_cache)
    if entry == "repetition":
        return repetition_reward(args.repetition_ngram, args.repetition_max_penalty)
    return {"accuracy": accuracy_reward, "format": format_reward}.get(entry) or load_reward(entry)


def make_verifier(args: RLConfig, pool: VerifierPool) -> Verifier:
    """Rules, table and judge as the options say; `UserError` for what cannot be honoured."""
    try:
        table = None if args.datasets is None else load_table(Path(args.datasets))
        return Verifier(pool, args.open_judge(), args.judge_when, table=table)
    except ValueError as error:
        raise UserError(str(error)) from None


def check_judge(judge: Judge) -> None:
    """Raise `UserError` for a judge that does not answer, before hours are spent without it."""
    try:
        judge.check()
    except ValueError as error:
        raise UserError(str(error)) from None


def check_asked(judge: Judge | None, args: RLConfig, rows: Sequence[Row]) -> None:
    """Raise `UserError` for a judge that would never be asked."""
    if judge is None or args.judge_when != "named":
        return
    if not any(names_judge(row.data) for row in rows):
        raise UserError(
            'judge_base_url is given, but no question names the judge: write "matcher": "judge" '
            "into those that need it, or give judge_when cannot_judge"
        )


@dataclass
class Rewarded:
    """What became of a list of completions; each list is as long.

    terms: by name, before their weights. formats: whether the format was followed.
    """

    verdicts: list[Verdict]
    formats: list[bool]
    clipped: list[bool]
    terms: dict[str, list[float | None]]
    rewards: list[float | None]


class Rewarder:
    """Gives completions their rewards.

    rows: all questions, whose columns are handed to the users' functions. terms: see `make_terms`.
    verify: says the verdicts of all completions at once (`Verifier.verdicts`).
    timeout: seconds that a user's function may take for all completions of a batch.
    Raises `UserError` when a function asks for a column that no question has.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        terms: Sequence[RewardTerm],
        verify: Verify,
        timeout: float = 600.0,
    ):
        self.terms = terms
        self.timeout = timeout
        self.verify = verify
        self._columns: list[str] = []
        own = [term for term in terms if term.name not in BUILT_IN]
        if own:  # or they are not needed, and the rows not looked at
            names = {name for row in rows for name in row.data}
            self._columns = sorted(names.difference(OURS))
        try:
            for term in own:
                check_columns(term.name, term.function, dict.fromkeys(self._columns))
        except ValueError as error:
            raise UserError(f"reward_funcs: {error}") from None

    def reward(
        self,
        answered: Sequence[tuple[Mapping[str, Any], Completion]],
        trainer_state: Any = None,
        verdicts: Sequence[Verdict] | None = None,
    ) -> Rewarded:
        """Judge and weigh completions of questions' records; `verdicts` where they were judged.

        Raises `UserError` when a user's function gives what cannot be a reward.
        """
        if verdicts is None:
            verdicts = list(self.verify([(record, done.text) for record, done in answered]))
        verdicts = list(verdicts)
        clipped = [done.finish_reason == "length" for _, done in answered]
        values: dict[str, list[float | None]] = {}
        for term in self.terms:
            # made anew for each: what one does to its arguments is nothing to the others
            columns = self._arguments(answered)
            columns |= {"verdicts": list(verdicts), "clipped": list(clipped)}
            columns["trainer_state"] = trainer_state
            try:
                call = partial(call_reward, term.name, term.function, columns, len(answered))
                own = term.name not in BUILT_IN
                values[term.name] = _within(self.timeout, term.name, call) if own else call()
            except RewardError as error:
                raise UserError(f"reward_funcs: {error}") from None
        return Rewarded(
            verdicts,
            # a completion that was cut never followed the format, whatever it holds
            [v.format_ok and not cut for v, cut in zip(verdicts, clipped, strict=True)],
            clipped,
            values,
            combine_rewards(self.terms, list(values.values())),
        )

    def _arguments(
        self, answered: Sequence[tuple[Mapping[str, Any], Completion]]
    ) -> dict[str, Any]:
        columns: dict[str, Any] = {
            name: [record.get(name) for record, _ in answered] for name in self._columns
        }
        return columns | {
            "prompts": [prompt_of(record) for record, _ in answered],
            "completions": [[{"role": "assistant", "content": d.text}] for _, d in answered],
            "completion_ids": [list(done.token_ids) for _, done in answered],
        }


def _within(seconds: float, name: str, call: Callable[[], _T]) -> _T:
    """The result of a call, or what it raises; `RewardError` when it takes longer.

    It runs in a thread of its own, which is left behind when it hangs: no process can be had for a
    function that may hold a model, and nothing else can be waited for and given up.
    """
    done: Future[_T] = Future()

    def run() -> None:
        try:
            done.set_result(call())
        except BaseException as error:  # handed to the caller, whatever it is
            done.set_exception(error)

    Thread(target=run, name=f"reward {name}", daemon=True).start()
    try:
        return done.result(seconds)
    except TimeoutError:
        if done.done():
            raise  # the function's own
        raise RewardError(
            f"reward {name!r} did not come back within reward_timeout, {seconds:g} seconds"
        ) from None


def prompt_of(record: Mapping[str, Any]) -> list[dict[str, str]]:
    """A question's messages, as a reward function sees them; images are "<image>" in the text."""
    system = record.get("system")
    messages = [] if system is None else [{"role": "system", "content": system}]
    return [*messages, {"role": "user", "content": record["question"]}]
