"""The tokenizer and the chat template of a GGUF file, in and out.

Byte-level BPE (`gpt2`) becomes a tokenizer.json, SentencePiece (`llama`) a SentencePiece model:
the formats that a run saves. How a text is split before BPE is only named in a GGUF file; an
unknown name is refused, since a wrong split gives other tokens without any error.
"""

import json
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from nanojaxgpt.data.subwords import SPACE_MARK
from nanojaxgpt.data.tokenizers import (
    HF_FILES,
    JsonTokenizer,
    SentencePieceTokenizer,
    Tokenizer,
)
from nanojaxgpt.errors import ConfigError, DataError
from nanojaxgpt.interchange.hf_tokenizer import NO_IDS, tokenizer_json
from nanojaxgpt.interchange.templates import LARGEST_TEMPLATE
from nanojaxgpt.interchange.values import is_number

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # types of tokens
TEMPLATE = "tokenizer.chat_template"
# The keys of tokenizer_config.json, and what these tokens are called here.
ROLES = {"bos_token": "bos", "eos_token": "eos", "pad_token": "padding", "unk_token": "unknown"}
SAMPLING = {"temperature": "temp", "top_k": "top_k", "top_p": "top_p", "min_p": "min_p"}


class Splitting(NamedTuple):
    """How a text is prepared for BPE, as a tokenizer.json says it."""

    pre_tokenizer: dict[str, Any]
    normalizer: dict[str, Any] | None = None
    whole: bool = False  # a piece that is a token is not made of merges (ignore_merges)
    start: bool = False  # where add_bos_token is missing, it is true


def byte_level(use_regex: bool) -> dict[str, Any]:
    """Return the step that spells bytes as characters, after GPT-2's split if `use_regex`."""
    return dict(type="ByteLevel", add_prefix_space=False, trim_offsets=True, use_regex=use_regex)


def split_by(digits: str) -> dict[str, Any]:
    """Return the split of Llama 3 and Qwen 2, which differ in how digits are grouped."""
    words = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
    rest = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    pattern = {"Regex": f"{words}|{digits}|{rest}"}
    step = dict(type="Split", pattern=pattern, behavior="Isolated", invert=False)
    return dict(type="Sequence", pretokenizers=[step, byte_level(False)])


DIGITS = dict(type="Digits", individual_digits=True)
SPLITTINGS = {
    "gpt-2": Splitting(byte_level(True)),
    "smollm": Splitting(dict(type="Sequence", pretokenizers=[DIGITS, byte_level(True)])),
    "llama-bpe": Splitting(split_by(r"\p{N}{1,3}"), whole=True, start=True),
    # llama.cpp doesn't normalize; the models' own tokenizers do.
    "qwen2": Splitting(split_by(r"\p{N}"), dict(type="NFC")),
}


def open_vocabulary(
    path: Path, metadata: Mapping[str, Any], rows: int
) -> tuple[Tokenizer, dict[str, Any]]:
    """Return the tokenizer of a file, and fields of the config's section `sample`.

    `rows` are those of the model's table. Raises DataError.
    """
    known = {name.removeprefix("tokenizer.ggml."): value for name, value in metadata.items()}
    tokens, kinds = known.get("tokens"), known.get("token_type")
    if not isinstance(tokens, list) or not tokens or not isinstance(tokens[0], str):
        raise DataError(f"{path} has no tokenizer")
    kinds = kinds or [NORMAL] * len(tokens)
    if not isinstance(kinds, list) or len(tokens) != len(kinds) or len(tokens) > rows:
        raise DataError(f"{path}: it has {len(tokens):,} tokens, types {kinds!r:.40} "
                        f"and {rows:,} rows of the embedding table")  # fmt: skip
    special = {name: token_id(path, known, name, len(tokens)) for name in ("bos", "eos", "eot")}
    model = str(known.get("model"))
    if model not in OPENERS:
        raise DataError(f"{path}: the tokenizer model {model!r} is not supported, only "
                        f"{', '.join(OPENERS)}")  # fmt: skip
    try:
        found = OPENERS[model](path, known, tokens, kinds, special)
    except (ArithmeticError, AttributeError, TypeError, ValueError, struct.error) as error:
        raise DataError(f"{path}: its tokenizer can't be read: {error}") from error
    sample: dict[str, Any] = {}
    for ours, theirs in SAMPLING.items():
        value = metadata.get(f"general.sampling.{theirs}")
        if is_number(value):
            sample[ours] = value
    if special["eot"] not in (-1, found.end_id):
        sample["end_ids"] = (special["eot"],)
    return found, sample


def token_id(path: Path, known: Mapping[str, Any], name: str, count: int) -> int:
    """Return the id of a special token, -1 where there is none. Raises DataError."""
    number = known.get(f"{name}_token_id", -1)
    if type(number) is not int or not -1 <= number < count:
        raise DataError(f"{path}: tokenizer.ggml.{name}_token_id={number!r} is not a token, of "
                        f"which there are {count:,}")  # fmt: skip
    return number


