"""Converted checkpoints served by vLLM: log-probabilities are those of our packed forward.

And the published folder served by vLLM's own class for that layout, on the published weights: the
same again. Its configuration class is remote code, so a plain one stands in for it here.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from plain import noise_image
from published import FAMILIES, make_published
from torch import Tensor

from internvl.chat import forbidden_token_ids, load_processor, normalize_tiles, render_prompt
from internvl.checkpoint import load_model
from internvl.conversion.convert import convert
from internvl.data import Row
from internvl.encoding import Encoder
from internvl.packing import pack
from internvl.sampler import SampleRequest, SamplingConfig, open_sampler

pytestmark = [
    pytest.mark.slow,
    pytest.mark.xdist_group("vllm"),
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
]
TOLERANCE = 1e-4
MAX_TILES = 4
QUESTIONS = [
    ("<image>\nHow many bars are red?", [(56, 56)]),
    ("<image>\nand <image>\n图中有什么？", [(120, 50), (56, 112)]),
    ("What is 4 + 5?", []),
]


# vLLM's processor of the published layout resizes by other code; here nothing is resized
UNRESIZED = [(question, [(56, 56)] * len(sizes)) for question, sizes in QUESTIONS]
Questions = list[tuple[str, list[tuple[int, int]]]]


def packed_logprobs(
    model: Any,
    processor: Any,
    folder: Path,
    questions: Questions,
    completions: Sequence[Sequence[Sequence[int]]],
) -> list[Tensor]:
    """One forward over all questions and completions; log-probabilities of each completion."""
    encoder = Encoder(processor, MAX_TILES, max_length=2048)
    examples = []
    for number, (question, sizes) in enumerate(questions):
        names = [f"{number}-{index}.png" for index in range(len(sizes))]
        for index, (name, size) in enumerate(zip(names, sizes, strict=True)):
            noise_image(*size, seed=10 * number + index).save(folder / name)
        row = Row({"question": question, "image": names}, folder / "rows.jsonl", 1, folder)
        examples.append(encoder.completions(row, [list(ids) for ids in completions[number]]))
    batch = pack(examples)
    forbidden = forbidden_token_ids(processor, model.config.text_config.vocab_size)
    with torch.no_grad():
        scores = model(
            packed=batch,
            pixel_values=normalize_tiles(processor, batch.tiles),
            forbidden=forbidden,
        )
    return list(scores.logprobs.split(batch.lengths.tolist()))


def pictures(number: int, sizes: list[tuple[int, int]]) -> list[Any]:
    return [noise_image(*size, seed=10 * number + index) for index, size in enumerate(sizes)]


@pytest.mark.parametrize("family", FAMILIES)
def test_vllm_serves_the_conversion_with_our_logprobs(tmp_path: Path, family: str) -> None:
    make_published(tmp_path / "chat", family)
    convert(tmp_path / "chat", tmp_path / "hf", to="hf", progress=False)
    sampler = open_sampler(tmp_path / "hf", backend="vllm", max_model_len=512)
    try:
        requests = [
            SampleRequest(question, tuple(pictures(number, sizes)), seed=number)
            for number, (question, sizes) in enumerate(QUESTIONS)
        ]
        sampled = sampler.sample(requests, SamplingConfig(n=2, max_tokens=24, max_tiles=MAX_TILES))
    finally:
        sampler.close()
    model, processor = load_model(tmp_path / "hf").eval(), load_processor(str(tmp_path / "hf"))
    completions = [[one.token_ids for one in each] for each in sampled]
    ours = packed_logprobs(model, processor, tmp_path, QUESTIONS, completions)
    theirs = [torch.tensor(one.logprobs) for each in sampled for one in each]
    gap = max(float((a - b).abs().max()) for a, b in zip(ours, theirs, strict=True))
    assert gap < TOLERANCE


@pytest.mark.parametrize("family", FAMILIES)
def test_vllm_serves_the_published_folder_with_the_same_logprobs(
    tmp_path: Path, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_published(tmp_path / "chat", family)
    convert(tmp_path / "chat", tmp_path / "hf", to="hf", progress=False)
    processor = load_processor(str(tmp_path / "hf"))
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "ERROR")
    completions, theirs = served(tmp_path / "chat", tmp_path / "hf", processor)
    model = load_model(tmp_path / "hf").eval()
    ours = packed_logprobs(model, processor, tmp_path, UNRESIZED, completions)
    gap = max(float((a - b).abs().max()) for a, b in zip(ours, theirs, strict=True))
    assert gap < TOLERANCE


def served(chat: Path, hf: Path, processor: Any) -> tuple[list[list[list[int]]], list[Tensor]]:
    """Completions and their log-probabilities from vLLM's InternVLChatModel."""
    from transformers import AutoConfig, PreTrainedConfig
    from vllm import LLM, SamplingParams
    from vllm.distributed import parallel_state

    class InternVLChatConfig(PreTrainedConfig):
        model_type = "internvl_chat"

        def __init__(self, vision_config: Any = None, llm_config: Any = None, **kwargs: Any):
            super().__init__(**kwargs)
            self.vision_config = PreTrainedConfig(**(vision_config or {}))
            language = dict(llm_config or {"model_type": "llama"})
            kind = language.pop("model_type").replace("internlm2", "llama")
            self.llm_config = AutoConfig.for_model(kind, **language)

    config = json.loads((chat / "config.json").read_text())
    del config["auto_map"]
    (chat / "config.json").write_text(json.dumps(config))
    AutoConfig.register("internvl_chat", InternVLChatConfig, exist_ok=True)
    engine = LLM(
        model=str(chat),
        tokenizer=str(hf),
        dtype="float32",
        enforce_eager=True,
        max_model_len=512,
        generation_config="vllm",
        logprobs_mode="processed_logprobs",
        enable_chunked_prefill=False,
        max_num_batched_tokens=4096,
        limit_mm_per_prompt={"video": 0},
        use_tqdm_on_load=False,
    )
    vocabulary = config["llm_config"]["vocab_size"]
    forbidden = dict.fromkeys(forbidden_token_ids(processor, vocabulary), -1e9)
    params = SamplingParams(
        n=2, temperature=1.0, max_tokens=24, seed=3, logprobs=0, logit_bias=forbidden
    )
    completions, logprobs = [], []
    for number, (question, sizes) in enumerate(UNRESIZED):
        text = render_prompt(processor, question).replace(processor.image_token, "<image>")
        ids = processor.tokenizer(text, add_special_tokens=False)["input_ids"]
        prompt: dict[str, Any] = {"prompt_token_ids": ids}
        if sizes:
            prompt["multi_modal_data"] = {"image": pictures(number, sizes)}
        (output,) = engine.generate([prompt], params, use_tqdm=False)
        completions.append([list(one.token_ids) for one in output.outputs])
        for one in output.outputs:
            steps = zip(one.logprobs, one.token_ids, strict=True)
            values = [step[token].logprob for step, token in steps]
            logprobs.append(torch.tensor(values))
    engine.llm_engine.engine_core.shutdown()
    del engine
    parallel_state.destroy_model_parallel()
    parallel_state.destroy_distributed_environment()
    return completions, logprobs
