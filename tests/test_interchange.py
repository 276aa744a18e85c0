"""The tables of other formats: every parameter has a tensor, and comes back as it was."""

import numpy as np
import pytest
from conftest import small_model

from nanojaxgpt.config.rotary import parse_rotary, write_rotary
from nanojaxgpt.interchange.tensors import Tensor, from_parts, slots, to_parts

PLAIN = (
    Tensor("embed", ("embed_VD",)), Tensor("norm", ("final_norm_scale",)),
    Tensor("head", ("head_VD",)), Tensor("{}.attention_norm", ("attention_norm_scale",)),
    Tensor("{}.mlp_norm", ("mlp_norm_scale",)), Tensor("{}.o", ("o_NHD",)),
    Tensor("{}.up", ("gate_DF", "up_DF")), Tensor("{}.down", ("down_DF",), transposed=True),
)  # fmt: skip
JOINED = (
    Tensor("{}.qkv", ("q_DNH", "k_DKH", "v_DKH")),
    Tensor("{}.b", ("q_bias", "k_bias", "v_bias")),
)
PER_HEAD = tuple(tensor._replace(per_head=True) for tensor in JOINED)
PAIRED = (
    Tensor("{}.q", ("q_DNH",), paired=True), Tensor("{}.k", ("k_DKH",), paired=True),
    Tensor("{}.v", ("v_DKH",)), Tensor("{}.qb", ("q_bias",), paired=True),
    Tensor("{}.kb", ("k_bias",)), Tensor("{}.vb", ("v_bias",)),
)  # fmt: skip
SHAPE = dict(num_layers=3, embed_dim=12, num_heads=4, head_dim=6, mlp="swiglu", mlp_dim=10,
             norm="rmsnorm", tied_head=False, bias=True, bias_in="qkv",
             positions="rotary")  # fmt: skip


@pytest.mark.parametrize("attention", [JOINED, PER_HEAD, PAIRED])
def test_a_tensor_comes_back_as_it_was(attention):
    cfg = small_model(**SHAPE | (dict(num_kv_heads=4 if attention is PER_HEAD else 2)))
    rng = np.random.default_rng(0)
    for name, slot in slots(cfg, PLAIN + attention).items():
        array = rng.normal(size=slot.shape).astype(np.float32)
        parts = to_parts(slot, array)
        assert [part.shape for part in parts] == [place.row.shape for place in slot.places]
        assert np.array_equal(from_parts(slot, parts), array), name


def test_every_parameter_has_a_tensor():
    with pytest.raises(ValueError, match="no tensor for layers/k_DKH"):
        slots(small_model(**SHAPE), PLAIN)


def test_outputs_go_where_the_table_says():
    cfg = small_model(**SHAPE | dict(num_kv_heads=2))
    joined, paired = slots(cfg, PLAIN + JOINED), slots(cfg, PLAIN + PAIRED)
    per_head = slots(small_model(**SHAPE | dict(num_kv_heads=4)), PLAIN + PER_HEAD)
    matrix = np.arange(48.0 * 12).reshape(48, 12)
    q_DNH, k_DKH, v_DKH = to_parts(joined["1.qkv"], matrix)
    assert np.array_equal(q_DNH[:, 1, 2], matrix[6 + 2])
    assert np.array_equal(k_DKH[:, 1, 2], matrix[24 + 6 + 2])
    assert np.array_equal(v_DKH[:, 0, 5], matrix[36 + 5])
    matrix = np.arange(72.0 * 12).reshape(72, 12)
    _, k_DKH, _ = to_parts(per_head["1.qkv"], matrix)
    assert np.array_equal(k_DKH[:, 2, 3], matrix[2 * 18 + 6 + 3])
    matrix = np.arange(24.0 * 12).reshape(24, 12)
    (q_DNH,) = to_parts(paired["1.q"], matrix)
    # Dimensions 1 and 1 + H/2 turn together; there they are neighbours.
    assert np.array_equal(q_DNH[:, 2, 1], matrix[2 * 6 + 2])
    assert np.array_equal(q_DNH[:, 2, 4], matrix[2 * 6 + 3])


@pytest.mark.parametrize("entry", [
    "", "none", "base=1000000 fraction=0.25", "scaling=linear factor=8",
    "scaling=llama3 factor=32 original=8192",
    "fraction=0.1 scaling=yarn factor=4 original=32 slow=0.25 truncate=0 attention=1.3",
    "scaling=longrope factor=2 original=32 short=1,1.1 long=1.5,9",
])  # fmt: skip
def test_the_entry_of_rotary_positions(entry):
    found = parse_rotary(entry, 1e4)
    assert parse_rotary(write_rotary(found, 1e4), 1e4) == found
    assert set(write_rotary(found, 1e4).split()) == set(entry.split())
    assert parse_rotary(write_rotary(found, 5e5), 5e5) == found
