"""In: a jaxpr. Out: the FLOPs of its matmuls, every loop counted as often as it runs."""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr  # pyright: ignore[reportPrivateImportUsage]

from nanojaxgpt.flops import attention_flops, train_flops
from nanojaxgpt.model.config import ModelConfig


class Matmuls(NamedTuple):
    """FLOPs of a program: products with weights, and products of activations with each other."""

    weights: int
    attention: int  # 0 in a Pallas kernel, which holds none that could be seen

    def scaled(self, times: int) -> "Matmuls":
        """Return the FLOPs of running it `times` times."""
        return Matmuls(self.weights * times, self.attention * times)


def count_matmuls(jaxpr: Jaxpr) -> Matmuls:
    """Return the FLOPs of the jaxpr's dot_generals: 2 a multiply-add.

    Those with batch dimensions are attention, for the model multiplies by weights in two
    dimensions. Of a conditional the dearest branch counts, of a shard_map every shard.
    """
    total = Matmuls(0, 0)
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            found = dot_flops(equation)
        elif equation.primitive.name == "pallas_call":
            continue
        else:
            inner = [count_matmuls(sub) for sub in subjaxprs(equation.params)]
            if not inner:
                continue
            if equation.primitive.name == "cond":
                inner = [max(inner, key=sum)]
            times = equation.params["length"] if equation.primitive.name == "scan" else 1
            if equation.primitive.name == "shard_map":
                times = equation.params["mesh"].size
            found = add(*inner).scaled(times)
        total = add(total, found)
    return total


def add(*parts: Matmuls) -> Matmuls:
    """Return the sum."""
    return Matmuls(*map(sum, zip(*parts, strict=True)))


def dot_flops(equation: Any) -> Matmuls:
    """Return the FLOPs of one dot_general."""
    (contract, _), (batch, _) = equation.params["dimension_numbers"]
    left, result = equation.invars[0].aval.shape, equation.outvars[0].aval.shape
    flops = 2 * math.prod(result) * math.prod(left[i] for i in contract)
    return Matmuls(0, flops) if batch else Matmuls(flops, 0)


def subjaxprs(params: dict[str, Any]) -> Iterator[Jaxpr]:
    """Yield the jaxprs among an equation's parameters."""
    kinds = (ClosedJaxpr, Jaxpr)
    for leaf in jax.tree.leaves(list(params.values()), is_leaf=lambda x: isinstance(x, kinds)):
        if isinstance(leaf, kinds):
            yield leaf.jaxpr if isinstance(leaf, ClosedJaxpr) else leaf


def weight_flops(cfg: ModelConfig, seq_len: int) -> int:
    """Return the part of `train_flops` that multiplies by weights, for one sequence."""
    return train_flops(cfg, seq_len) - 3 * attention_flops(cfg, seq_len)
