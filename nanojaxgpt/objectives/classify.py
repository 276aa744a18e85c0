"""Classification: a head over the features at the last token of each text.

The place to read has weight 1 and the number of the label as its target; all others have weight 0.
Dimensions: B rows, T places, D features, C labels, E predictions.
"""

import jax
import jax.numpy as jnp
import numpy as np

from nanojaxgpt.data.rows import Batch
from nanojaxgpt.loss import token_loss
from nanojaxgpt.model.parameters import Params
from nanojaxgpt.model.projection import project
from nanojaxgpt.model.transformer import Transformer
from nanojaxgpt.objectives import Loss, Metric
from nanojaxgpt.objectives.features import features
from nanojaxgpt.schedules import Hyper
from nanojaxgpt.trainable import merge_params


def label_logits(model: Transformer, params: Params, x_BTD: jax.Array) -> jax.Array:
    """Return the head's logits at every place, float32 [B, T, C]."""
    label_CD = params["label_CD"].astype(model.cfg.compute_dtype)
    return project(x_BTD, label_CD, "TI,OI->TO", jnp.float32) / model.cfg.width


def make_loss(model: Transformer) -> Loss:
    """Return the loss: the sum of the labels' cross-entropies, and of the weights.

    The metrics are `accuracy`, and `confusion`: examples [C, E] by label and by prediction.
    """

    def loss(
        params: Params, frozen: Params, batch: Batch, hyper: Hyper, rng: jax.Array
    ) -> tuple[jax.Array, jax.Array, dict[str, Metric]]:
        whole = merge_params(params, frozen)
        x_BTD, _ = features(model, whole, batch, hyper, rng)
        logits_BTC = label_logits(model, whole, x_BTD)
        weights_BT = batch.weights_BT
        labels_BT = jnp.where(weights_BT > 0, batch.targets_BT, 0)  # elsewhere they are tokens
        losses_BT = token_loss(logits_BTC, labels_BT, jnp.float32(0))
        chosen_BT, weight = jnp.argmax(logits_BTC, -1), jnp.sum(weights_BT)
        right = jnp.sum((chosen_BT == labels_BT) * weights_BT)
        one_hot = jax.nn.one_hot
        count = model.cfg.num_labels
        confusion_CE = jnp.einsum(
            "BTC,BTE->CE", one_hot(labels_BT, count) * weights_BT[..., None],
            one_hot(chosen_BT, count),
        )  # fmt: skip
        metrics = {"accuracy": (right, weight), "confusion": (confusion_CE, weight)}
        return jnp.sum(losses_BT * weights_BT), weight, metrics

    return loss


def macro_f1(confusion_CC: np.ndarray) -> float:
    """Return the mean of the labels' F1 scores; that of a label without examples counts as 0."""
    right_C = np.diag(confusion_CC)
    both_C = confusion_CC.sum(0) + confusion_CC.sum(1)  # examples of the label, and predictions
    return float(np.mean(2 * right_C / np.maximum(both_C, 1e-9)))
