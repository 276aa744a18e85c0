"""THE table of parameters: each one's path, shape, axes, kind and initializer stand here alone.

Declaration, sharding, muP, Muon, Adafactor, the layout for decoding, FLOPs and counts read it.
Names end in their dimensions (see transformer.py); the layers of a stack are the first axis.
"""

import functools
import math
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax

from nanojaxgpt.config.sections import GATED
from nanojaxgpt.model.config import LayerConfig, ModelConfig


class Parameter(NamedTuple):
    """One row of the table; within a stack, `shape`, `summed` and `axes` are those of one layer."""

    name: str
    shape: tuple[int, ...]
    summed: tuple[int, ...]  # dimensions that a product with activations sums over
    axes: tuple[str, ...]  # logical names of the dimensions, see sharding.RULES
    kind: str  # embedding, kernel, head, norm, bias, gate, adapter
    init: Callable
    stack: str = ""  # the stack of layers it is in; "": in none
    layers: int = 0  # how many layers that has

    @property
    def path(self) -> str:
        """Its path in the tree of parameters, `layers/q_DNH`."""
        return f"{self.stack}/{self.name}" if self.stack else self.name

    @property
    def size(self) -> int:
        """How many numbers it has, in all layers."""
        return math.prod(self.shape) * (self.layers or 1)

    @property
    def adapter(self) -> tuple[str, str]:
        """The names that the two kernels of its adapter have, of q_DNH q_lora_DR and q_lora_RNH."""
        stem, letters = self.name.rsplit("_", 1)
        inner = "".join(letters[axis] for axis in self.summed)
        outer = "".join(letter for letter in letters if letter not in inner)
        return f"{stem}_lora_{inner}R", f"{stem}_lora_R{outer}"

    @property
    def is_matrix(self) -> bool:
        """Whether it is a table or the matrix of a product, not one of the small vectors."""
        return self.kind in ("embedding", "kernel", "head")

    @property
    def array_shape(self) -> tuple[int, ...]:
        """The shape of the array, of all layers."""
        return (self.layers, *self.shape) if self.stack else self.shape

    def dtype(self, cfg: ModelConfig) -> str:
        """Return what it is stored in."""
        return "float32" if self.kind == "adapter" else cfg.param_dtype

    @property
    def logical_axes(self) -> tuple[str, ...]:
        """The logical names of all dimensions of the array."""
        return ("layers", *self.axes) if self.stack else self.axes


# Rows by the paths of their parameters.
Table = Mapping[str, Parameter]
# Arrays, or their abstract shapes, nested by the paths of the table.
Params = Mapping[str, Any]
# Any tree of arrays, as jax takes it: a batch, a gradient, an optimizer's state.
PyTree = Any


class ParameterRows:
    """Collects the rows of one module; `inputs` is what the projection with a bias sums over."""

    def __init__(self, cfg: ModelConfig) -> None:
        self.cfg, self.found = cfg, list[Parameter]()

    def kernel(self, name: str, shape: tuple, axes: tuple, summed: tuple = (0,), **how: Any) -> int:
        """Add a kernel; return the size that it sums over."""
        inputs = math.prod(shape[axis] for axis in summed)
        kind, residual = how.get("kind", "kernel"), how.get("residual", False)
        init = kernel_init(self.cfg, inputs, residual)
        self.found.append(Parameter(name, shape, summed, axes, kind, init))
        return inputs

    def bias(self, name: str, shape: tuple, axes: tuple, inputs: int) -> None:
        """Add the bias of a projection that sums over `inputs`."""
        init = uniform_init(1 / math.sqrt(inputs)) if self.cfg.init == "torch" else zeros
        self.found.append(Parameter(name, shape, (), axes, "bias", init))

    def norm(self, name: str, shape: tuple, axes: tuple = ("norm",), bias: bool = True) -> None:
        """Add the scale of a norm, and its bias where norms have one."""
        cfg = self.cfg
        if cfg.norm_scale:
            init = nn.initializers.constant(1 - cfg.norm_offset) if cfg.norm_offset else ones
            self.found.append(Parameter(f"{name}_scale", shape, (), axes, "norm", init))
        if bias and cfg.norm_bias and cfg.norm == "layernorm":
            self.found.append(Parameter(f"{name}_bias", shape, (), axes, "norm", zeros))


