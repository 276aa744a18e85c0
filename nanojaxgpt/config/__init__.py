"""Load, override, check and compare configs, whose fields are in sections.py.

In: an experiment file, overrides from the command line, or a run's `config.json`. Out: a locked
`ConfigDict` whose fields all have the right type and range, or a typed `sections.Config`. No jax
here: a typo fails before any backend starts.
"""

import ast
import difflib
import hashlib
import importlib.util
import inspect
import json
import os
import re
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

from ml_collections import ConfigDict

from nanojaxgpt.checks import (
    field_problems,
    kind_of,
    partner_problems,
    read_float,
    read_int,
    show,
)
from nanojaxgpt.config import sections
from nanojaxgpt.config.blocks import blocks_problems
from nanojaxgpt.config.remat import remat_problems
from nanojaxgpt.config.rotary import rotary_problems
from nanojaxgpt.config.sections import Config
from nanojaxgpt.errors import ConfigError, Stopped, UserError
from nanojaxgpt.names import unknown_name

AnyConfig = ConfigDict | Config  # what reads a config's fields takes either
Either = TypeVar("Either", bound=AnyConfig)
Typed = TypeVar("Typed", bound=Config)


def base_config() -> ConfigDict:
    """Return every field with its default, locked: what an experiment starts from."""
    return editable(sections.Config())


def editable(cfg: Config) -> ConfigDict:
    """Return the config as experiments take it: locked, so that no field can be added."""
    return ConfigDict(to_dict(cfg)).lock()


def fields(cfg: AnyConfig) -> Iterator[tuple[str, Any]]:
    """Yield every dotted field name with its value, in alphabetical order."""
    for section, values in sorted(to_dict(cfg).items()):
        for name, value in sorted(values.items()):
            yield f"{section}.{name}", value


def to_dict(cfg: AnyConfig) -> dict[str, dict[str, Any]]:
    """Return {section: {field: value}}, the values as they were given."""
    if isinstance(cfg, ConfigDict):
        return cfg.to_dict()
    return {name: getattr(cfg, name).given() for name in sections.kinds(type(cfg))}


def typed(cfg: AnyConfig) -> Config:
    """Return the config as frozen dataclasses, which are hashable. Raises as `check_config`."""
    return cfg if isinstance(cfg, Config) else build(dict(fields(cfg)), sections.Config)


def with_fields(cfg: Either, changes: Mapping[str, Any]) -> Either:
    """Return a checked copy with dotted fields replaced, as in {"model.remat": "full"}.

    Raises ConfigError for a field that does not exist, and as `check_config`.
    """
    values = dict(fields(cfg))
    for name in changes:
        if name not in values:
            raise ConfigError(unknown_name("config field", name, list(values)))
    if isinstance(cfg, Config):
        return build({**values, **changes}, type(cfg))
    cfg = cfg.copy_and_resolve_references()
    set_fields(cfg, changes)
    check_config(cfg)
    return cfg.lock()


def build(values: Mapping[str, Any], kind: type[Typed]) -> Typed:
    """Return the config, of the class `kind`, of {"section.field": value}, checked.

    Raises as `check_config`.
    """
    rules = sections.rules()
    problems = [p for name in values for p in field_problems(name, values[name], rules[name])]
    if problems:
        raise ConfigError("\n".join(problems))
    parts: dict[str, dict[str, Any]] = {}
    for name, value in values.items():
        section, field = name.split(".")
        number = float(value) if rules[name].item is float else value  # an integer is one too
        parts.setdefault(section, {})[field] = number
    cfg = assemble(parts, sections.Config)
    model = cfg.model
    problems = partner_problems(cfg)
    if model.positions == "rotary":
        head_dim = model.head_dim or model.embed_dim // model.num_heads
        problems += rotary_problems(model.rotary, model.rotary_base, head_dim)
    problems += remat_problems(model) + blocks_problems(model)
    if problems:
        raise ConfigError("\n".join(problems))
    return assemble(parts, kind)


def assemble(parts: Mapping[str, Mapping[str, Any]], kind: type[Typed]) -> Typed:
    """Return the config of {section: {field: value}}, not checked."""
    built: Any = {name: one(**parts[name]) for name, one in sections.kinds(kind).items()}
    return kind(**built)


