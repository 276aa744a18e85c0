"""Losses and gradients of fine-tuning, on the same weights and examples, against TRL's own code.

TRL's methods run on stand-ins for their trainers, which hold the settings that the methods read. Of
ORPO, TRL's odds ratio is compared; its likelihood also counts the prompt's tokens, which are not
trained here, so that part is written in torch. So is all of classification, by transformers.
"""

import functools
import json
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
from conftest import small_model
from test_families import THEIRS, our_params
from test_objectives import config

from nanojaxgpt.data.rows import Batch
from nanojaxgpt.interchange.families import model_fields
from nanojaxgpt.model.transformer import Transformer
from nanojaxgpt.objectives import distill
from nanojaxgpt.step import OBJECTIVES, accumulate, make_hyper

torch = pytest.importorskip("torch", reason="the oracle is TRL, in torch")
transformers = pytest.importorskip("transformers", reason="the oracle is TRL")
pytest.importorskip("trl", reason="the oracle is TRL")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

LENGTH, BOUND = 40, 1e-5
NUMBERS = {"beta": 0.3, "margin": 0.4, "label_smoothing": 0.1, "centering": 0.05, "nll_weight": 0.0,
           "temperature": 1.7}  # fmt: skip


def draw_pairs(count: int = 8) -> list[tuple[list[int], list[int], list[int]]]:
    """Return (prompt, chosen, rejected) as ids, none of which is the padding's, 0."""
    draw = np.random.default_rng(0)
    return [
        tuple(draw.integers(1, 31, size).tolist() for size in (draw.integers(2, 5), *sizes))
        for sizes in draw.integers(1, 6, (count, 2))
    ]


PAIRS = draw_pairs()
ANSWERS = [(p, c) for p, c, _ in PAIRS] + [(p, r) for p, _, r in PAIRS]  # as TRL has them


def pack(examples: list[tuple[list[int], list[int], float]], per_row: int) -> Batch:
    """Return rows of examples, (prompt, answer, log-probability by the reference) each."""
    rows = len(examples) // per_row
    tokens, targets, segments, positions = np.zeros((4, rows, LENGTH), np.int32)
    weights, reference = np.zeros((2, rows, LENGTH), np.float32)
    for row in range(rows):
        first = 0
        for number, (prompt, answer, known) in enumerate(examples[row * per_row :][:per_row], 1):
            ids = np.array(prompt + answer)
            place = slice(first, first := first + len(ids) - 1)
            tokens[row, place], targets[row, place] = ids[:-1], ids[1:]
            segments[row, place], positions[row, place] = number, np.arange(len(ids) - 1)
            weights[row, place] = np.arange(1, len(ids)) >= len(prompt)
            reference[row, place] = known
    return Batch(tokens, targets, weights, segments, positions, reference_BT=reference)


def padded(examples: list[tuple[list[int], list[int]]]) -> dict[str, Any]:
    """Return what TRL's collators give: ids, mask of padding, mask of the answers."""
    longest = max(len(prompt + answer) for prompt, answer in examples)
    ids, mask, answers = np.zeros((3, len(examples), longest), np.int64)
    for row, (prompt, answer) in enumerate(examples):
        size = len(prompt + answer)
        ids[row, :size], mask[row, :size] = prompt + answer, 1
        answers[row, len(prompt) : size] = 1
    found = {"input_ids": ids, "attention_mask": mask, "completion_mask": answers}
    return {name: torch.tensor(array) for name, array in found.items()}


@functools.cache
def theirs(seed: int = 0, labels: int = 0) -> Any:
    """Return a random Llama, with a head for so many labels instead of that for tokens."""
    torch.manual_seed(seed)
    cfg = transformers.AutoConfig.for_model("llama", **THEIRS, num_labels=labels or 2)
    head = "SequenceClassification" if labels else "CausalLM"
    kind = getattr(transformers, f"AutoModelFor{head}")
    model = kind.from_config(cfg, attn_implementation="eager")
    with torch.no_grad():
        for tensor in model.parameters():
            tensor.normal_(0, 0.2) if tensor.ndim > 1 else tensor.add_(
                0.3 * torch.randn_like(tensor)
            )
    return model.eval()


