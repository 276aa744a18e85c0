"""Benchmarks against lm-evaluation-harness: each request's log-probability, greediness and text.

The oracle is `lm_eval --model hf` on the same weights, in float32 and float64, with tasks in YAML
that have the catalog's prompts. Two runs in float32 differ by the errors of both, and transformers'
own was up to 2e-4 from its float64: so float64 is the measure, for us and for its float32.
"""

import dataclasses
import json
import logging
import os
from configparser import ConfigParser
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from conftest import ROOT, SHARED
from test_chat_data import SMOL

import nanojaxgpt
from nanojaxgpt.__main__ import main
from nanojaxgpt.errors import ConfigError
from nanojaxgpt.evals import evaluate, tasks
from nanojaxgpt.evals.answers import AnswerStore
from nanojaxgpt.language_model import LanguageModel

torch = pytest.importorskip("torch", reason="the oracle is lm-eval, in torch")
transformers = pytest.importorskip("transformers", reason="the oracle is lm-eval")
lm_eval = pytest.importorskip("lm_eval", reason="the oracle is lm-eval")
DATA = SHARED / "data"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(not (DATA / "eval").is_dir(), reason="shared/data/eval is not there"),
]

# Questions of a task that SmolLM2 is asked: of 200, two cores have the answers in half an hour.
SMOL_LIMIT = int(os.environ.get("NANOJAXGPT_ORACLE_LIMIT", "4"))
NEW_TOKENS = 40  # of GSM8K's answers, whose prompts have no examples here
BOUND = 1e-4  # of a log-probability in nats, against float64
NAMES = ("arc_easy", "piqa", "winogrande", "lambada", "gsm8k", "multi30k_bytes")
# The same prompts as templates of lm-eval.
TEMPLATES: dict[str, dict[str, Any]] = {
    "arc_easy": {
        "output_type": "multiple_choice", "doc_to_text": "{{query}}\nAnswer:",
        "doc_to_choice": "{{choices}}", "doc_to_target": "{{gold}}",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}, {"metric": "acc_bytes"}],
    },
    "piqa": {
        "output_type": "multiple_choice", "doc_to_text": "{{query}}Answer:",
        "doc_to_choice": "{{choices}}", "doc_to_target": "{{gold}}",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}, {"metric": "acc_bytes"}],
    },
    "winogrande": {
        "output_type": "multiple_choice", "doc_to_text": "{{gold}}",
        "doc_to_choice": "{{context_options}}", "doc_to_target": "{{continuation}}",
        "metric_list": [{"metric": "acc"}],
    },
    "lambada": {
        "output_type": "loglikelihood", "doc_to_text": "{{context}}",
        "doc_to_target": " {{continuation}}",
        "metric_list": [{"metric": "acc"}, {"metric": "perplexity"}],
    },
    "gsm8k": {
        "output_type": "generate_until", "doc_to_text": "Question: {{context}}\nAnswer:",
        "doc_to_target": "{{answer}}", "metric_list": [{"metric": "exact_match"}],
        "generation_kwargs": {"until": ["Question:", "</s>", "<|im_end|>"], "do_sample": False,
                              "max_gen_toks": NEW_TOKENS},
    },
    "multi30k_bytes": {
        "output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "bits_per_byte"}],
    },
}  # fmt: skip


class Theirs(NamedTuple):
    """What lm-eval found: the answer of each request by task and question, and the metrics."""

    answers: dict[str, list[list[Any]]]
    metrics: dict[str, dict[str, float]]


class Case(NamedTuple):
    """A model in both frameworks, and on how many questions of each task it is compared."""

    ours: LanguageModel
    folder: Path
    limit: int


def random_gpt2(folder: Path) -> Path:
    """Write a random GPT-2 with a small byte-level tokenizer; return its folder."""
    import tokenizers

    found = tokenizers.Tokenizer(tokenizers.models.BPE())
    found.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    found.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=1500, special_tokens=["<|endoftext|>"], show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    found.train_from_iterator((DATA / "tune/multi30k_val.en").read_text().splitlines(), trainer)
    config = transformers.GPT2Config(
        vocab_size=found.get_vocab_size(), n_positions=512, n_embd=64, n_layer=2, n_head=4,
        initializer_range=0.25, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    wrapped = transformers.PreTrainedTokenizerFast(
        tokenizer_object=found, eos_token="<|endoftext|>", model_max_length=512,
        clean_up_tokenization_spaces=False,
    )  # fmt: skip
    wrapped.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=["gpt2", "smollm2"])
def case(request, tmp_path_factory) -> Case:
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "gpt2":
        return Case(nanojaxgpt.load(random_gpt2(folder)), folder, 200)
    if not (files := sorted(SMOL.glob("*.gguf"))):
        pytest.skip(f"SmolLM2 is not in {SMOL}")
    model = nanojaxgpt.load(files[0])
    model.save(folder / "hf", format="hf")
    return Case(model, folder / "hf", SMOL_LIMIT)


