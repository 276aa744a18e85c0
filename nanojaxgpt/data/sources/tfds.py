"""In: NAME[/CONFIG][:VERSION][@SPLIT][#FIELD]. Out: texts or records of a TensorFlow Dataset.

Read without TensorFlow, from array_record files that lie prepared in `data.tfds_dir`. Nothing is
ever downloaded: without a network that would fail only after minutes of retries.
"""

import hashlib
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from nanojaxgpt.config import sections
from nanojaxgpt.data.sources.documents import (
    Document,
    Refuse,
    check_text,
    choose_field,
    class_name,
)
from nanojaxgpt.data.sources.files import check_scheme
from nanojaxgpt.errors import ConfigError, DataError
from nanojaxgpt.extras import require_package

NAME = re.compile(r"(\w+)(?:/([^:@#]+))?(?::([\d.]+))?(?:@([^#]+))?(?:#(\w+))?")
OWN_BUILDERS = ("tiny_shakespeare", "local_text")
READ_AT_ONCE = 256  # examples; each call of the reader costs as much as several of them


class Prepared(NamedTuple):
    """A dataset on disk: its builder, and which part of it is read."""

    builder: Any
    split: str
    field: str  # "" where none was named


def check_tfds(location: str) -> None:
    """Raise ConfigError where TensorFlow Datasets is not installed; nothing is imported."""
    require_package("tensorflow_datasets", "tfds", f"tfds:{location}")


def read_tfds(location: str, data: sections.Data, refuse: Refuse) -> Iterator[Document]:
    """Yield one document per example that has any text, in the order of the files."""
    prepared = open_tfds(location, data)
    field = choose_text(location, prepared)
    for name, example in examples_of(location, prepared):
        if text := decode_example(f"tfds:{location}, example {name}", example[field], refuse):
            yield Document(name, text)


