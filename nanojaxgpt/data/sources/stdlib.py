"""In: the running Python. Out: its standard library and language reference as documents."""

import hashlib
import importlib
import os
import platform
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nanojaxgpt.config import sections
from nanojaxgpt.data.sources.documents import Document, Refuse
from nanojaxgpt.errors import ConfigError, DataError


def read_stdlib(location: str, data: sections.Data, refuse: Refuse) -> Iterator[Document]:
    """Yield the standard library's own source files and the topics of the language reference.

    Ordered by a hash of the name, so that a tail of the corpus is a random choice of documents.
    """
    if location:
        raise ConfigError(f"data.source=stdlib takes no path, not {location!r}")
    documents = [*stdlib_modules(), *stdlib_topics()]
    if not documents:
        raise DataError(
            "this Python has neither its library's source nor the language reference; "
            "set data.source=text:PATH"
        )
    yield from sorted(documents, key=lambda d: hashlib.sha256(d.name.encode()).digest())


def identify_stdlib(location: str, data: sections.Data) -> dict[str, Any]:
    """Return the Python version and a hash of every name and text."""
    content, num_documents = hashlib.sha256(), 0
    for name, text in read_stdlib(location, data, print):
        for part in (name.encode(), text.encode()):
            content.update(len(part).to_bytes(8, "little") + part)
        num_documents += 1
    return dict(
        python=platform.python_version(), documents=num_documents, sha256=content.hexdigest()
    )


# Tests, tables and installed packages; the two applications repeat what the library shows.
EXCLUDED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
EXCLUDED_FOLDERS |= {"encodings", "idlelib", "turtledemo"}
# The topics come as documents of their own; the others were generated with this machine's paths.
EXCLUDED_PREFIXES = ("pydoc_data/topics.py", "_sysconfigdata", "config-")


def stdlib_modules() -> Iterator[Document]:
    """Yield every UTF-8 source file of the standard library that has any text."""
    root = Path(sysconfig.get_path("stdlib"))
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in EXCLUDED_FOLDERS]
        for path in (Path(folder, file) for file in files if file.endswith(".py")):
            name = path.relative_to(root).as_posix()
            if name.startswith(EXCLUDED_PREFIXES):
                continue
            try:
                text = path.read_bytes().decode()
            except (OSError, UnicodeDecodeError):
                continue
            if text:
                yield Document(name, text)


def stdlib_topics() -> Iterator[Document]:
    """Yield the topics of the language reference, where this Python ships them."""
    try:
        topics = importlib.import_module("pydoc_data.topics").topics
    except ImportError:
        return
    for name, text in topics.items():
        yield Document(f"topics/{name}", text)
