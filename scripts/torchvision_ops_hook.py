"""Declare the torchvision operators whose C++ library does not load beside a CPU torch.

Why: the torchvision wheel that pip finds is often the CUDA build. Beside a CPU torch its C++
library does not load, and `import torchvision` dies with "operator torchvision::nms does not
exist", although its transforms (all that InternVL needs) are pure torch. Only the schemas are
missing.

setup_env.py copies this file into a venv's site-packages, next to a .pth file that imports it, and
only where `import torchvision` was seen to fail. It must sit in the environment rather than in our
code because vLLM starts worker processes of its own. Every Python start pays for it, so at import
this file does no more than put a finder in front of sys.meta_path.
"""

import importlib.abc
import importlib.machinery
import sys

SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_keep_alive = []  # the declarations live as long as their Library object does


class _DeclaringLoader(importlib.machinery.SourceFileLoader):
    """Loads torchvision as usual, after declaring the operators it expects."""

    def exec_module(self, module):
        import torch

        # torch.library's fragments may be added to: a torchvision that brings its own
        # operators would clash, but the hook is installed only where it brings none.
        library = torch.library.Library("torchvision", "FRAGMENT")
        for schema in SCHEMAS:
            library.define(schema)
        _keep_alive.append(library)
        super().exec_module(module)


class _TorchvisionFinder(importlib.abc.MetaPathFinder):
    """Swaps the loader of the one package; looking for it (find_spec) imports nothing."""

    def find_spec(self, fullname, path=None, target=None):
        if fullname != "torchvision":
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and isinstance(spec.loader, importlib.machinery.SourceFileLoader):
            spec.loader = _DeclaringLoader(spec.loader.name, spec.loader.path)
        return spec


sys.meta_path.insert(0, _TorchvisionFinder())
