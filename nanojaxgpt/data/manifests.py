"""In: a folder of shards. Out: the manifest that describes it, sealed by a hash of its own.

What is read back is compared with that hash, with itself and with the files beside it, so that a
damaged manifest is refused before a token is read.
"""

import json
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from nanojaxgpt.data.exactness import Loss
from nanojaxgpt.data.shards import (
    TOKEN_DTYPES,
    content_hash,
    describe_file,
    edge_hash,
    read_lengths,
    token_dtype,
)
from nanojaxgpt.data.tokenizers import Tokenizer
from nanojaxgpt.errors import DataError

FORMAT = 3  # raise it whenever the same source and tokenizer would give other tokens or files
HASHED_BYTES = 256 << 20  # of a store: a larger one is checked by sizes and its shards' edges

Manifest = dict[str, Any]


def write_manifest(
    folder: Path,
    source: dict[str, Any],
    shards: list[dict[str, Any]],
    tokenizer: Tokenizer,
    examples: dict[str, Any] | None = None,
) -> Manifest:
    """Write where each document starts, and the manifest, which is returned; remove the rest.

    `examples` is what is known of examples for fine-tuning, whose shards have weights.
    """
    starts = np.lib.format.open_memmap(
        folder / "documents.npy", "w+", np.int64, (sum(shard["documents"] for shard in shards),)
    )
    place, num_tokens = 0, 0
    for shard in shards:
        stops = num_tokens + np.cumsum(read_lengths(folder, shard))
        starts[place : place + len(stops)] = [num_tokens, *stops[:-1]]
        place, num_tokens = place + len(stops), num_tokens + shard["tokens"]
    starts.flush()
    manifest = dict(
        format=FORMAT,
        source=source,
        tokenizer_hash=tokenizer.content_hash(),
        dtype=token_dtype(tokenizer).str,
        tokens=num_tokens,
        documents=place,
        text_bytes=sum(shard["text_bytes"] for shard in shards),
        **{count: sum(shard[count] for shard in shards) for count in Loss._fields},
        documents_file=dict(file="documents.npy", **describe_file(folder / "documents.npy")),
        shards=shards,
    )
    manifest = seal(manifest | ({"examples": examples} if examples else {}))
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")
    kept = {"manifest.json", "documents.npy", "tokenizer", *(shard["file"] for shard in shards)}
    kept |= {shard["weights"]["file"] for shard in shards if examples}
    for path in folder.iterdir():  # lengths and descriptions, and what a killed process left
        if path.name not in kept:
            path.unlink()
    return manifest


def seal(manifest: Manifest) -> Manifest:
    """Return the manifest with a hash of everything else in it."""
    content = {key: value for key, value in manifest.items() if key != "hash"}
    return content | {"hash": content_hash(content)}


def read_manifest(folder: Path) -> Manifest:
    """Return the manifest of the store in `folder`, compared with itself and with its files.

    Raises DataError that names the file which is missing, truncated, altered or swapped.
    """
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        if manifest["format"] != FORMAT:
            raise refusal(folder, "manifest.json", f"has format {manifest['format']}, not {FORMAT}")
        if manifest != seal(manifest):
            raise refusal(
                folder, "manifest.json", "was altered: its content does not match its hash"
            )
        if problem := contradiction(manifest):
            raise refusal(folder, "manifest.json", f"contradicts itself: {problem}")
        check_files(folder, manifest)
    except OSError as error:
        raise refusal(folder, str(error.filename), f"can't be read ({error.strerror})") from error
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise refusal(folder, "manifest.json", f"is not a manifest ({error!r})") from error
    return manifest


def contradiction(manifest: Manifest) -> str:
    """Return where the numbers and names of a manifest don't agree, or nothing."""
    shards, dtype = manifest["shards"], manifest["dtype"]
    if dtype not in TOKEN_DTYPES:
        return f"dtype {dtype!r} is not one of {', '.join(TOKEN_DTYPES)}"
    names = [f"{number:05}.tokens" for number in range(len(shards))]
    if not shards or names != [shard["file"] for shard in shards]:
        return "its shards are not numbered from 00000 on"
    if manifest["documents_file"]["file"] != "documents.npy":
        return f"its documents are in {manifest['documents_file']['file']}, not documents.npy"
    for shard in shards:
        if shard["size"] != shard["tokens"] * np.dtype(dtype).itemsize:
            return f"{shard['tokens']:,} tokens of {dtype} are not {shard['size']:,} bytes"
        if "examples" in manifest:
            weights = shard["weights"]
            if weights["file"] != Path(shard["file"]).with_suffix(".weights").name:
                return f"the weights of {shard['file']} are in {weights['file']}"
            if weights["size"] != shard["tokens"]:
                return f"{shard['tokens']:,} tokens, but {weights['size']:,} weights"
    for count in ("tokens", "documents", "text_bytes", *Loss._fields):
        if (total := sum(shard[count] for shard in shards)) != manifest[count]:
            return f"{manifest[count]:,} {count}, but its shards have {total:,}"
    return "" if manifest["source"] and manifest["tokenizer_hash"] else "no source or no tokenizer"


def check_files(folder: Path, manifest: Manifest) -> None:
    """Raise DataError, or OSError, where a file is not the one that the manifest describes."""
    files = [manifest["documents_file"], *manifest["shards"]]
    files += [shard["weights"] for shard in manifest["shards"] if "examples" in manifest]
    hash_all = sum(file["size"] for file in files) <= HASHED_BYTES
    for expected in files:
        name, path = expected["file"], folder / expected["file"]
        size = path.stat().st_size
        if size != expected["size"]:
            raise refusal(folder, name, f"has {size:,} bytes instead of {expected['size']:,}")
        found = describe_file(path) if hash_all else dict(edges=edge_hash(path))
        if any(expected[key] != value for key, value in found.items()):
            raise refusal(folder, name, "was altered: its SHA-256 does not match the manifest")


def read_starts(folder: Path, manifest: Manifest) -> tuple[np.ndarray, np.ndarray]:
    """Return where each shard starts, and the end, and where each document starts (on disk).

    Raises DataError where a shard does not start with the document that it should.
    """
    shard_starts, first_documents = (
        np.array([0, *accumulate(shard[count] for shard in manifest["shards"])])
        for count in ("tokens", "documents")
    )
    try:
        starts = np.load(folder / "documents.npy", mmap_mode="r")
    except (OSError, ValueError) as error:
        raise refusal(folder, "documents.npy", f"can't be read ({error})") from error
    if starts.dtype != np.int64 or starts.shape != (manifest["documents"],):
        found = f"holds {starts.dtype} {starts.shape}"
        raise refusal(folder, "documents.npy", f"{found}, not int64 ({manifest['documents']},)")
    if not np.array_equal(starts[first_documents[:-1]], shard_starts[:-1]):
        raise refusal(folder, "documents.npy", "does not start a document where a shard starts")
    return shard_starts, starts


def refusal(folder: Path, name: str, what: str) -> DataError:
    """Return the error for a file of the store in `folder`, with what to do about it."""
    return DataError(f"{folder / name} {what}; delete the folder {folder} to prepare it again")
