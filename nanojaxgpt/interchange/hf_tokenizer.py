"""The tokenizer and the chat template of a folder in Hugging Face's format, in and out."""

import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nanojaxgpt.data import tokenizers
from nanojaxgpt.data.tokenizer_files import read_model
from nanojaxgpt.data.tokenizer_json import (
    export_bytes,
    export_characters,
    export_gpt2,
    export_sentencepiece,
    export_words,
    token_of,
)
from nanojaxgpt.data.tokenizers import JsonTokenizer, SentencePieceTokenizer, Tokenizer
from nanojaxgpt.errors import DataError
from nanojaxgpt.interchange.provenance import TOKEN_KEYS
from nanojaxgpt.interchange.templates import FILE, LARGEST_TEMPLATE, save_template

SETTINGS = "tokenizer_config.json"
OLDER = "special_tokens_map.json"
NO_IDS: Mapping[str, int] = {}


def read_settings(folder: Path, name: str = SETTINGS) -> dict[str, Any]:
    """Return what tokenizer_config.json holds, nothing where there is none. Raises DataError."""
    path = folder / name
    if not path.exists():
        return {}
    try:
        found = json.loads(read_model(path))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise DataError(f"{path} must hold a JSON object, not a {type(found).__name__}")
    return found


def open_tokenizer(folder: Path, end_ids: Sequence[int], vocab_size: int) -> Tokenizer:
    """Return the tokenizer of a folder; the first of `end_ids` becomes its end token.

    Special tokens from `vocab_size` on, the rows of the model's table, are left out. Raises
    DataError where the folder has no tokenizer, or one with more tokens than the table has rows.
    """
    settings = read_settings(folder)
    marks = {"end_id": end_ids[0]} if end_ids else {}
    names = [file.name for file in sorted(folder.iterdir())]
    end = spelling(settings.get("eos_token"))
    if "tokenizer.json" in names:
        path = folder / "tokenizer.json"
        content = read_model(path)
        files = {tokenizers.HF_FILES[0]: content}
        plain = JsonTokenizer("hf", files, str(path))
        if plain.vocab_size > vocab_size:
            marks["vocab_size"] = vocab_size
        if not end_ids and (known := plain.token_id(end)) >= 0:
            marks["end_id"] = known
        if plain.first_id >= 0:
            marks["start_id"] = plain.first_id
        found: Tokenizer = JsonTokenizer("hf", files, str(path), marks) if marks else plain
    elif pair := next((pair for pair in tokenizers.GPT2_NAMES if set(pair) <= set(names)), ()):
        path = folder / pair[0]
        contents = map(read_model, (folder / name for name in pair))
        files: dict[str, bytes] = dict(zip(tokenizers.GPT2_FILES, contents, strict=True))
        found = JsonTokenizer("gpt2", files, str(path), marks)
    elif "tokenizer.model" in names:
        path = folder / "tokenizer.model"
        content = read_model(path)
        first = SentencePieceTokenizer(content, str(path)).first_id
        if settings.get("add_bos_token", True) and first >= 0:
            marks["start_id"] = first
        found = SentencePieceTokenizer(content, str(path), marks)
    elif "tekken.json" in names:
        raise DataError(f"{folder / 'tekken.json'} can't be read: put the tokenizer.json of the "
                        "same model beside it")  # fmt: skip
    else:
        raise DataError(f"{folder} has no tokenizer: neither tokenizer.json, nor vocab.json and "
                        "merges.txt, nor tokenizer.model")  # fmt: skip
    if found.vocab_size > vocab_size:
        raise DataError(f"{path} has {found.vocab_size:,} tokens, but the model's embedding table "
                        f"{vocab_size:,} rows: it belongs to another model")  # fmt: skip
    if found.end_id >= found.vocab_size:
        raise DataError(f"eos_token_id={found.end_id} is not a token of {path}, whose last one is "
                        f"{found.vocab_size - 1}")  # fmt: skip
    return found


def spelling(token: Any) -> str:
    """Return how a token of tokenizer_config.json is spelled, "" for none."""
    found = token.get("content") if isinstance(token, dict) else token
    return found.encode(errors="ignore").decode() if isinstance(found, str) else ""


