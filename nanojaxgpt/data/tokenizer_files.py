"""The files of a tokenizer: their bytes, and a hash of what it does."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from nanojaxgpt.errors import DataError
from nanojaxgpt.regular import read_regular


def read_model(path: Path) -> bytes:
    """Return the bytes of a tokenizer's file. Raises DataError where there is none."""
    try:
        return read_regular(path)
    except OSError as error:
        raise DataError(f"no tokenizer file {path}: {error.strerror}") from error


def short_hash(data: bytes) -> str:
    """Return 16 hex digits of SHA-256."""
    return hashlib.sha256(data).hexdigest()[:16]


def mark_bytes(marks: Mapping[str, int]) -> bytes:
    """Return the part of the hashed content that marks add: nothing without marks."""
    return json.dumps(marks, sort_keys=True).encode() if marks else b""
