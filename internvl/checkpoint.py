"""Checkpoints in and out, loaded strictly and proved by a checksum.

transformers loads by `strict=False` in more than one place, and full-parameter InternVL training
resumed by its Trainer silently restarts from the base weights (transformers issue 43701); here a
name that does not match is an error, and what was loaded can be compared with what was saved.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import PartialState
from safetensors import SafetensorError
from torch import Tensor

from internvl.attention import SHARED_PREFIX
from internvl.errors import UserError
from internvl.folders import require_hf_layout
from internvl.model import InternVLForConditionalGeneration, adopt

if TYPE_CHECKING:
    from peft import PeftModel

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_model(
    path: str | Path, *, dtype: str = "float32", quantization: Any = None
) -> InternVLForConditionalGeneration:
    """Load an HF-native InternVL checkpoint for training; every weight must match by name.

    dtype: "float32", "bfloat16" or "float16". quantization: transformers' configuration of a base
    that is quantised as it is loaded, on this process's device. Raises `UserError` naming what is
    missing, unexpected or of another shape.
    """
    path = Path(path)
    require_hf_layout(path)
    if dtype not in DTYPES:
        raise UserError(f"dtype {dtype!r} is not one of {sorted(DTYPES)}")
    try:
        model, info = InternVLForConditionalGeneration.from_pretrained(
            str(path),
            dtype=DTYPES[dtype],
            attn_implementation={"text_config": SHARED_PREFIX, "vision_config": "sdpa"},
            output_loading_info=True,
            **({} if quantization is None else _quantised(quantization)),
        )
    except (OSError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path}: the weights cannot be loaded: {reason}") from None
    refuse_unmatched(path, info)
    _keep_gradients(model)
    if model.lm_head.weight is not model.get_input_embeddings().weight:
        # transformers 5 reads a config that is silent about it as tied, and keeps saying so where
        # the stored head is another (internvl.conversion.heads): what is saved must not
        model.config.tie_word_embeddings = False
        model.config.text_config.tie_word_embeddings = False
    return adopt(model)


def _keep_gradients(model: torch.nn.Module) -> None:
    """Keep bitsandbytes from its layout for CPUs, made in evaluation, which has no backward."""
    layers: Iterable[Any] = model.modules()
    for module in layers:
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def _quantised(quantization: Any) -> dict[str, Any]:
    device = PartialState().device
    place = device.index if device.type == "cuda" else device.type
    return {"quantization_config": quantization, "device_map": {"": place}}


def refuse_unmatched(path: str | Path, info: dict[str, Any]) -> None:
    """Raise `UserError` where from_pretrained (info: what it told) did not match every weight."""
    for fault in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if names := info[fault]:
            shown = ", ".join(sorted(map(str, names))[:5])
            raise UserError(f"{path}: {len(names)} {fault.replace('_', ' ')}: {shown}, ...")


def load_weights(model: InternVLForConditionalGeneration, path: str | Path) -> None:
    """Put a checkpoint's weights into `model`, in place; every name must match."""
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    fresh = load_model(path, dtype=dtype)
    model.load_state_dict(fresh.state_dict(), strict=True)