def named_tokens(folder: Path, tokenizer: Tokenizer) -> dict[str, int]:
    """Return the ids of the special tokens that tokenizer_config.json names, by its keys.

    Where it lacks one, the older special_tokens_map.json counts. Raises DataError.
    """
    stated = read_settings(folder, OLDER) | read_settings(folder)
    if isinstance(tokenizer, SentencePieceTokenizer):
        pieces = {piece: number for number, (piece, _) in enumerate(tokenizer.pieces())}
        ids = {key: pieces.get(spelling(stated.get(key)), -1) for key in TOKEN_KEYS}
    else:
        assert isinstance(tokenizer, JsonTokenizer)
        ids = {key: tokenizer.token_id(spelling(stated.get(key))) for key in TOKEN_KEYS}
    return {key: number for key, number in ids.items() if 0 <= number < tokenizer.vocab_size}


def open_chat_template(folder: Path) -> str:
    """Return the text of the chat template, "" where there is none. Raises DataError."""
    path = folder / FILE
    if path.exists():
        content = read_model(path)
    else:
        path = folder / SETTINGS
        found = read_settings(folder).get("chat_template") or ""
        if isinstance(found, list):  # of several, by their names
            named = {
                str(one.get("name")): one.get("template") for one in found if isinstance(one, dict)
            }
            found = named.get("default") or ""
        if not isinstance(found, str):
            raise DataError(f"{path}: chat_template is not a text")
        content = found.encode(errors="surrogatepass")
    if len(content) > LARGEST_TEMPLATE:
        raise DataError(f"{path}: the chat template has {len(content):,} bytes, more than "
                        f"{LARGEST_TEMPLATE:,}")  # fmt: skip
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8: {error}") from error


def write_tokenizer(
    folder: Path,
    tokenizer: Tokenizer,
    seq_len: int,
    chat_template: str,
    special: Mapping[str, int] = NO_IDS,
) -> None:
    """Write a tokenizer's files as transformers reads them, and the chat template unless "".

    `special`: the ids of special tokens by the keys of tokenizer_config.json, where they are known.
    """
    settings: dict[str, Any] = dict(
        tokenizer_class="PreTrainedTokenizerFast", model_max_length=seq_len,
        clean_up_tokenization_spaces=False,
    )  # fmt: skip
    if isinstance(tokenizer, SentencePieceTokenizer):
        (folder / "tokenizer.model").write_bytes(tokenizer.model)
    if isinstance(tokenizer, SentencePieceTokenizer) and not tokenizer.exact:
        settings |= dict(tokenizer_class="LlamaTokenizer", legacy=False,
                         add_bos_token=tokenizer.start_id >= 0)  # fmt: skip
        spell = [piece for piece, _ in tokenizer.pieces()].__getitem__
    else:
        content = tokenizer_json(tokenizer)
        (folder / "tokenizer.json").write_bytes(content)
        spell = functools.partial(token_of, content)
    own = {"eos_token": tokenizer.end_id, "bos_token": tokenizer.start_id}
    for name, number in {**own, **special}.items():
        if 0 <= number < tokenizer.vocab_size:
            settings[name] = spell(number)
    (folder / SETTINGS).write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n")
    save_template(folder, chat_template)


def tokenizer_json(tokenizer: Tokenizer) -> bytes:
    """Return the tokenizer.json of a tokenizer; of SentencePiece's only exact ones have one."""
    if isinstance(tokenizer, SentencePieceTokenizer):
        return export_sentencepiece(tokenizer.pieces(), tokenizer.special())
    if isinstance(tokenizer, JsonTokenizer) and tokenizer.kind == "hf":
        return tokenizer.files[tokenizers.HF_FILES[0]]
    if isinstance(tokenizer, JsonTokenizer):
        vocabulary, merges = tokenizer.files.values()
        ends = [piece for piece, number in json.loads(vocabulary).items()
                if number == tokenizer.end_id]  # fmt: skip
        return export_gpt2(vocabulary, merges, ends[0] if ends else "")
    if isinstance(tokenizer, tokenizers.CharTokenizer):
        return export_characters(tokenizer.characters)
    if isinstance(tokenizer, tokenizers.WordTokenizer):
        return export_words(tokenizer.words)
    return export_bytes(tokenizers.END_TOKENS[0])
