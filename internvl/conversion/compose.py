"""One InternVL of two checkpoints: a language model, and another's vision tower.

    LLM      a causal language model (Qwen2, Qwen3, Qwen3-MoE, LLaMA), or an InternVL for its own
    VISION   an InternVL: vision tower, projector where it fits, tiles, chat template

    internvl compose Qwen3-8B InternVL3_5-2B-HF OUT

as InternVL is begun, and as it grows (arXiv 2412.05271, "Progressive Scaling Strategy"): a ViT that
was trained with a small language model goes under a large one without being trained again. A
projector goes with it where the two language models are equally wide; otherwise a new one is made,
which `stage: mlp_warmup` trains. A bare language model's tokenizer gets InternVL's tokens
(conversion/adoption.py). Tensors are copied as byte ranges, so a model of any size is composed
within a few megabytes beyond its new projector, and the same folders give the same bytes.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from internvl.conversion.adoption import Adopted, adopt_processor, grown, mean_rows
from internvl.conversion.convert import whole_folder, write_config, write_targets
from internvl.conversion.heads import TIED, same_bytes, untied
from internvl.conversion.layouts import EMBEDDINGS, HEAD, hf_name, hf_shapes, plan_same
from internvl.conversion.processors import PROCESSOR_FILES
from internvl.conversion.published import DTYPES, LANGUAGE_MODELS, hf_text
from internvl.conversion.shards import HeldWeights, JoinedWeights, Weights, open_weights, read_json
from internvl.errors import UserError
from internvl.folders import CHAT_TYPE, HF_TYPE, read_config_json, require_hf_layout
from internvl.hashing import model_fingerprint
from internvl.parts import PARTS, part_of

if TYPE_CHECKING:
    from transformers import InternVLConfig

RECORD = "composed.json"
FORMAT = 1
_TOWER, _PROJECTOR, _LANGUAGE = PARTS
# InternLM2 is remote code's; as an InternVL that `convert` brought in it is LLaMA
_BARE = tuple(name for name in LANGUAGE_MODELS if not name.startswith("InternLM2"))
# what makes a tile and its visual tokens: an InternVL's processor must cut what the tower is for
_TILE = ("image_size", "patch_size", "num_channels")
_TOKENS = ("downsample_ratio", "image_seq_length")
_PIXELS = ("size", "resample", "rescale_factor", "image_mean", "image_std")
# of the model's config, what comes with the tower
_WITH_TOWER = ("vision_feature_layer", "vision_feature_select_strategy", "projector_hidden_act")


@dataclass(frozen=True)
class Composition:
    """A language model and a vision tower that go together, by their configurations.

    config: of the result. tied: whether the head is said to be the embeddings; said: by config.json
    itself. adopted: the processor of a bare language model; None for an InternVL, which has one.
    fits: whether the projector of `vision` does.
    """

    llm: Path
    vision: Path
    config: dict[str, Any]
    tied: bool
    said: bool
    adopted: Adopted | None
    fits: bool
    seed: int

    def described(self) -> str:
        """What comes from where, in one line."""
        parts, vision = _full(self.config), self.vision
        tower = parts.vision_config
        line = f"vision tower ({tower.num_hidden_layers} layers of {tower.hidden_size})"
        if self.fits:
            line += f" and projector from {vision}"
        else:
            wide = _config_of(vision).text_config.hidden_size
            line += (
                f" from {vision}; projector made anew (seed {self.seed}): that of {vision} is for "
                f"a language model of {wide}"
            )
        if self.adopted is None:
            return f"{line}; language model, tokenizer and tile processor from {self.llm}"
        head = "tied to the embeddings" if self.tied else "of its own"
        return (
            f"{line}; language model (head {head}) from {self.llm}, {self.adopted.described()}; "
            f"tile processor and chat template from {vision}"
        )

    def record(self) -> dict[str, Any]:
        """What the result depends on: the two folders' contents and the seed of a new projector."""
        return {
            "format": FORMAT,
            "language_model": model_fingerprint(str(self.llm)),
            "vision": model_fingerprint(str(self.vision)),
            "projector": "kept" if self.fits else {"seed": self.seed},
            "chat_tokens_added": bool(self.adopted and self.adopted.chat_tokens_added),
        }


