"""Benchmarks: scores are those of whole rows, answers are kept, errors name their place.

tests/test_evals_oracle.py compares with lm-eval itself.
"""

import dataclasses
import json
import math

import jax
import numpy as np
import pytest
from conftest import byte_level_tokenizer, command
from test_golden_models import GOLDEN, copy_golden
from test_hosts import in_threads, teams

import nanojaxgpt
from nanojaxgpt.__main__ import main
from nanojaxgpt.config import override_config
from nanojaxgpt.data.tokenizers import ByteTokenizer, CharTokenizer
from nanojaxgpt.errors import ConfigError, DataError, MemoryExceeded
from nanojaxgpt.evals import answers, evaluate, metrics, scoring, tasks
from nanojaxgpt.evals.generation import generate_texts, plan_prompts
from nanojaxgpt.interchange.provenance import Provenance
from nanojaxgpt.interchange.templates import PLAIN
from nanojaxgpt.language_model import LanguageModel, Score
from nanojaxgpt.model.config import complete
from nanojaxgpt.model.parameters import parameters
from nanojaxgpt.model.transformer import init_params
from nanojaxgpt.sharding import make_mesh, tree_shardings
from nanojaxgpt.text_stream import encode_pair

TRUTH = [  # text of a choice: its score, of which the sizes decide
    ("ab", -2.0), ("abcdef", -3.0), ("日本", -2.9),
]  # fmt: skip


def make_model(path, mesh=None, **changes: str) -> LanguageModel:
    """Return a random model of bytes with a context of 32."""
    fields = {
        "model.num_layers": "2", "model.embed_dim": "16", "model.num_heads": "2",
        "model.seq_len": "32", "model.vocab_size": "264", "model.init": "torch",
        "data.tokenizer": "bytes", "data.cache_dir": str(path / "cache"),
    }  # fmt: skip
    cfg = complete(override_config(nanojaxgpt.base_config(), fields | changes))
    mesh = mesh or make_mesh({}, jax.devices()[:1])
    params = init_params(cfg.model, jax.random.key(0))
    # Larger, so that the next byte is not nearly as likely as any other.
    params = jax.tree.map(lambda x: 1.5 * x if x.ndim > 1 else x, params)
    params = jax.device_put(params, tree_shardings(params, parameters(cfg.model), mesh))
    return LanguageModel(cfg.model, params, ByteTokenizer(), mesh, cfg, path / "run", 7)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("evals")


@pytest.fixture(scope="module")
def model(folder):
    return make_model(folder)


def random_questions(seed: int = 0) -> list[list[scoring.Pair]]:
    """Return questions with and without a shared context, of many lengths, some over 32 tokens."""
    draw = np.random.default_rng(seed)

    def ids(low: int, high: int) -> list[int]:
        return draw.integers(0, 257, draw.integers(low, high)).tolist()

    found = []
    for number in range(24):
        context, kind = ids(1, 40), number % 4
        if kind == 0:  # the choices of one context
            found.append([scoring.Pair(context, ids(1, 7)) for _ in range(draw.integers(2, 5))])
        elif kind == 1:  # two contexts that differ late
            end = ids(1, 6)
            found.append([scoring.Pair([*context, *ids(1, 3)], end) for _ in range(2)])
        elif kind == 2:
            found.append([scoring.Pair(context, ids(1, 33))])
        else:  # they share nothing
            found.append([scoring.Pair(ids(1, 9), ids(1, 9)) for _ in range(3)])
    return found


def collect(model: LanguageModel, questions: list[list[scoring.Pair]]) -> dict:
    """Return the score of each place, and check that there are few shapes."""
    found, shapes = {}, set()
    for shape, scores in scoring.score_pairs(model, questions):
        shapes.add(shape)
        assert not found.keys() & dict(scores).keys()
        found |= dict(scores)
    assert len(shapes) <= scoring.MOST_SHAPES
    assert {shape.choices > 0 for shape in shapes} == {True, False}
    return found