@pytest.fixture(scope="module")
def manager(tmp_path_factory) -> Any:
    """Return lm-eval's tasks, these among them."""
    from lm_eval.tasks import TaskManager

    folder = tmp_path_factory.mktemp("tasks")
    captions = (DATA / "tune/multi30k_test2016.en").read_text().splitlines()
    lines = [json.dumps({"text": text}) + "\n" for text in captions]
    (folder / "captions.jsonl").write_text("".join(lines))
    for name, template in TEMPLATES.items():
        file = tasks.find_benchmarks(name)[0].file
        path = folder / "captions.jsonl" if isinstance(file, dict) else DATA / file
        source = {"task": f"local_{name}", "dataset_path": "json", "test_split": "test",
                  "dataset_kwargs": {"data_files": {"test": str(path)}}}  # fmt: skip
        (folder / f"{name}.yaml").write_text(json.dumps(source | template))
    return TaskManager(include_path=str(folder))


def ask(model: Any, manager: Any, limit: int, names: tuple[str, ...]) -> Theirs:
    """Return what lm-eval finds with a model."""
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    found = lm_eval.simple_evaluate(
        model=model, tasks=[f"local_{name}" for name in names], task_manager=manager, limit=limit,
        bootstrap_iters=0,
    )  # fmt: skip
    answers = {}
    for name in names:
        samples = sorted(found["samples"][f"local_{name}"], key=lambda one: one["doc_id"])
        answers[name] = [[own[0] for own in one["resps"]] for one in samples]
    numbers = {name: {key.removesuffix(",none"): value for key, value in row.items()}
               for name, row in found["results"].items()}  # fmt: skip
    return Theirs(answers, {name: numbers[f"local_{name}"] for name in names})


def huggingface(case: Case, dtype: str) -> Any:
    """Return lm-eval's own model of a folder."""
    from lm_eval.models.huggingface import HFLM

    kind = {"softmax_dtype": "float64"} if dtype == "float64" else {}
    return HFLM(pretrained=str(case.folder), dtype=dtype, device="cpu", batch_size=8, **kind)


@pytest.fixture(scope="module")
def ours(case) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return our answers by task and question, and the metrics."""
    answers, found = AnswerStore(), {}
    asked = []
    for benchmark in tasks.find_benchmarks(",".join(NAMES)):
        benchmark = dataclasses.replace(benchmark, max_tokens=NEW_TOKENS)
        opened = tasks.open_benchmark(benchmark, DATA, case.limit)
        asked.append(evaluate.make_prompts(case.ours, opened, 0, 0, False))
    shapes = evaluate.score_prompts(case.ours, asked, answers, lambda text: None)
    assert shapes["scoring"] <= 8
    for prompts in asked:
        keys = [[evaluate.pair_key(pair) for pair in pairs] for pairs in prompts.pairs]
        keys = keys or [[key] for key in evaluate.text_keys(prompts)]
        found[prompts.opened.benchmark.name] = [answers.values(one) for one in keys]
    metrics = {one.opened.benchmark.name: evaluate.measure(one, answers) for one in asked}
    return found, metrics


@pytest.fixture(scope="module")
def theirs(case, manager) -> dict[str, Theirs]:
    """Return what lm-eval finds by the number format."""
    names = {"float32": NAMES, "float64": tuple(name for name in NAMES if name != "gsm8k")}
    return {dtype: ask(huggingface(case, dtype), manager, case.limit, names[dtype])
            for dtype in names}  # fmt: skip


def logs(answers: list[list[Any]]) -> np.ndarray:
    """Return the log-probabilities of all requests; those of a text's windows are summed."""
    return np.array([one[0] if isinstance(one, list | tuple) else one
                     for question in answers for one in question])  # fmt: skip


def summed(answers: list[list[Any]]) -> list[list[Any]]:
    """Return the sum of each text's windows."""
    return [[sum(one[0] for one in question)] for question in answers]


@pytest.mark.parametrize("name", [name for name in NAMES if name != "gsm8k"])
def test_each_request_has_the_log_probability_of_lm_eval(case, ours, theirs, name):
    found = ours[0][name]
    mine = logs(summed(found) if name == "multi30k_bytes" else found)
    single, double = (logs(theirs[dtype].answers[name]) for dtype in ("float32", "float64"))
    own, other = np.abs(mine - double).max(), np.abs(single - double).max()
    print(f"{name}: {len(mine)} requests; against float64 ours {own:.1e}, theirs {other:.1e}; "
          f"against each other {np.abs(mine - single).max():.1e}")  # fmt: skip
    assert np.ptp(double) > 1
    assert own < BOUND
    assert own < max(2 * other, BOUND / 5)  # not worse than transformers in float32


