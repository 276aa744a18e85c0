"""A model on disk in another format, opened: what is known of it before its weights are read."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from nanojaxgpt.data.tokenizers import Tokenizer
from nanojaxgpt.interchange.provenance import Provenance
from nanojaxgpt.interchange.tensors import Slot
from nanojaxgpt.model.config import ModelConfig


class Pretrained(NamedTuple):
    """A model of another format. `read` returns a tensor of `slots` by its name there."""

    origin: Path
    family: str  # as the table of families calls it, such as llama
    config: ModelConfig
    slots: dict[str, Slot]
    read: Callable[[str], np.ndarray]
    tokenizer: Tokenizer
    chat_template: str  # "": none
    sample: Mapping[str, Any]  # fields of the config's section `sample` that the model sets
    provenance: Provenance