def one_by_one(model: LanguageModel, pair: scoring.Pair) -> Score:
    """Return a score from the logits of the whole row, in float64."""
    ids = [*pair.context, *pair.continuation][-model.config.seq_len - 1 :]
    count = len(pair.continuation)
    logits_TV = model.logits(np.array([ids[:-1]]))[0, -count:].astype(np.float64)
    logs_TV = logits_TV - np.log(np.exp(logits_TV).sum(-1, keepdims=True))
    chosen_T = logs_TV[np.arange(count), list(pair.continuation)]
    greedy = logs_TV.argmax(-1).tolist() == list(pair.continuation)
    return Score(float(chosen_T.sum()), greedy, count)


@pytest.mark.parametrize("kind", ["learned", pytest.param("rotary", marks=pytest.mark.slow)])
def test_scores_are_those_of_whole_rows(folder, kind, monkeypatch):
    monkeypatch.setattr(scoring, "LOGIT_TOKENS", 8)  # not all logits at once
    monkeypatch.setattr(scoring, "COMPILE_TOKENS", 100)  # several shapes
    changes = {"model.positions": kind}
    if kind == "rotary":
        changes |= {"model.windows": "(8, 0)", "model.num_kv_heads": "1"}
    model = make_model(folder, **changes)
    questions = random_questions()
    greedy = int(model.logits(np.array([[5, 6, 7]]))[0, -1].argmax())
    questions.append([scoring.Pair([5, 6, 7], [greedy]), scoring.Pair([5, 6, 7], [greedy, 3])])
    found = collect(model, questions)
    assert len(found) == sum(map(len, questions))
    for (question, row), score in found.items():
        wanted = one_by_one(model, questions[question][row])
        assert score.log_probability == pytest.approx(wanted.log_probability, 1e-6, 1e-4)
        assert score[1:] == wanted[1:]
    assert found[len(questions) - 1, 0].greedy
    assert not found[len(questions) - 1, 1].greedy


@pytest.mark.slow
def test_scores_over_a_mesh_are_those_of_one_device(folder, model):
    mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    spread = make_model(folder, mesh)
    questions = random_questions(1)
    one, many = collect(model, questions), collect(spread, questions)
    assert one.keys() == many.keys()
    for place, score in one.items():
        assert many[place].log_probability == pytest.approx(score.log_probability, 1e-6, 1e-4)


def test_scores_are_those_of_lm_eval_in_float64(folder):
    model = nanojaxgpt.load(copy_golden("llama", folder))
    lines = [json.loads(line) for line in (GOLDEN / "questions.jsonl").read_text().splitlines()]
    pairs = [
        [scoring.Pair(*encode_pair(model.tokenizer, line["query"], one)) for one in line["choices"]]
        for line in lines
    ]
    greedy = 0
    for _, scores in scoring.score_pairs(model, pairs):
        for (question, row), score in scores:
            wanted = lines[question]["answers"][row]
            assert score.log_probability == pytest.approx(wanted[0], abs=1e-4)
            assert score.greedy == wanted[1]
            greedy += score.greedy
    assert greedy > 5


def test_batches_have_few_shapes_that_hold_their_groups():
    draw = np.random.default_rng(0)
    found = [scoring.Shape(*map(int, draw.choice([2, 4, 8, 64, 1024], 3))) for _ in range(60)]
    found += [scoring.Shape(0, 1 << power, 8) for power in range(4, 14)]
    chosen = scoring.choose_shapes(found)
    assert len(set(chosen.values())) <= scoring.MOST_SHAPES
    for shape in found:
        assert all(mine <= its for mine, its in zip(shape, chosen[shape], strict=True))
        assert bool(shape.choices) == bool(chosen[shape].choices)
    # A compilation costs more than a little padding, and less than much.
    few = [scoring.Shape(4, 32, 8), scoring.Shape(4, 64, 8)]
    assert len(set(scoring.choose_shapes(few).values())) == 1
    assert len(set(scoring.choose_shapes(few * 1000).values())) == 2


def test_a_text_is_scored_once_with_as_much_context_as_fits():
    # The example of lm-eval's documentation of loglikelihood_rolling.
    assert scoring.roll(range(10), -1, 4) == [
        ([-1], range(4)), (range(3, 4), range(4, 8)), (range(5, 8), range(8, 10)),
    ]  # fmt: skip
    assert scoring.roll([], -1, 4) == []


