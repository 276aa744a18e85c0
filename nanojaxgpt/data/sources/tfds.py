"""In: NAME[/CONFIG][:VERSION][@SPLIT][#FIELD]. Out: the texts of a TensorFlow Dataset.

Read without TensorFlow, from array_record files that lie prepared in `data.tfds_dir`. Nothing is
ever downloaded: without a network that would fail only after minutes of retries.
"""

import hashlib
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from etils import epath

from nanojaxgpt.config import sections
from nanojaxgpt.data.sources.documents import (
    Document,
    Refuse,
    check_text,
    choose_field,
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
    field: str


def check_tfds(location: str) -> None:
    """Raise ConfigError where TensorFlow Datasets is not installed; nothing is imported."""
    require_package("tensorflow_datasets", "tfds", f"tfds:{location}")


def read_tfds(location: str, data: sections.Data, refuse: Refuse) -> Iterator[Document]:
    """Yield one document per example that has any text, in the order of the files."""
    builder, split, field = open_tfds(location, data)
    if not builder.info.splits[split].num_examples:
        return
    try:
        examples = builder.as_data_source(split)
        for start in range(0, len(examples), READ_AT_ONCE):
            numbers = range(start, min(start + READ_AT_ONCE, len(examples)))
            for number, example in zip(numbers, examples.__getitems__(numbers), strict=True):
                name = f"{split}/{number}"
                if text := decode_example(
                    f"tfds:{location}, example {name}", example[field], refuse
                ):
                    yield Document(name, text)
    except NotImplementedError as error:
        raise DataError(
            f"{builder.data_path} is not in array_record format; {how_to_prepare(location)}"
        ) from error
    except (OSError, RuntimeError, ValueError, IndexError) as error:
        raise DataError(f"{builder.data_path} can't be read: {error}") from error


def identify_tfds(location: str, data: sections.Data) -> dict[str, Any]:
    """Return the dataset's full name, the part of it that is read, and its files.

    `info` is the hash of dataset_info.json, where TFDS counts examples and bytes of each file: the
    files themselves, often hundreds of gigabytes, are not read for this.
    """
    builder, split, field = open_tfds(location, data)
    info = builder.info.splits[split]
    paths = sorted({epath.Path(part.filename) for part in info.file_instructions})
    return dict(
        dataset=builder.info.full_name,
        split=split,
        field=field,
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
    features: Any = builder.info.features
    texts = [k for k, kind in features.items() if isinstance(kind, tfds.features.Text)]
    return Prepared(builder, split, choose_field(f"tfds:{location}", field, texts))


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
