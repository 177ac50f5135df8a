"""`cascade demo`: the whole cascade on a world made on the spot.

world -> sft-careful -> sft -> [evaluate] -> sample, verify, pair -> mpo -> [evaluate]
      -> sample, verify, select -> rl -> [evaluate] -> report.html, summary.json
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from cascade.stages import Driver, Manifest, Stage
from internvl.data import write_json
from internvl.errors import UserError

PRESETS = ("demo", "tiny")
CARELESS = "It looks clear from the chart"
STAGES = ("sft", "mpo", "rl")


@dataclass
class Demo:
    """A demo run: where it lives, its seed, and the recipe's options."""

    run: Path
    seed: int
    preset: str
    control: bool
    backend: str
    recipe: dict[str, Any]

    def stages(self) -> list[Stage]:
        """Every stage of the run, in order."""
        out = [
            self._stage(
                "world", ["cascade", "world", str(self.run / "world"), *self._world_options()],
                self.run / "world",
            ),
            self._train("sft-careful", "sft", self.run / "world" / "model", "world", self._sft()),
            self._evaluate("sft-careful"),
            self._train(
                "sft", "sft", self._model("sft-careful"), "sft-careful", self._sft("mixed")
            ),
            self._evaluate("sft"),
            *self._rollouts("pairs", "sft", "preference", "sample"),
            self._stage(
                "pair",
                [
                    "mmpr", "pair", self._file("pairs", "verdicts"), "--output",
                    self._file("pairs", "pairs"), "--seed", str(self.seed),
                    "--meta", str(self.run / "stages" / "pairs" / "meta.json"), "--name", "charts",
                    "--image-root", str(self.run / "world"), *self._flags("pair"),
                ],
                self.run / "stages" / "pair", "pairs.verify",
            ),
            self._train("mpo", "mpo", self._model("sft"), "pair", self._mpo()),
            self._evaluate("mpo"),
        ]  # fmt: skip
        if self.control:
            weights = {**self._mpo(), "loss_weights": [0.0, 0.0, 1.0]}
            out.append(self._train("control", "mpo", self._model("sft"), "pair", weights))
            out.append(self._evaluate("control"))
        bounds = {k: v for k, v in self.recipe["select"].items() if k != "n"}
        out += [
            *self._rollouts("select", "mpo", "rl", "sample", n=self.recipe["select"]["n"]),
            self._stage(
                "select",
                [
                    "mmpr", "select", self._file("select", "verdicts"), "--output",
                    self._file("select", "questions"), *_as_flags(bounds),
                ],
                self.run / "stages" / "selected", "select.verify",
            ),
            self._train("rl", "rl", self._model("mpo"), "select", self._rl()),
            self._evaluate("rl", background=False),
        ]  # fmt: skip
        return out

    # ---- the pieces ----

    def _stage(self, name: str, command: list[str], folder: Path, *needs: str) -> Stage:
        return Stage(name, ["-m", *command], folder, tuple(needs))

    def _model(self, stage: str) -> Path:
        return self.run / "stages" / stage

    def _file(self, stage: str, name: str) -> str:
        return str(self.run / "stages" / stage / f"{name}.jsonl")

    def _world_options(self) -> list[str]:
        return ["--seed", str(self.seed), *_as_flags(self.recipe["world"])]

    def _flags(self, section: str) -> list[str]:
        return _as_flags(self.recipe[section])

    def _sft(self, split: str = "sft") -> dict[str, Any]:
        world = self.run / "world"
        name = "sft-careful" if split == "sft" else "sft"
        files = {"train_file": str(world / f"{split}.jsonl")}
        if "stop_gold_probability" in self.recipe[name]:
            files["eval_file"] = str(world / "probe.jsonl")
        return {**files, **self.recipe[name]}

    def _mpo(self) -> dict[str, Any]:
        meta = self.run / "stages" / "pairs" / "meta.json"
        return {"train_file": str(meta), **self.recipe["mpo"]}

    def _rl(self) -> dict[str, Any]:
        return {
            "train_file": self._file("select", "questions"),
            "image_root": str(self.run / "world"),
            "sampler": self.backend,
            **self.recipe["rl"],
        }

    def _train(
        self, name: str, module: str, model: Path, needs: str, options: dict[str, Any]
    ) -> Stage:
        folder = self._model(name)
        config = {
            "model_name_or_path": str(model),
            "output_dir": str(folder),
            "seed": self.seed,
            **self.recipe["common"],
            **options,
        }
        file = self.run / "configs" / f"{name}.yaml"
        launch = ["accelerate.commands.launch", *LAUNCH, "-m", module, "--config", str(file)]
        return Stage(name, ["-m", *launch], folder, (needs,), config, file)

    def _rollouts(
        self, name: str, model: str, split: str, section: str, **override: Any
    ) -> list[Stage]:
        """sample and verify: the model's own completions of a split, judged."""
        options = {**self.recipe[section], **override}
        sample = [
            "mmpr", "sample", str(self.run / "world" / f"{split}.jsonl"),
            "--model", str(self._model(model)), "--output", self._file(name, "rollouts"),
            "--seed", str(self.seed), "--backend", self.backend, *_as_flags(options),
        ]  # fmt: skip
        verify = [
            "mmpr", "verify", self._file(name, "rollouts"), "--output",
            self._file(name, "verdicts"),
        ]  # fmt: skip
        folder = self.run / "stages" / name
        return [
            self._stage(f"{name}.sample", sample, folder, model),
            # both write into one folder: verify's own is a marker's, so that nothing is emptied
            self._stage(f"{name}.verify", verify, folder / ".verify", f"{name}.sample"),
        ]

    def _evaluate(self, stage: str, background: bool = True) -> Stage:
        folder = self.run / "eval" / stage
        command = [
            "cascade", "evaluate", str(self.run / "world" / "heldout.jsonl"),
            "--model", str(self._model(stage)), "--output", str(folder), "--seed", str(self.seed),
            "--backend", self.backend, "--count", f"careless={CARELESS}", *self._flags("evaluate"),
        ]  # fmt: skip
        name = f"evaluate.{stage}"
        return Stage(name, ["-m", *command], folder, (stage,), background=background)