def ours(model: Any, labels: int = 0, gradients: bool = False) -> tuple[Transformer, dict]:
    """Return our model, and their weights or gradients as our parameters."""
    family, fields = model_fields(json.loads(model.config.to_json_string()))
    plain = small_model(**fields | dict(unroll=1))
    leaves = {
        name: leaf.grad if gradients else leaf.detach() for name, leaf in model.named_parameters()
    }
    head = {}
    if labels:
        head = {"label_CD": leaves.pop("score.weight").numpy()}
        leaves["lm_head.weight"] = torch.zeros(plain.vocab_size, plain.embed_dim)
    params = our_params(plain, family.tensors, SimpleNamespace(state_dict=lambda: leaves))
    cfg = small_model(**fields | dict(unroll=1, num_labels=labels))
    return Transformer(cfg), params | head


def trainer(**settings: Any) -> SimpleNamespace:
    """Return what TRL's methods take as `self`: the settings, and one process."""
    same = lambda x: x
    alone = SimpleNamespace(device="cpu", gather=same, gather_for_metrics=same, num_processes=1)
    common = dict(accelerator=alone, aux_loss_enabled=False, _total_train_tokens=0, _tp_size=1,
                  _metrics=defaultdict(lambda: defaultdict(list)), beta=NUMBERS["beta"],
                  model=SimpleNamespace(training=False), alpha=0.0)  # fmt: skip
    return SimpleNamespace(**common | settings)


def fused(model: Any) -> Any:
    """Return the model with the head by which TRL's trainers read log-probabilities."""
    from trl.trainer.utils import add_fused_lm_head

    if not hasattr(model, "has_fused_head"):
        add_fused_lm_head(model, outputs=("log_probs", "entropy", "mean_logits", "is_top1"))
        model.has_fused_head = True
    return model


def sums_of(model: Any, batch: dict, average: bool) -> Any:
    """Return TRL's log-probability of each answer, its sum or mean over tokens."""
    from trl.experimental.cpo import CPOTrainer

    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
    return CPOTrainer.get_batch_logps(logits, labels, average_log_prob=average)


def reference() -> Any:
    """Return the log-probability of each answer by another model."""
    with torch.no_grad():
        return sums_of(theirs(1), padded(ANSWERS), average=False)


def their_sft(model: Any) -> Any:
    from trl import SFTTrainer

    batch = padded(ANSWERS)
    batch["labels"] = batch["input_ids"].masked_fill(batch.pop("completion_mask") == 0, -100)
    settings = SimpleNamespace(loss_type="nll", average_tokens_across_devices=False)
    own = trainer(args=settings, compute_loss_func=None, label_smoother=None)
    own.accelerator.parallelism_config = None
    return SFTTrainer.compute_loss(own, fused(model), batch)


def their_dpo(model: Any, kind: str) -> Any:
    from trl import DPOTrainer

    chosen, rejected = reference().chunk(2)
    batch = padded(ANSWERS) | {"ref_chosen_logps": chosen, "ref_rejected_logps": rejected}
    own = trainer(precompute_ref_logps=True, ld_alpha=None, f_divergence_type="reverse_kl",
                  loss_types=[kind], loss_weights=[1.0], use_weighting=False)  # fmt: skip
    return DPOTrainer._compute_loss(own, fused(model), batch, False)


def their_orpo(model: Any) -> Any:
    from trl.experimental.orpo import ORPOTrainer

    chosen, rejected = sums_of(model, padded(ANSWERS), average=True).chunk(2)
    losses, *_ = ORPOTrainer.odds_ratio_loss(trainer(), chosen, rejected)
    return -chosen.mean() - losses.mean()


def their_simpo(model: Any) -> Any:
    from trl.experimental.cpo import CPOTrainer

    own = trainer(loss_type="simpo", simpo_gamma=NUMBERS["margin"],
                  label_smoothing=NUMBERS["label_smoothing"])  # fmt: skip
    chosen, rejected = sums_of(model, padded(ANSWERS), average=True).chunk(2)
    return CPOTrainer.cpo_loss(own, chosen, rejected)[0].mean()