def test_spaces_before_a_continuation_belong_to_it():
    tokenizer = byte_level_tokenizer(["the answer is yes"], ["<end>"], 300, end_id=0)
    context, rest = encode_pair(tokenizer, "the answer \n", "yes")
    assert context == tokenizer.encode("the answer").tolist()
    assert context + rest == tokenizer.encode("the answer \nyes").tolist()
    assert encode_pair(tokenizer, "", " yes") == ([0], tokenizer.encode(" yes").tolist())
    assert encode_pair(tokenizer, "the", "")[1] == []


def write_lines(path, records: list) -> None:
    """Write JSON lines."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


@pytest.fixture(scope="module")
def data(folder):
    """Return a folder with files of questions, and own.json, which describes them."""
    draw = np.random.default_rng(3)
    words = ["ash", "elm", "fir", "oak", "yew"]
    records = [
        {"query": f"{n}?", "choices": draw.choice(words, 3, False).tolist(), "gold": n % 3}
        for n in range(30)
    ]
    write_lines(folder / "choices.jsonl", records)
    write_lines(folder / "cloze.jsonl", [{"a": f"{n} is", "b": words[n % 5]} for n in range(12)])
    (folder / "left.txt").write_text("".join(f"left {n}\n" for n in range(6)))
    (folder / "right.txt").write_text("".join(f"right {n}\n" for n in range(6)))
    descriptions = {
        "trees": {"kind": "multiple_choice", "file": "choices.jsonl", "context": "{query}",
                  "choices": "{choices}", "gold": "{gold}", "metric": "acc_norm", "chance": 0.25},
        "blanks": {"kind": "cloze", "file": "cloze.jsonl", "context": "{a}", "continuation": "{b}"},
        "sides": {"kind": "generate", "file": {"l": "left.txt", "r": "right.txt"}, "context": "{l}",
                  "references": ["{r}", "{l}"], "until": ["\n", "Q"], "max_tokens": 6,
                  "metrics": {"exact_match": {}, "chrf": {}, "rougeL": {}}, "metric": "chrf"},
        "bytes": {"kind": "perplexity", "file": "choices.jsonl", "continuation": "{query}" * 30},
        "all": ["trees", "blanks", "sides", "bytes"],
    }  # fmt: skip
    (folder / "own.json").write_text(json.dumps(descriptions))
    return folder


def own(data, names: str = "all") -> list[tasks.Benchmark]:
    """Return benchmarks of own.json."""
    return tasks.find_benchmarks(",".join(f"{data}/own.json:{name}" for name in names.split(",")))


def quiet(text: str) -> None:
    """Report nothing."""


def test_every_task_is_summed_up(model, data):
    found = evaluate.evaluate_tasks(model, own(data), data, limit=5, report=quiet)
    summary = json.loads(json.dumps(found.summary))
    assert list(summary["tasks"]) == ["trees", "blanks", "sides", "bytes"]
    assert {name: list(task["metrics"]) for name, task in summary["tasks"].items()} == {
        "trees": ["acc", "acc_norm", "acc_bytes"],
        "blanks": ["acc", "log_probability", "perplexity"],
        "sides": ["exact_match", "chrf", "rougeL"],
        "bytes": ["bits_per_byte", "loss"],
    }
    trees = summary["tasks"]["trees"]
    assert trees["examples"] == 5
    assert trees["metrics"]["acc"]["stderr"] >= 0
    assert summary["centered"] == pytest.approx(
        (trees["metrics"]["acc_norm"]["value"] - 0.25) / 0.75
    )
    assert 0 < sum(summary["compiled_shapes"].values()) <= 8
    # By chance a byte takes 8 bits; this model is random and sure of itself.
    assert 7 < summary["tasks"]["bytes"]["metrics"]["bits_per_byte"]["value"] < 40
    assert summary["step"] == 7
    assert summary["chat_template"] is False


def test_bits_per_byte_are_those_of_the_windows(model, data):
    (benchmark,) = own(data, "bytes")
    found = evaluate.evaluate_tasks(model, [benchmark], data, limit=1, report=quiet)
    text = tasks.open_benchmark(benchmark, data, 1).questions[0].continuations[0]
    ids = [256, *text.encode()]
    windows = [scoring.Pair(ids[:1], ids[1:33]), scoring.Pair(ids[28:33], ids[33:61])]
    assert len(ids) == 61
    wanted = -sum(one_by_one(model, pair).log_probability for pair in windows) / 60 / math.log(2)
    assert found.metrics["bytes"]["bits_per_byte"].value == pytest.approx(wanted, abs=1e-5)


def test_a_text_without_a_context_follows_the_bos_token_that_the_files_state(model, data):
    stated = dataclasses.replace(model, provenance=Provenance(tokenizer={"bos_token": 7}))
    assert model.first_id == 256  # the end token
    assert stated.first_id == 7
    endless = dataclasses.replace(model, tokenizer=CharTokenizer("abc"))
    with pytest.raises(ConfigError, match="no end token"):
        _ = endless.first_id
    assert dataclasses.replace(endless, provenance=stated.provenance).first_id == 7
    (benchmark,) = own(data, "bytes")
    found = [evaluate.evaluate_tasks(one, [benchmark], data, limit=1, report=quiet).metrics
             for one in (model, stated)]  # fmt: skip
    assert found[0]["bytes"]["loss"].value != found[1]["bytes"]["loss"].value


def test_an_evaluation_that_was_stopped_goes_on_with_the_same_bits(
    model, data, tmp_path, monkeypatch
):
    monkeypatch.setattr(scoring, "DEVICE_TOKENS", {"cpu": 128})  # several batches of each shape
    ran, run = [], scoring.run_rows
    monkeypatch.setattr(scoring, "run_rows", lambda *a: ran.append(a) or run(*a))
    whole = evaluate.evaluate_tasks(model, own(data), data, cache=tmp_path / "whole", report=quiet)
    batches = len(ran)
    ran.clear()
    (full,) = (tmp_path / "whole").iterdir()
    lines = full.read_bytes().splitlines(keepends=True)
    (tmp_path / "part").mkdir()
    part = tmp_path / "part" / full.name
    part.write_bytes(b"".join(lines[:41]) + lines[41][:-9])  # a kill in the middle of a write
    told = []
    again = evaluate.evaluate_tasks(
        model, own(data), data, cache=tmp_path / "part", report=told.append
    )
    assert again.summary["tasks"] == whole.summary["tasks"]
    assert told == [f"{len(lines):,} requests, 41 of them answered before"]
    assert 0 < len(ran) < batches
    known = {json.loads(line)[0]: line for line in lines}
    assert {json.loads(line)[0]: line for line in part.read_bytes().splitlines(keepends=True)
            if line.endswith(b"]\n")} == known  # fmt: skip
    ran.clear()
    third = evaluate.evaluate_tasks(
        model, own(data), data, cache=tmp_path / "part", report=told.append
    )
    assert not ran
    assert third.summary["tasks"] == whole.summary["tasks"]
    assert third.summary["compiled_shapes"] == {"scoring": 0, "generating": 0}


def test_answers_of_a_team_are_read_and_written_by_its_first_process(tmp_path):
    path = tmp_path / "evals" / "model.jsonl"
    answers.AnswerStore(path).add({"a": [-1.1, True, 2]})
    before = path.read_bytes()
    members = teams(3)
    stores = in_threads(3, lambda index: answers.AnswerStore(path, members[index]))
    assert [store.known for store in stores] == [{"a": [-1.1, True, 2]}] * 3
    for store in reversed(stores):
        store.add({"b": "text"})
        assert store.values(["b", "a"]) == ["text", [-1.1, True, 2]]
        assert (path.read_bytes() == before) == (store is not stores[0])
    assert path.read_bytes() == before + b'["b", "text"]\n'


def test_answers_are_of_one_model(folder, model):
    other = dataclasses.replace(model, params=jax.tree.map(lambda x: x + 1e-3, model.params))
    names = {answers.model_identity(one) for one in (model, other, make_model(folder))}
    assert len(names) == 2


def test_few_shot_examples_are_drawn_by_the_seed_and_never_the_question(model, data):
    (benchmark,) = own(data, "blanks")
    opened = tasks.open_benchmark(benchmark, data)
    texts = [tasks.few_shot(opened, number, 11, 5) for number in range(12)]
    for number, text in enumerate(texts):
        shots = text.removesuffix("\n\n").split("\n\n")
        assert sorted(shots) == sorted(
            one.example for n, one in enumerate(opened.questions) if n != number
        )
    assert [tasks.few_shot(opened, 0, 3, 5) for _ in range(2)] == [
        tasks.few_shot(opened, 0, 3, 5)
    ] * 2
    assert tasks.few_shot(opened, 0, 3, 5) != tasks.few_shot(opened, 0, 3, 6)
    assert tasks.few_shot(opened, 0, 3, 5) != tasks.few_shot(opened, 1, 3, 5)
    with pytest.raises(ConfigError, match="blanks has 11 examples for --fewshot=12"):
        tasks.few_shot(opened, 0, 12, 5)


@pytest.mark.slow
def test_texts_are_those_of_the_sampler(model):
    prompts = [list(b"a"), list(b"one more"), list(b"b" * 30), list(b"xyz")]
    found = {}
    for _, texts in generate_texts(model, prompts, 8, ["\n", "e"]):
        found |= texts
    cut = [prompt[-24:] for prompt in prompts]
    assert [found[n] for n in range(4)] == [
        model.generate([one], max_tokens=8, temperature=0.0, stop=["\n", "e"])[0] for one in cut
    ]
    assert not list(generate_texts(model, prompts, 8, [], known=lambda number: True))
    with pytest.raises(ConfigError, match="32 tokens to generate leave no room"):
        list(generate_texts(model, prompts, 32, []))


def test_batches_of_prompts_have_as_many_rows():
    plan = plan_prompts([5] * 17 + [9] * 40, 4000, 64)
    assert {len(those) for _, those in plan} <= {15, 9, 16}
    assert {number for _, those in plan for number in those} == set(range(57))
    assert len({slots for slots, _ in plan}) <= 8


def test_metrics_of_choices_divide_by_characters_and_bytes():
    texts, logs = zip(*TRUTH, strict=True)
    benchmark = tasks.Benchmark("t", "multiple_choice", "f")
    question = tasks.Question("f:1", ("c",), texts, 1, "")
    scores = [Score(log, False, 1) for log in logs]

    def right(gold: int) -> dict[str, float]:
        asked = [question._replace(gold=gold)]
        return {k: m.value for k, m in metrics.measure_scores(benchmark, asked, [scores]).items()}

    assert right(0) == {"acc": 1, "acc_norm": 0, "acc_bytes": 0}
    assert right(1) == {"acc": 0, "acc_norm": 1, "acc_bytes": 0}
    assert right(2) == {"acc": 0, "acc_norm": 0, "acc_bytes": 1}


def test_errors_of_metrics_are_those_of_means_and_ratios():
    assert metrics.mean([0, 1, 1, 0]).error == pytest.approx(np.std([0, 1, 1, 0], ddof=1) / 2)
    draw = np.random.default_rng(0)
    sizes = draw.integers(50, 500, 2000).astype(float)
    parts = sizes * draw.normal(2, 0.3, 2000)
    found = metrics.ratio(parts, sizes)
    rows = draw.integers(0, 2000, (1000, 2000))
    drawn = parts[rows].sum(1) / sizes[rows].sum(1)
    assert found.value == parts.sum() / sizes.sum()
    assert found.error == pytest.approx(drawn.std(), rel=0.1)
    assert metrics.centered([(1.0, 0.25), (0.25, 0.25), (0.4, 0.5)]) == pytest.approx(0.8 / 3)


GSM8K = tasks.find_benchmarks("gsm8k")[0]


@pytest.mark.parametrize(
    ("text", "strict", "flexible"),
    [
        ("so 3 * 6 = 18\n#### 18", 1, 1),
        ("#### 1,800 dollars", 0, 0),
        ("It is $18.", 0, 1),
        ("#### 18 then #### 19", 1, 0),
        ("eighteen", 0, 0),
    ],
)
def test_answers_are_extracted_as_the_task_says(text, strict, flexible):
    question = tasks.Question("f:1", ("",), ("18",), 0, "")
    found = metrics.measure_texts(GSM8K, [question], [text])
    assert {name: one.value for name, one in found.items()} == {
        "exact_match": strict, "flexible_match": flexible,
    }  # fmt: skip


def test_metrics_of_texts_take_the_best_reference_and_own_functions(tmp_path):
    (tmp_path / "mine.py").write_text("def length(answer, references):\n    return len(answer)\n")
    same = {"measure": "exact_match", "ignore_case": True, "ignore": ["[.]"]}
    options = {"rouge1": {}, "bleu": {}, "own": {"measure": f"{tmp_path}/mine.py:length"}}
    options["same"] = same
    benchmark = tasks.Benchmark("t", "generate", "f", metrics=options)
    metrics.check_metrics(benchmark)
    question = tasks.Question("f:1", ("",), ("a dog ran home fast", "The cat sat on a mat."), 0, "")
    found = metrics.measure_texts(benchmark, [question], [" the cat sat on a mat "])
    values = {name: one.value for name, one in found.items()}
    assert values == {"rouge1": 1, "bleu": pytest.approx(79.1, abs=15), "own": 20, "same": 1}
    bad = dataclasses.replace(benchmark, metrics={"own": {"measure": f"{tmp_path}/mine.py:size"}})
    with pytest.raises(ConfigError, match="has no function 'size'"):
        metrics.check_metrics(bad)


def test_a_chat_asks_in_the_template_and_keeps_text_as_text(model, data):
    tokenizer = byte_level_tokenizer(["User: Assistant: "], ["<end>"], 300, end_id=0)
    chatting = dataclasses.replace(model, tokenizer=tokenizer, chat_template=PLAIN)
    write_lines(data / "odd.jsonl", [{"query": "a<end>b", "choices": ["x", "y<end>"], "gold": 0}])
    odd = dataclasses.replace(own(data, "trees")[0], file="odd.jsonl")
    prompts = evaluate.make_prompts(chatting, tasks.open_benchmark(odd, data), 0, 0, True)
    whole = [[*pair.context, *pair.continuation] for pair in prompts.pairs[0]]
    assert [tokenizer.decode(ids) for ids in whole] == [
        f"User:\na<end>b\n\nAssistant:\n{choice}" for choice in ("x", "y<end>")
    ]
    assert not any(0 in ids for ids in whole)  # the spelled token is text
    with pytest.raises(ConfigError, match="has no chat template"):
        evaluate.make_prompts(model, tasks.open_benchmark(odd, data), 0, 0, True)


def test_two_models_are_compared_question_by_question(model, data):
    other = dataclasses.replace(model, params=jax.tree.map(lambda x: 1.5 * x, model.params))
    first, second = (
        evaluate.evaluate_tasks(one, own(data), data, report=quiet) for one in (model, other)
    )
    found = evaluate.compare_tasks(first, second)
    row, left, right = (
        found["trees"],
        *(one.metrics["trees"]["acc_norm"] for one in (first, second)),
    )
    each = right.values - left.values
    assert each.any()
    assert row["difference"] == pytest.approx(each.mean())
    assert row["stderr"] == pytest.approx(each.std(ddof=1) / math.sqrt(30))
    low, high = row["interval"]
    assert low < row["difference"] < high
    wanted = (2.8 * each.std(ddof=1) / each.mean()) ** 2 if each.mean() else None
    assert row.get("examples_needed") == (math.ceil(wanted) if wanted else None)
    assert found["bytes"]["difference"] == pytest.approx(
        second.metrics["bytes"]["bits_per_byte"].value
        - first.metrics["bytes"]["bits_per_byte"].value
    )
    assert "interval" not in found["sides"]  # chrF is of all texts together
    same = evaluate.compare_tasks(first, first)["trees"]
    assert same["difference"] == 0
    assert "examples_needed" not in same


GOOD = {"query": "q", "choices": ["a", "b"], "gold": 0}


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ('{"query": ', "bad.jsonl:2 is not JSON"),
        ("[1]", "bad.jsonl:2 holds an array"),
        ({"choices": ["a", "b"], "gold": 0}, "bad.jsonl:2: task trees: it has no field 'query'"),
        (GOOD | {"gold": 2}, "bad.jsonl:2: task trees: the right answer is '2', which is none"),
        (GOOD | {"gold": "c"}, "bad.jsonl:2: task trees: the right answer is 'c'"),
        (GOOD | {"gold": None}, "bad.jsonl:2: task trees: its field 'gold' is null"),
        (GOOD | {"choices": []}, "bad.jsonl:2: task trees: it has no choices"),
        (GOOD | {"choices": ["a", " "]}, "bad.jsonl:2: task trees: a choice or continuation"),
        (GOOD | {"query": ["a", "b"]}, "bad.jsonl:2: task trees: it has 2 contexts"),
        (GOOD | {"choices": ["a", "b" * 40]},
         "bad.jsonl:2: task trees: a continuation of 41 tokens does not fit the model's"),
    ],
)  # fmt: skip
def test_a_bad_example_is_named_by_its_line(model, data, record, message):
    line = record if isinstance(record, str) else json.dumps(record)
    (data / "bad.jsonl").write_text(json.dumps(GOOD) + "\n" + line + "\n")
    benchmark = dataclasses.replace(own(data, "trees")[0], file="bad.jsonl")
    with pytest.raises(DataError) as error:
        evaluate.evaluate_tasks(model, [benchmark], data, report=quiet)
    assert message in str(error.value)


def test_a_tokenizer_without_an_end_token_needs_a_context(model, data):
    letters = CharTokenizer("0123456789? abcdefghijklmnopqrstuvwxyz")
    chars = dataclasses.replace(model, tokenizer=letters)
    wanted = r"choices.jsonl:1: task bytes: the prompt '' has no tokens"
    with pytest.raises(ConfigError, match=wanted):
        evaluate.evaluate_tasks(chars, own(data, "bytes"), data, report=quiet)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"x": {"kind": "choice", "file": "f"}}', "task x: kind='choice' must be one of"),
        ('{"x": {"kind": "cloze", "file": "f"}}', "task x: kind=cloze needs context, continuation"),
        ('{"x": {"kind": "cloze", "flie": "f"}}', "task x: no field flie; did you mean file?"),
        ('{"x": {"kind": "perplexity", "file": "f", "continuation": "d", "fewshot": "2"}}',
         "task x: fewshot='2' has the wrong type"),
        ("[]", "must hold an object of tasks"),
        ("{", "can't be read"),
        ('{"y": {}}', "no task x"),
    ],
)  # fmt: skip
def test_a_wrong_description_is_refused(tmp_path, text, message):
    (tmp_path / "own.json").write_text(text)
    with pytest.raises(ConfigError) as error:
        tasks.find_benchmarks(f"{tmp_path}/own.json:x")
    assert message in str(error.value)


def test_an_unknown_task_is_answered_with_a_near_one():
    with pytest.raises(ConfigError, match="no task arc_easi; did you mean arc_easy"):
        tasks.find_benchmarks("arc_easi")
    with pytest.raises(ConfigError, match="names no task"):
        tasks.find_benchmarks(",")


def test_templates_have_fields_filters_and_replacements():
    record = {"a": {"b": "x y"}, "c": ["one", "two"], "d": 3, "e": "[T] it  is"}
    assert tasks.fill_template("{a.b|capitalize}: {c.1} {d}", record) == ["X y: two 3"]
    assert tasks.fill_template("{c}", record) == ["one", "two"]
    assert tasks.fill_template(["{d}", "f{c}"], record) == ["3", "f['one', 'two']"]
    for missing in ("{c.2}", "{x}", "{a.x}"):
        with pytest.raises(ValueError, match="it has no field"):
            tasks.fill_template(missing, record)
    steps = [[r"\[.*?\]", ""], [r"^\s+", ""], ["  ", " "]]
    benchmark = tasks.Benchmark("t", "cloze", "f", "{e}", continuation="{d}", replace=steps)
    question = tasks.make_question(benchmark, "f:1", record)
    assert question.contexts == ("it is",)
    assert question.example == "it is 3"


def test_rows_of_a_dataset_are_questions(model, tmp_path, capsys):
    datasets = pytest.importorskip("datasets")
    rows = {"question": ["1 + 1?", "2 + 1?"], "answer": [1, 0],
            "choices": [["1", "2"], ["3", "4"]]}  # fmt: skip
    datasets.DatasetDict({"test": datasets.Dataset.from_dict(rows)}).save_to_disk(tmp_path / "set")
    benchmark = dataclasses.replace(
        tasks.find_benchmarks("mmlu")[0], file=f"hf:{tmp_path}/set@test", fewshot_file="",
        context="{question|strip}\nA. {choices.0}\nB. {choices.1}\nAnswer:", fewshot=1,
    )  # fmt: skip
    found = evaluate.evaluate_tasks(model, [benchmark], tmp_path)
    assert found.summary["tasks"]["mmlu"]["examples"] == 2
    assert "is downloaded where it is not cached" in capsys.readouterr().err
    opened = tasks.open_benchmark(benchmark, tmp_path)
    assert opened.questions[0].example == "1 + 1?\nA. 1\nB. 2\nAnswer: B"


def test_the_catalog_is_complete():
    small = tasks.find_benchmarks("small")
    assert len(small) == 8
    for path in sorted(tasks.CATALOG.glob("*.json")):
        for name, fields in tasks.read_descriptions(path).items():
            for benchmark in tasks.find_benchmarks(name):
                metrics.check_metrics(benchmark)
                assert benchmark.source
                assert benchmark.licence
                assert benchmark.metric or isinstance(fields, list)


def test_a_batch_that_can_not_fit_is_refused(model, monkeypatch):
    monkeypatch.setattr("nanojaxgpt.memory.device_bytes", lambda mesh: 50_000)
    with pytest.raises(MemoryExceeded, match="the evaluation needs at least"):
        collect(model, random_questions())


def test_the_command_prints_a_table_and_writes_json(model, data, capsys, tmp_path):
    model.save(tmp_path / "run")
    call = ["eval", str(tmp_path / "run"), f"--tasks={data}/own.json:trees", f"--data={data}"]
    place = f"--config.data.cache_dir={tmp_path}"
    assert main([*call, "--limit=9", "--fewshot=1", f"--json={tmp_path}/found.json", place]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[3] for line in printed[:4]] == ["metric", "acc", "acc_norm*", "acc_bytes"]
    assert printed[1].split()[:3] == ["trees", "9", "1"]
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["tasks"]["trees"]["examples"] == 9
    assert len(list((tmp_path / "evals").iterdir())) == 1
    assert main([*call, "--limit=9", "--fewshot=1", "--curve", place]) == 0
    head, row = (line.split() for line in capsys.readouterr().out.splitlines())
    value = found["tasks"]["trees"]["metrics"]["acc_norm"]["value"]
    assert (head, row) == (["step", "trees"], ["7", f"{value:.4f}"])
    assert main(["compare", call[1], call[1], *call[2:], place, "--limit=9"]) == 0
    assert capsys.readouterr().out.splitlines()[1].split()[4] == "+0.0000"


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--curve"], 2, "--curve is of benchmarks: name them with --tasks=NAMES"),
        (["--limit=3"], 2, "--limit is of benchmarks: name them with --tasks=NAMES"),
        (["--multihost"], 2, "--multihost is of benchmarks: name them with --tasks=NAMES"),
        (["--tasks=arc_easy", "--process_id=1"], 2, "--process_id need --multihost"),
        (["--tasks=arc_easi"], 2, "did you mean arc_easy"),
        (["--tasks=arc_easy", "--data=nowhere"], 3, "there is no file nowhere/eval/arc_easy.jsonl"),
    ],
)
def test_the_command_says_what_is_wrong(model, tmp_path, capsys, arguments, code, message):
    model.save(tmp_path / "run")
    assert main(["eval", str(tmp_path / "run"), *arguments]) == code
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_a_killed_command_goes_on(model, data, tmp_path):
    import os
    import signal
    import subprocess
    import sys
    import time

    model.save(tmp_path / "run")
    rows = [{"query": f"{n}?", "choices": [str(n), "x"], "gold": 0} for n in range(3000)]
    write_lines(tmp_path / "many.jsonl", rows)
    text = (data / "own.json").read_text().replace("choices.jsonl", "many.jsonl")
    (tmp_path / "own.json").write_text(text)
    call = ["eval", tmp_path / "run", f"--tasks={tmp_path}/own.json:trees", f"--data={tmp_path}",
            f"--config.data.cache_dir={tmp_path}", f"--json={tmp_path}/found.json"]  # fmt: skip
    child = subprocess.Popen([sys.executable, "-m", "nanojaxgpt", *map(str, call)],
                             env=os.environ | {"JAX_PLATFORMS": "cpu"})  # fmt: skip
    while not any(path.stat().st_size for path in (tmp_path / "evals").glob("*")):
        assert child.poll() is None
        time.sleep(0.01)
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert not (tmp_path / "found.json").exists()
    again = command(*call)
    assert again.returncode == 0, again.stderr
    assert "6,000 requests, 0 of" not in again.stderr
    resumed = json.loads((tmp_path / "found.json").read_text())
    assert command(*call, "--fresh").returncode == 0
    assert json.loads((tmp_path / "found.json").read_text())["tasks"] == resumed["tasks"]
