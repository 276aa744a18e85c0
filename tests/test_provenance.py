"""What an export says of the model that a run started from: special tokens, name, licence."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import pytest
import tokenizers
from conftest import ROOT
from test_gguf import BPE, find_smollm2, make

import nanojaxgpt
from nanojaxgpt import config
from nanojaxgpt.__main__ import main
from nanojaxgpt.config.sections import Init
from nanojaxgpt.errors import DataError
from nanojaxgpt.interchange import opening, provenance
from nanojaxgpt.interchange.huggingface import open_folder
from nanojaxgpt.interchange.provenance import load_provenance
from nanojaxgpt.language_model import LanguageModel
from nanojaxgpt.model.config import complete
from nanojaxgpt.model.lora import add_adapters

LETTERS = "abcdefghijklmnopqrstuvwxyz"
SPECIAL = ("<unk>", "<s>", "</s>", "<pad>", "<stop>")
CARD = "---\nlanguage: en\nlicense: 'apache-2.0'\n---\n# A model\n"


def special_tokenizer() -> tokenizers.Tokenizer:
    """Return a tokenizer of letters after five special tokens, none of which it adds to a text."""
    ids = {piece: number for number, piece in enumerate((*SPECIAL, *LETTERS))}
    found = tokenizers.Tokenizer(tokenizers.models.BPE(ids, [], unk_token="<unk>"))
    found.add_special_tokens(list(SPECIAL))
    return found


@pytest.fixture
def folder(tmp_path) -> Path:
    """Return a folder whose three files name the special tokens differently, as Llama 3's do."""
    copied = shutil.copytree(ROOT / "tests" / "golden" / "llama", tmp_path / "mine")
    special_tokenizer().save(str(copied / "tokenizer.json"))
    settings = dict(bos_token="<s>", eos_token={"content": "<stop>"}, pad_token="<nowhere>")
    (copied / "tokenizer_config.json").write_text(json.dumps(settings))
    (copied / "special_tokens_map.json").write_text(json.dumps(dict(unk_token="<unk>")))
    config = json.loads((copied / "config.json").read_text())
    config |= dict(bos_token_id=1, eos_token_id=2, pad_token_id=3)
    (copied / "config.json").write_text(json.dumps(config))
    generation = dict(eos_token_id=[4, 2], pad_token_id=400)
    (copied / "generation_config.json").write_text(json.dumps(generation))
    (copied / "README.md").write_text(CARD)
    return copied


def read(path: Path, *keys: str) -> dict:
    """Return these keys of a JSON file, where it has them."""
    found = json.loads(path.read_text())
    return {key: found[key] for key in keys if key in found}


def test_an_export_names_the_special_tokens_of_the_source(folder, tmp_path):
    run, out = tmp_path / "run", tmp_path / "out"
    assert main(["import", str(folder), str(run)]) == 0
    assert main(["export", str(run), str(out)]) == 0
    ids = ("bos_token_id", "eos_token_id", "pad_token_id")
    assert read(out / "config.json", *ids) == dict(zip(ids, (1, 2, 3), strict=True))
    assert read(out / "generation_config.json", *ids) == dict(eos_token_id=[4, 2])
    tokens = ("bos_token", "eos_token", "pad_token", "unk_token")
    # What is no token, and what is no row of the table, is left out.
    assert read(out / "tokenizer_config.json", *tokens) == dict(
        bos_token="<s>", eos_token="<stop>", unk_token="<unk>"
    )
    again = open_folder(out).provenance
    assert again == load_provenance(run)._replace(name="out")