def their_reward(model: Any) -> Any:
    from trl import RewardTrainer

    batch = padded([(prompt, answer[:-1]) for prompt, answer in ANSWERS])
    del batch["completion_mask"]
    batch["margin"] = torch.full((len(PAIRS),), NUMBERS["margin"])
    own = trainer(args=SimpleNamespace(center_rewards_coefficient=NUMBERS["centering"]))
    return RewardTrainer.compute_loss(own, model, batch)


def their_classes(model: Any) -> Any:
    batch = padded(ANSWERS)
    del batch["completion_mask"]
    return model(**batch, labels=torch.arange(len(ANSWERS)) % 3).loss


def their_jsd(model: Any, beta: float) -> Any:
    from trl.experimental.gkd import GKDTrainer

    batch = padded(ANSWERS)
    labels = batch["input_ids"].masked_fill(batch.pop("completion_mask") == 0, -100)[:, 1:]
    with torch.no_grad():
        wise = theirs(1)(**batch).logits[:, :-1]
    return GKDTrainer.generalized_jsd_loss(
        model(**batch).logits[:, :-1], wise, labels, beta, NUMBERS["temperature"]
    )


THEIR_LOSSES = {
    "language": their_sft, "dpo": functools.partial(their_dpo, kind="sigmoid"),
    "ipo": functools.partial(their_dpo, kind="ipo"), "orpo": their_orpo, "simpo": their_simpo,
    "reward": their_reward, "classify": their_classes,
    "distill 0.0": functools.partial(their_jsd, beta=0.0),
    "distill 0.3": functools.partial(their_jsd, beta=0.3),
    "distill 1.0": functools.partial(their_jsd, beta=1.0),
}  # fmt: skip


@pytest.mark.parametrize("case", THEIR_LOSSES)
def test_loss_and_gradients_are_those_of_trl(case):
    name, _, jsd_beta = case.partition(" ")
    labels = {"reward": 1, "classify": 3}.get(name, 0)
    oracle = theirs(labels=labels)
    oracle.zero_grad()
    expected = THEIR_LOSSES[case](oracle)
    expected.backward()
    model, params = ours(oracle, labels)
    scored = [(*answer, known) for answer, known in zip(ANSWERS, reference().tolist(), strict=True)]
    sides = zip(scored[: len(PAIRS)], scored[len(PAIRS) :], strict=True)
    examples = [answer for pair in sides for answer in pair]
    if name == "classify":
        examples = [((p + a), [i % 3], 0.0) for i, (p, a) in enumerate(ANSWERS)]
    cfg, frozen = config(name), {}
    if name == "distill":
        teacher, wise = ours(theirs(1))
        frozen, loss_fn = {"teacher": wise}, distill.make_loss(model, teacher, 4)
    else:
        loss_fn = OBJECTIVES[cfg.objective.kind](model, cfg)
    numbers = NUMBERS | {"jsd_beta": float(jsd_beta or 0)}
    if name == "dpo":  # TRL's has none
        numbers["label_smoothing"] = 0.0
    hyper = make_hyper(cfg) | {key: np.float32(value) for key, value in numbers.items()}
    batch = pack(examples, per_row=4)
    total, gradients, weight, _ = jax.jit(
        lambda params, frozen: accumulate(
            loss_fn, params, frozen, batch, hyper, jax.random.key(0), 2
        )
    )(params, frozen)
    assert float(total / weight) == pytest.approx(expected.item(), rel=BOUND)
    _, wanted = ours(oracle, labels, gradients=True)
    for (path, mine), grad in zip(
        jax.tree.leaves_with_path(gradients), jax.tree.leaves(wanted), strict=True
    ):
        scale = max(np.abs(grad).max(), 1e-3)
        assert np.abs(np.asarray(mine) / weight - grad).max() < BOUND * scale, path
