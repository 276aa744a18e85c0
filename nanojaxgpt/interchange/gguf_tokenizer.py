"""The tokenizer in a GGUF file's metadata, as a tokenizer.json or a SentencePiece model."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from nanojaxgpt.data.tokenizers import HF_FILES, JsonTokenizer, SentencePieceTokenizer, Tokenizer
from nanojaxgpt.errors import DataError
from nanojaxgpt.extras import require_package

NORMAL, UNKNOWN, CONTROL, USER, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # tokenizer.ggml.token_type
WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}


def split(pattern: str) -> list[dict[str, Any]]:
    """Return the steps of a pre-tokenizer that cuts by a pattern, then maps bytes."""
    cut = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return [cut, BYTES | {"use_regex": False}]


# How each `tokenizer.ggml.pre` cuts a text into words.
STEPS: dict[str, list[dict[str, Any]]] = {
    "gpt-2": [BYTES],
    "smollm": [{"type": "Digits", "individual_digits": True}, BYTES],
    "llama-bpe": split(WORDS + r"\p{N}{1,3}" + REST),
    "qwen2": split(WORDS + r"\p{N}" + REST),
}
COMPOSED = ("qwen2",)  # these normalize a text to NFC
WHOLE_WORDS = ("llama-bpe",)  # these take a word that is a token as one, whatever the merges say


def build_tokenizer(fields: Mapping[str, Any], vocab_size: int) -> tuple[Tokenizer, dict[str, Any]]:
    """Return the tokenizer, and what the model sets of the section `sample`: its end ids.

    Raises DataError for a tokenizer that can't be built as its author meant it.
    """
    given = {name.removeprefix("tokenizer.ggml."): value for name, value in fields.items()
             if name.startswith("tokenizer.ggml.")}  # fmt: skip
    kind, tokens = given.get("model"), given.get("tokens")
    if not isinstance(tokens, list) or not tokens:
        raise DataError("it has no tokenizer (tokenizer.ggml.tokens)")
    if len(tokens) > vocab_size:
        raise DataError(f"its tokenizer has {len(tokens):,} tokens, but its embedding table "
                        f"{vocab_size:,} rows")  # fmt: skip
    types = given.get("token_type") or [NORMAL] * len(tokens)
    ends = list(dict.fromkeys(
        given[name] for name in ("eos_token_id", "eot_token_id", "eom_token_id")
        if 0 <= given.get(name, -1) < len(tokens)
    ))  # fmt: skip
    marks = {"end_id": ends[0]} if ends else {}
    default = kind == "llama"  # SentencePiece's models begin with a token unless they say otherwise
    start = given.get("bos_token_id", -1)
    if given.get("add_bos_token", default) and start >= 0:
        marks["start_id"] = start
    if kind == "gpt2":
        content = byte_level_json(given, tokens, types)
        files = {HF_FILES[0]: json.dumps(content, ensure_ascii=False).encode()}
        found: Tokenizer = JsonTokenizer("hf", files, "its tokenizer", marks)
    elif kind == "llama":
        found = SentencePieceTokenizer(sentencepiece_model(given, tokens, types), "it", marks)
    else:
        raise DataError(f"tokenizer.ggml.model={kind!r} is not supported: gpt2 and llama are")
    return found, {"end_ids": tuple(ends[1:])} if ends[1:] else {}


def byte_level_json(
    given: Mapping[str, Any], tokens: Sequence[str], types: Sequence[int]
) -> dict[str, Any]:
    """Return the tokenizer.json of a byte-level BPE. Raises DataError for an unknown `pre`."""
    pre = given.get("pre", "")
    if pre not in STEPS:
        raise DataError(f"tokenizer.ggml.pre={pre!r} is not supported: texts would be cut "
                        f"otherwise; supported are {', '.join(STEPS)}")  # fmt: skip
    added = [
        {"id": number, "content": token, "single_word": False, "lstrip": False, "rstrip": False,
         "normalized": False, "special": kind == CONTROL}
        for number, (token, kind) in enumerate(zip(tokens, types, strict=True))
        if kind in (CONTROL, USER)
    ]  # fmt: skip
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": {"type": "NFC"} if pre in COMPOSED else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": STEPS[pre]},
        "post_processor": None,
        "decoder": BYTES,
        "model": {
            "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
            "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False,
            "ignore_merges": pre in WHOLE_WORDS,
            "vocab": {token: number for number, token in enumerate(tokens)},
            "merges": [merge.split(" ", 1) for merge in given.get("merges") or []],
        },
    }  # fmt: skip


def sentencepiece_model(
    given: Mapping[str, Any], tokens: Sequence[str], types: Sequence[int]
) -> bytes:
    """Return the SentencePiece model of these pieces and their scores. Raises DataError."""
    require_package("google.protobuf", "gguf", "this tokenizer")
    from sentencepiece import sentencepiece_model_pb2

    proto: Any = sentencepiece_model_pb2

    scores = given.get("scores")
    if not scores or len(scores) != len(tokens):
        raise DataError("its tokenizer has no score for each token (tokenizer.ggml.scores)")
    model = proto.ModelProto()
    for token, score, kind in zip(tokens, scores, types, strict=True):
        model.pieces.add(piece=token, score=score, type=kind)
    model.trainer_spec.model_type = model.trainer_spec.BPE
    model.trainer_spec.vocab_size = len(tokens)
    model.trainer_spec.byte_fallback = BYTE in types
    for name, field in (("unk", "unknown"), ("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        number = given.get(f"{field}_token_id", -1)
        setattr(model.trainer_spec, f"{name}_id", number)
        if 0 <= number < len(tokens):
            setattr(model.trainer_spec, f"{name}_piece", tokens[number])
    model.normalizer_spec.name = "identity"
    model.normalizer_spec.add_dummy_prefix = bool(given.get("add_space_prefix", True))
    model.normalizer_spec.remove_extra_whitespaces = False
    model.normalizer_spec.escape_whitespaces = True
    return model.SerializeToString()
