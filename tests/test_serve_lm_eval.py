"""lm-eval over HTTP, unmodified: each request of two benchmarks is scored as in the process."""

import json
import logging

import numpy as np
import pytest
from conftest import SHARED

lm_eval = pytest.importorskip("lm_eval", reason="the client is lm-eval")
pytest.importorskip("tenacity", reason="lm-eval asks servers by it")
pytest.importorskip("starlette")

from serving import make_model, serving  # noqa: E402

from nanojaxgpt.evals import evaluate, tasks  # noqa: E402
from nanojaxgpt.evals.answers import AnswerStore  # noqa: E402

DATA = SHARED / "data"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),
]
needs_data = pytest.mark.skipif(not (DATA / "eval").is_dir(), reason="needs shared/data/eval")
EXAMPLES, CONTEXT = 50, 1024
METRICS = [{"metric": "acc"}, {"metric": "acc_norm"}]
PROMPTS = {"arc_easy": "{{query}}\nAnswer:", "piqa": "{{query}}Answer:"}  # as the catalog has them


@pytest.fixture(scope="module")
def model():
    return make_model(seq_len=CONTEXT)


def ask(model, names, folder):
    """Return what lm-eval finds over HTTP for the tasks of a folder."""
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    with serving({"tiny": model}, slots=8) as server:
        return lm_eval.simple_evaluate(
            model="local-completions",
            model_args=f"model=tiny,base_url={server.url}/v1/completions,max_length={CONTEXT},"
            "tokenizer_backend=remote,num_concurrent=8",
            tasks=names, task_manager=TaskManager(include_path=str(folder)),
            limit=EXAMPLES, bootstrap_iters=0,
        )  # fmt: skip


def over_http(model, folder):
    """Return the answers of lm-eval's requests by task and question, and its metrics."""
    for name, prompt in PROMPTS.items():
        file = DATA / tasks.find_benchmarks(name)[0].file
        task = {
            "task": f"local_{name}", "dataset_path": "json", "test_split": "test",
            "dataset_kwargs": {"data_files": {"test": str(file)}},
            "output_type": "multiple_choice", "doc_to_text": prompt,
            "doc_to_choice": "{{choices}}", "doc_to_target": "{{gold}}", "metric_list": METRICS,
        }  # fmt: skip
        (folder / f"{name}.yaml").write_text(json.dumps(task))
    found = ask(model, [f"local_{name}" for name in PROMPTS], folder)
    answers, metrics = {}, {}
    for name in PROMPTS:
        samples = sorted(found["samples"][f"local_{name}"], key=lambda one: one["doc_id"])
        answers[name] = [[own[0] for own in one["resps"]] for one in samples]
        results = found["results"][f"local_{name}"]
        metrics[name] = {key: results[f"{key},none"] for key in ("acc", "acc_norm")}
    return answers, metrics


def in_process(model):
    """Return the same of the project's evaluator."""
    answers, found, metrics = AnswerStore(), {}, {}
    opened = [
        tasks.open_benchmark(one, DATA, EXAMPLES)
        for one in tasks.find_benchmarks(",".join(PROMPTS))
    ]
    asked = [evaluate.make_prompts(model, one, 0, 0, False) for one in opened]
    evaluate.score_prompts(model, asked, answers, lambda text: None)
    for prompts in asked:
        keys = [[evaluate.pair_key(pair) for pair in pairs] for pairs in prompts.pairs]
        name = prompts.opened.benchmark.name
        found[name] = [answers.values(one) for one in keys]
        metrics[name] = {key: one.value for key, one in evaluate.measure(prompts, answers).items()}
    return found, metrics


@needs_data
def test_each_request_over_http_is_scored_as_in_the_process(model, tmp_path):
    (theirs, numbers), (ours, expected) = over_http(model, tmp_path), in_process(model)
    for name in PROMPTS:
        assert len(theirs[name]) == len(ours[name]) == EXAMPLES
        pairs = [
            (one, other)
            for question, own in zip(theirs[name], ours[name], strict=True)
            for one, other in zip(question, own, strict=True)
        ]
        logs = np.array([[one[0], other[0]] for one, other in pairs])
        assert np.ptp(logs) > 10
        np.testing.assert_allclose(logs[:, 0], logs[:, 1], rtol=1e-5, atol=1e-3)
        assert [one[1] for one, _ in pairs] == [bool(other[1]) for _, other in pairs]
        for metric, value in numbers[name].items():
            assert value == pytest.approx(expected[name][metric]), metric


def test_lm_eval_scores_as_the_model_does(model, tmp_path):
    choices = ["an assistant", "the", "no user"]
    rows = [{"question": f"the user {word}", "choices": choices, "answer": 0}
            for word in ("and", "the", "is", "was")]  # fmt: skip
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "own.yaml").write_text(f"""\
task: own
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list: [{{metric: acc}}]
""")
    samples = ask(model, ["own"], tmp_path)["samples"]["own"]
    assert len(samples) == len(rows)
    for sample in samples:
        for choice, [number, greedy] in zip(
            sample["doc"]["choices"], sample["filtered_resps"], strict=True
        ):
            score = model.score(sample["doc"]["question"], f" {choice}")
            assert float(number) == pytest.approx(score.log_probability, abs=1e-3)
            assert greedy in (score.greedy, str(score.greedy))