def read_tfds_records(
    location: str, data: sections.Data, refuse: Refuse
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (where it stands, all fields) of each example, in the order of the files."""
    prepared = open_records(location, data)
    for name, example in examples_of(location, prepared):
        place = f"tfds:{location}, example {name}"
        try:
            yield place, as_plain(prepared.builder.info.features, example)
        except UnicodeDecodeError as error:
            refuse(f"{place}: a text is not UTF-8 at its byte {error.start} ({error.reason})")


def examples_of(location: str, prepared: Prepared) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the name SPLIT/NUMBER of each example and its fields. Raises DataError."""
    builder, split, _ = prepared
    if not builder.info.splits[split].num_examples:
        return
    try:
        examples = builder.as_data_source(split)
        for start in range(0, len(examples), READ_AT_ONCE):
            numbers = range(start, min(start + READ_AT_ONCE, len(examples)))
            for number, example in zip(numbers, examples.__getitems__(numbers), strict=True):
                yield f"{split}/{number}", example
    except NotImplementedError as error:
        raise DataError(
            f"{builder.data_path} is not in array_record format; {how_to_prepare(location)}"
        ) from error
    except (OSError, RuntimeError, ValueError, IndexError) as error:
        raise DataError(f"{builder.data_path} can't be read: {error}") from error


def as_plain(kind: Any, value: Any) -> Any:
    """Return a value of the feature `kind` as a JSON file would have it.

    Texts are str, a class is its name, if it has one (None: unlabelled), and a sequence of dicts,
    which TFDS stores as a dict of lists, is a list. Raises UnicodeDecodeError for a text.
    """
    from tensorflow_datasets import features

    if value is None:  # an optional feature
        return None
    if isinstance(kind, features.FeaturesDict):
        return {name: as_plain(kind[name], part) for name, part in value.items()}
    if isinstance(kind, features.Sequence):
        return [as_plain(kind.feature, part) for part in elements_of(value)]
    if isinstance(kind, features.ClassLabel):
        return class_name(kind.names, int(value))
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:
            if isinstance(kind, features.Text):
                raise
    return value.item() if isinstance(value, np.generic) else value


def elements_of(value: Any) -> list[Any]:
    """Return the elements of a sequence; a dict of lists becomes a list of dicts."""
    if not isinstance(value, Mapping):
        return list(value)
    columns = [elements_of(column) for column in value.values()]
    return [dict(zip(value, row, strict=True)) for row in zip(*columns, strict=True)]


def identify_tfds(location: str, data: sections.Data) -> dict[str, Any]:
    """Return the dataset's full name, the part of it that is read, and its files."""
    prepared = open_tfds(location, data)
    return dict(field=choose_text(location, prepared), **identify_prepared(prepared))


def identify_tfds_records(location: str, data: sections.Data) -> dict[str, Any]:
    """Return what `identify_tfds` does, with the hash of the features and of the classes' names."""
    prepared = open_records(location, data)
    folder, digest = prepared.builder.data_path, hashlib.sha256()
    for path in sorted([*folder.glob("features.json"), *folder.glob("*.labels.txt")]):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return dict(features=digest.hexdigest(), **identify_prepared(prepared))


def identify_prepared(prepared: Prepared) -> dict[str, Any]:
    """Return the dataset's full name, the split that is read, and its files.

    `info` is the hash of dataset_info.json, where TFDS counts examples and bytes of each file: the
    files themselves, often hundreds of gigabytes, are not read for this.
    """
    builder, split, _ = prepared
    info = builder.info.splits[split]
    paths = sorted({epath.Path(part.filename) for part in info.file_instructions})
    return dict(
        dataset=builder.info.full_name,
        split=split,
        examples=info.num_examples,
        info=hashlib.sha256((builder.data_path / "dataset_info.json").read_bytes()).hexdigest(),
        files=[dict(name=path.name, bytes=path.stat().length) for path in paths],
    )


def decode_example(name: str, value: bytes, refuse: Refuse) -> str:
    """Return the text of an example; "" where it is refused."""
    try:
        return check_text(name, value.decode() if isinstance(value, bytes) else value, refuse)
    except UnicodeDecodeError as error:
        refuse(f"{name}, byte {error.start}: not UTF-8 ({error.reason})")
        return ""


def open_tfds(location: str, data: sections.Data) -> Prepared:
    """Return the dataset that `location` names. Raises ConfigError, DataError: not prepared."""
    parts = NAME.fullmatch(location)
    if not parts:
        raise ConfigError(
            f"data.source=tfds:{location} is not tfds:NAME[/CONFIG][:VERSION][@SPLIT][#FIELD]"
        )
    check_tfds(location)
    name, config, version, split, field = (part or "" for part in parts.groups())
    check_scheme(f"data.tfds_dir={data.tfds_dir}", data.tfds_dir)
    folder = epath.Path(data.tfds_dir or "~/tensorflow_datasets").expanduser()
    if name in OWN_BUILDERS and data.manual_dir:
        from nanojaxgpt.data.sources.builders import prepare_own

        found = prepare_own(name, folder, data)
    else:
        found = find_prepared(location, folder, name, config, version)
    import tensorflow_datasets as tfds

    builder, split = tfds.builder_from_directory(found), split or "train"
    try:
        builder.info.splits[split]
    except (KeyError, ValueError) as error:
        known = ", ".join(builder.info.splits)
        raise ConfigError(f"tfds:{location}: no split {split!r}; available: {known}") from error
    return Prepared(builder, split, field)


def open_records(location: str, data: sections.Data) -> Prepared:
    """Return the dataset whose examples are read whole. Raises as `open_tfds`."""
    prepared = open_tfds(location, data)
    if prepared.field:
        raise ConfigError(f"tfds:{location}: an example is read whole: leave out #{prepared.field}")
    return prepared


def choose_text(location: str, prepared: Prepared) -> str:
    """Return which field of text is read. Raises ConfigError."""
    from tensorflow_datasets import features

    fields: Any = prepared.builder.info.features
    texts = [name for name, kind in fields.items() if isinstance(kind, features.Text)]
    return choose_field(f"tfds:{location}", prepared.field, texts)


def find_prepared(
    location: str, folder: epath.Path, name: str, config: str, version: str
) -> epath.Path:
    """Return the newest version of a dataset below `folder`. Raises DataError: none is there."""
    base = folder / name / config if config else folder / name
    found = versions(base)
    if not found and not config and base.is_dir():
        configs = [path for path in base.iterdir() if path.is_dir() and versions(path)]
        if len(configs) > 1:
            names = ", ".join(sorted(path.name for path in configs))
            raise ConfigError(
                f"tfds:{location}: name a config, tfds:{name}/CONFIG; available: {names}"
            )
        found = versions(configs[0]) if configs else {}
    chosen = found.get(version) if version else found[max(found, key=as_numbers)] if found else None
    if not chosen:
        here = f"; available versions: {', '.join(sorted(found))}" if found else ""
        raise DataError(
            f"no prepared dataset {base}{f'/{version}' if version else ''}{here}; "
            + how_to_prepare(location)
        )
    return chosen


def versions(folder: epath.Path) -> dict[str, epath.Path]:
    """Return the prepared versions of a dataset or of one config of it."""
    if not folder.is_dir():
        return {}
    found = [p for p in folder.iterdir() if re.fullmatch(r"[\d.]+", p.name)]
    return {p.name: p for p in found if (p / "dataset_info.json").exists()}


def as_numbers(version: str) -> list[int]:
    """Return "1.10.0" as [1, 10, 0], which sorts after 1.9.0."""
    return [int(number or 0) for number in version.split(".")]


def how_to_prepare(location: str) -> str:
    """Return the sentence that says how a dataset comes into `data.tfds_dir`."""
    parts = NAME.fullmatch(location)
    name, config = (parts[1], parts[2]) if parts else (location, "")
    if name in OWN_BUILDERS:
        return "set data.manual_dir to the folder of your text files to build it from them"
    full = f"{name}/{config}" if config else name
    return (
        "datasets are not downloaded automatically. On a machine with network access, run\n"
        f'  python -c "import tensorflow_datasets as tfds, tensorflow_datasets.text.{name}; '
        f"tfds.builder('{full}', file_format='array_record').download_and_prepare()\"\n"
        "and set data.tfds_dir to the folder that this fills (~/tensorflow_datasets)"
    )
