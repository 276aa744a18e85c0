"""The teacher of a distillation: another model, of which only the parameters are taken."""

import functools
from collections.abc import Callable
from pathlib import Path

from jax.sharding import Mesh

from nanojaxgpt.adapters import load_source
from nanojaxgpt.config.sections import Config
from nanojaxgpt.data.loader import load_run_tokenizer
from nanojaxgpt.data.tokenizers import Tokenizer
from nanojaxgpt.errors import ConfigError
from nanojaxgpt.hosts.team import ALONE, Team
from nanojaxgpt.interchange.opening import config_of, find_model
from nanojaxgpt.model.config import ModelConfig, complete
from nanojaxgpt.model.parameters import Params

open_teacher = functools.cache(find_model)


def teacher_config(cfg: Config) -> ModelConfig:
    """Return the shape of objective.teacher. Raises ConfigError where it can't teach `cfg`."""
    name = cfg.objective.teacher
    found = complete(config_of(open_teacher(name))).model.bare
    if found.seq_len < cfg.model.seq_len:
        raise ConfigError(
            f"objective.teacher={name} reads at most {found.seq_len} tokens: lower "
            f"model.seq_len={cfg.model.seq_len}"
        )
    return found


def load_teacher(
    cfg: Config,
    mesh: Mesh,
    tokenizer: Tokenizer,
    report: Callable[[str], None],
    team: Team = ALONE,
) -> Params:
    """Return the teacher's parameters on `mesh`. Raises ConfigError, CheckpointError."""
    name, shape = cfg.objective.teacher, teacher_config(cfg)
    source = open_teacher(name)
    own = load_run_tokenizer(source, report) if isinstance(source, Path) else source.tokenizer
    if own.content_hash() != tokenizer.content_hash():
        raise ConfigError(
            f"objective.teacher={name} has another tokenizer than the data, so its probabilities "
            "are of other tokens; choose a teacher with the same one"
        )
    report(f"learning from {name}")
    return load_source(source, shape, mesh, 0, report, team)[1]