def load_config(experiment: str, overrides: dict[str, str] | None = None) -> ConfigDict:
    """Return the checked config of `experiment`, "FILE.py" or "FILE.py:VARIANT", plus overrides.

    `overrides` maps dotted fields to text from the command line. Raises ConfigError.
    """
    cfg = load_experiment(experiment)
    return override_config(cfg, overrides or {})


def load_experiment(experiment: str) -> ConfigDict:
    """Return the result of an experiment file's `get_config(variant)`. Raises ConfigError."""
    path, _, variant = experiment.partition(":")
    module = load_module(path)
    if not callable(getattr(module, "get_config", None)):
        raise ConfigError(f"{path} has no function get_config(variant='') -> ConfigDict")
    with running(path, "get_config()"):
        if variant and not inspect.signature(module.get_config).parameters:
            raise ConfigError(f"it has no variants; leave out ':{variant}'")
        cfg = module.get_config(variant) if variant else module.get_config()
    if not isinstance(cfg, ConfigDict):
        raise ConfigError(f"{path}: get_config returns {kind_of(cfg)}, not a ConfigDict")
    with running(path, "the config of get_config()"):
        return conform(cfg.to_dict())


@contextmanager
def running(path: str, what: str) -> Iterator[None]:
    """Turn whatever the code of an experiment file raises, sys.exit too, into a ConfigError.

    It names the last line of the file that was running. Signals pass through.
    """
    try:
        yield
    except (KeyboardInterrupt, Stopped):
        raise
    except BaseException as error:
        absolute = os.path.abspath(path)
        frames = traceback.walk_tb(error.__traceback__)
        lines = [line for frame, line in frames if frame.f_code.co_filename == absolute]
        place = f"{path}:{lines[-1]}" if lines else path
        said = f"{what} calls sys.exit" if isinstance(error, SystemExit) else exception_text(error)
        raise ConfigError(f"{place}: {said}") from error


def exception_text(error: BaseException) -> str:
    """Return the message of an exception; of ml_collections' the first and the last line."""
    try:
        text = str(error if isinstance(error, UserError | SyntaxError) else error.args[0])
    except Exception:  # no arguments, or their own __str__ fails
        text = ""
    if isinstance(error, UserError):
        return text
    if isinstance(error, AttributeError):
        present = r" Other fields present: .*?\}\"?(\\n|\n|$)"
        text = re.sub(present, " ", text, flags=re.DOTALL).strip("' ")
    name = "" if isinstance(error, AttributeError) else f"{type(error).__name__}: "
    text = " ".join(f"{name}{text}".split()).removesuffix(":")
    return text if len(text) <= 500 else f"{text[:500]}..."


def load_module(path: str) -> ModuleType:
    """Import the Python file at `path`. Raises ConfigError where it is missing or broken."""
    found = Path(path)
    try:
        missing = not found.is_file()
        near = sorted(str(p) for p in found.parent.glob("*.py") if p.name[0] != "_")
    except OSError as error:  # a name that is too long, a folder without permission
        raise ConfigError(f"can't read {show(path)}: {error.strerror}") from error
    if missing:
        guess = difflib.get_close_matches(path, near, 1) or near[:5]
        hint = f"; did you mean {' or '.join(guess)}?" if guess else ""
        raise ConfigError(f"no experiment file {show(path).strip(chr(39))}{hint}")
    if found.suffix != ".py":
        raise ConfigError(f"{path} is not an experiment: its name must end in .py")
    with running(path, "the file"):
        spec = importlib.util.spec_from_file_location(found.stem, path)
        if spec is None or spec.loader is None:
            raise ImportError("it can't be imported")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return module


def conform(given: dict[str, Any]) -> ConfigDict:
    """Return the base config with these values of every section. Raises ConfigError.

    All sections and fields must be there, and no others; `check_config` looks at the values.
    """
    cfg, problems, changes = base_config(), [], {}
    known = [name for name, _ in fields(cfg)]
    for section, values in given.items():
        if not isinstance(values, dict):
            problems.append(f"the section {show(section)} is {kind_of(values)}, not a ConfigDict")
            known = [name for name in known if name.split(".")[0] != section]
            continue
        for name, value in values.items():
            if f"{section}.{name}" in known:
                changes[f"{section}.{name}"] = value
            else:
                problems.append(unknown_name("config field", f"{section}.{name}", known))
    pairs = [name.split(".") for name in known]
    if missing := [f"{first}.{last}" for first, last in pairs if last not in given.get(first, ())]:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        problems.append(f"missing: {', '.join(missing[:3])}{more}; start from base_config()")
    if problems:
        raise ConfigError("\n".join(problems))
    set_fields(cfg, changes)
    return cfg.lock()


