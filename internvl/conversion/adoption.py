"""A bare language model becomes an InternVL's: tokens, rows of its embeddings, chat template.

    tokenizer       InternVL's tokens where they are missing, in the published order, and <video>
    embeddings      a row for each added token: a spare one (Qwen keeps some), or a new one;
    and head        its start is the mean of the rows of the tokens that were there, as the
                    published training code starts the head's (it draws the embeddings')
    chat template   that of the checkpoint whose vision tower it gets, with its own bos token

Nothing is drawn, so the same folders give the same bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from internvl.conversion.convert import write_config
from internvl.conversion.processors import adopt_tokenizer
from internvl.conversion.shards import BLOCK_BYTES, Segment, Target, TensorInfo, Weights
from internvl.conversion.templates import END_OF_TURN, START_OF_TURN, with_bos
from internvl.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import InternVLProcessor

_TORCH = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_PROBE = [
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "?"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "A reply."}]},
]


@dataclass(frozen=True)
class Adopted:
    """A bare language model's new processor.

    added: ids of the tokens that its tokenizer did not have, one after the other. vocab_size: rows
    of the embeddings with them; llm_vocab_size: without.
    """

    processor: InternVLProcessor
    added: dict[str, int]
    llm_vocab_size: int

    @property
    def first(self) -> int:
        """The id of the first added token; where none was added, the rows there are."""
        return min(self.added.values(), default=self.llm_vocab_size)

    @property
    def vocab_size(self) -> int:
        """Rows of the embeddings: as many as there were, or as the tokens need."""
        return max(self.llm_vocab_size, self.first + len(self.added))

    @property
    def eos_id(self) -> int:
        """Id of the token that ends a turn."""
        return int(self._tokenizer.eos_token_id)

    @property
    def pad_id(self) -> int:
        """Id of the padding token."""
        return int(self._tokenizer.pad_token_id)

    @property
    def image_token_id(self) -> int:
        """Id of the token that visual tokens take the place of."""
        return int(self._tokenizer.context_image_token_id)

    @property
    def chat_tokens_added(self) -> bool:
        """Whether the tokens that turns are written with are new."""
        return bool({START_OF_TURN, END_OF_TURN} & set(self.added))

    @property
    def _tokenizer(self) -> Any:
        return self.processor.tokenizer

    def described(self) -> str:
        """What was added, in words."""
        if not self.added:
            return "its tokenizer has all of InternVL's tokens"
        rows = f"in spare rows of the {self.vocab_size:,} of its vocabulary"
        if self.vocab_size > self.llm_vocab_size:
            rows = f"its vocabulary grown from {self.llm_vocab_size:,} to {self.vocab_size:,} rows"
        return (
            f"its tokenizer with {len(self.added)} tokens more ({', '.join(self.added)}), {rows}, "
            "each the mean of the others"
        )

    def save(self, folder: Path) -> None:
        """Write processor and generation settings."""
        self.processor.save_pretrained(folder)
        ids = {"eos_token_id": self.eos_id, "pad_token_id": self.pad_id}
        write_config(folder / "generation_config.json", ids)


def adopt_processor(
    llm: Path, vision: Path, *, vocab_size: int, add_chat_tokens: bool = False
) -> Adopted:
    """The processor of a bare language model under an InternVL's vision tower.

    vocab_size: the language model's. add_chat_tokens: add `<|im_start|>` and `<|im_end|>` where the
    tokenizer lacks them. Raises `UserError` where the InternVL's chat template is nothing to the
    language model.
    """
    from transformers import InternVLProcessor

    from internvl.chat import load_processor

    theirs: Any = load_processor(str(vision))
    rendered = str(theirs.apply_chat_template(_PROBE, tokenize=False))
    start = rendered.find(START_OF_TURN)
    if start < 0 or END_OF_TURN not in rendered.rpartition("A reply.")[2]:
        raise UserError(
            f"{vision}: its chat template is not ChatML ({START_OF_TURN} ... {END_OF_TURN}), so it "
            f"cannot be given to {llm}: write a ChatML template into its chat_template.jinja"
        )
    tokenizer, bos, added = adopt_tokenizer(llm, add_chat_tokens=add_chat_tokens)
    found = Adopted(
        InternVLProcessor(
            image_processor=theirs.image_processor,
            tokenizer=tokenizer,
            video_processor=theirs.video_processor,
            image_seq_length=theirs.image_seq_length,
            chat_template=with_bos(str(theirs.chat_template), bos),
        ),
        added,
        vocab_size,
    )
    _check_tokens(llm, found)
    ours = str(found.processor.apply_chat_template(_PROBE, tokenize=False))
    if ours != bos + rendered[start:]:
        raise UserError(
            f"{vision}: its chat template writes otherwise with the tokenizer of {llm}: {ours!r}, "
            f"expected {bos + rendered[start:]!r}; mend its chat_template.jinja"
        )
    _check_spelled(llm, vision, theirs.tokenizer, tokenizer, rendered[start:])
    return found


def _check_tokens(llm: Path, found: Adopted) -> None:
    """Raise `UserError` for a tokenizer that has more tokens than the model has rows."""
    ids = sorted(found.added.values())
    assert ids == list(range(found.first, found.first + len(ids))), found.added
    known = max(found.processor.tokenizer.get_vocab().items(), key=lambda item: item[1])
    if found.first > found.llm_vocab_size or known[1] >= found.vocab_size:
        raise UserError(
            f"{llm}: config.json says vocab_size {found.llm_vocab_size}, but its tokenizer has ids "
            f"up to {found.first - 1}: tokenizer and model do not belong together"
        )


def _check_spelled(llm: Path, vision: Path, theirs: Any, ours: Any, text: str) -> None:
    """Raise `UserError` for a token of a template that the language model has not."""
    from internvl.control_tokens import control_pattern

    vocabulary = ours.get_vocab()
    for token in control_pattern(theirs).findall(text):
        if token not in vocabulary:
            raise UserError(
                f"{vision}: its chat template writes {token!r}, which is no token of {llm}"
            )


def mean_rows(weights: Weights, name: str, adopted: Adopted) -> Tensor:
    """The rows of the added tokens: each the mean of all rows before them, summed in float64."""
    import torch

    info = weights.tensors[name]
    dtype, width = getattr(torch, _TORCH[info.dtype]), info.shape[1]
    total = torch.zeros(width, dtype=torch.float64)
    step = max(1, BLOCK_BYTES // info.row_bytes)
    for start in range(0, adopted.first, step):
        stop = min(start + step, adopted.first)
        segment = Segment(name, start * info.row_bytes, stop * info.row_bytes)
        block = bytearray(b"".join(weights.read(segment)))
        total += torch.frombuffer(block, dtype=dtype).view(-1, width).double().sum(0)
    return (total / adopted.first).to(dtype).repeat(len(adopted.added), 1)


def grown(target: Target, adopted: Adopted) -> Target:
    """A matrix of the vocabulary with the added tokens' rows, spare rows behind them kept."""
    row, name = target.info.row_bytes, target.segments[0].source
    last = adopted.first + len(adopted.added)
    segments = [
        Segment(name, 0, adopted.first * row),
        Segment(f"{target.name} (new rows)", 0, len(adopted.added) * row),
    ]
    if last < adopted.llm_vocab_size:
        segments.append(Segment(name, last * row, adopted.llm_vocab_size * row))
    shape = (adopted.vocab_size, target.info.shape[1])
    return Target(target.name, TensorInfo(target.info.dtype, shape), tuple(segments))
