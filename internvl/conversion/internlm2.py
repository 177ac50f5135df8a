"""A SentencePiece tokenizer.model (InternLM2's, LLaMA's) as a fast tokenizer, without remote code.

The published folder holds a SentencePiece BPE model and, in tokenizer_config.json, tokens that were
added afterwards: some at new ids (<img>, <IMG_CONTEXT>), some in the place of unused pieces
(<|im_end|>). The merges are rebuilt from the pieces: of all ways to put a piece together from two
others, the one that makes the better-scored piece comes first, as SentencePiece itself decides.

LLaMA's (InternVL2-40B) is read so, too: transformers 5 puts a space before a text or not by
`legacy` alone, whatever the model says; the published code asks SentencePiece.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from internvl.errors import UserError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

SPACE = "\u2581"  # SentencePiece's sign for a space
_BPE, _NORMAL, _CONTROL, _USER_DEFINED = 2, 1, 3, 4  # as sentencepiece_model.proto numbers them


def fast_tokenizer(model_file: Path, added: Mapping[int, str], *, legacy: bool = True) -> Tokenizer:
    """The `tokenizers` object of a SentencePiece BPE model; no token is added at either end.

    added: special tokens by id, in place of the piece of that id or after the last one. legacy:
    LLaMA's setting. Raises `UserError` where sentencepiece is missing, or the model is of a kind
    that would be split differently.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

    proto = _read_model(model_file)
    if proto.normalizer_spec.add_dummy_prefix and not legacy:
        raise UserError(f"{model_file}: puts a space before a text, but not with legacy false")
    symbols = {i for i, piece in enumerate(proto.pieces) if piece.type == _USER_DEFINED}
    if proto.normalizer_spec.add_dummy_prefix and symbols - set(added):
        # SentencePiece would put the space before a text once, not after each symbol
        raise UserError(f"{model_file}: has symbols of its own and puts a space before a text")
    pieces = [added.get(index, piece.piece) for index, piece in enumerate(proto.pieces)]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    if len(vocabulary) != len(pieces):
        raise UserError(f"{model_file}: an added token is also an ordinary piece")
    tokenizer = Tokenizer(
        models.BPE(
            vocab=vocabulary,
            merges=_merges(proto, added),
            unk_token=pieces[proto.trainer_spec.unk_id],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    steps: list[Any] = [normalizers.Replace(" ", SPACE)]
    if proto.normalizer_spec.add_dummy_prefix:
        steps.insert(0, normalizers.Prepend(SPACE))
    tokenizer.normalizer = normalizers.Sequence(steps)
    undo: list[Any] = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if proto.normalizer_spec.add_dummy_prefix:
        undo.append(decoders.Strip(content=" ", left=1))
    tokenizer.decoder = decoders.Sequence(undo)
    kinds = {index: piece.type for index, piece in enumerate(proto.pieces)}
    whole = {index for index, kind in kinds.items() if kind in (_CONTROL, _USER_DEFINED)}
    for index in sorted(whole | set(added)):
        token = added.get(index) or pieces[index]
        special = index in added or kinds[index] == _CONTROL
        # a symbol with a space in it is looked for once spaces are SentencePiece's
        add = tokenizer.add_special_tokens if special else tokenizer.add_tokens
        add([AddedToken(token, special=special, normalized=not special and SPACE in token)])
        if tokenizer.token_to_id(token) != index:
            raise UserError(
                f"{model_file}: token {token!r} would get id {tokenizer.token_to_id(token)}, "
                f"tokenizer_config.json says {index}"
            )
    return tokenizer


def _read_model(file: Path) -> Any:
    """The parsed SentencePiece model; only what `fast_tokenizer` reproduces exactly is let in."""
    try:
        from google.protobuf.message import DecodeError
        from sentencepiece import sentencepiece_model_pb2
    except ImportError as error:
        raise UserError(
            f"{file}: a SentencePiece tokenizer needs sentencepiece and protobuf ({error}): "
            "pip install 'internvl-posttraining[internlm2]'"
        ) from None
    schema: Any = sentencepiece_model_pb2  # generated when it is imported
    proto = schema.ModelProto()
    try:
        proto.ParseFromString(file.read_bytes())
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror}") from None
    except DecodeError as error:
        raise UserError(f"{file}: is no SentencePiece model: {error}") from None
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    faults = [
        (trainer.model_type != _BPE, "is no BPE model"),
        (not trainer.byte_fallback, "has no byte fallback"),
        (bool(normalizer.precompiled_charsmap), f"normalises text ({normalizer.name})"),
        (normalizer.remove_extra_whitespaces, "removes extra spaces"),
        (not normalizer.escape_whitespaces, "does not escape spaces"),
        (trainer.treat_whitespace_as_suffix, "treats a space as a suffix"),
    ]
    for wrong, fault in faults:
        if wrong:
            raise UserError(f"{file}: {fault}; only InternLM2's kind can be converted")
    return proto


def _merges(proto: Any, added: Mapping[int, str]) -> list[tuple[str, str]]:
    """Pairs of pieces that make a piece, the best-scored result first."""
    score, index_of = {}, {}
    for index, piece in enumerate(proto.pieces):
        if piece.type == _NORMAL and index not in added:
            score[piece.piece], index_of[piece.piece] = piece.score, index
    found = []
    for piece, value in score.items():
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in score and right in score:
                found.append((-value, index_of[piece], index_of[left], left, right))
    return [(left, right) for *_, left, right in sorted(found)]
