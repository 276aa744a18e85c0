"""What a MODEL is: a run directory, a Hugging Face folder, a GGUF file, or a name on the hub."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nanojaxgpt import config, rundir
from nanojaxgpt.config.sections import Config, Init, Model
from nanojaxgpt.errors import ConfigError
from nanojaxgpt.extras import require_package
from nanojaxgpt.interchange.provenance import HUB, SCRATCH, Provenance, load_provenance
from nanojaxgpt.interchange.templates import load_template

if TYPE_CHECKING:
    from nanojaxgpt.interchange.pretrained import Pretrained

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
# Fields that a config may set though a model of another format has them otherwise.
FREE = (
    "attention",
    "attention_blocks",
    "unroll",
    "remat",
    "dropout",
    "param_dtype",
    "compute_dtype",
    "init",
    "num_labels",
)


def find_model(model: str | Path) -> "Path | Pretrained":
    """Return the run directory that MODEL is, or the opened model of another format.

    Raises ConfigError, DataError or CheckpointError, saying what is wrong with which file.
    """
    if str(model).startswith(HUB):
        found = open_hf(fetch_model(str(model).removeprefix(HUB)))
        return found._replace(provenance=found.provenance._replace(name=str(model)))
    path = Path(model)
    if path.suffix == ".gguf" and path.is_file():
        from nanojaxgpt.interchange import gguf_file

        return gguf_file.open_file(path)
    if path.suffix in PICKLES and path.is_file():
        raise ConfigError(f"{path} is a pickle, which can run code when it is read: convert it to "
                          "safetensors, and give the folder")  # fmt: skip
    if path.is_file():
        raise ConfigError(f"{path} is not a model: give a run directory, a Hugging Face folder or "
                          "a .gguf file")  # fmt: skip
    return open_hf(path) if is_foreign(path) else path


def is_foreign(folder: Path) -> bool:
    """Return whether a folder is Hugging Face's: its config.json has no sections."""
    try:
        found = json.loads((folder / "config.json").read_bytes())
    except (OSError, ValueError, RecursionError):
        pickles = [path for kind in PICKLES for path in folder.glob(f"*{kind}")]
        return bool(pickles or list(folder.glob("*.safetensors")))
    return isinstance(found, dict) and not isinstance(found.get("model"), dict)


def open_hf(folder: Path) -> "Pretrained":
    """Return the model of a Hugging Face folder, or of the adapter in one of peft's."""
    from nanojaxgpt.interchange import huggingface, peft

    if (folder / peft.CONFIG).is_file() and not (folder / "config.json").is_file():
        return peft.open_adapter(folder, find_model)
    return huggingface.open_folder(folder)


def fetch_model(name: str) -> Path:
    """Return the folder of a model on the Hugging Face hub, OWNER/NAME[@REVISION].

    What is in the cache is used as it is, without a request. Raises ConfigError.
    """
    require_package("huggingface_hub", "huggingface", f"{HUB}{name}")
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    repository, _, revision = name.partition("@")
    wanted: dict[str, Any] = dict(
        repo_id=repository,
        revision=revision or None,
        allow_patterns=[
            "*.json",
            "*.safetensors",
            "*.jinja",
            "tokenizer.model",
            "merges.txt",
            "README.md",
        ],
    )
    try:
        return Path(huggingface_hub.snapshot_download(**wanted, local_files_only=True))
    except LocalEntryNotFoundError:
        pass
    except Exception as error:
        raise ConfigError(f"{HUB}{name}: {first_line(error)}") from error
    try:
        return Path(huggingface_hub.snapshot_download(**wanted))
    except Exception as error:
        raise ConfigError(f"can't get {HUB}{name}, which is not in the cache: "
                          f"{first_line(error)}") from error  # fmt: skip


def first_line(error: Exception) -> str:
    """Return the first line of what an exception says."""
    return next(iter(str(error).strip().split("\n")), "")[:300] or type(error).__name__


def config_of(source: "Path | Pretrained") -> Config:
    """Return the config of a run, or one for a model of another format, with what it sets."""
    if isinstance(source, Path):
        return rundir.read_config(source)
    changes = {f"model.{name}": value for name, value in source.config.given().items()}
    changes |= {f"sample.{name}": value for name, value in source.sample.items()}
    on_hub = source.provenance.name.startswith(HUB)
    name = source.provenance.name if on_hub else str(source.origin)
    return config.with_fields(Config(), changes | {"init.from_model": name})


def adopt_model(cfg: Config, run: Path) -> Config:
    """Return the config with the section `model` of init.from_model, or as it is without one.

    A `run` that was begun has it in its config. Raises ConfigError where the config sets a field
    otherwise, and as `find_model`.
    """
    name = cfg.init.from_model
    if not name:
        return cfg
    if (run / "config.json").is_file():
        begun = rundir.read_config(run)
        if begun.init.from_model == name:
            return adopted(cfg, begun.model, name)
    source = find_model(name)
    return adopted(cfg, config_of(source).model, name, grows=not isinstance(source, Path))


def adopted(cfg: Config, theirs: Model, name: str, grows: bool = True) -> Config:
    """Return the config with the model's fields where it has the defaults.

    `grows`: whether the vocabulary may be larger, which adds rows of zeros; a checkpoint's is not.
    """
    mine, given, rules = cfg.model.given(), theirs.given(), theirs.rules()
    changes, problems = {}, []
    longer = mine["seq_len"] > given["seq_len"]
    for field, value in given.items():
        free = field in FREE or (field == "rotary" and longer and mine["rotary"] != ("",))
        if free or mine[field] == value:
            continue
        if field == "seq_len":
            if longer and mine["rotary"] in (("",), given["rotary"]):
                problems.append(f"model.seq_len={mine[field]}, but its context has {value} tokens; "
                                "a longer one needs a scaling in model.rotary, such as "
                                f'"scaling=yarn factor=4 original={value}"')  # fmt: skip
        elif field == "vocab_size" and grows and mine[field] >= value:
            continue
        elif mine[field] == rules[field].default:
            changes[f"model.{field}"] = value
        else:
            problems.append(f"model.{field}={mine[field]!r}, but it has {value!r}")
    if problems:
        raise ConfigError("\n".join(f"{name}: {problem}" for problem in problems))
    return config.with_fields(cfg, changes)


def inherited_template(init: Init, run: Path | None) -> str:
    """Return the chat template of the model that a run starts from, or "".

    A run that was begun keeps a copy.
    """
    if run and (run / "identity.json").exists():
        return load_template(run / "tokenizer")
    if not (init.from_run or init.from_model):
        return ""
    source = find_model(init.from_model) if init.from_model else Path(init.from_run)
    if isinstance(source, Path):
        return load_template(source / "tokenizer")
    return source.chat_template


def inherited_provenance(init: Init, run: Path) -> Provenance:
    """Return the provenance of the model that a run starts from; a begun run keeps a copy."""
    if (run / "identity.json").exists():
        return load_provenance(run)
    if not (init.from_run or init.from_model):
        return SCRATCH
    source = find_model(init.from_model) if init.from_model else Path(init.from_run)
    return load_provenance(source) if isinstance(source, Path) else source.provenance
