"""Dimension suffixes tell the truth: against einsum terms, and against the parameters' shapes."""

import ast
import re

import jax
import pytest
from conftest import ROOT, small_model

from nanojaxgpt.checkpoint import path_name
from nanojaxgpt.config import base_config
from nanojaxgpt.model.transformer import init_params
from nanojaxgpt.optim import path_mask

SOURCES = sorted((ROOT / "nanojaxgpt").rglob("*.py"))
SIZES = {"L": 3, "D": 12, "N": 4, "K": 2, "H": 6, "F": 20, "V": 31, "T": 16}  # no two alike
SHAPE = dict(
    num_layers=3, embed_dim=12, num_heads=4, num_kv_heads=2, head_dim=6, mlp_dim=20, vocab_size=31,
    seq_len=16,
)  # fmt: skip
VARIANTS = {
    "default": {},
    "gated": {"mlp": "swiglu", "bias": False, "norm": "rmsnorm"},
    "untied": {"tied_head": False},
    "rotary": {"positions": "rotary"},
    "qk_norm": {"qk_norm": True},
    "smeared": {"smeared_keys": True},
    "parallel": {"parallel_block": True},
    "attention_only": {"mlp": "none"},
    "sandwich": {"norm_placement": "sandwich"},
    "output": {"norm_placement": "output", "bias_in": "qkv"},
    "width": {"qk_norm": True, "qk_norm_over": "width"},
    "two_norms": {"parallel_block": True, "parallel_norms": True, "head_bias": True},
    "no_scales": {"norm_scale": False, "bias_in": "attention"},
}


def suffix(node: ast.AST) -> str:
    """Return the dimensions that a name ends in, through `x.astype(...)` and numbers of it."""
    while True:
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            if node.func.attr != "astype":
                return ""
            node = node.func.value
        elif isinstance(node, ast.BinOp) and not suffix(node.right):
            node = node.left
        else:
            break
    name = node.id if isinstance(node, ast.Name) else getattr(node, "attr", "")
    found = re.search(r"_([A-Z][A-Z0-9]*)$", name)
    return found[1] if found and not name.isupper() else ""


def contraction(node: ast.AST) -> tuple[str, list[ast.AST]] | None:
    """Return the terms and the operands of an einsum whose operands are written out."""
    if not isinstance(node, ast.Call) or any(isinstance(a, ast.Starred) for a in node.args):
        return None
    called = ast.unparse(node.func).split(".")[-1]
    if called == "einsum" and isinstance(node.args[0], ast.Constant):
        return node.args[0].value, node.args[1:]
    return None


def check_terms(tree: ast.AST) -> tuple[list[str], int]:
    """Return what disagrees, and how many suffixes were compared with their terms."""
    wrong, count = [], 0

    def compare(node: ast.AST, term: str) -> None:
        nonlocal count
        if found := suffix(node):
            count += 1
            if found != term:
                wrong.append(f"line {node.lineno}: {ast.unparse(node)} is {term}")

    for node in ast.walk(tree):
        if terms := contraction(node):
            operands, _ = terms[0].split("->")
            for term, operand in zip(operands.split(","), terms[1], strict=True):
                compare(operand, term)
        if isinstance(node, ast.Assign):
            value = node.value
            while isinstance(value, ast.BinOp | ast.Call) and not contraction(value):
                if isinstance(value, ast.Call) and not isinstance(value.func, ast.Attribute):
                    break
                value = value.left if isinstance(value, ast.BinOp) else value.func.value
            if terms := contraction(value):
                compare(node.targets[0], terms[0].split("->")[1])
    return wrong, count


@pytest.mark.parametrize(
    ("line", "wrong"),
    [
        ("y_BO = jnp.einsum('BI,IO->BO', x_BI, w_IO)", 0),
        ("y_BO = jnp.einsum('BI,IO->BO', x_BI, w_OI)", 1),
        ("y_OB = jnp.einsum('BI,IO->BO', x_IB, w_OI)", 3),
        ("y_BT = jnp.einsum('BI,IO->BO', x, w_IO.astype(z)).astype(q) * 2", 1),
    ],
)
def test_the_check_sees_what_is_wrong(line, wrong):
    assert len(check_terms(ast.parse(line))[0]) == wrong


def test_suffixes_are_the_terms():
    compared = 0
    for path in SOURCES:
        wrong, count = check_terms(ast.parse(path.read_text()))
        assert not wrong, path.name
        compared += count
    assert compared >= 6


def parameters(**changes) -> dict[str, jax.ShapeDtypeStruct]:
    """Return path -> shape of a model's parameters; nothing is allocated."""
    cfg = small_model(**(SHAPE | changes))
    shapes = jax.eval_shape(lambda: init_params(cfg, jax.random.key(0)))
    return {path_name(p): leaf for p, leaf in jax.tree_util.tree_leaves_with_path(shapes)}


@pytest.mark.parametrize("variant", VARIANTS)
def test_parameters_have_the_shape_of_their_name(variant):
    suffixed = 0
    for path, leaf in parameters(**VARIANTS[variant]).items():
        name = path.split("/")[-1]
        stacked = ["L"] if path.startswith("layers/") else []
        if dims := suffix(ast.parse(name, mode="eval").body):
            suffixed += 1
            assert leaf.shape == tuple(SIZES[d] for d in [*stacked, *dims]), path
        else:
            assert re.fullmatch(r".+_(bias|scale)", name), f"{path} has no dimensions in its name"
            assert leaf.shape[: len(stacked)] == tuple(SIZES[d] for d in stacked)
    assert suffixed >= 5


def test_variants_have_what_they_are_named_for():
    names = {variant: set(parameters(**VARIANTS[variant])) for variant in VARIANTS}
    assert "layers/gate_DF" in names["gated"]
    assert "head_VD" in names["untied"]
    assert "position_TD" in names["default"] - names["rotary"]
    assert "layers/q_norm_scale" in names["qk_norm"]
    assert "layers/smear_K" in names["smeared"]
    assert not {name for name in names["attention_only"] if name.endswith("_DF")}
    norms = {"layers/attention_norm_scale", "layers/mlp_norm_scale"}
    after = {"layers/attention_output_norm_scale", "layers/mlp_output_norm_scale"}
    assert names["sandwich"] >= norms | after
    assert names["output"] >= after
    assert not names["output"] & (norms | {"layers/o_bias"})
    assert "layers/v_bias" in names["output"]
    assert parameters(**VARIANTS["width"])["layers/k_norm_scale"].shape == (3, 2, 6)
    assert names["two_norms"] - names["parallel"] == {
        "head_bias", "layers/mlp_norm_scale", "layers/mlp_norm_bias"
    }  # fmt: skip
    assert not {name for name in names["no_scales"] if name.endswith(("_scale", "up_bias"))}
    assert "layers/o_bias" in names["no_scales"]


MATRICES = {"embed_VD", "position_TD", "head_VD", "layers/q_DNH", "layers/k_DKH", "layers/v_DKH",
            "layers/o_NHD", "layers/gate_DF", "layers/up_DF", "layers/down_DF"}  # fmt: skip


@pytest.mark.parametrize("variant", VARIANTS)
def test_weight_decay_is_for_matrices(variant):
    tree = parameters(**VARIANTS[variant])
    mask = path_mask(tree, base_config().optim.decay_pattern)
    decayed = {name for name, chosen in mask.items() if chosen}
    assert decayed == MATRICES & tree.keys()
    assert decayed < tree.keys()