def check_composition(
    llm: str | Path, vision: str | Path, *, seed: int = 0, add_chat_tokens: bool = False
) -> Composition:
    """What two folders would give, by configurations and tokenizers alone; no weight is read.

    seed: of a new projector. add_chat_tokens: see `adopt_processor`. Raises `UserError` naming what
    does not go together.
    """
    llm, vision = Path(llm), Path(vision)
    require_hf_layout(vision)
    theirs = _config_of(vision)
    if _is_bare(llm):
        raw = read_json(llm / "config.json")
        _check_bare(llm, raw)
        adopted = adopt_processor(
            llm, vision, vocab_size=raw["vocab_size"], add_chat_tokens=add_chat_tokens
        )
        tied, said = bool(raw.get(TIED, False)), TIED in raw  # false is the default of each family
        config = _bare_config(raw, theirs, adopted, tied, _dtype(llm, raw))
    else:
        if add_chat_tokens:
            raise UserError(f"{llm} is an InternVL, which has its tokens: leave out the adding")
        adopted, raw = None, require_hf_layout(llm)
        ours = _config_of(llm)
        _refuse_other_tiles((llm, vision), (ours, theirs))
        tied, said = bool(ours.tie_word_embeddings), TIED in raw
        dtype = _dtype(llm, raw)
        config = {
            **raw,
            **{name: getattr(theirs, name) for name in _WITH_TOWER},
            "vision_config": {**theirs.vision_config.to_diff_dict(), "dtype": dtype},
            "dtype": dtype,
        }
    fits = _full(config).text_config.hidden_size == theirs.text_config.hidden_size
    return Composition(llm, vision, config, tied, said, adopted, fits, seed)


def compose(
    composition: Composition,
    out: str | Path,
    *,
    allow_pickle: bool = False,
    progress: bool = True,
) -> None:
    """Write the composed checkpoint, whole, to the new folder `out`.

    allow_pickle: read pytorch_model*.bin too (tensors only). Raises `UserError` for weights that
    are not those of their configurations; `out` is then not there.
    """
    out = Path(out)
    joined = _joined(composition, allow_pickle)
    with whole_folder(out) as partial:
        targets, weights, config = _planned(composition, joined)
        if composition.adopted:
            composition.adopted.save(partial)
        else:
            for name in PROCESSOR_FILES:
                if (composition.llm / name).is_file():
                    shutil.copyfile(composition.llm / name, partial / name)
        write_config(partial / "config.json", config)
        write_config(partial / RECORD, composition.record())
        write_targets(targets, partial, weights, progress=progress)


def compose_once(composition: Composition, out: Path, *, progress: bool = True) -> bool:
    """Compose `out` unless it is there already; returns whether it was made now.

    Raises `UserError` where `out` was made of other folders or with another seed.
    """
    if not (out / RECORD).is_file():
        compose(composition, out, progress=progress)
        return True
    if read_json(out / RECORD) != composition.record():
        raise UserError(
            f"{out}: was composed of other checkpoints, or with another seed; remove it, or give "
            "another output_dir"
        )
    return False


# ------------------------------------------------------------------------- configurations


def _is_bare(folder: Path) -> bool:
    """Whether a folder holds a model that is no InternVL; raises `UserError` for no model."""
    if not (folder / "config.json").is_file():
        read_config_json(folder)  # says what is missing
    return read_json(folder / "config.json").get("model_type") not in (HF_TYPE, CHAT_TYPE)


def _config_of(folder: Path) -> InternVLConfig:
    return _full(read_config_json(folder))


def _full(config: Mapping[str, Any]) -> InternVLConfig:
    """An HF-native config with its defaults."""
    from transformers import InternVLConfig

    return InternVLConfig.from_dict(dict(config))


def _check_bare(folder: Path, raw: dict[str, Any]) -> None:
    """Raise `UserError` for a language model that no InternVL is built on."""
    file, architectures = folder / "config.json", raw.get("architectures") or []
    if not architectures or architectures[0] not in _BARE:
        said = ", ".join(map(str, architectures)) or "nothing"
        raise UserError(
            f"{file}: architectures says {said}; expected an InternVL, or a causal language model "
            f"that one is built on: {', '.join(_BARE)}"
        )
    if raw.get("quantization_config"):
        raise UserError(f"{file}: the weights are quantized; take the original ones")
    for key in ("hidden_size", "vocab_size"):
        if not isinstance(raw.get(key), int):
            raise UserError(f"{file}: {key} is {raw.get(key)!r}, expected a number")


def _dtype(folder: Path, raw: dict[str, Any]) -> str:
    dtype = str(raw.get("dtype") or raw.get("torch_dtype") or "float32")
    if dtype not in DTYPES:
        known = ", ".join(DTYPES)
        raise UserError(f"{folder / 'config.json'}: dtype is {dtype!r}, expected one of {known}")
    return dtype


def _bare_config(
    raw: dict[str, Any], vision: InternVLConfig, adopted: Adopted, tied: bool, dtype: str
) -> dict[str, Any]:
    """config.json of a bare language model with a vision tower."""
    from transformers import InternVLConfig

    ids = {"eos_token_id": adopted.eos_id, "pad_token_id": adopted.pad_id}
    said = {**ids, TIED: tied, "dtype": dtype}
    full = InternVLConfig(
        vision_config={**vision.vision_config.to_diff_dict(), "dtype": dtype},
        text_config={**hf_text(raw), **said, "vocab_size": adopted.vocab_size},
        image_token_id=adopted.image_token_id,
        architectures=["InternVLForConditionalGeneration"],
        **{name: getattr(vision, name) for name in (*_TOKENS, *_WITH_TOWER)},
        **said,
    )
    return dict(full.to_diff_dict())


