"""The answers of a model, kept in a file: a benchmark that was stopped goes on where it was."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from nanojaxgpt import checkpoint
from nanojaxgpt.errors import ConfigError, why
from nanojaxgpt.hosts.team import ALONE, Team
from nanojaxgpt.language_model import LanguageModel
from nanojaxgpt.rundir import code_hash


def model_identity(model: LanguageModel) -> str:
    """Return 16 hex digits that name parameters, config, tokenizer, code and kind of device."""
    facts = [
        checkpoint.describe_leaves({"params": model.params}),
        repr(model.config),
        model.tokenizer.content_hash(),
        model.vocab_rows,
        code_hash(),
        [device.device_kind for device in model.mesh.devices.flat],
        jax.process_count(),  # sums over the devices are rounded otherwise
    ]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


def request_key(*parts: Any) -> str:
    """Return 24 hex digits that name a request."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:24]


class AnswerStore:
    """Answers by the key of their request; those in the file, if there is one, come first.

    Each batch is appended in one write. A line that was not finished is passed over. Of several
    processes, a `team`, the first one reads the file for all and writes it.
    """

    def __init__(self, path: Path | None = None, team: Team = ALONE) -> None:
        self.path, self.known = path if team.first else None, dict[str, Any]()
        self._torn = False
        if path is not None:
            self.known = team.decide(self._read, "to read the answers it has kept")
        self.found = len(self.known)  # in the file

    def _read(self) -> dict[str, Any]:
        assert self.path is not None
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            lines = self.path.read_bytes().split(b"\n") if self.path.exists() else []
        except OSError as error:
            raise ConfigError(f"can't read the answers in {self.path}: {error.strerror}") from error
        known = {}
        for line in lines:
            try:
                key, answer = json.loads(line)
                known[key] = answer
            except (ValueError, TypeError):  # torn, or the empty one after the last line end
                continue
        self._torn = bool(lines and lines[-1])
        return known

    def add(self, new: Mapping[str, Any]) -> None:
        """Keep answers. Raises ConfigError where the file can't be written."""
        self.known.update(new)
        if self.path is None:
            return
        text = "".join(json.dumps([key, answer]) + "\n" for key, answer in new.items())
        try:
            with open(self.path, "a") as file:
                file.write("\n" * self._torn + text)
        except OSError as error:
            raise ConfigError(f"can't keep answers in {self.path}: "
                              f"{why(error, self.path.parent)}") from error  # fmt: skip
        self._torn = False

    def __contains__(self, key: str) -> bool:
        return key in self.known

    def values(self, keys: Sequence[str]) -> list[Any]:
        """Return the answers of keys that are all known."""
        return [self.known[key] for key in keys]
