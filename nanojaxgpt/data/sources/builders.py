"""In: the text files in `data.manual_dir`. Out: a TensorFlow Dataset of them, as array_record.

Two builders of this project's own: `tiny_shakespeare`, since that of TFDS needs TensorFlow, and
`local_text`, a folder's *.txt files. Either names its config after the content, so that a changed
file makes another dataset.
"""

import contextlib
import hashlib
import io
import json
from collections.abc import Iterator
from typing import Any

import tensorflow_datasets as tfds
from absl import logging
from etils import epath

from nanojaxgpt.config import sections
from nanojaxgpt.data.sources.documents import BadTexts
from nanojaxgpt.data.sources.files import identify_text, read_text
from nanojaxgpt.errors import DataError

FILES = {"tiny_shakespeare": "tinyshakespeare.txt", "local_text": "*.txt"}

# They stand in no registry: TFDS knows a tiny_shakespeare of its own.
with tfds.core.registered.skip_registration():  # pyright: ignore[reportAttributeAccessIssue]

    class TextFiles(tfds.core.GeneratorBasedBuilder):
        """One example per text file, in the order of their names; FILES says which."""

        VERSION = tfds.core.Version("1.0.0")

        def __init__(self, data: sections.Data, **settings: Any) -> None:
            self.location, self.data = location_of(self.name, data), data
            super().__init__(**settings)

        def _info(self) -> tfds.core.DatasetInfo:
            features = tfds.features.FeaturesDict({"text": tfds.features.Text()})
            return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

        def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict:
            return {"train": self._generate_examples()}

        def _generate_examples(self) -> Iterator[tuple[int, dict[str, str]]]:
            bad = BadTexts(self.data.bad_text, print)
            for number, document in enumerate(read_text(self.location, self.data, bad)):
                yield number, {"text": document.text}

    class TinyShakespeare(TextFiles):
        """Karpathy's char-rnn corpus: one text of 1,115,394 bytes."""

        name = "tiny_shakespeare"

    class LocalText(TextFiles):
        """The *.txt files of a folder."""

        name = "local_text"


BUILDERS = {builder.name: builder for builder in (TinyShakespeare, LocalText)}


def location_of(name: str, data: sections.Data) -> str:
    """Return the glob of the files that a builder reads."""
    return f"{data.manual_dir}/{FILES[name]}"


def prepare_own(name: str, folder: epath.Path, data: sections.Data) -> epath.Path:
    """Return the folder of the dataset, prepared now where it is not there. Raises DataError."""
    content = json.dumps(identify_text(location_of(name, data), data))
    config = tfds.core.BuilderConfig(name=hashlib.sha256(content.encode()).hexdigest()[:16])
    with quietly():
        builder = BUILDERS[name](data, data_dir=folder, config=config, file_format="array_record")
    if not builder.data_path.exists():
        try:
            with quietly():
                builder.download_and_prepare()
        except OSError as error:
            # Two processes may prepare it at once; the one that comes second finds it there.
            if not builder.data_path.exists():
                raise DataError(
                    f"can't prepare {name} in data.tfds_dir={folder}: {error}"
                ) from error
    return builder.data_path


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Keep TFDS from telling its own story of a second's work, and of configs it does not know."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)
    tfds.disable_progress_bar()
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.set_verbosity(verbosity)
