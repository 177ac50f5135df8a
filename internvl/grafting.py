"""Progressive scaling: the vision tower of one checkpoint under another's language model.

    donor   vision tower, projector (where it fits)      trained with a small language model
    base    language model, tokenizer, tile processor    a larger one

as InternVL 2.5 grows (arXiv 2412.05271, "Progressive Scaling Strategy"): a ViT that was trained
with a small language model goes under a large one without being trained again. A projector goes
with it where the two language models are equally wide; otherwise a new one is made, which
`stage: mlp_warmup` trains.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoModel, InternVLConfig
from transformers.models.internvl.modeling_internvl import InternVLMultiModalProjector

from internvl.chat import load_processor
from internvl.conversion.shards import open_weights
from internvl.errors import UserError
from internvl.folders import require_hf_layout
from internvl.model import InternVLForConditionalGeneration
from internvl.parts import PARTS, part_of

_TOWER, _PROJECTOR = PARTS[:2]
_MODULES = {_TOWER: "vision_tower.", _PROJECTOR: "multi_modal_projector."}
# what makes a tile and its visual tokens: the base's processor must cut what the tower was made for
_TILE = ("image_size", "patch_size", "num_channels")
_TOKENS = ("downsample_ratio", "image_seq_length")
_PIXELS = ("size", "resample", "rescale_factor", "image_mean", "image_std")
# of the model's config, what comes with the tower
_WITH_TOWER = ("vision_feature_layer", "vision_feature_select_strategy", "projector_hidden_act")


@dataclass(frozen=True)
class Graft:
    """A donor that fits a base. fits: whether its projector does, too."""

    base: Path
    donor: Path
    config: InternVLConfig
    fits: bool

    def described(self, seed: int) -> str:
        """What comes from where, in one line."""
        vision, donor = self.config.vision_config, self.donor
        tower = f"vision tower ({vision.num_hidden_layers} layers of {vision.hidden_size})"
        if self.fits:
            parts = f"{tower} and projector from {donor}"
        else:
            wide = self.config.text_config.hidden_size
            parts = (
                f"{tower} from {donor}; projector made anew (seed {seed}): that of {donor} is for "
                f"a language model of {wide}"
            )
        return f"{parts}; language model, tokenizer and tile processor from {self.base}"


def check_graft(base: Path, donor: Path) -> Graft:
    """What a donor can give a base, by their configurations alone.

    Raises `UserError` where tiles, patches or visual tokens differ, or pixels are normalised
    otherwise.
    """
    configs = []
    for folder in (base, donor):
        require_hf_layout(folder)
        configs.append(InternVLConfig.from_pretrained(folder))
    ours, theirs = configs
    folders = (base, donor)
    for name in (*_TILE, *_TOKENS):
        holders: list[Any] = [c if name in _TOKENS else c.vision_config for c in configs]
        _refuse_other(name, folders, [getattr(holder, name) for holder in holders])
    processors: list[Any] = [load_processor(str(folder)).image_processor for folder in folders]
    for name in _PIXELS:
        _refuse_other(name, folders, [_plain(getattr(one, name)) for one in processors])
    fits = ours.text_config.hidden_size == theirs.text_config.hidden_size
    return Graft(base, donor, theirs, fits)


def _plain(value: Any) -> Any:
    """A processor's value as it compares: sequences as lists, sizes as dictionaries."""
    if isinstance(value, Mapping):
        return dict(value)
    return list(value) if isinstance(value, list | tuple) else value


def _refuse_other(name: str, folders: tuple[Path, Path], values: list[Any]) -> None:
    (base, donor), (ours, theirs) = folders, values
    if ours != theirs:
        raise UserError(
            f"{donor}: its {name} is {theirs}, that of {base} {ours}: tiles made for one are "
            "nothing to the other's vision tower"
        )


def graft_vision(model: InternVLForConditionalGeneration, graft: Graft, *, seed: int) -> None:
    """Put the donor's vision tower, and its projector or a new one, into a model of the base.

    Only these tensors of the donor are read. seed: of a new projector, which starts as torch's
    layers do (as the published code's does). Raises `UserError` for weights that do not match.
    """
    parts = (_TOWER, _PROJECTOR) if graft.fits else (_TOWER,)
    weights = _read_parts(graft.donor, parts)
    config: Any = model.config
    for name in _WITH_TOWER:
        setattr(config, name, getattr(graft.config, name))
    with torch.device("meta"):
        tower = AutoModel.from_config(graft.config.vision_config, attn_implementation="sdpa")
    _fill(tower, weights[_TOWER], graft.donor)
    config.vision_config = tower.config
    if graft.fits:
        with torch.device("meta"):
            projector = InternVLMultiModalProjector(config)
        _fill(projector, weights[_PROJECTOR], graft.donor)
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            projector = InternVLMultiModalProjector(config)
    place = next(model.parameters())
    inner: Any = model.model
    inner.vision_tower = tower.to(place.device, place.dtype).train(model.training)
    inner.multi_modal_projector = projector.to(place.device, place.dtype).train(model.training)


def _read_parts(folder: Path, parts: tuple[str, ...]) -> dict[str, dict[str, Tensor]]:
    """The tensors of some parts of a checkpoint, by their names within the part."""
    found: dict[str, dict[str, Tensor]] = {part: {} for part in parts}
    open_weights(folder, allow_pickle=False)  # whole, and not a pickle
    try:
        for file in sorted(folder.glob("model*.safetensors")):
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118 - it is no mapping
                    part = part_of(name)
                    if part in found:
                        found[part][name.partition(_MODULES[part])[2]] = opened.get_tensor(name)
    except (OSError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{folder}: the weights cannot be loaded: {reason}") from None
    return found


def _fill(module: nn.Module, weights: dict[str, Tensor], folder: Path) -> None:
    """Give a module without storage its weights; all of them, and no others."""
    try:
        module.load_state_dict(weights, strict=True, assign=True)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{folder}: its weights are not those of its config: {reason}") from None
    for parameter in module.parameters():
        parameter.requires_grad_(True)
