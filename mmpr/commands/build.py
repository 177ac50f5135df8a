"""`mmpr build`: all commands in one go, from a recipe; verification runs beside the sampling."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from internvl.data import input_folder, write_json
from internvl.errors import UserError
from internvl.terminal import Command
from mmpr.commands import check, dropout, pair, sample, select, verify
from mmpr.commands.shared import open_quarantine, told_to_the_user
from mmpr.following import FollowingVerifier
from mmpr.recipe import Recipe, read_recipe
from mmpr.verify import VerifyReport
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

    def with_images(self, *more: str) -> list[str]:
        """The options that say where image paths start."""
        return [f"--image-root={self.image_root()}", *more]

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
        wanted = {"questions": str(self.recipe.questions), **self._verify_facts()}
        path = self.recipe.output / "build.json"
        if path.exists():
            found = json.loads(path.read_bytes())
            for key, value in wanted.items():
                if found.get(key) != value:
                    raise UserError(
                        f"{self.recipe.file}: {key} is {value!r} now, but {self.recipe.output} was "
                        f"begun with {found.get(key)!r}; give another --output"
                    )
        for name, source, output in (
            ("pair", self.verdicts, self.pairs),
            ("dropout", self.verdicts, self.dropout),
            ("select", self.verdicts, self.questions),
            ("check", self.meta, None),
        ):
            if self.recipe.sections[name] is not None:
                more = [f"--model={self.recipe.model}"] if name == "dropout" else []
                self.options(_COMMANDS[name], source, output, *more)
        write_json(path, wanted)

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
        return {f"verify {key}": str(value) for key, value in kept.items()}

    def sample_and_verify(self) -> None:
        """Sample what is missing; each batch on disk is verified while the next is sampled."""
        args = self._verify_options()
        report = VerifyReport()
        quarantine = open_quarantine(args)
        with told_to_the_user():
            verifier = make_verifier(args)
        with (
            verifier.pool,
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
        made: list[Path] = []
        for name, output in (("pair", self.pairs), ("dropout", self.dropout)):
            if recipe.sections[name] is None:
                continue
            label = recipe.name if name == "pair" else f"{recipe.name}_dropout"
            more = self.with_images(
                f"--meta={self.meta}", f"--name={label}", f"--seed={recipe.seed}"
            )
            if name == "dropout":
                more.append(f"--model={recipe.model}")
            command = _COMMANDS[name]
            command.run(self.options(command, self.verdicts, output, *more))
            made.append(output)
        if made and recipe.sections["check"] is not None:
            check.COMMAND.run(self.options(check.COMMAND, self.meta, None))
        if recipe.sections["select"] is not None:
            select.COMMAND.run(self.options(select.COMMAND, self.verdicts, self.questions))
        self._say_what_is_there(made)

    def _say_what_is_there(self, made: list[Path]) -> None:
        print()
        if made:
            print(f"python -m mpo trains on {self.meta}")
        if self.recipe.sections["select"] is not None:
            root = self.image_root()
            print(f"python -m rl trains on {self.questions} (--image_root {root})")
        print(f"mmpr view {self.meta if made else self.verdicts} --output page.html shows it")


COMMAND = Command("build", "all of it from one recipe, resumable", add_arguments, run)
