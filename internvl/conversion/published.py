"""config.json of the published layout (InternVLChatModel) to the HF-native one, and back.

Every key is mapped, or refused by name where transformers' InternVL would compute something else,
or of no effect on the result (training switches, generation defaults of old transformers). Nothing
is lost either way: `convert` keeps the other layout's files beside the converted ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn

from internvl.conversion.layouts import Dimensions
from internvl.errors import UserError
from internvl.positions import POSITION_STEPS

Config = dict[str, Any]

# llm_config.architectures[0] -> model_type of the text_config
LANGUAGE_MODELS = {
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "Qwen3MoeForCausalLM": "qwen3_moe",
    "LlamaForCausalLM": "llama",
    "InternLM2ForCausalLM": "llama",
}
ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "llama3")
DTYPES = ("float32", "float16", "bfloat16")

# Defaults of the published configuration classes: a key at its default may be left out.
_CHAT_DEFAULTS: Config = {
    "downsample_ratio": 0.5,
    "dynamic_image_size": False,
    "force_image_size": None,
    "max_dynamic_patch": 6,
    "min_dynamic_patch": 1,
    "pad2square": False,
    "ps_version": "v1",
    "select_layer": -1,
    "use_backbone_lora": 0,
    "use_llm_lora": 0,
    "use_thumbnail": False,
}
# keys that transformers 4 or the published training code wrote, of no effect on what is computed
_NO_EFFECT = {
    *("_commit_hash", "_name_or_path", "architectures", "auto_map", "hidden_size", "image_fold"),
    *("model_type", "output_attentions", "transformers_version"),
}
_READ = {
    *("dtype", "llm_config", "rope_pos_id_stride", "rope_pos_id_version", "system_message"),
    *("template", "tie_word_embeddings", "torch_dtype", "vision_config"),
}
_VISION_DEFAULTS: Config = {
    "attention_dropout": 0.0,
    "dropout": 0.0,
    "hidden_act": "gelu",
    "hidden_size": 3200,
    "image_size": 224,
    "initializer_factor": 0.1,
    "initializer_range": 0.02,
    "intermediate_size": 12800,
    "layer_norm_eps": 1e-6,
    "norm_type": "rms_norm",
    "num_attention_heads": 25,
    "num_channels": 3,
    "num_hidden_layers": 48,
    "patch_size": 14,
    "qk_normalization": True,
    "qkv_bias": False,
}
_VISION_NAMES = {  # published -> transformers, where they differ
    "initializer_factor": "layer_scale_init_value",
    "qk_normalization": "use_qk_norm",
    "qkv_bias": "attention_bias",
}
_AUTO_MAP = {
    "AutoConfig": "configuration_internvl_chat.InternVLChatConfig",
    "AutoModel": "modeling_internvl_chat.InternVLChatModel",
    "AutoModelForCausalLM": "modeling_internvl_chat.InternVLChatModel",
}


def refuse(key: str, value: object, advice: str) -> NoReturn:
    """Raise `UserError` for a configuration that cannot be converted faithfully."""
    raise UserError(f"config.json: {key} is {value!r}: {advice}")


# ------------------------------------------------------------------------- published -> HF


def hf_config(chat: Config, *, image_token_id: int, eos_id: int, pad_id: int, tied: bool) -> Config:
    """The HF-native config (as transformers writes it) of a published one.

    eos_id: of the token that ends a turn, which the published code passes at generation.
    tied: the head is the embeddings. Raises `UserError` naming the key that cannot be honoured.
    """
    from transformers import InternVLConfig

    check_chat_config(chat)
    settings = {**_CHAT_DEFAULTS, **chat}
    vision = _hf_vision(settings)
    text = hf_text(settings["llm_config"])
    text.update(eos_token_id=eos_id, pad_token_id=pad_id, tie_word_embeddings=tied)
    text["dtype"] = vision["dtype"] = chat_dtype(chat)
    config = InternVLConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=image_token_id,
        image_seq_length=image_seq_length(settings),
        downsample_ratio=settings["downsample_ratio"],
        projector_hidden_act="gelu",
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        tie_word_embeddings=tied,
        architectures=["InternVLForConditionalGeneration"],
        dtype=chat_dtype(chat),
        # said once more at the top, where transformers' Trainer looks for them
        eos_token_id=eos_id,
        pad_token_id=pad_id,
    )
    step = position_step(chat)
    return {**config.to_diff_dict(), **({} if step == 1 else {"position_step": step})}


def position_step(chat: Config) -> float:
    """How far a visual token moves the position on (V2PE's delta): the published stride / 256."""
    keys = ("rope_pos_id_version", "rope_pos_id_stride")
    version, stride = (chat.get(key, chat["llm_config"].get(key)) for key in keys)
    if version in (None, "default"):
        return 1.0
    steps = {256 * step: step for step in POSITION_STEPS}
    if version != "v2pe_fix":
        refuse(keys[0], version, "only 'v2pe_fix' (and 'default') says what holds at inference")
    if stride not in steps:
        refuse(keys[1], stride, "expected 256, 128, 64, ... or 1: 256 times V2PE's delta")
    return steps[stride]


def check_chat_config(chat: Config) -> None:
    """Raise `UserError` for what transformers' InternVL would compute otherwise, or not."""
    settings = {**_CHAT_DEFAULTS, **chat}
    for part in ("vision_config", "llm_config"):
        if not isinstance(settings.get(part), dict):
            refuse(part, settings.get(part), "expected the configuration of that part")
    needed = {
        "ps_version": ("v2", "transformers shuffles pixels as v2 only; v1 transposes each tile"),
        "select_layer": (-1, "transformers' and vLLM's InternVL take the last layer's features"),
        "use_thumbnail": (True, "transformers' image processor always adds the thumbnail"),
        "dynamic_image_size": (True, "the toolkit always cuts images into tiles"),
        "pad2square": (False, "images are resized, never padded"),
        "use_backbone_lora": (0, "the adapter is still apart; merge it with the published code"),
        "use_llm_lora": (0, "the adapter is still apart; merge it with the published code"),
    }
    for key, (value, reason) in needed.items():
        if settings[key] != value:
            refuse(key, settings[key], f"only {value!r} can be converted ({reason})")
    if settings.get("quantization_config"):
        method = settings["quantization_config"]
        refuse("quantization_config", method, "take the original weights, not quantized ones")
    low, high = settings["min_dynamic_patch"], settings["max_dynamic_patch"]
    if not 1 <= low <= high:
        refuse("min_dynamic_patch, max_dynamic_patch", (low, high), "expected 1 <= min <= max")
    if (1 / settings["downsample_ratio"]) % 1:
        refuse("downsample_ratio", settings["downsample_ratio"], "expected one over a whole number")
    language_model(settings["llm_config"])


def unknown_keys(chat: Config) -> list[str]:
    """Keys of a published config that are set and that nobody here reads."""
    known = _NO_EFFECT | _READ | set(_CHAT_DEFAULTS)
    return sorted(key for key, value in chat.items() if key not in known and value)


def language_model(llm: Config) -> str:
    """The architecture of a published llm_config; raises `UserError` for one without a mapping."""
    architectures = llm.get("architectures") or [None]
    name = architectures[0]
    if name not in LANGUAGE_MODELS:
        known = ", ".join(LANGUAGE_MODELS)
        refuse("llm_config.architectures", name, f"these language models can be converted: {known}")
    return str(name)


def _hf_vision(settings: Config) -> Config:
    vision = {**_VISION_DEFAULTS, **settings["vision_config"]}
    size, forced = vision["image_size"], settings["force_image_size"]
    if forced not in (None, size):
        refuse(
            "force_image_size",
            forced,
            f"vision_config.image_size is {size}, and its position embeddings would have to be "
            "interpolated; resize them with the published code first",
        )
    if vision["dropout"]:
        refuse("vision_config.dropout", vision["dropout"], "set it to 0: transformers has another")
    if vision["norm_type"] not in ("layer_norm", "rms_norm"):
        refuse("vision_config.norm_type", vision["norm_type"], "expected layer_norm or rms_norm")
    if vision["qk_normalization"] and vision["layer_norm_eps"] != 1e-6:
        refuse(
            "vision_config.layer_norm_eps",
            vision["layer_norm_eps"],
            "with qk_normalization only 1e-06: transformers' norm of queries and keys has no other",
        )
    return {
        _VISION_NAMES.get(key, key): vision[key] for key in _VISION_DEFAULTS if key != "dropout"
    }


def hf_text(llm: Config) -> Config:
    """Keyword arguments of the language model's transformers configuration."""
    from transformers import CONFIG_MAPPING, PreTrainedConfig

    architecture = language_model(llm)
    model_type = LANGUAGE_MODELS[architecture]
    config_class = CONFIG_MAPPING[model_type]
    own = set(config_class.__dataclass_fields__) - set(PreTrainedConfig.__dataclass_fields__)
    own |= {*config_class.attribute_map.values(), "head_dim"}  # which Qwen3-MoE's reads undeclared
    text = {key: value for key, value in llm.items() if key in own and value is not None}
    text["model_type"] = model_type
    text["use_cache"] = True  # published as false, left over from training
    if architecture == "InternLM2ForCausalLM":
        text["attention_bias"] = bool(llm.get("bias", True))  # their default
        text["head_dim"] = llm["hidden_size"] // llm["num_attention_heads"]
    if "rope_parameters" not in text:
        if "rope_theta" in llm:
            text["rope_theta"] = llm["rope_theta"]
        if scaling := _rope_scaling(llm, architecture):
            text["rope_scaling"] = scaling
    return text


def _rope_scaling(llm: Config, architecture: str) -> Config | None:
    """llm_config.rope_scaling in today's spelling; refused where it means something else."""
    scaling = llm.get("rope_scaling")
    if not scaling:
        return None
    kind = scaling.get("rope_type", scaling.get("type"))
    # InternLM2's own code knows two, by the formulas of transformers' LLaMA
    known = ("linear", "dynamic") if architecture == "InternLM2ForCausalLM" else ROPE_TYPES
    if kind not in known:
        refuse("llm_config.rope_scaling", scaling, f"its type must be one of {', '.join(known)}")
    return {**{key: value for key, value in scaling.items() if key != "type"}, "rope_type": kind}


def image_seq_length(settings: Config) -> int:
    """Tokens of one tile: patches of a tile after the pixel shuffle."""
    settings = {**_CHAT_DEFAULTS, **settings}
    vision = {**_VISION_DEFAULTS, **settings["vision_config"]}
    side = vision["image_size"] // vision["patch_size"] * settings["downsample_ratio"]
    if side % 1:
        refuse("vision_config.image_size", vision["image_size"], "no whole number of image tokens")
    return int(side) ** 2


def tile_range(chat: Config) -> tuple[int, int, int]:
    """Fewest tiles, most tiles, and pixels of a tile's side."""
    settings = {**_CHAT_DEFAULTS, **chat}
    size = {**_VISION_DEFAULTS, **settings["vision_config"]}["image_size"]
    return settings["min_dynamic_patch"], settings["max_dynamic_patch"], size


def chat_dtype(chat: Config) -> str:
    """The dtype of a published checkpoint; raises `UserError` for one that is not floating."""
    llm = chat.get("llm_config") or {}
    given = [part.get(key) for part in (chat, llm) for key in ("dtype", "torch_dtype")]
    dtype = next((name for name in given if name), "bfloat16")
    if dtype not in DTYPES:
        refuse("torch_dtype", dtype, f"expected one of {', '.join(DTYPES)}")
    return str(dtype)


def chat_is_tied(chat: Config) -> bool:
    """Whether a published config says that the head is the embeddings."""
    own = chat["llm_config"].get("tie_word_embeddings")
    return bool(chat.get("tie_word_embeddings", False) if own is None else own)


def dimensions(text: Mapping[str, Any], *, internlm2: bool) -> Dimensions:
    """Heads of the language model, from an HF text_config."""
    heads = text["num_attention_heads"]
    return Dimensions(
        num_heads=heads,
        num_kv_heads=text.get("num_key_value_heads") or heads,
        head_dim=text.get("head_dim") or text["hidden_size"] // heads,
        internlm2=internlm2,
    )


# ------------------------------------------------------------------------- HF -> published


def chat_config(hf: Config, *, template: str, tiles: tuple[int, int]) -> Config:
    """A published config for an HF-native model that never was one.

    template: name of the published conversation template. tiles: fewest and most tiles of an
    image. Raises `UserError` naming the key that the published code cannot honour.
    """
    from transformers import InternVLConfig

    full = InternVLConfig.from_dict(dict(hf)).to_dict()
    vision = _chat_vision(full)
    needed = {
        "vision_feature_layer": (-1, "the last layer's features"),
        "vision_feature_select_strategy": ("default", "every patch, without the class token"),
        "projector_hidden_act": ("gelu", "the published projector's"),
    }
    for key, (value, meaning) in needed.items():
        if full[key] != value:
            refuse(key, full[key], f"the published layout knows {value!r} only ({meaning})")
    step = full.get("position_step", 1.0)
    if step != 1.0:
        refuse("position_step", step, "the published code advances a visual token's position by 1")
    dtype = str(full.get("dtype") or "bfloat16").removeprefix("torch.")
    return {
        "architectures": ["InternVLChatModel"],
        "auto_map": dict(_AUTO_MAP),
        "downsample_ratio": full["downsample_ratio"],
        "dynamic_image_size": True,
        "force_image_size": vision["image_size"],
        "llm_config": _chat_llm(full["text_config"], dtype),
        "max_dynamic_patch": tiles[1],
        "min_dynamic_patch": tiles[0],
        "model_type": "internvl_chat",
        "pad2square": False,
        "ps_version": "v2",
        "select_layer": -1,
        "template": template,
        "tie_word_embeddings": full["text_config"]["tie_word_embeddings"],
        "torch_dtype": dtype,
        "use_backbone_lora": 0,
        "use_llm_lora": 0,
        "use_thumbnail": True,
        "vision_config": {**vision, "torch_dtype": dtype},
    }


def _chat_vision(full: Config) -> Config:
    vision = full["vision_config"]
    needed = {
        "use_absolute_position_embeddings": True,
        "use_mask_token": False,
        "use_mean_pooling": True,
        "hidden_dropout_prob": 0.0,
        "projection_dropout": 0.0,
    }
    for key, value in needed.items():
        if vision[key] != value:
            refuse(f"vision_config.{key}", vision[key], f"the published ViT has {value!r} only")
    names = {theirs: ours for ours, theirs in _VISION_NAMES.items()}
    chat = {
        names.get(key, key): value
        for key, value in vision.items()
        if names.get(key, key) in _VISION_DEFAULTS
    }
    for key in ("image_size", "patch_size"):
        height, width = vision[key]
        if height != width:
            refuse(f"vision_config.{key}", vision[key], "the published ViT takes squares only")
        chat[key] = height
    return {
        "architectures": ["InternVisionModel"],
        "drop_path_rate": 0.0,
        "dropout": 0.0,
        "model_type": "intern_vit_6b",
        "use_flash_attn": True,
        **chat,
    }


def _chat_llm(text: Config, dtype: str) -> Config:
    """llm_config in the spelling of transformers 4, which the published code is written for."""
    kinds = {kind: name for name, kind in LANGUAGE_MODELS.items() if name[:8] != "InternLM"}
    if text["model_type"] not in kinds:
        known = ", ".join(sorted(kinds))
        refuse("text_config.model_type", text["model_type"], f"the published code knows {known}")
    dropped = {"rope_parameters", "dtype", "transformers_version", "id2label", "label2id"}
    dropped |= {"chunk_size_feed_forward", "is_encoder_decoder", "output_hidden_states"}
    dropped |= {"problem_type", "return_dict", "_name_or_path", "num_local_experts"}
    llm = {key: value for key, value in text.items() if key not in dropped}
    rope = dict(text["rope_parameters"])
    llm["rope_theta"] = rope.pop("rope_theta")
    kind = rope.get("rope_type", "default")
    llm["rope_scaling"] = None if kind == "default" else {**rope, "type": kind}
    if "num_local_experts" in text:
        llm["num_experts"] = text["num_local_experts"]
    llm.update(architectures=[kinds[text["model_type"]]], torch_dtype=dtype)
    return llm