# one thread a process: the models are tiny, the second core has the data loader or an evaluation,
# and on one machine the result is the same to the byte
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}

# one process, no questions asked; what accelerate would otherwise warn about, and without its own
# traceback below a stage's one line
LAUNCH = ["--quiet", "--num_processes", "1", "--num_machines", "1", "--mixed_precision", "no",
          "--dynamo_backend", "no"]  # fmt: skip


def _as_flags(options: dict[str, Any]) -> list[str]:
    return [part for key, value in options.items() for part in (f"--{key}", str(value))]


def load_recipe(preset: str) -> dict[str, Any]:
    """A preset's options, from the recipes that come with the package."""
    if preset not in PRESETS:
        raise UserError(f"preset {preset!r} is not one of {', '.join(PRESETS)}")
    text = resources.files("cascade").joinpath("recipes", f"{preset}.yaml").read_text("utf-8")
    recipe = yaml.safe_load(text)
    assert isinstance(recipe, dict)
    return recipe


def run_demo(run: Path, *, seed: int, preset: str, control: bool, backend: str) -> None:
    """Run what is left of the demo, then write summary and report and print the table."""
    from rich.console import Console

    from cascade.report import collect, write_report
    from cascade.terminal import stage_table

    demo = Demo(run, seed, preset, control, backend, load_recipe(preset))
    manifest = Manifest(run / "manifest.json", seed, preset)
    Driver(manifest, env=ENVIRONMENT).run_stages(demo.stages())
    write_json(run / "summary.json", summary(run, manifest, control))
    report = write_report(run)
    console = Console()
    console.print(stage_table(collect(run)))
    console.print(f"{manifest.seconds:.0f} s in all; the page: {report}")


def summary(run: Path, manifest: Manifest, control: bool) -> dict[str, Any]:
    """The run's result in a few numbers."""

    def row(name: str) -> dict[str, Any]:
        metrics = json.loads((run / "eval" / name / "metrics.json").read_text(encoding="utf-8"))
        return {k: metrics[k] for k in ("name", "greedy", "sampled", "sampled_se", "format", "n")}

    out: dict[str, Any] = {
        "seed": manifest.data["seed"],
        "seconds": manifest.seconds,
        "stages": [row(name) for name in STAGES],
    }
    if control:
        out["control"] = row("control")
    return out
