"""Losses and gradients of every objective against torch: transformers' model, one example alone.

The formulas are written here from the papers, over plain sequences without packing or masks.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_families import CASES, their_model, torch
from test_golden_models import import_folder
from test_objectives import PREFERENCES, config, make_rows

from nanojaxgpt.config.sections import Objective
from nanojaxgpt.data.tokenizer_json import export_characters
from nanojaxgpt.model.transformer import Transformer, init_params
from nanojaxgpt.objectives import distill
from nanojaxgpt.objectives.policy import Rollout, make_loss
from nanojaxgpt.step import OBJECTIVES, make_hyper

pytestmark = pytest.mark.slow

NUMBERS = {"beta": 0.3, "label_smoothing": 0.1, "margin": 0.3, "centering": 0.2, "nll_weight": 0.5,
           "temperature": 1.5, "jsd_beta": 0.3, "clip_low": 0.2, "clip_high": 0.28,
           "kl": 0.05}  # fmt: skip
BOUND = 1e-5


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Return a random Llama of transformers, and what was imported of it."""
    folder, theirs = tmp_path_factory.mktemp("llama"), their_model(CASES["llama"])
    theirs.save_pretrained(folder)
    (folder / "tokenizer.json").write_bytes(export_characters("abcdefghijklmnopqrstuvwxyz"))
    source, params = import_folder(folder)
    theirs.model.embed_tokens.padding_idx = None  # torch gives its row no gradient
    return theirs, source.config, params


class Answer:
    """One example of a packed row, alone in torch."""

    def __init__(self, theirs: Any, batch: Any, row: int, segment: int, head: Any = None) -> None:
        place = np.flatnonzero(batch.segments_BT[row] == segment)
        ids, targets, weights = (
            torch.tensor(np.asarray(x[row][place]))
            for x in (batch.tokens_BT, batch.targets_BT, batch.weights_BT)
        )
        x_TD = theirs.model(ids[None].long()).last_hidden_state[0]
        self.logits, self.chosen, self.targets = theirs.lm_head(x_TD), weights > 0, targets.long()
        log_TV = torch.log_softmax(self.logits, -1)
        self.log = log_TV.gather(1, self.targets[:, None])[:, 0][self.chosen]
        self.scores = None if head is None else x_TD @ head.T
        self.place = place


def logsigmoid(x: Any) -> Any:
    """Return log sigmoid."""
    return torch.nn.functional.logsigmoid(x)


def preference(name: str, chosen: Answer, rejected: Answer, reference: tuple) -> Any:
    """Return the loss of one pair."""
    n = NUMBERS
    sums = chosen.log.sum(), rejected.log.sum()
    counts = len(chosen.log), len(rejected.log)
    means = sums[0] / counts[0], sums[1] / counts[1]

    def smooth(x: Any) -> Any:
        return -(1 - n["label_smoothing"]) * logsigmoid(x) - n["label_smoothing"] * logsigmoid(-x)

    if name == "dpo":
        loss = smooth(n["beta"] * (sums[0] - reference[0] - sums[1] + reference[1]))
    elif name == "ipo":
        gap = (sums[0] - reference[0]) / counts[0] - (sums[1] - reference[1]) / counts[1]
        loss = (gap - 1 / (2 * n["beta"])) ** 2
    elif name == "simpo":
        loss = smooth(n["beta"] * (means[0] - means[1]) - n["margin"])
    else:
        odds = [mean - torch.log(1 - torch.exp(mean)) for mean in means]
        loss = -means[0] - n["beta"] * logsigmoid(odds[0] - odds[1])
    return loss - n["nll_weight"] * means[0]


def their_loss(name: str, theirs: Any, batch: Any, head: Any) -> Any:
    """Return the mean loss of a batch, example by example."""
    losses, weight = [], 0.0
    for row in range(len(batch.tokens_BT)):
        numbers = range(1, int(batch.segments_BT[row].max()) + 1)
        answers = [Answer(theirs, batch, row, number, head) for number in numbers]
        if name in (*PREFERENCES, "reward"):
            for chosen, rejected in zip(answers[::2], answers[1::2], strict=True):
                if name == "reward":
                    up, down = chosen.scores[-1, 0], rejected.scores[-1, 0]
                    loss = -logsigmoid(up - down - NUMBERS["margin"])
                    losses.append(loss + NUMBERS["centering"] * (up + down) ** 2)
                else:
                    held = (0, 0)
                    if batch.reference_BT is not None:
                        held = tuple(float(batch.reference_BT[row][a.place[0]])
                                     for a in (chosen, rejected))  # fmt: skip
                    losses.append(preference(name, chosen, rejected, held))
                weight += 1
            continue
        for answer in answers:
            if name == "classify":
                logits, labels = answer.scores[answer.chosen], answer.targets[answer.chosen]
                losses.append(torch.nn.functional.cross_entropy(logits, labels, reduction="sum"))
            else:
                losses.append(-answer.log.sum())
            weight += int(answer.chosen.sum())
    return sum(losses) / weight


def mean_and_gradients(loss_fn: Any, params: Any, frozen: Any, batch: Any, hyper: Any) -> Any:
    """Return our mean loss, and its gradient by the parameters."""

    @jax.jit
    @jax.value_and_grad
    def mean(params: Any) -> Any:
        total, weight, _ = loss_fn(params, frozen, batch, hyper, jax.random.key(0))
        return total / weight

    return mean(params)


