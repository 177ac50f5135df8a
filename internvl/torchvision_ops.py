"""Let torchvision load where its C++ operators do not, as beside a CPU torch.

The torchvision wheel that pip finds is often the CUDA build. Beside a CPU torch its C++ library
does not load, and `import torchvision` (so most of transformers, too) dies with "operator
torchvision::nms does not exist", although its transforms, all that InternVL needs, are pure torch.
Only the schemas are missing: they are declared after that failure was seen, and the import is
tried once more.

`import internvl` installs this for our own processes; scripts/setup_env.py copies the file into an
environment, where every process has it (one of vLLM's workers, say). Every Python start pays for
that, so importing this file does no more than put a finder in front of sys.meta_path.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_keep_alive: list[Any] = []  # the declarations live as long as their Library object does


class _DeclaringLoader(importlib.machinery.SourceFileLoader):
    """Loads torchvision as usual, and where an operator is missing declares it first."""

    def exec_module(self, module: ModuleType) -> None:
        try:
            super().exec_module(module)
        except RuntimeError as error:
            if "torchvision::" not in str(error) or "does not exist" not in str(error):
                raise
            import torch

            library = torch.library.Library("torchvision", "FRAGMENT")
            for schema in SCHEMAS:
                library.define(schema)
            _keep_alive.append(library)
            super().exec_module(module)


class _TorchvisionFinder(importlib.abc.MetaPathFinder):
    """Swaps the loader of the one package; looking for it (find_spec) imports nothing."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != "torchvision":
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and isinstance(spec.loader, importlib.machinery.SourceFileLoader):
            spec.loader = _DeclaringLoader(spec.loader.name, spec.loader.path)
        return spec


sys.meta_path.insert(0, _TorchvisionFinder())
