"""`mmpr build`: all commands in one go, from a recipe; verification runs beside the sampling."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from internvl.data import input_folder, write_json
from internvl.data.resumable import naming_the_file
from internvl.errors import UserError
from internvl.hashing import stable_hash
from internvl.terminal import Command
from mmpr.commands import check, dropout, pair, sample, select, verify
from mmpr.commands.shared import open_quarantine, told_to_the_user
from mmpr.following import FollowingVerifier
from mmpr.recipe import Recipe, read_recipe
from mmpr.verify import VerifyReport
from rewards import load_table
from rewards.endpoint import ReplyCacheError
from rewards.judging_options import make_verifier

_COMMANDS = {
    command.name: command
    for command in (
        sample.COMMAND,
        verify.COMMAND,
        pair.COMMAND,
        dropout.COMMAND,
        check.COMMAND,
        select.COMMAND,
    )
}
# what comes after the verdicts, and what refuses its options; asked before anything is sampled
_CHECKS = {
    "pair": pair.check_options,
    "dropout": dropout.check_options,
    "check": check.check_options,
    "select": select.check_options,
}
# options of verify that do not change what it says of a completion
_OF_NO_VERDICT = (
    *("rollouts", "output", "quarantine", "max_bad", "workers", "judge_cache"),
    *("judge_api_key_env", "judge_timeout", "judge_max_retries", "judge_max_concurrency"),
)
_EXAMPLE = """\
example, build.yaml (sections are the options of the commands of that name, all may be left out;
relative paths start from the recipe's folder):

  questions: questions.jsonl
  model: ckpt
  output: work/charts
  sample: {n: 16, temperature: 0.7, prompt-style: final}
  pair: {max-pairs-per-question: 15}
  dropout: {start-ratio: 0.5}      # only where this section is there
  select: {min-accuracy: 0.2, max-accuracy: 0.8}

It leaves in output: rollouts.jsonl, verdicts.jsonl, pairs.jsonl, dropout.jsonl, meta.json of the
pairs (for `python -m mpo`), rl.jsonl (for `python -m rl`), and a .quarantine.jsonl beside each.
Started again after a kill it goes on where it was; the files come out the same to the byte."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = _EXAMPLE
    parser.add_argument("recipe", type=Path, help="YAML: what to build, and with which options")
    parser.add_argument("--output", type=Path, metavar="DIR", help="instead of the recipe's")


def run(args: argparse.Namespace) -> None:
    """`mmpr build`."""
    recipe = read_recipe(args.recipe, list(_COMMANDS), output=args.output)
    for name in ("sample", "verify"):
        if recipe.sections[name] is None:
            raise UserError(f"{recipe.file}: {name} cannot be switched off: all stands on it")
    build = _Build(recipe)
    build.check_recipe()
    build.sample_and_verify()
    build.go_on()


class _Build:
    """The files of a build, and the steps that make them."""

    def __init__(self, recipe: Recipe):
        self.recipe = recipe
        out = recipe.output
        self.rollouts, self.verdicts = out / "rollouts.jsonl", out / "verdicts.jsonl"
        self.pairs, self.dropout, self.questions = (
            out / "pairs.jsonl",
            out / "dropout.jsonl",
            out / "rl.jsonl",
        )
        self.meta = out / "meta.json"

    def options(self, command: Command, source: Path, output: Path | None, *more: str) -> Any:
        """A command's arguments for its part of the build."""
        fixed = [str(source), f"--max-bad={self.recipe.max_bad}", *more]
        if output is not None:
            fixed.append(f"--output={output}")
        return self.recipe.arguments(command, fixed)

    def image_root(self) -> Path:
        """Where the rollouts' image paths start: images that were bytes lie beside them."""
        from mmpr.sample import first_image

        found = first_image(self.rollouts)
        first = found[0] if isinstance(found, list) else found
        if first is not None and (self.recipe.output / first).is_file():
            return self.recipe.output
        return self.recipe.image_root or input_folder(self.recipe.questions)

    def check_recipe(self) -> None:
        """Refuse a build whose verdicts would be of two kinds, and every wrong option at once."""
        self._sample_options()
        for name, check_options in _CHECKS.items():
            if self.recipe.sections[name] is not None:
                check_options(self._options_of(name))
        wanted = self._verify_facts()
        path = self.recipe.output / "build.json"
        if self.verdicts.exists():
            if not path.exists():
                raise UserError(
                    f"{self.verdicts} exists without {path.name}: it is not known what made it. "
                    "Give another --output."
                )
            found = json.loads(path.read_bytes())
            for key, value in wanted.items():
                if found.get(key) != value:
                    raise UserError(
                        f"{self.recipe.file}: {key} is {value!r} now, but {self.recipe.output} was "
                        f"begun with {found.get(key)!r}; go back to it, or take {self.verdicts} "
                        "away to have the same rollouts judged anew"
                    )
        with naming_the_file(path):
            write_json(path, wanted)

    def _options_of(self, name: str, *more: str) -> Any:
        """The arguments of a command that comes after the verdicts."""
        command, model = _COMMANDS[name], f"--model={self.recipe.model}"
        if name == "check":
            section = self.recipe.sections[name] or {}
            counted = [model] if {"max-length", "max-tiles"} & section.keys() else []
            return self.options(command, self.meta, None, *counted)
        output = {"pair": self.pairs, "dropout": self.dropout, "select": self.questions}[name]
        own = [model] if name == "dropout" else []
        return self.options(command, self.verdicts, output, *own, *more)

    def _sample_options(self) -> argparse.Namespace:
        recipe = self.recipe
        more = [f"--model={recipe.model}", f"--seed={recipe.seed}"]
        if recipe.image_root is not None:
            more.append(f"--image-root={recipe.image_root}")
        return self.options(sample.COMMAND, recipe.questions, self.rollouts, *more)

    def _verify_options(self) -> argparse.Namespace:
        return self.options(verify.COMMAND, self.rollouts, self.verdicts)

    def _verify_facts(self) -> dict[str, Any]:
        """What verdicts depend on besides the rollouts."""
        args = vars(self._verify_options())
        kept = {key: args[key] for key in args if key not in _OF_NO_VERDICT}
        if args["datasets"] is not None:  # what it says counts, not where it lies
            with told_to_the_user():
                load_table(args["datasets"])
                kept["datasets"] = f"a table of number {stable_hash(args['datasets'].read_text())}"
        return {f"verify {key}": str(value) for key, value in kept.items()}

    def sample_and_verify(self) -> None:
        """Sample what is missing; each batch on disk is verified while the next is sampled."""
        args = self._verify_options()
        report = VerifyReport()
        quarantine = open_quarantine(args)
        with told_to_the_user():
            verifier = make_verifier(args)
        with (
            told_to_the_user(ReplyCacheError),
            verifier,
            FollowingVerifier(
                *(self.rollouts, self.verdicts),
                verifier=verifier,
                report=report,
                quarantine=quarantine,
            ) as following,
        ):
            for _ in sample.sampling(self._sample_options()):
                following.reached()
        quarantine.check(report.total + quarantine.count)
        verify.tell_verdicts(self.verdicts, report, quarantine)

    def go_on(self) -> None:
        """From the verdicts to pairs and questions for RL; each file is made whole or not."""
        recipe = self.recipe
        self.meta.unlink(missing_ok=True)  # it tells of the sets that the recipe names now
        made: list[Path] = []
        for name, output in (("pair", self.pairs), ("dropout", self.dropout)):
            if recipe.sections[name] is None:
                continue
            label = recipe.name if name == "pair" else f"{recipe.name}_dropout"
            more = (f"--meta={self.meta}", f"--name={label}", f"--seed={recipe.seed}")
            root = f"--image-root={self.image_root()}"
            _COMMANDS[name].run(self._options_of(name, root, *more))
            made.append(output)
        # before the check, which ends the build where too much is bad
        if recipe.sections["select"] is not None:
            select.COMMAND.run(self._options_of("select"))
        pairs = any(output.stat().st_size for output in made)
        if pairs and recipe.sections["check"] is not None:
            check.COMMAND.run(self._options_of("check"))
        self._say_what_is_there(made, pairs)

    def _say_what_is_there(self, made: list[Path], pairs: bool) -> None:
        print()
        if pairs:
            print(f"python -m mpo trains on {self.meta}")
        for output in made:
            if not output.stat().st_size:
                print(f"{output} is empty: its table above says what became of the rollouts")
        if self.recipe.sections["select"] is not None:
            if self.questions.stat().st_size:
                root = self.image_root()
                print(f"python -m rl trains on {self.questions} (--image_root {root})")
            else:
                print(f"{self.questions} is empty: its table above tells the accuracies")
        print(f"mmpr view {self.meta if pairs else self.verdicts} --output page.html shows it")


COMMAND = Command("build", "all of it from one recipe, resumable", add_arguments, run)
