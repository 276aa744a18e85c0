"""Files of models with bytes changed, cut off or made huge: refused in words, at once."""

import random
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import allocates_at_most
from test_golden_models import copy_golden

from nanojaxgpt.errors import CheckpointError, ConfigError, DataError
from nanojaxgpt.interchange.opening import find_model

TRIES = 25
HUGE = (2**63, 2**64 - 1, 2**62, 2**40, 2**31)
REFUSALS = (ConfigError, DataError, CheckpointError)


def damaged(content: bytes, header: int, seed: int) -> Iterator[bytes]:
    """Yield the content cut off, with bits flipped, and with a huge number, in its header."""
    rng = random.Random(seed)
    for _ in range(TRIES):
        yield content[: rng.randrange(header)]
        flipped = bytearray(content)
        for _ in range(rng.choice((1, 1, 2, 8))):
            flipped[rng.randrange(header)] ^= 1 << rng.randrange(8)
        yield bytes(flipped)
        place = rng.randrange(header - 8)
        yield content[:place] + struct.pack("<Q", rng.choice(HUGE)) + content[place + 8 :]


def refuse_or_read(model: Path, file: Path, header: int) -> int:
    """Try a model with its file damaged; return how often it was refused."""
    refused = 0
    for content in damaged(file.read_bytes(), header, seed=header):
        file.write_bytes(content)
        try:
            with allocates_at_most(64 << 20):
                source = find_model(model)
                assert not isinstance(source, Path)
                for name in source.slots:
                    source.read(name)
        except REFUSALS:
            refused += 1
    return refused


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma3"])
def test_a_damaged_gguf_file(architecture, tmp_path):
    pytest.importorskip("gguf", reason="GGUF files need the package gguf")
    from test_gguf import make

    path = make(tmp_path, architecture)
    assert refuse_or_read(path, path, 3500) > TRIES


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_damaged_folder(name, tmp_path):
    folder = copy_golden("llama", tmp_path)
    file = folder / name
    size = struct.unpack("<Q", file.read_bytes()[:8])[0] + 8
    header = size if name == "model.safetensors" else file.stat().st_size
    assert refuse_or_read(folder, file, header) > TRIES
