"""nanojaxgpt: a JAX/Flax research framework for GPT-style language models."""

import importlib
from typing import Any

__version__ = "0.1.0"

# The public functions, each imported from its module when it is first used.
_PUBLIC = {
    "load": "language_model:load",
    "train": "training:fit",
    "evaluate": "language_model:evaluate",
    "serve": "server.running:serve",
    "base_config": "config:base_config",
    "read_metrics": "metrics:read_metrics",
}
__all__ = list(_PUBLIC)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    """Return a public function by its name."""
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, function = _PUBLIC[name].split(":")
    return getattr(importlib.import_module(f"{__name__}.{module}"), function)