@pytest.mark.slow
def test_a_run_that_trains_on_keeps_them(folder, tmp_path, monkeypatch):
    one = jax.devices()[:1]
    monkeypatch.setattr(jax, "devices", lambda *_: one)
    text = tmp_path / "corpus.txt"
    text.write_text("abc defg hij\n" * 400)
    options = [
        f"--config.init.from_model={folder}", f"--config.data.source=text:{text}",
        "--config.data.lossy_tokenizer=True", f"--config.data.cache_dir={tmp_path}/cache",
        "--config.train.num_steps=2", "--config.train.batch_size=2", "--config.model.seq_len=16",
        "--config.optim.warmup_steps=1", "--config.eval.num_batches=1", "--config.mesh.data=1",
    ]  # fmt: skip
    (tmp_path / "plain.py").write_text("from nanojaxgpt.config import base_config as get_config\n")
    experiment = f"--config={tmp_path}/plain.py"
    run, wanted = tmp_path / "run", open_folder(folder).provenance
    assert main(["train", experiment, f"--run={run}", *options]) == 0
    assert load_provenance(run) == wanted
    shutil.rmtree(folder)
    assert main(["train", experiment, f"--run={run}", *options]) == 0
    assert load_provenance(run) == wanted


def test_it_comes_with_what_a_run_starts_from(folder, tmp_path):
    run, new = tmp_path / "run", tmp_path / "new"
    assert main(["import", str(folder), str(run)]) == 0
    wanted = open_folder(folder).provenance
    for init in (Init(from_model=str(folder)), Init(from_run=str(run)), Init(from_model=str(run))):
        assert opening.inherited_provenance(init, new) == wanted
    assert opening.inherited_provenance(Init(), new) == provenance.SCRATCH


def test_a_gguf_file_keeps_them(folder, tmp_path):
    """From a GGUF file into a folder, and from a folder into a GGUF file."""
    more: dict[str, Any] = {f"tokenizer.ggml.{name}_token_id": number
           for name, number in (("bos", 13), ("padding", 1), ("unknown", 2))}  # fmt: skip
    path = make(tmp_path, "llama", (), **more | {"general.license": "mit"})
    model = nanojaxgpt.load(path)
    assert model.tokenizer.start_id == -1  # it is named, but not put before texts
    model.save(tmp_path / "out", format="hf")
    model.save(tmp_path / "again.gguf", format="gguf")
    special = dict(bos_token=13, eos_token=0, pad_token=1, unk_token=2)
    keys = {f"{name}_id": special[name] for name in ("bos_token", "eos_token", "pad_token")}
    for name in ("out", "again.gguf"):
        found = opening.find_model(tmp_path / name)
        assert not isinstance(found, Path)
        assert found.provenance == provenance.Provenance(name, "mit", "", special, keys, keys)
    assert read(tmp_path / "out" / "tokenizer_config.json", "pad_token") == {
        "pad_token": BPE["tokenizer.ggml.tokens"][1]
    }


