"""Imports go one way: read from the sources with ast, so that no package has to be importable.

No stage imports another, nothing imports the packages above it, and the heavy optional libraries
are named in one place each (see CONTRIBUTING.md).
"""

import ast
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MAY_IMPORT = {
    "rewards": set(),
    "internvl": set(),
    "training": {"internvl"},
    "sft": {"internvl", "training", "rewards"},
    "mpo": {"internvl", "training"},
    "mmpr": {"internvl", "rewards"},
    "rl": {"internvl", "training", "rewards"},
    "cascade": {"internvl", "rewards"},
}
ONE_PLACE = ("vllm", "wandb", "deepspeed", "ray")
# Of rewards only the client of an endpoint, which the data tools call; training knows no rewards.
SFT_OF_REWARDS = ("sft/data_tools/", "rewards.endpoint")
# The verifiers run in worker processes of their own, which must start in no time.
NO_TORCH = "rewards"


@dataclass(frozen=True)
class Import:
    """One imported module: `file` is relative to the tree, `lazy` = not run at import time."""

    file: str
    line: int
    module: str
    lazy: bool

    @property
    def top(self) -> str:
        return self.module.split(".")[0]

    def __str__(self) -> str:
        return f"{self.file}:{self.line} imports {self.module}"


def named_modules(node: ast.AST, package: str) -> list[str]:
    """The absolute names that one statement imports; `package` is the dotted package it is in."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        if node.level == 0:
            return [node.module or ""]
        parts = package.split(".")
        base = parts[: len(parts) - node.level + 1]
        if node.module:
            return [".".join([*base, node.module])]
        return [".".join([*base, alias.name]) for alias in node.names]
    if isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
        called = ast.unparse(node.func)
        if called in ("import_module", "importlib.import_module", "__import__"):
            return [str(node.args[0].value)]
    return []


def walk(node: ast.AST, lazy: bool = False) -> Iterator[tuple[ast.AST, bool]]:
    """Every node, with whether it runs only later (in a function) or never (type checking)."""
    for child in ast.iter_child_nodes(node):
        inner = lazy or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            inner = True
        yield child, inner
        yield from walk(child, inner)


def read_imports(root: Path) -> list[Import]:
    found = []
    for package in MAY_IMPORT:
        for path in sorted((root / package).rglob("*.py")):
            file = path.relative_to(root)
            dotted = ".".join(file.parent.parts)
            for node, lazy in walk(ast.parse(path.read_text(encoding="utf-8"), str(path))):
                for module in named_modules(node, dotted):
                    found.append(Import(file.as_posix(), node.lineno, module, lazy))
    return found


def wrong_directions(imports: list[Import]) -> list[str]:
    wrong = []
    for item in imports:
        own = item.file.split("/")[0]
        if item.top in MAY_IMPORT and item.top != own and item.top not in MAY_IMPORT[own]:
            allowed = ", ".join(sorted(MAY_IMPORT[own])) or "nothing of ours"
            wrong.append(f"{item}: {own} may import {allowed}")
        folder, module = SFT_OF_REWARDS
        if (own, item.top) == ("sft", "rewards") and not (
            item.file.startswith(folder) and item.module.startswith(module)
        ):
            wrong.append(f"{item}: only {folder} may, and only {module}")
        if item.top in ("tests", "examples"):
            wrong.append(f"{item}, which is not installed")
        if own == NO_TORCH and item.top in ("torch", "transformers"):
            wrong.append(f"{item}: {NO_TORCH} works without torch")
    return wrong


def scattered_libraries(imports: list[Import]) -> list[str]:
    wrong = []
    files = defaultdict(set)
    for item in imports:
        if item.top in ONE_PLACE:
            files[item.top].add(item.file)
            if not item.lazy:
                wrong.append(f"{item} at the top: it is optional, import it inside the function")
        if item.top == "vllm" and not (
            item.file.startswith("internvl/") and "sampler" in Path(item.file).name
        ):
            wrong.append(f"{item}: only internvl's sampler knows vLLM")
    for library, places in files.items():
        # vLLM's sampler may be split into an in-process and a server half; one package it stays.
        if library != "vllm" and len(places) > 1:
            wrong.append(f"{library} is imported in more than one place: {sorted(places)}")
    return wrong


def test_imports_go_one_way():
    imports = read_imports(ROOT)
    assert imports, "no package was found: the test would prove nothing"
    assert wrong_directions(imports) == []


def test_optional_libraries_have_one_place():
    assert scattered_libraries(read_imports(ROOT)) == []


def test_every_package_is_known():
    folders = {path.parent.name for path in ROOT.glob("*/__init__.py")} - {"tests", "examples"}
    assert folders <= set(MAY_IMPORT), "a new package: add its line to MAY_IMPORT"


def test_verifiers_start_without_torch():
    modules = sorted(
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for path in (ROOT / "rewards").glob("*.py")
        if path.stem != "__main__"
    )
    code = (
        "import importlib, sys\n"
        f"for name in {modules!r}: importlib.import_module(name.removesuffix('.__init__'))\n"
        "sys.exit('torch was imported' if 'torch' in sys.modules else 0)"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


# --- the checks themselves can fail --------------------------------------------------------------


def tree(root: Path, **files: str) -> list[Import]:
    """Write a synthetic tree (`pkg__name` -> pkg/name.py) and read its imports."""
    for name, text in files.items():
        path = root / (name.replace("__", "/") + ".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return read_imports(root)


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("rewards__match", "import internvl\n"),
        ("rewards__match", "from torch import nn\n"),
        ("internvl__chat", "from training.trainer import PackedTrainer\n"),
        ("training__trainer", "def f():\n    from mpo import losses\n"),
        ("sft__train", "import mpo.losses as m\n"),
        ("mpo__train", "from rewards import verify\n"),
        ("sft__trainer", "from rewards.endpoint import Endpoint\n"),
        ("sft__data_tools__scores", "from rewards import verify\n"),
        ("mmpr__cli", "if TYPE_CHECKING:\n    from training import trainer\n"),
        ("rl__train", "from mpo.losses import dpo_loss\n"),
        ("rl__deep__train", "from ... import mpo\n"),
        ("cascade__stages", "import importlib\nimportlib.import_module('rl')\n"),
        ("cascade__stages", "from tests import tiny\n"),
    ],
)
def test_a_wrong_direction_is_found(tmp_path, file, text):
    assert len(wrong_directions(tree(tmp_path, **{file: text}))) == 1


def test_allowed_directions_are_quiet(tmp_path):
    imports = tree(
        tmp_path,
        rl__train="from internvl import chat\nimport training, rewards\nfrom . import losses\n",
        rl__deep__train="from ..losses import policy_loss\nimport torch\n",
        internvl__sampler="def f():\n    import vllm\n",
    )
    assert len(imports) == 7
    assert wrong_directions(imports) == []
    assert scattered_libraries(imports) == []


@pytest.mark.parametrize(
    "files",
    [
        {"internvl__vllm_sampler": "import vllm\n"},
        {"rl__rollouts": "def f():\n    from vllm import LLM\n"},
        {
            "training__report": "def f():\n    import wandb\n",
            "rl__x": "def f():\n    import wandb\n",
        },
        {"training__trainer": "import deepspeed\n"},
    ],
)
def test_a_scattered_library_is_found(tmp_path, files):
    assert len(scattered_libraries(tree(tmp_path, **files))) == 1
