"""What `inspect` prints: documents and their borders, padding, and which targets are scored."""

import subprocess
import sys

import pytest
from conftest import ROOT, command

from nanojaxgpt.config import cache_dir, sections
from nanojaxgpt.data.loader import open_data
from nanojaxgpt.data.rows import make_ramp
from nanojaxgpt.data.show import show_step
from nanojaxgpt.errors import DataError


@pytest.fixture
def show(small_config, tmp_path):
    """Return a function that shows a step of four files' text, with dotted changes."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for number in range(8):
            (tmp_path / name / f"{number}.txt").write_text(f"{name}{number}é")

    def build(split="train", step=1, rows=2, batch_size=2, ramp=(), **changes):
        text = {"data.tokenizer": "bytes", "data.source": f"text:{tmp_path / 'a'}"}
        changes = {name: value.format(folder=tmp_path) for name, value in changes.items()}
        cfg = small_config(**(text | changes))
        data = open_data(sections.Data(**cfg.data), cache_dir(cfg), report=lambda _: None)
        sizes = make_ramp(batch_size, *ramp)
        return list(show_step(data, split, step, cfg.model.seq_len, sizes, 0, rows))

    return build


def test_a_packed_row_shows_its_documents_and_its_padding(show):
    lines = show(**{"data.packing": "pack", "data.validation_documents": "1"})
    assert lines[0] == "train, step 1: 2 rows of 16 positions"
    assert lines[1] == "  tokens: 28, padding: 4 (12.5%)"
    assert lines[2] == "  scored targets: 28 (87.5%)"
    first = lines.index(next(line for line in lines if line.startswith("-- row 0, segment 1")))
    text = lines[first].split("positions, ")[1]
    assert text.startswith("'a")
    assert [line.split() for line in lines[first + 1 : first + 5]] == [
        ["1", "0", "'a'", "->", f"'{text[2]}'", "1"],
        ["1", "1", f"'{text[2]}'", "->", "<195>", "1"],
        ["1", "2", "<195>", "->", "<169>", "1"],
        ["1", "3", "<169>", "->", "<end>", "1"],
    ]
    assert lines[first + 5].startswith("-- row 0, segment 2: 4 positions")
    assert lines[-1] == "-- row 1, padding: 4 positions, 0 of them scored"


def test_a_batch_that_grew_shows_as_many_rows(show):
    packed = {"data.packing": "pack", "data.validation_documents": "1"}
    grown = [show(step=step, ramp=(1, 3), **packed) for step in (1, 2, 3, 4)]
    assert [lines[0].split()[3] for lines in grown] == ["1", "1", "1", "2"]
    assert grown[1] == show(step=2, batch_size=1, **packed)


def test_a_wrapped_row_shows_where_documents_end(show):
    lines = show(rows=1, batch_size=1)
    [title] = [line for line in lines if line.startswith("-- row")]
    assert "row 0, segment 1: 16 positions" in title
    assert title.count(" <end> ") == 3
    assert sum("<end>" in line and "->" in line for line in lines) >= 6


def test_a_mixture_shows_how_many_rows_each_source_gave(show):
    mixture = "('3 text:{folder}/a', '1 text:{folder}/b')"
    lines = show(batch_size=4, **{"data.mixture": mixture, "data.packing": "pack",
                                  "model.seq_len": "4"})  # fmt: skip
    counts = [line.rsplit(": ", 1)[1] for line in lines if line.startswith("  from text:")]
    assert counts == ["3 rows", "1 rows"]


def test_a_task_shows_that_only_its_answer_is_scored(show):
    lines = show(**{"data.source": "task:modular_addition,p=7", "model.seq_len": "10"})
    start = lines.index(next(line for line in lines if line.startswith("-- row 0, segment 2")))
    marks = [line.split()[5:] for line in lines[start + 1 : start + 5]]
    assert marks == [["0", "not", "scored"]] * 3 + [["1"]]
    assert lines[start + 5] == "-- row 0, padding: 2 positions, 0 of them scored"


def test_a_validation_batch_that_is_not_there_is_refused(show):
    lines = show("validation", rows=1, **{"data.validation_documents": "2"})
    assert lines[0] == "validation, step 1: 1 rows of 16 positions"
    assert sum(line.endswith("not scored") for line in lines) == 16 - 9
    with pytest.raises(DataError, match="has only 1 batches, not 2"):
        show("validation", step=2, **{"data.validation_documents": "2"})


def test_the_verb_needs_no_jax_and_says_what_is_wrong(tmp_path):
    experiment = tmp_path / "tiny.py"
    experiment.write_text(
        "from nanojaxgpt.config import base_config\n\ndef get_config():\n"
        "    cfg = base_config()\n    cfg.data.source = 'task:copy,length=4'\n"
        "    cfg.model.seq_len = 8\n    return cfg\n"
    )
    program = (
        "import sys; from nanojaxgpt.__main__ import main; code = main(sys.argv[1:]); "
        "assert 'jax' not in sys.modules; sys.exit(code)"
    )
    arguments = [sys.executable, "-c", program, "inspect", f"--config={experiment}", "--step=3"]
    found = subprocess.run(arguments, capture_output=True, text=True, cwd=ROOT)
    assert found.returncode == 0, found.stderr
    assert found.stdout.startswith("train, step 3: 32 rows of 8 positions\n")
    assert found.stdout.count("\n-- row") == 4
    refused = command("inspect", f"--config={experiment}", "--step=0")
    assert refused.returncode == 2
    assert "must be at least 1" in refused.stderr