@pytest.mark.parametrize("name", ["arc_easy", "piqa", "winogrande", "lambada"])
def test_each_request_is_as_greedy_as_in_lm_eval(ours, theirs, name):
    mine = [bool(one[1]) for question in ours[0][name] for one in question]
    assert mine == [one[1] for question in theirs["float32"].answers[name] for one in question]


@pytest.mark.parametrize("name", NAMES)
def test_metrics_are_those_of_lm_eval(ours, theirs, name):
    found = {metric: one.value for metric, one in ours[1][name].items()}
    expected = theirs["float32"].metrics[name]
    shared = found.keys() & expected.keys()
    assert shared
    for metric in shared - {"exact_match"}:  # of which theirs is of the whole text
        assert found[metric] == pytest.approx(expected[metric], rel=1e-4), metric
    if name == "multi30k_bytes":
        exact = theirs["float64"].metrics[name]["bits_per_byte"]
        print(f"bits per byte {found['bits_per_byte']:.9f}, in float64 {exact:.9f}")
        assert found["bits_per_byte"] == pytest.approx(exact, rel=1e-6)


def test_texts_are_those_of_lm_eval(ours, theirs):
    mine = [question[0] for question in ours[0]["gsm8k"]]
    other = [question[0] for question in theirs["float32"].answers["gsm8k"]]
    assert len(set(mine)) > 1
    differing = [pair for pair in zip(mine, other, strict=True) if pair[0] != pair[1]]
    assert not differing, f"{len(differing)} of {len(mine)}: {differing[:3]}"


def test_the_adapter_gives_what_the_evaluator_gives(case, manager, ours):
    from nanojaxgpt.evals.lm_eval import Adapter

    found = ask(Adapter(case.ours), manager, case.limit, NAMES)
    for name in NAMES:
        if name == "gsm8k":
            assert found.answers[name] == ours[0][name]
            continue
        mine = summed(ours[0][name]) if name == "multi30k_bytes" else ours[0][name]
        # Other requests share a batch, so sums have another order.
        np.testing.assert_allclose(logs(found.answers[name]), logs(mine), rtol=0, atol=2e-4)


def no_fork() -> int:
    raise AssertionError("a fork of a process that runs JAX may hang")


def test_the_command_runs_the_harness(case, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(os, "fork", no_fork)  # perplexity has its error from bootstrap samples
    lines = [{"a": "A man", "b": "walks"}, {"a": "Two dogs", "b": "play"}]
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    task = {"task": "own", "dataset_path": "json", "test_split": "test",
            "dataset_kwargs": {"data_files": {"test": f"{tmp_path}/own.jsonl"}},
            "output_type": "loglikelihood", "doc_to_text": "{{a}}", "doc_to_target": " {{b}}",
            "metric_list": [{"metric": "acc"}, {"metric": "perplexity"}]}  # fmt: skip
    (tmp_path / "own.yaml").write_text(json.dumps(task))
    call = [
        "lm-eval",
        str(case.folder),
        f"--include_path={tmp_path}",
        f"--json={tmp_path}/found.json",
    ]
    assert main([*call, "--tasks=own"]) == 0
    assert "|own" in capsys.readouterr().out
    found = json.loads((tmp_path / "found.json").read_text())["results"]["own"]
    scores = [case.ours.score(line["a"], f" {line['b']}") for line in lines]
    wanted = np.exp(-np.mean([one.log_probability for one in scores]))
    assert found["perplexity,none"] == pytest.approx(wanted, rel=1e-4)
    assert main([*call, "--tasks=own,owl"]) == 2
    assert "lm-eval has no task owl" in capsys.readouterr().err


def test_the_adapter_refuses_what_it_would_ignore(case):
    from nanojaxgpt.evals.lm_eval import Adapter, generation_limits

    assert generation_limits({"until": "x", "max_gen_toks": 5, "do_sample": False}) == (5, ("x",))
    with pytest.raises(ConfigError, match=r"temperature=0\.7"):
        generation_limits({"until": [], "temperature": 0.7})
    with pytest.raises(ConfigError, match="device='tpu'"):
        Adapter(case.ours, device="tpu")
    with pytest.raises(ConfigError, match="give a model, or pretrained"):
        Adapter()
    assert Adapter(case.ours, batch_size=2).model.experiment.eval.batch_size == 2


def test_the_package_is_a_plug_in_of_lm_eval():
    from importlib.metadata import EntryPoint

    from lm_eval.api.model import LM

    setup = ConfigParser()
    setup.read(ROOT / "setup.cfg")
    line = setup["options.entry_points"]["lm_eval.models"].strip()
    name, _, value = line.partition(" = ")
    assert name == "nanojaxgpt"
    assert issubclass(EntryPoint(name, value, "lm_eval.models").load(), LM)
