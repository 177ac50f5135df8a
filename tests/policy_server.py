"""A server that answers as vLLM's does, from a transformers model in this process.

It has what a stock server has for training: it reads weights from a folder, empties caches, tells
the version that it was told, and forgets all of it when it dies.
"""

from __future__ import annotations

import base64
import io
import json
import threading
from pathlib import Path
from typing import Any

from fake_servers import FakeServer
from PIL import Image
from safetensors.torch import load_file

from internvl.chat import encode_prompt, encode_text
from internvl.hf_sampler import TransformersSampler
from internvl.sampler import SampleRequest, SamplingConfig

RESETS = ["/reset_prefix_cache", "/reset_mm_cache", "/reset_encoder_cache"]


class PolicyServer(FakeServer):
    """behave: as FakeServer's, and called before each completion. calls: the paths of the others.

    spoil: called with the weights that are read, before they are used.
    """

    def __init__(self, model: Path, *, spoil: Any = None, **options: Any):
        self.model, self.spoil = model, spoil
        self.one_at_a_time = threading.Lock()
        self.calls: list[str] = []
        self.read: list[str] = []  # the folders of weights
        super().__init__(**options)

    def start(self) -> None:
        """A new process, as it were: the checkpoint's weights, and no version."""
        self.sampler = TransformersSampler(
            self.model, seed=0, max_model_len=512, max_num_seqs=64, dtype="float32"
        )
        self.version = "default"
        super().start()

    def get(self, path: str) -> str | None:
        if path == "/weight_info":
            return json.dumps({"weight_version": self.version})
        return None

    def post(self, path: str, body: dict[str, Any]) -> tuple[int, str] | None:
        """The answer to anything but a completion."""
        if path.endswith("/chat/completions"):
            return None
        self.calls.append(path)
        if path == "/collective_rpc":
            folder = Path(body["kwargs"]["weights_path"])
            self.read.append(folder.name)
            weights = {}
            for file in sorted(folder.glob("*.safetensors")):
                weights |= load_file(file)
            if self.spoil is not None:
                self.spoil(weights)
            with self.one_at_a_time:
                self.sampler.update_weights(weights.items())
            return 200, json.dumps({"results": [None]})
        if path == "/update_weight_version":
            self.version = body["new_version"]
        return 200, json.dumps({"success": True}) if path in RESETS else ""

    def answer(self, body: dict[str, Any]) -> dict[str, Any]:
        with self.one_at_a_time:
            return self._answer(body)

    def _answer(self, body: dict[str, Any]) -> dict[str, Any]:
        processor = self.sampler._processor
        text, images = "", []
        for part in body["messages"][0]["content"]:
            if part["type"] == "image_url":
                encoded = part["image_url"]["url"].partition(",")[2]
                images.append(Image.open(io.BytesIO(base64.b64decode(encoded))).convert("RGB"))
                text += "<image>\n"
            else:
                text += part["text"]
        tiles = body.get("mm_processor_kwargs", {}).get("max_patches", 12)
        begun = body["messages"][1]["content"] if len(body["messages"]) > 1 else ""
        started = tuple(encode_text(processor, begun)) if begun else ()
        config = SamplingConfig(
            n=body["n"], temperature=body["temperature"], max_tokens=body["max_tokens"]
        )
        request = SampleRequest(text, images, seed=body["seed"], max_tiles=tiles, started=started)
        (done,) = self.sampler.sample([request], config)
        ids = encode_prompt(processor, text, images, tiles).ids
        choices = [self._choice(index, one) for index, one in enumerate(done)]
        if "logprob_token_ids" in body:
            (token,) = body["logprob_token_ids"]
            scored = SampleRequest(text, images, seed=0, max_tiles=tiles, started=(*started, token))
            (score,) = self.sampler.score([scored], config)["transformers"]
            told = [{"token": f"token_id:{token}", "logprob": score.logprobs[-1]}]
            choices[0]["logprobs"]["content"][0]["top_logprobs"] = told
        answer = {"object": "chat.completion", "model": "tiny", "choices": choices}
        return {**answer, "prompt_token_ids": [*ids, *started]}

    @staticmethod
    def _choice(index: int, done: Any) -> dict[str, Any]:
        return {
            "index": index,
            "message": {"role": "assistant", "content": done.text},
            "finish_reason": done.finish_reason,
            "token_ids": list(done.token_ids),
            "logprobs": {"content": [{"logprob": value} for value in done.logprobs]},
        }
