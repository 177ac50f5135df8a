"""What goes over the wire to an OpenAI-compatible server: faults sorted, answers checked."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from internvl.data import RowImages
from internvl.errors import DataError, UserError
from internvl.images import plain_jpeg
from internvl.servers import Unreachable, Unusable

if TYPE_CHECKING:
    from PIL import Image

_BUSY = (408, 425, 429, 502, 503, 504)  # it may answer later


def send(url: str, post: Callable[[], Any]) -> str:
    """The text of an answer; faults are sorted by who is to blame, see `ServerPool`."""
    import openai

    try:
        return str(post().text)
    except openai.APITimeoutError:
        raise Unusable("no answer in time (--server-timeout)") from None
    except openai.APIConnectionError as error:
        raise Unreachable(clip(str(error.__cause__ or error))) from None
    except openai.APIStatusError as error:
        code, told = error.status_code, _message(error.response.text)
    if code in _BUSY:
        raise Unreachable(f"HTTP {code}: {told}")
    if code in (400, 413, 422):
        if "mm_processor_kwargs" in told:
            raise UserError(
                f"{url} takes no tile budget with a request: start it with "
                f"--trust-request-mm-kwargs. It said: {told}"
            )
        raise DataError(f"{url} refuses the request: {told}")
    if code >= 500:
        raise Unusable(f"HTTP {code}: {told}")
    raise UserError(f"{url}: HTTP {code}: {told}")


def _message(text: str) -> str:
    """What an error body says, in one line."""
    try:
        told = json.loads(text)["error"]["message"]
    except (ValueError, TypeError, KeyError):
        told = text
    return clip(str(told))


def clip(text: str, longest: int = 300) -> str:
    line = " ".join(text.split())
    return line if len(line) <= longest else f"{line[:longest]}..."


def speaks_of_length(message: str) -> bool:
    return any(words in message for words in ("context length", "model length", "too long"))


def parse_answer(raw: str, n: int, logprobs: bool) -> dict[str, Any]:
    """An answer with n choices in order; raises `Unusable` for anything else."""
    try:
        answer = json.loads(raw)
    except ValueError:
        raise Unusable(f"answered what is not JSON: {clip(raw)!r}") from None
    choices = answer.get("choices") if isinstance(answer, dict) else None
    if not isinstance(choices, list) or not all(isinstance(one, dict) for one in choices):
        raise Unusable(f"answered without choices: {clip(raw)}")
    choices.sort(key=lambda one: str(one.get("index")).rjust(9))
    if [one.get("index") for one in choices] != list(range(n)):
        raise Unusable(f"answered with {len(choices)} choices, {n} were asked for")
    for choice in choices:
        if fault := _choice_fault(choice, logprobs):
            raise Unusable(f"answered with a choice whose {fault}: {clip(str(choice))}")
    return answer


def _choice_fault(choice: dict[str, Any], logprobs: bool) -> str | None:
    """What of a choice is not as it should be, or None."""
    if choice.get("finish_reason") not in ("stop", "length"):
        return "finish_reason is neither stop nor length"
    message, ids = choice.get("message"), choice.get("token_ids")
    if not isinstance(message, dict) or not isinstance(message.get("content"), str | None):
        return "message holds no text"
    if ids is None:
        return "message holds no text" if message.get("content") is None else None
    if not isinstance(ids, list) or not ids or not all(type(one) is int for one in ids):
        return "token_ids are no list of ids"
    if not logprobs:
        return None
    drawn = choice.get("logprobs")
    drawn = drawn.get("content") if isinstance(drawn, dict) else None
    if not isinstance(drawn, list) or len(drawn) != len(ids):
        return "logprobs are not as many as its tokens"
    if not all(isinstance(one, dict) and type(one.get("logprob")) is float for one in drawn):
        return "logprobs are no numbers"
    return None


def scored_body(body: dict[str, Any], text: str, token: int) -> dict[str, Any]:
    """A request for one token after a reply begun with `text`, telling the chance of `token`."""
    extra = {**body["extra_body"], "logprob_token_ids": [token]}
    extra["return_tokens_as_token_ids"] = True
    messages = list(body["messages"])
    if text:
        messages.append({"role": "assistant", "content": text})
        extra |= {"add_generation_prompt": False, "continue_final_message": True}
    return {**body, "messages": messages, "logprobs": True, "extra_body": extra}


def scored_logprob(answer: dict[str, Any], token: int) -> float:
    """The log-probability of `token` in an answer to `scored_body`; `Unusable` without one."""
    (choice,) = answer["choices"]
    try:
        told = choice["logprobs"]["content"][0]["top_logprobs"]
        return next(float(one["logprob"]) for one in told if one["token"] == f"token_id:{token}")
    except (TypeError, KeyError, IndexError, StopIteration):
        raise Unusable(
            "does not tell the log-probability of a given token, as vLLM 0.31 does: "
            f"{clip(str(choice))}"
        ) from None


def signed_seed(seed: int) -> int:
    """A seed of 64 bits as the API takes it: the same bits, with a sign."""
    return seed - (1 << 64) if seed >= 1 << 63 else seed


def data_uris(asked: Sequence[Image.Image], images: Sequence[Image.Image]) -> list[str]:
    """A request's images as data URIs, without loss; `images` are the same, decoded.

    A JPEG that is shown as it is stored travels as it is: it is a fifth as large. All others are
    PNGs of our own decoding, which a server could not do in our way (rotated, over white).
    """
    sources = asked.sources() if isinstance(asked, RowImages) else []
    files = [plain_jpeg(source) for source in sources] or [None] * len(images)
    return [
        _png(image) if file is None else _uri("jpeg", file)
        for image, file in zip(images, files, strict=True)
    ]


def _png(image: Image.Image) -> str:
    encoded = io.BytesIO()
    image.save(encoded, "PNG", compress_level=1)  # four times as fast as the default, 15% larger
    return _uri("png", encoded.getvalue())


def _uri(kind: str, encoded: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(encoded).decode()}"
