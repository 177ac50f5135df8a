"""The model layer: the only package that knows tiles, image tokens, lm_head and vLLM.

Submodules are imported by name (`from internvl.data import read_rows`), so that the light ones
(`data`, `errors`) never pay for torch.
"""

import internvl.torchvision_ops  # noqa: F401  (before anything imports torchvision)