def compare_gradients(theirs: Any, loss: Any, grads: Any) -> None:
    """Compare the gradients of the table, of the queries of each layer and of the last norm."""
    theirs.zero_grad()
    loss.backward()
    found = {"embed_VD": theirs.model.embed_tokens.weight.grad.numpy(),
             "final_norm_scale": theirs.model.norm.weight.grad.numpy()}  # fmt: skip
    for name, wanted in found.items():
        np.testing.assert_allclose(grads[name], wanted, atol=BOUND * np.abs(wanted).max())
    for number, layer in enumerate(theirs.model.layers):
        wanted = layer.self_attn.q_proj.weight.grad.numpy().T
        ours = np.asarray(grads["layers"]["q_DNH"][number]).reshape(wanted.shape)
        np.testing.assert_allclose(ours, wanted, atol=BOUND * np.abs(wanted).max())


@pytest.mark.parametrize("name", ["language", "classify", "reward", *PREFERENCES])
def test_loss_and_gradients_are_those_of_torch(name, models):
    theirs, model_cfg, params = models
    labels = {"classify": 3, "reward": 1}.get(name, 0)
    model, batch, cfg = (
        Transformer(dataclasses.replace(model_cfg, num_labels=labels)),
        make_rows(name),
        config(name),
    )
    head = None
    if labels:
        head = np.random.default_rng(0).standard_normal((labels, model_cfg.embed_dim))
        params = {**params, "label_CD": jnp.asarray(head, jnp.float32)}
        head = torch.tensor(head, dtype=torch.float32)
    hyper = make_hyper(cfg) | {key: np.float32(value) for key, value in NUMBERS.items()}
    loss_fn = OBJECTIVES[cfg.objective.kind](model, cfg)

    ours, grads = mean_and_gradients(loss_fn, params, {}, batch, hyper)
    wanted = their_loss(name, theirs, batch, head)
    assert float(ours) == pytest.approx(wanted.item(), rel=BOUND)
    compare_gradients(theirs, wanted, grads)


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_distillation_is_that_of_torch(beta, models):
    theirs, model_cfg, params = models
    model, batch = Transformer(model_cfg), make_rows("distill")
    wise = init_params(model_cfg, jax.random.key(5))
    teacher = jax.tree.map(lambda x: x + 0.05 * jnp.sin(jnp.arange(x.size).reshape(x.shape)), wise)
    hyper = make_hyper(config("language")) | {"temperature": np.float32(1.5)}
    hyper |= {"jsd_beta": np.float32(beta)}
    loss_fn = distill.make_loss(model, model, 1)

    ours, grads = mean_and_gradients(loss_fn, params, {"teacher": teacher}, batch, hyper)
    logits_BTV = model.apply(
        {"params": teacher}, batch.tokens_BT, batch.positions_BT, batch.segments_BT
    )[0]
    losses, weight = [], 0
    for row in range(len(batch.tokens_BT)):
        for number in range(1, int(batch.segments_BT[row].max()) + 1):
            answer = Answer(theirs, batch, row, number)
            student = torch.log_softmax(answer.logits / 1.5, -1)
            known = torch.tensor(np.asarray(logits_BTV[row][answer.place]))
            known = torch.log_softmax(known / 1.5, -1)
            kl = lambda p, q: (p.exp() * (p - q)).sum(-1)
            if beta in (0.0, 1.0):
                loss = kl(student, known) if beta else kl(known, student)
            else:
                mixed = torch.log((1 - beta) * student.exp() + beta * known.exp())
                loss = beta * kl(known, mixed) + (1 - beta) * kl(student, mixed)
            losses.append(loss[answer.chosen].sum())
            weight += int(answer.chosen.sum())
    wanted = sum(losses) / weight
    assert float(ours) == pytest.approx(wanted.item(), rel=BOUND)
    compare_gradients(theirs, wanted, grads)


@pytest.mark.parametrize("ratio", ["token", "sequence"])
@pytest.mark.parametrize("aggregation", ["dapo", "grpo", "dr_grpo"])
def test_the_policy_gradient_is_that_of_torch(aggregation, ratio, models):
    theirs, model_cfg, params = models
    model, batch = Transformer(model_cfg), make_rows("language", lengths=(16,))
    draw, shape = np.random.default_rng(1), batch.tokens_BT.shape
    advantages = np.repeat(draw.standard_normal((shape[0], 1)), shape[1], 1).astype(np.float32)
    held, old = (draw.normal(-3.4, 0.3, shape).astype(np.float32) for _ in range(2))
    plain = batch._replace(segments_BT=None, positions_BT=None)
    rollout = Rollout(plain, advantages, old, held)
    objective = Objective(aggregation=aggregation, ratio=ratio, max_tokens=16)
    hyper = make_hyper(config("language")) | {k: np.float32(v) for k, v in NUMBERS.items()}
    loss_fn = make_loss(model, 1, objective)

    ours, grads = mean_and_gradients(loss_fn, params, {}, rollout, hyper)
    losses, weight = [], 0
    for row in range(shape[0]):
        answer = Answer(theirs, batch, row, 1)
        chosen = answer.chosen.numpy()
        before, start = (torch.tensor(x[row][chosen]) for x in (old, held))
        ratios = torch.exp(answer.log - before)
        if ratio == "sequence":
            ratios = torch.exp((answer.log - before).mean()).expand(len(before))
        gain = float(advantages[row, 0])
        clipped = ratios.clamp(1 - NUMBERS["clip_low"], 1 + NUMBERS["clip_high"])
        loss = -torch.minimum(ratios * gain, clipped * gain)
        apart = start - answer.log
        loss = loss + NUMBERS["kl"] * (torch.exp(apart) - apart - 1)
        losses.append(loss.mean() if aggregation == "grpo" else loss.sum())
        weight += {"dapo": len(loss), "grpo": 1, "dr_grpo": 16}[aggregation]
    wanted = sum(losses) / weight
    assert float(ours) == pytest.approx(wanted.item(), rel=BOUND)
    compare_gradients(theirs, wanted, grads)