zeros, ones = nn.initializers.zeros, nn.initializers.ones


def uniform_init(bound: float) -> Callable:
    """Return an initializer of numbers in [-bound, bound)."""
    return lambda rng, shape, dtype: jax.random.uniform(rng, shape, dtype, -bound, bound)


def kernel_init(cfg: ModelConfig, inputs: int, residual: bool = False) -> Callable:
    """Return the initializer of a projection; GPT-2 shrinks those that write to the residual.

    With muP GPT-2's shrinks with the width, as the others do by themselves.
    """
    if cfg.init == "gpt2":
        std = 0.02 / math.sqrt(cfg.width)
        return nn.initializers.normal(std / math.sqrt(2 * cfg.num_layers) if residual else std)
    if cfg.init == "fan_in":
        # Cutting a normal at two standard deviations leaves 0.8796 of its spread.
        return nn.initializers.truncated_normal(1 / math.sqrt(inputs) / 0.87962566103423978)
    return uniform_init(1 / math.sqrt(inputs))


def embedding_init(cfg: ModelConfig) -> Callable:
    """Return the initializer of the token and position tables."""
    std = {"gpt2": 0.02, "fan_in": 1 / math.sqrt(cfg.embed_dim), "torch": 1.0}
    return nn.initializers.normal(std[cfg.init])


@functools.cache
def model_rows(cfg: ModelConfig) -> dict[str, Parameter]:
    """Return the parameters outside the layers by name."""
    rows, embed = ParameterRows(cfg), embedding_init(cfg)
    vocab = (cfg.vocab_size, cfg.embed_dim), ("vocab", "embed")
    rows.found.append(Parameter("embed_VD", vocab[0], (), vocab[1], "embedding", embed))
    if cfg.positions == "learned":
        shape, axes = (cfg.seq_len, cfg.embed_dim), ("positions", "embed")
        rows.found.append(Parameter("position_TD", shape, (), axes, "embedding", embed))
    if cfg.final_norm:
        rows.norm("final_norm", (cfg.embed_dim,))
    if not cfg.tied_head:
        rows.kernel("head_VD", *vocab, summed=(1,), kind="head")
    if cfg.head_bias:
        rows.bias("head_bias", (cfg.vocab_size,), ("vocab",), cfg.embed_dim)
    if cfg.num_labels:
        labels = (cfg.num_labels, cfg.embed_dim), ("labels", "embed")
        rows.kernel("label_CD", *labels, summed=(1,), kind="head")
    return {row.name: row for row in rows.found}


def adapter_rows(kernel: Parameter, rank: int) -> list[Parameter]:
    """Return the rows of a kernel's adapter, [in..., R] and [R, out...] (Hu 2021).

    They start as PEFT's: the first uniform, the second zero, so that nothing is added yet.
    """
    outer = [axis for axis in range(len(kernel.shape)) if axis not in kernel.summed]
    ins, outs = (tuple(kernel.shape[axis] for axis in part) for part in (kernel.summed, outer))
    in_axes, out_axes = (
        tuple(kernel.axes[axis] for axis in part) for part in (kernel.summed, outer)
    )
    down, up = kernel.adapter
    init = uniform_init(1 / math.sqrt(math.prod(ins)))
    summed = tuple(range(len(ins)))
    return [
        Parameter(down, (*ins, rank), summed, (*in_axes, "rank"), "adapter", init),
        Parameter(up, (rank, *outs), (0,), ("rank", *out_axes), "adapter", zeros),
    ]


@functools.cache
def layer_rows(cfg: ModelConfig, layer: LayerConfig) -> dict[str, Parameter]:
    """Return the parameters of one layer by name, those of its adapters last."""
    rows = block_rows(cfg, layer)
    for row in [*rows] if cfg.lora.rank else ():
        path = f"{cfg.stack_of(layer)}/{row.name}"
        if row.kind == "kernel" and any(re.search(one, path) for one in cfg.lora.targets):
            rows += adapter_rows(row, cfg.lora.rank)
    return {row.name: row for row in rows}