def special_ids(path: Path, metadata: Mapping[str, Any], count: int) -> dict[str, int]:
    """Return the ids of special tokens by the keys of tokenizer_config.json. Raises DataError."""
    known = {name.removeprefix("tokenizer.ggml."): value for name, value in metadata.items()}
    ids = {key: token_id(path, known, name, count) for key, name in ROLES.items()}
    return {key: number for key, number in ids.items() if number >= 0}


def read_marks(special: Mapping[str, int], add_start: bool) -> dict[str, int]:
    """Return what the tokenizer is told beside its files."""
    marks = {"end_id": special["eos"]} if special["eos"] >= 0 else {}
    return marks | ({"start_id": special["bos"]} if add_start and special["bos"] >= 0 else {})


def open_bpe(
    path: Path,
    known: Mapping[str, Any],
    tokens: Sequence[str],
    kinds: Sequence[int],
    special: Mapping[str, int],
) -> Tokenizer:
    """Return a byte-level tokenizer. Tokens without a use, as padding has, are left out."""
    name = str(known.get("pre"))
    if name not in SPLITTINGS:
        raise DataError(f"{path}: tokenizer.ggml.pre={name!r} is not supported, only "
                        f"{', '.join(SPLITTINGS)}: texts would be split wrongly")  # fmt: skip
    if known.get("add_space_prefix"):
        raise DataError(f"{path}: add_space_prefix is not supported with this kind of tokenizer")
    split = SPLITTINGS[name]
    vocabulary: dict[str, int] = {}
    for number, (token, kind) in enumerate(zip(tokens, kinds, strict=True)):
        if kind == UNUSED:
            continue
        if token in vocabulary:
            raise DataError(f"{path}: the tokens {vocabulary[token]} and {number} are both "
                            f"{token!r}")  # fmt: skip
        vocabulary[token] = number
    added = [
        dict(id=number, content=token, single_word=False, lstrip=False, rstrip=False,
             normalized=False, special=kinds[number] == CONTROL)
        for token, number in vocabulary.items() if kinds[number] in (CONTROL, USER_DEFINED)
    ]  # fmt: skip
    marks = read_marks(special, known.get("add_bos_token", split.start))
    merges = [[merge[:cut], merge[cut + 1 :]] for merge in known.get("merges") or []
              for cut in [merge.find(" ", 1)]]  # fmt: skip
    content = dict(
        version="1.0", truncation=None, padding=None, added_tokens=added,
        normalizer=split.normalizer, pre_tokenizer=split.pre_tokenizer,
        post_processor=start_step(tokens, marks), decoder=byte_level(True),
        model=dict(
            type="BPE", dropout=None, unk_token=None, continuing_subword_prefix=None,
            end_of_word_suffix=None, fuse_unk=False, byte_fallback=False,
            ignore_merges=split.whole, vocab=vocabulary, merges=merges,
        ),
    )  # fmt: skip
    files = {HF_FILES[0]: json.dumps(content, ensure_ascii=False).encode()}
    return JsonTokenizer("hf", files, str(path), marks)


def start_step(tokens: Sequence[str], marks: Mapping[str, int]) -> dict[str, Any] | None:
    """Return what puts the start token before a text, for others who read the tokenizer.json."""
    if "start_id" not in marks:
        return None
    token, text = tokens[marks["start_id"]], dict(Sequence=dict(id="A", type_id=0))
    start = dict(SpecialToken=dict(id=token, type_id=0))
    return dict(
        type="TemplateProcessing", single=[start, text],
        pair=[start, text, start, dict(Sequence=dict(id="B", type_id=1))],
        special_tokens={token: dict(id=token, ids=[marks["start_id"]], tokens=[token])},
    )  # fmt: skip


def open_sentencepiece(
    path: Path,
    known: Mapping[str, Any],
    tokens: Sequence[str],
    kinds: Sequence[int],
    special: Mapping[str, int],
) -> Tokenizer:
    """Return a SentencePiece model of merges: its pieces, scores and types, which a file lists."""
    scores = known.get("scores") or []
    if len(scores) != len(tokens) or kinds.count(UNKNOWN) != 1:
        raise DataError(f"{path}: of {len(tokens):,} tokens {len(scores):,} have a score and "
                        f"{kinds.count(UNKNOWN)} stand for what is unknown, not one")  # fmt: skip
    model = b""
    for token, score, kind in zip(tokens, scores, kinds, strict=True):
        # Tokens that users defined are spelled with spaces.
        piece = token.replace(" ", SPACE_MARK) if kind == USER_DEFINED else token
        part = proto_field(1, piece.encode()) + proto_field(2, float(score)) + proto_field(3, kind)
        model += proto_field(1, part)
    trainer = proto_field(3, 2) + proto_field(35, BYTE in kinds)  # model_type BPE, byte_fallback
    for number, token in ((40, kinds.index(UNKNOWN)), (41, special["bos"]), (42, special["eos"])):
        trainer += proto_field(number, token % (1 << 64))
        if token >= 0:
            trainer += proto_field(number + 5, tokens[token].encode())
    trainer += proto_field(43, (1 << 64) - 1)  # no padding
    charsmap = bytes(number % 256 for number in known.get("precompiled_charsmap") or [])
    normalizer = proto_field(1, b"identity") + (proto_field(2, charsmap) if charsmap else b"")
    normalizer += proto_field(3, known.get("add_space_prefix", True))
    normalizer += proto_field(4, known.get("remove_extra_whitespaces", False)) + proto_field(
        5, True
    )
    model += proto_field(2, trainer) + proto_field(3, normalizer)
    marks = read_marks(special, known.get("add_bos_token", True))
    return SentencePieceTokenizer(model, str(path), marks)