def ids_by_transformers(folder: Path, **file: str) -> list[int | list[int] | None]:
    """Return what transformers takes for the special tokens, of each of its three files."""
    transformers = pytest.importorskip("transformers", reason="the oracle is transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **file)
    found = [getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad", "unk")]
    readers = [transformers.AutoConfig] + [transformers.GenerationConfig] * (not file)
    for reader in readers:
        config = reader.from_pretrained(folder, **file)
        found += [getattr(config, f"{name}_token_id") for name in ("bos", "eos", "pad")]
    return found


@pytest.mark.slow
@pytest.mark.parametrize("pad", ["<pad>", None])
def test_transformers_reads_the_same_ids_back(pad, tmp_path):
    transformers = pytest.importorskip("transformers", reason="the oracle is transformers")
    source, run, out = (tmp_path / name for name in ("source", "run", "out"))
    number = pad and SPECIAL.index(pad)
    cfg = transformers.LlamaConfig(
        vocab_size=31, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=64, bos_token_id=1, eos_token_id=2,
        pad_token_id=number,
    )  # fmt: skip
    theirs = transformers.LlamaForCausalLM(cfg)
    theirs.generation_config = transformers.GenerationConfig(
        bos_token_id=1, eos_token_id=[4, 2], pad_token_id=number
    )
    theirs.save_pretrained(source)
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=special_tokenizer(), bos_token="<s>", eos_token="<stop>", pad_token=pad,
        unk_token="<unk>",
    ).save_pretrained(source)  # fmt: skip
    wanted = ids_by_transformers(source)
    assert wanted == [1, 4, number, 0, 1, 2, number, 1, [4, 2], number]
    assert main(["import", str(source), str(run)]) == 0
    assert main(["export", str(run), str(out)]) == 0
    assert ids_by_transformers(out) == wanted


@pytest.mark.slow
def test_transformers_reads_the_ids_of_a_gguf_file(tmp_path):
    path = find_smollm2()
    wanted = ids_by_transformers(path.parent, gguf_file=path.name)
    assert wanted[:4] == [1, 2, 2, 0]
    nanojaxgpt.load(path).save(tmp_path / "out", dtype="bfloat16", format="hf")
    assert ids_by_transformers(tmp_path / "out")[:7] == [*wanted[:4], 1, 2, 2]
    assert "(apache-2.0)" in (tmp_path / "out" / "README.md").read_text()


def card_of(model: LanguageModel, folder: Path, form: str = "hf") -> str:
    """Return the card of an export."""
    model.save(folder, format=form)
    return (folder / "README.md").read_text()


def test_a_card_names_the_source_and_its_licence(folder, tmp_path):
    text = card_of(nanojaxgpt.load(folder), tmp_path / "one")
    assert text.startswith('---\nlibrary_name: "transformers"\nlicense: "apache-2.0"\n---\n# one\n')
    assert "It started from `mine`, whose licence (apache-2.0) holds for it." in text
    assert str(tmp_path) not in text
    assert open_folder(tmp_path / "one").provenance.license == "apache-2.0"


def test_a_card_names_a_model_of_the_hub(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(opening, "fetch_model", lambda name: folder)
    run = tmp_path / "run"
    assert main(["import", "hf:someone/mine@v1", str(run)]) == 0
    model = nanojaxgpt.load(run)
    assert model.experiment.init.from_model == "hf:someone/mine@v1"
    text = card_of(model, tmp_path / "one")
    assert 'base_model: "someone/mine"' in text
    assert "It started from `someone/mine@v1`, whose licence (apache-2.0) holds" in text


def test_a_card_names_the_base_of_an_adapter(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(opening, "fetch_model", lambda name: folder)
    section = nanojaxgpt.load(folder).experiment
    tuned = config.with_fields(section, {"lora.rank": 2, "init.from_model": "hf:someone/mine"})
    cfg = complete(tuned)
    loaded = nanojaxgpt.load("hf:someone/mine")
    params = add_adapters(cfg.model, loaded.params, jax.random.key(0))
    model = dataclasses.replace(loaded, config=cfg.model, params=params, experiment=cfg)
    text = card_of(model, tmp_path / "adapter", "peft")
    assert text.startswith('---\nlibrary_name: "peft"\nbase_model: "someone/mine"\n')
    assert "adapters alone (LoRA, rank 2)" in text
    merged = nanojaxgpt.load(tmp_path / "adapter")
    text = card_of(merged, tmp_path / "merged")
    assert "from `adapter`, an adapter of `someone/mine`, whose licence (apache-2.0)" in text
    assert 'base_model: "someone/mine"' in text


@pytest.mark.parametrize(
    ("front", "found"),
    [("license: mit", "mit"), ('license: "a b"', "a b"), ("license: `x`\n", "x"), ("license:", ""),
     ("x: 1", ""), ("license: " + "y" * 200, "y" * 100)],
)  # fmt: skip
def test_licences_of_cards(front, found, tmp_path):
    (tmp_path / "README.md").write_text(f"---\n{front}\n---\nlicense: other\n")
    assert provenance.card_license(tmp_path) == found


@pytest.mark.parametrize(
    "text", ["[", "[]", '{"name": 3}', '{"color": ""}', '{"tokenizer": {"eos_token": "x"}}',
             '{"tokenizer": {"who": 1}}', "[" * 100_000]
)  # fmt: skip
def test_a_damaged_file_is_refused(text, tmp_path):
    (tmp_path / provenance.FILE).write_text(text)
    with pytest.raises(DataError, match=r"provenance.json is damaged .* delete it"):
        load_provenance(tmp_path)