def block_rows(cfg: ModelConfig, layer: LayerConfig) -> list[Parameter]:
    """Return the parameters of one layer without adapters."""
    rows, embed, head = ParameterRows(cfg), cfg.embed_dim, cfg.head_dim
    norms = {"pre": ("norm",), "post": ("norm",), "output": ("output_norm",)}
    placed = norms.get(cfg.norm_placement, ("norm", "output_norm"))
    fused = cfg.parallel_block and cfg.norm_placement == "post" and cfg.mlp != "none"
    for place in () if fused else placed:
        rows.norm(f"attention_{place}", (embed,))
    heads = (("q", "DNH", cfg.num_heads, "heads"), ("k", "DKH", cfg.num_kv_heads, "kv_heads"),
             ("v", "DKH", cfg.num_kv_heads, "kv_heads"))  # fmt: skip
    for name, letters, count, axis in heads:
        shape, axes = (embed, count, head), ("embed", axis, "head_dim")
        inputs = rows.kernel(f"{name}_{letters}", shape, axes)
        if cfg.bias:
            rows.bias(f"{name}_bias", shape[1:], axes[1:], inputs)
    for name, _, count, axis in heads[:2] if cfg.qk_norm else ():
        if cfg.qk_norm_over == "head":
            rows.norm(f"{name}_norm", (head,), bias=False)
        else:
            rows.norm(f"{name}_norm", (count, head), (axis, "head_dim"), bias=False)
    if cfg.smeared_keys:
        smear = Parameter("smear_K", (cfg.num_kv_heads,), (), ("norm",), "gate", zeros)
        rows.found.append(smear)
    shape, axes = (cfg.num_heads, head, embed), ("heads", "head_dim", "embed")
    inputs = rows.kernel("o_NHD", shape, axes, (0, 1), residual=True)
    if cfg.bias and cfg.bias_in != "qkv":
        rows.bias("o_bias", (embed,), ("norm",), inputs)
    if cfg.mlp == "none":
        return rows.found
    if fused:
        rows.norm("norm", (embed,))
    for place in placed:
        shares = place == "norm" and cfg.parallel_block and not cfg.parallel_norms
        if not (fused or shares):
            rows.norm(f"mlp_{place}", (embed,))
    biased, shape, axes = (
        cfg.bias and cfg.bias_in == "all",
        (embed, layer.mlp_dim),
        ("embed", "mlp"),
    )
    for name in ("gate", "up") if cfg.mlp in GATED else ("up",):
        inputs = rows.kernel(f"{name}_DF", shape, axes)
        if biased:
            rows.bias(f"{name}_bias", shape[1:], axes[1:], inputs)
    # Stored [out, in]: the gradient of a wide-to-narrow kernel is 1.1x faster so on CPU.
    inputs = rows.kernel("down_DF", shape, axes, (1,), residual=True)
    if biased:
        rows.bias("down_bias", (embed,), ("norm",), inputs)
    return rows.found


@functools.cache
def parameters(cfg: ModelConfig) -> dict[str, Parameter]:
    """Return the whole table by path. Raises ValueError where the vocabulary has no size yet."""
    found = list(model_rows(cfg).values())
    for name, stack in cfg.stacks.items():
        rows = layer_rows(cfg, cfg.layer(stack.first)).values()
        found += [row._replace(stack=name, layers=stack.count) for row in rows]
    return {row.path: row for row in found}


def abstract_tree(cfg: ModelConfig) -> Params:
    """Return the parameters without arrays: their shapes and dtypes."""
    found: dict[str, Any] = {}
    for row in parameters(cfg).values():
        place = found.setdefault(row.stack, {}) if row.stack else found
        place[row.name] = jax.ShapeDtypeStruct(row.array_shape, row.dtype(cfg))
    return found


def count_params(cfg: ModelConfig) -> int:
    """Return the number of parameters."""
    return sum(row.size for row in parameters(cfg).values())


def row_of(path: str, table: Table) -> Parameter | None:
    """Return the row that a path ends with, as those of an optimizer's state do; None: no row.

    So `opt_state/mu/layers/q_DNH` is laid out, decayed and counted like `layers/q_DNH`.
    """
    parts = path.split("/")
    suffixes = ("/".join(parts[first:]) for first in range(len(parts)))
    return next((table[suffix] for suffix in suffixes if suffix in table), None)