def override_config(cfg: Either, overrides: Mapping[str, str]) -> Either:
    """Return a copy of `cfg` with dotted fields set from text, then checked."""
    known, changes = dict(fields(cfg)), {}
    for name, text in overrides.items():
        if name not in known:
            raise ConfigError(unknown_name("config field", name, list(known)))
        changes[name] = parse_value(name, text, known[name])
    return with_fields(cfg, changes)


def set_fields(cfg: ConfigDict, changes: Mapping[str, Any]) -> None:
    """Set dotted fields to values of any type; `check_config` names a wrong one."""
    with cfg.unlocked(), cfg.ignore_type():
        for name, value in changes.items():
            section, field = name.split(".")
            try:
                cfg[section][field] = value
            except (OverflowError, TypeError, ValueError) as error:  # 10**400 in a float's place
                raise ConfigError(f"{name}={show(value)}: {error}") from None


def parse_value(name: str, text: str, default: Any) -> Any:
    """Return `text` as the type of `default` (bool, int, float, str or tuple of int)."""
    try:
        if isinstance(default, bool):
            return {"true": True, "1": True, "false": False, "0": False}[text.lower()]
        if isinstance(default, int):
            return read_int(text)
        if isinstance(default, float):
            return read_float(text)
        if isinstance(default, tuple):
            value = ast.literal_eval(text)
            return tuple(value) if isinstance(value, tuple | list) else (value,)
        return text
    except (KeyError, TypeError, ValueError, SyntaxError, RecursionError, MemoryError):
        shown = show(default)
        raise ConfigError(
            f"{name}={show(text)} is not {kind_of(default)}, such as {shown}"
        ) from None


def check_config(cfg: ConfigDict) -> None:
    """Raise ConfigError with every field that has a wrong type, range, choice or partner."""
    typed(cfg)


def free_on_resume(name: str) -> bool:
    """Return whether a field may change when a run is resumed."""
    return sections.rules()[name].resume


def to_json(cfg: AnyConfig) -> str:
    """Return the config as JSON text that `from_json` reads back."""
    return json.dumps(to_dict(cfg), indent=2, sort_keys=True) + "\n"


def from_json(text: str, origin: str = "config.json") -> Config:
    """Return the checked config in `text`. Raises ConfigError, naming `origin`."""
    found = dict(fields(sections.Config()))
    known = list(found)
    try:
        for section, values in json.loads(text).items():
            for name, value in values.items():
                if f"{section}.{name}" not in known:
                    field = unknown_name("config field", f"{section}.{name}", known)
                    raise ConfigError(f"{field}; the file was written by another version")
                found[f"{section}.{name}"] = tuple(value) if isinstance(value, list) else value
        return build(found, sections.Config)
    except (ValueError, AttributeError, RecursionError) as error:
        raise ConfigError(f"{origin} is not a config: {error}") from error
    except ConfigError as error:
        raise ConfigError(f"{origin}: {error}") from error


def config_hash(cfg: AnyConfig) -> str:
    """Return 16 hex digits that name what a resolved config changes of the defaults.

    So a sweep's trials keep their names when a later version has more fields.
    """
    return hash_fields(dict(fields(cfg)))


def hash_fields(values: Mapping[str, Any]) -> str:
    """Return the `config_hash` of {"section.field": value}, where fields may be missing."""
    defaults = dict(fields(sections.Config()))
    changed = {name: value for name, value in values.items() if value != defaults[name]}
    text = json.dumps(changed, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def differences(old: AnyConfig, new: AnyConfig) -> list[tuple[str, Any, Any]]:
    """Return (field, old value, new value) wherever two configs differ."""
    after = dict(fields(new))
    return [(name, value, after[name]) for name, value in fields(old) if value != after[name]]


def cache_dir(cfg: AnyConfig) -> Path:
    """Return the folder that holds token stores and downloads."""
    return cache_path(cfg.data.cache_dir)


def cache_path(cache_dir: str) -> Path:
    """Return the folder that data.cache_dir stands for."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(cache_dir or Path(base) / "nanojaxgpt").expanduser()