def checksum(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """SHA-256 of named tensors: names, shapes, dtypes and bytes, in the order of the names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors, key=lambda item: item[0]):
        value = tensor.detach().to("cpu").contiguous()
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}\n".encode())
        digest.update(value.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def full_weights(model: torch.nn.Module) -> Iterator[tuple[str, Tensor]]:
    """A model's parameters by transformers' names, one whole at a time, LoRA merged in passing.

    The model itself is not changed: merging in place and back would round the base weights.
    Sharded parameters (FSDP2, ZeRO-3) are gathered, so every rank must walk through all of them;
    base weights in 4 or 8 bits (QLoRA) come as what they stand for.
    Raises `UserError` for adapters whose weights are not the base's plus a delta (DoRA, IA3, ...).
    """
    from peft import PeftModel
    from peft.tuners.lora import LoraLayer
    from peft.utils import ModulesToSaveWrapper

    if not isinstance(model, PeftModel):
        for name, parameter in model.named_parameters():
            yield plain_name(name), whole(parameter)
        return
    _check_additive(model)
    base = model.get_base_model()
    adapted = {name: m for name, m in base.named_modules() if isinstance(m, LoraLayer)}
    saved = [name for name, m in base.named_modules() if isinstance(m, ModulesToSaveWrapper)]
    for name, parameter in base.named_parameters():
        owner, _, leaf = name.rpartition(".")
        if ".lora_" in f".{name}" or any(name.startswith(f"{s}.original_module.") for s in saved):
            continue
        weight = _unquantised(base.get_submodule(owner), parameter) if leaf == "weight" else None
        weight = whole(parameter) if weight is None else weight
        layer = adapted.get(owner.removesuffix(".base_layer"))
        if layer is None or not owner.endswith(".base_layer"):
            yield re.sub(r"\.modules_to_save\.[^.]+\.", ".", plain_name(name)), weight
            continue
        if leaf == "weight" and not layer.merged:
            for adapter in layer.active_adapters:
                weight = weight + _delta(layer, adapter)
        yield f"{plain_name(owner.removesuffix('.base_layer'))}.{leaf}", weight


def plain_name(name: str) -> str:
    """A parameter's name without what wrappers put into it (activation checkpointing, compile)."""
    return name.replace("_checkpoint_wrapped_module.", "").replace("_orig_mod.", "")


def whole(parameter: Tensor) -> Tensor:
    """A parameter's full value, detached; where it is sharded, every rank must ask for it."""
    from torch.distributed.tensor import DTensor

    tensor = parameter.detach()
    if isinstance(tensor, DTensor):
        # a shard that was moved to the CPU (offload) is gathered where its ranks can talk
        sharded: Any = tensor.to(tensor.device_mesh.device_type)
        return sharded.full_tensor()
    if hasattr(parameter, "ds_id"):  # ZeRO-3: whole only while the context is open
        from deepspeed.zero import GatheredParameters

        with GatheredParameters([parameter]):
            return parameter.detach().clone()
    return tensor


def _unquantised(module: torch.nn.Module, parameter: Tensor) -> Tensor | None:
    """What a weight in 4 or 8 bits stands for; None where it is none."""
    if type(parameter).__name__ not in ("Params4bit", "Int8Params"):
        return None
    from peft.utils.integrations import dequantize_module_weight

    return dequantize_module_weight(module).detach()


def _delta(layer: Any, adapter: str) -> Tensor:
    """What an adapter adds to its layer's weight; gathered where it is sharded."""
    from torch.distributed.tensor import DTensor

    parts = [parameter for name, parameter in layer.named_parameters() if ".lora_" in f".{name}"]
    if not any(isinstance(part, DTensor) or hasattr(part, "ds_id") for part in parts):
        return layer.get_delta_weight(adapter)
    if adapter not in layer.lora_A or layer.lora_A[adapter].weight.ndim != 2:
        raise UserError("LoRA on other than linear layers cannot be gathered from shards")
    down, up = whole(layer.lora_A[adapter].weight), whole(layer.lora_B[adapter].weight)
    product = (up @ down) * layer.scaling[adapter]
    return product.T if layer.fan_in_fan_out else product


def matching(
    named: Iterable[tuple[str, Tensor]], shapes: Mapping[str, Sequence[int]]
) -> Iterator[tuple[str, Tensor]]:
    """Pass weights through one by one; raise `UserError` unless they are exactly `shapes`'s."""
    missing = set(shapes)
    for name, tensor in named:
        if name not in shapes:
            raise UserError(f"the sampler's model has no weight {name!r}")
        if tuple(tensor.shape) != tuple(shapes[name]):
            raise UserError(
                f"weight {name!r} is {tuple(tensor.shape)}, "
                f"the sampler's model has {tuple(shapes[name])}"
            )
        missing.discard(name)
        yield name, tensor
    if missing:
        shown = ", ".join(sorted(missing)[:5])
        raise UserError(f"{len(missing)} weights were not handed to the sampler: {shown}, ...")


def _check_additive(model: PeftModel) -> None:
    for name, config in model.peft_config.items():
        kind = config.peft_type.value
        if kind == "LORA":
            kind = "DoRA" if config.use_dora else "LoRA with lora_bias" if config.lora_bias else ""
        if kind or len(model.peft_config) > 1:
            raise UserError(
                f"adapter {name!r} is {kind or 'one of several'}; full weights can be given of one "
                "LoRA (rsLoRA, bias and modules_to_save too)"
            )