def _refuse_other_tiles(
    folders: tuple[Path, Path], configs: tuple[InternVLConfig, InternVLConfig]
) -> None:
    """Raise `UserError` where tiles, patches, visual tokens or normalisation differ."""
    from internvl.chat import load_processor

    for name in (*_TILE, *_TOKENS):
        holders: list[Any] = [c if name in _TOKENS else c.vision_config for c in configs]
        _refuse_other(name, folders, [getattr(holder, name) for holder in holders])
    processors: list[Any] = [load_processor(str(folder)).image_processor for folder in folders]
    for name in _PIXELS:
        _refuse_other(name, folders, [_plain(getattr(one, name)) for one in processors])


def _plain(value: Any) -> Any:
    """A processor's value as it compares: sequences as lists, sizes as dictionaries."""
    if isinstance(value, Mapping):
        return dict(value)
    return list(value) if isinstance(value, list | tuple) else value


def _refuse_other(name: str, folders: tuple[Path, Path], values: list[Any]) -> None:
    (llm, vision), (ours, theirs) = folders, values
    if ours != theirs:
        raise UserError(
            f"{vision}: its {name} is {theirs}, that of {llm} {ours}: tiles made for one are "
            "nothing to the other's vision tower"
        )


# -------------------------------------------------------------------------------- weights


def _joined(composition: Composition, allow_pickle: bool) -> JoinedWeights:
    """The tensors that are taken of each folder, by save_pretrained's names."""
    prefix = "language_model." if composition.adopted else ""
    places: dict[str, tuple[Weights, str]] = {}
    llm = open_weights(composition.llm, allow_pickle=allow_pickle)
    for name in llm.tensors:
        if name.endswith(".rotary_emb.inv_freq"):  # a buffer that old LLaMA folders hold
            continue
        if prefix or part_of(name) == _LANGUAGE:
            places[hf_name(prefix + name)] = (llm, name)
    vision = open_weights(composition.vision, allow_pickle=allow_pickle)
    taken = (_TOWER, _PROJECTOR) if composition.fits else (_TOWER,)
    for name in vision.tensors:
        if part_of(name) in taken:
            places[hf_name(name)] = (vision, name)
    if not composition.fits:
        projector = _new_projector(composition)
        places |= {name: (projector, name) for name in projector.tensors}
    return JoinedWeights(places)


def _new_projector(composition: Composition) -> HeldWeights:
    """A projector that starts as torch's layers do (as the published code's does)."""
    import torch
    from transformers.models.internvl.modeling_internvl import InternVLMultiModalProjector

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(composition.seed)
        projector = InternVLMultiModalProjector(_full(composition.config))
    dtype = getattr(torch, composition.config["dtype"])
    return HeldWeights(
        {
            f"multi_modal_projector.{name}": tensor.detach().to(dtype)
            for name, tensor in projector.state_dict().items()
        }
    )


def _planned(
    composition: Composition, weights: JoinedWeights
) -> tuple[list[Any], Weights, dict[str, Any]]:
    """What the result's weights are made of, from where, and its configuration."""
    config, llm = composition.config, composition.llm
    if HEAD in weights.tensors and composition.tied:
        if same_bytes(weights, HEAD, EMBEDDINGS):
            weights = weights.without(HEAD)
        elif composition.said:
            raise UserError(
                f"{llm}: tie_word_embeddings is true, but the stored head is not the embeddings; "
                "set it to false in config.json if the head was trained"
            )
        else:
            config = untied(config)  # see heads
    adopted, shapes = composition.adopted, hf_shapes(config)
    grow = [name for name in (EMBEDDINGS, HEAD) if name in shapes] if adopted else []
    if adopted:
        shapes |= {name: (adopted.llm_vocab_size, shapes[name][1]) for name in grow}
    try:
        targets = plan_same(weights.tensors, shapes)
    except UserError as error:
        raise UserError(f"{llm}, {composition.vision}: {error}") from None
    if adopted is None:
        return targets, weights, config
    made = {f"{name} (new rows)": mean_rows(weights, name, adopted) for name in grow}
    held = HeldWeights(made)
    places: dict[str, tuple[Weights, str]] = {name: (weights, name) for name in weights.tensors}
    places |= {name: (held, name) for name in made}
    grew = [grown(target, adopted) if target.name in grow else target for target in targets]
    return grew, JoinedWeights(places), config