def proto_field(number: int, value: bytes | float | int) -> bytes:
    """Return a field of a protocol buffer: bytes, a 32-bit float, an integer or a boolean."""
    if isinstance(value, bytes):
        return varint(number << 3 | 2) + varint(len(value)) + value
    if isinstance(value, float):
        return varint(number << 3 | 5) + struct.pack("<f", value)
    return varint(number << 3) + varint(int(value))


def varint(value: int) -> bytes:
    """Return an integer, seven bits a byte, the lowest first."""
    found = bytearray()
    while value > 127:
        found.append(value & 127 | 128)
        value >>= 7
    return bytes([*found, value])


OPENERS = {"gpt2": open_bpe, "llama": open_sentencepiece}


def read_template(path: Path, metadata: Mapping[str, Any]) -> str:
    """Return the text of the chat template, "" where there is none. Raises DataError."""
    found = metadata.get(TEMPLATE, "")
    if not isinstance(found, str):
        raise DataError(f"{path}: {TEMPLATE} is not a text")
    if (size := len(found.encode())) > LARGEST_TEMPLATE:
        raise DataError(f"{path}: the chat template has {size:,} bytes, more than "
                        f"{LARGEST_TEMPLATE:,}")  # fmt: skip
    return found


def write_vocabulary(
    tokenizer: Tokenizer, rows: int, special: Mapping[str, int] = NO_IDS
) -> dict[str, Any]:
    """Return the keys, after `tokenizer.ggml.`, that describe a tokenizer; `special` as above.

    Rows of the table that are no tokens are called [PAD0] and so on. Raises ConfigError for a
    tokenizer other than a byte-level one whose split has a name.
    """
    if not isinstance(tokenizer, JsonTokenizer):
        raise ConfigError(f"a tokenizer of the kind {tokenizer.kind} can't be written to a GGUF "
                          "file, only hf and gpt2")  # fmt: skip
    content = json.loads(tokenizer_json(tokenizer))
    normalizer, splitter = content.get("normalizer"), content.get("pre_tokenizer")
    names = [
        name
        for name, split in SPLITTINGS.items()
        if (plain(split.pre_tokenizer), split.normalizer) == (plain(splitter), normalizer)
    ]
    if not names or content["model"]["type"] != "BPE":
        raise ConfigError("the tokenizer splits texts in a way that has no name in a GGUF file; "
                          f"those that have one are {', '.join(SPLITTINGS)}")  # fmt: skip
    tokens, kinds = [f"[PAD{number}]" for number in range(rows)], [UNUSED] * rows
    added = {one["id"]: one for one in content.get("added_tokens", [])}
    vocabulary = content["model"]["vocab"] | {one["content"]: i for i, one in added.items()}
    for token, number in vocabulary.items():
        if number < rows:
            kind = CONTROL if number in added and added[number]["special"] else USER_DEFINED
            tokens[number], kinds[number] = token, kind if number in added else NORMAL
    keys: dict[str, Any] = dict(
        model="gpt2", pre=names[0], tokens=tokens, token_type=kinds,
        merges=[merge if isinstance(merge, str) else " ".join(merge)
                for merge in content["model"]["merges"]],
        add_bos_token=tokenizer.start_id >= 0, add_space_prefix=False,
    )  # fmt: skip
    # What ends a text stays the tokenizer's own: other programs may name another token so.
    own = {"bos_token": tokenizer.start_id, "eos_token": tokenizer.end_id}
    own = {key: number for key, number in own.items() if number >= 0}
    for key, number in {**special, **own}.items():
        keys[f"{ROLES[key]}_token_id"] = number
    return keys


def plain(step: Any) -> Any:
    """Return a step of a tokenizer.json without what changes only the offsets of tokens."""
    if isinstance(step, list):
        return [plain(each) for each in step]
    if isinstance(step, dict):
        return {name: plain(value) for name, value in step.items() if name != "trim_offsets"}
    return step
