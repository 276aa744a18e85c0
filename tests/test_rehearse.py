"""What a rehearsal says, against real shards, closed forms and handwritten HLO; its command."""

import importlib.util
import json
import re

import jax
import numpy as np
import pytest
from conftest import ROOT

from nanojaxgpt import sharding
from nanojaxgpt.__main__ import main
from nanojaxgpt.attention import choose_kernel, make_request
from nanojaxgpt.attention.request import Mask
from nanojaxgpt.chips import CHIPS, GIB, parse_topology
from nanojaxgpt.config import base_config, load_config, override_config
from nanojaxgpt.errors import ConfigError
from nanojaxgpt.flops import forward_flops
from nanojaxgpt.hosts import process
from nanojaxgpt.memory import Memory, device_tokens
from nanojaxgpt.model.config import complete
from nanojaxgpt.rehearse import estimate, report, search, step, targets
from nanojaxgpt.rehearse.collectives import (
    array_bytes,
    chains,
    iota_groups,
    read_collectives,
    read_groups,
)
from nanojaxgpt.rehearse.step import (
    count_flops,
    rehearse_step,
    resolve_mesh,
    temporaries_wanted,
    trace,
)
from nanojaxgpt.step import make_step


def config(**changes):
    """Return a config of 2 layers, 32 wide, whose layers are scanned."""
    small = {
        "model.num_layers": "2", "model.embed_dim": "32", "model.num_heads": "4",
        "model.seq_len": "16", "model.vocab_size": "64", "model.unroll": "1",
        "train.batch_size": "16",
    }  # fmt: skip
    return complete(override_config(base_config(), small | changes))


@pytest.fixture(scope="module")
def eight():
    return targets.open_target(parse_topology("cpu:8"))


SHAPES = [
    {"mesh.data": "8"},
    {"mesh.data": "1", "mesh.fsdp": "8"},
    {"mesh.data": "2", "mesh.fsdp": "2", "mesh.tensor": "2"},
]


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "-".join(s.values()))
def test_exact_bytes_are_those_of_real_shards(shape, eight):
    def exact(**changes):
        return search.exact_memory(*resolve_mesh(config(**shape | changes), eight), eight)

    memory = exact()
    cfg, mesh = resolve_mesh(config(**shape), eight)
    real = make_step(cfg, mesh)
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), real.abstract)
    state = jax.device_put(zeros, real.shardings)

    def on_first_device(tree):
        return sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(tree))

    assert memory.parameters == memory.gradients == on_first_device(state.params)
    assert memory.optimizer == on_first_device((state.step, state.opt_state))
    assert 2 * memory.parameters < memory.optimizer < 2 * memory.parameters + 100
    assert memory.batch == 3 * 16 * 16 * 4 // 8 * (2 if "mesh.tensor" in shape else 1)
    stored = {"model.param_dtype": "bfloat16", "train.accumulation_steps": "2"}
    half = exact(**stored)
    assert 2 * half.parameters == memory.parameters
    assert half.optimizer == memory.optimizer + memory.parameters  # a float32 master copy
    assert half.gradients == memory.gradients  # the micro-batches' sum
    one = stored | {"train.accumulation_steps": "1"}
    assert exact(**one).gradients == half.parameters


STEPS = {
    "scan": {},
    "unroll": {"model.unroll": "2"},
    "gated": {"model.mlp": "swiglu", "model.num_kv_heads": "2", "model.tied_head": "false"},
    "accumulation": {"train.accumulation_steps": "2"},
    "chunks": {"train.loss_chunks": "4"},
    "dots": {"model.remat": "dots"},
    "dots_no_batch": {"model.remat": "dots_no_batch"},
    "names": {"model.remat": "save=q,k,v,attention,mlp_input,up"},
    "full": {"model.remat": "full"},
}


@pytest.mark.parametrize("name", STEPS)
def test_the_jaxpr_has_the_formulas_flops(name, eight):
    cfg, mesh = resolve_mesh(config(**{"mesh.data": "8"} | STEPS[name]), eight)
    with jax.set_mesh(mesh):
        flops = count_flops(cfg, mesh, trace(cfg, mesh)[1])
    assert flops.weights_counted > 0
    assert abs(flops.difference) < 0.01
    model = cfg.model
    head = 2 * 16 * 16 * 32 * 64
    attention = 4 * 2 * 16 * 16 * 16 * 32
    layers = forward_flops(model, 16) * 16 - head - attention
    down = 2 * 2 * 16 * 16 * 32 * 128  # nothing in the backward pass needs its product
    again = {"chunks": head, "dots_no_batch": attention, "full": layers - down + attention}
    assert flops.recomputed == pytest.approx(again.get(name, 0), rel=0.01)


def sent(one, kind, axes=None):
    return sum(row.sent for row in one.traffic if row.kind == kind and axes in (None, row.axes))


@pytest.fixture(scope="module")
def parallel(eight):
    """Return rehearsals of data parallelism alone and of fsdp alone, on eight devices.

    Wide layers and few tokens: the weights' traffic is nearly all.
    """
    wide = {
        "model.embed_dim": "128", "model.num_layers": "3", "model.seq_len": "8",
        "model.positions": "none", "train.batch_size": "8",
    }  # fmt: skip
    shapes = {"data": {"mesh.data": "8"}, "fsdp": {"mesh.data": "1", "mesh.fsdp": "8"}}
    return {name: rehearse_step(config(**wide | mesh), eight) for name, mesh in shapes.items()}


def test_data_parallelism_sums_every_gradient_once(parallel):
    one = parallel["data"]
    gradients = 4 * one.num_params
    assert one.memory.parameters == gradients
    assert sent(one, "all-reduce", "data") == pytest.approx(2 * gradients * 7 / 8, rel=0.05)
    assert sent(one, "all-gather") == 0
    assert one.unknown_loops == 0


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [{"mesh.data": "8"}, {"mesh.data": "1", "mesh.fsdp": "8"}])
def test_chunks_of_the_loss_send_the_head_no_more_often(mesh, eight):
    """They sent it, and its gradient, once a chunk: 8 chunks made 15.3 MB of 2.0 with fsdp=8."""
    wide = {"model.vocab_size": "4096", "model.num_layers": "1", "model.compute_dtype": "bfloat16"}
    one, four = (
        sum(row.sent for row in rehearse_step(config(**wide | mesh | chunks), eight).traffic)
        for chunks in ({}, {"train.loss_chunks": "4"})
    )
    assert one > 8e5
    assert four < 1.01 * one


def test_fsdp_gathers_every_layer_twice_and_sums_its_gradient(parallel):
    one = parallel["fsdp"]
    layers = 4 * 3 * 12 * 128 * 128  # the kernels, in float32
    assert one.memory.parameters < 4 * one.num_params / 7
    gathered = sent(one, "all-gather", "fsdp")
    assert gathered == pytest.approx(2 * layers * 7 / 8, rel=0.05)
    summed = sent(one, "all-reduce", "fsdp") + 2 * sent(one, "reduce-scatter", "fsdp")
    assert summed == pytest.approx(2 * 4 * one.num_params * 7 / 8, rel=0.05)
    assert one.memory.fits
    assert one.unknown_loops == 0


HLO = """\
HloModule jit_step, num_partitions=8

%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%a, %b)
}

%body (state: (u32[], f32[4,8])) -> (u32[], f32[4,8]) {
  %state = (u32[], f32[4,8]) parameter(0)
  %i = u32[] get-tuple-element(%state), index=0
  %x = f32[4,8]{1,0} get-tuple-element(%state), index=1
  %two = u32[]{:T(128)} constant(2)
  %next = u32[] add(%i, %two)
  %sent = f32[4,8]{1,0} collective-permute(%x), channel_id=2, source_target_pairs={{0,1},{1,0}}
  ROOT %out = (u32[], /*index=1*/f32[4,8]) tuple(%next, %sent)
}

%condition (state.1: (u32[], f32[4,8])) -> pred[] {
  %state.1 = (u32[], f32[4,8]) parameter(0)
  %j = u32[] get-tuple-element(%state.1), index=0
  %end = u32[] constant(6)
  ROOT %less = pred[] compare(%j, %end), direction=LT
}

%all-reduce-scatter.1 (p: f32[8,8]) -> f32[2,8] {
  %p = f32[8,8] parameter(0)
  %whole = f32[8,8]{1,0:T(8,128)} all-reduce(%p), channel_id=5, replica_groups=[2,4]<=[8], to_apply=%add
  ROOT %part = f32[2,8] dynamic-slice(%whole), dynamic_slice_sizes={2,8}
}

%piece.1 (p.1: bf16[8]) -> (bf16[8], bf16[32]) {
  ROOT %start = (bf16[8], bf16[32]) all-gather-start(%p.1), channel_id=1, replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}
}

%piece.2 (p.2: bf16[8]) -> (bf16[8], bf16[32]) {
  ROOT %again = (bf16[8], bf16[32]) all-gather-start(%p.2), channel_id=1, replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}
}

ENTRY %main (x.1: f32[4,8]) -> f32[4,8] {
  %x.1 = f32[4,8] parameter(0)
  %begun = (bf16[8], bf16[32]) fusion(%x.1), kind=kCustom, calls=%piece.1
  %ended = (bf16[8], bf16[32]) fusion(%begun), kind=kCustom, calls=%piece.2
  %both = (f32[16], f32[]) all-reduce(%x.1, %x.1), replica_groups={}, to_apply=%add
  %alone = f32[16] all-reduce(%x.1), channel_id=9, replica_groups={{0},{1},{2},{3},{4},{5},{6},{7}}, to_apply=%add
  %scattered = f32[2,8] fusion(%x.1), kind=kCustom, calls=%all-reduce-scatter.1
  %first = f32[4,8]{1,0} collective-permute(%x.1), channel_id=2, source_target_pairs={{0,1},{1,0}}
  %second = u32[] constant(2)
  %from = u32[] copy(%second)
  %init = (u32[], f32[4,8]) tuple(%from, %first)
  %loop = (u32[], f32[4,8]) while(%init), condition=%condition, body=%body
  %known = (u32[], f32[4,8]) while(%init), condition=%strange, body=%other, backend_config={"known_trip_count":{"n":"12"}}
  %swapped = f32[16] all-to-all(%x.1), channel_id=7, replica_groups=[4,2]<=[2,4]T(1,0), dimensions={0}
}

%other (state.2: (u32[], f32[4,8])) -> (u32[], f32[4,8]) {
  %back = f32[3]{0} reduce-scatter(%state.2), channel_id=8, replica_groups=[4,2]<=[8], to_apply=%add
}
"""  # noqa: E501


def test_collectives_are_read_from_the_text():
    program = read_collectives(HLO)
    found = {one.kind: one for one in program.collectives if one.kind != "reduce-scatter"}
    first, second = [one for one in program.collectives if one.kind == "reduce-scatter"]
    assert len(program.collectives) == 7  # two pieces count once, a group of one not at all
    assert program.unknown_loops == 0
    assert found["all-gather"][1:] == (64, ((0, 1, 2, 3), (4, 5, 6, 7)), 1)
    assert found["all-gather"].sent == 48
    assert found["all-reduce"][1:] == (68, (tuple(range(8)),), 1)
    assert found["all-reduce"].sent == 2 * 68 * 7 / 8
    permutes = [one for one in program.collectives if one.kind == "collective-permute"]
    # The first pass is drawn out, with its channel; then the loop counts from 2 to 6 by twos.
    assert [one[1:] for one in permutes] == [(128, ((0, 1),), 1), (128, ((0, 1),), 2)]
    assert found["all-to-all"].groups == ((0, 4), (1, 5), (2, 6), (3, 7))
    assert first[1:] == (256, ((0, 1, 2, 3), (4, 5, 6, 7)), 1)  # an all-reduce with its slice
    assert second[1:] == (24, ((0, 1), (2, 3), (4, 5), (6, 7)), 12)
    assert read_collectives(HLO.replace("direction=LT", "direction=NE")).unknown_loops == 1


@pytest.mark.parametrize(
    ("text", "groups"),
    [
        ("replica_groups={{0,2},{1,3}}, x", ((0, 2), (1, 3))),
        ("replica_groups={}, x", ((0, 1, 2, 3),)),
        ("replica_groups=[2,2]<=[4], x", ((0, 1), (2, 3))),
        ("replica_groups=[2,2]<=[2,2]T(1,0), x", ((0, 2), (1, 3))),
        ("replica_groups=mesh['a'=2,'b'=2] {'a'}, x", ((0, 2), (1, 3))),
        ("replica_groups=mesh['a'=2,'b'=2] {'a','b'}, x", ((0, 1, 2, 3),)),
        ("replica_groups=mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'a'}", ((0, 1), (2, 3))),
        ("replica_groups=mesh['a'=2,'b'=2], device_ids=(3,2,1,0) {'b'}", ((3, 2), (1, 0))),
        ("replica_groups=mesh['a'=4] {'a':(2)2}, x", ((0, 1), (2, 3))),
        ("source_target_pairs={{0,1},{1,2},{3,0}}", ((3, 0, 1, 2),)),
    ],
)
def test_groups_in_every_form(text, groups):
    assert read_groups(text, 4) == groups


def test_a_send_between_slices_is_a_collective():
    program = read_collectives(
        "HloModule m, num_partitions=4\nENTRY %main (x: f32[]) -> f32[] {\n"
        "  %send = (f32[8]{0}, u32[], token[]) send(%x, %t), channel_id=2, frontend_attributes="
        '{_xla_megascale_target="{1,2}x{0:3}",_xla_megascale_transfer_type="ALL_REDUCE"}\n'
        "  %recv = (f32[8]{0}, u32[], token[]) recv(%t), channel_id=1, frontend_attributes="
        '{_xla_megascale_target="{1,2}x{0:3}",_xla_megascale_transfer_type="ALL_REDUCE"}\n}\n'
    )
    (one,) = program.collectives
    assert one == ("all-reduce", 32, ((0, 4),), 1)


def test_small_readings():
    assert array_bytes("(bf16[2,3]{1,0:T(8,128)(2,1)}, s4[8], pred[], u32[]{:S(2)})") == 17
    np.testing.assert_array_equal(iota_groups("[4,2]T(1,0)"), [0, 2, 4, 6, 1, 3, 5, 7])
    assert chains(((0, 1), (1, 0), (2, 3))) == ((2, 3), (0, 1))


def test_traffic_goes_over_links_and_between_slices():
    chip, places = (
        CHIPS["v5e"],
        np.array([[s, x, y] for s in (0, 1) for x in (0, 1) for y in (0, 1)]),
    )
    shape = {"data": 2, "fsdp": 4}
    program = read_collectives(
        "HloModule m, num_partitions=8\nENTRY %main (x: f32[]) -> f32[] {\n"
        "  %a = f32[1000] all-reduce(%x), replica_groups={}\n"
        "  %b = f32[1000] all-gather(%x), replica_groups=[2,4]<=[8]\n}\n"
    )
    rows = estimate.traffic(program.collectives, shape, places, chip, (2, 2))
    found = {(row.kind, row.network): row for row in rows}
    assert found["all-reduce", "ICI"].sent == 2 * 4000 * 3 / 4
    assert found["all-reduce", "DCN"].sent == 2 * 1000 / 2
    assert found["all-reduce", "DCN"].axes == "data+fsdp"
    assert found["all-gather", "ICI"].axes == "fsdp"
    assert found["all-gather", "ICI"].seconds == pytest.approx(3000 / 2 / 45e9)
    assert len(rows) == 3


def test_a_ring_is_twice_as_fast_as_a_line():
    chip = CHIPS["v5e"]
    row = np.array([[x, 0] for x in range(16)])
    assert estimate.link_speed(row, chip, (16, 16)) == 2 * 45e9
    assert estimate.link_speed(row[:8], chip, (16, 16)) == 45e9
    assert estimate.link_speed(row[:8], chip, (8, 8)) == 45e9
    assert estimate.link_speed(row, CHIPS["h100"], (16,)) == 450e9
    cubes = np.array([[0, 0, z] for z in range(4)])
    assert estimate.link_speed(cubes, CHIPS["v5p"], (4, 4, 4)) == 2 * 90e9
    assert estimate.link_speed(cubes, CHIPS["v5p"], (2, 2, 4)) == 90e9  # no whole cube


@pytest.mark.parametrize(
    ("name", "slices", "words"),
    [
        ("v5f:4x4", 1, "did you mean v5p or v5e"),
        ("", 1, "name the hardware, as in --topology=v5e:4x4"),
        ("V5E:4x4", 1, "no chip 'V5E'; did you mean v5e"),
        ("xyz", 1, "no chip 'xyz'; available: v4"),
        ("v5e", 1, "write the sizes as in v5e:4x4"),
        ("v5p:4x4", 1, "write the sizes as in v5p:4x4x4"),
        ("h100:0", 1, "write the sizes as in h100:8"),
        ("h100:8", 2, "only TPUs have slices"),
        ("v5e:4x4", 0, "at least 1"),
    ],
)
def test_names_that_are_none_say_what_is(name, slices, words):
    with pytest.raises(ConfigError, match=words):
        parse_topology(name, slices)


def test_without_libtpu_the_title_says_so(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    target = targets.open_target(parse_topology("v5e:2x2", 2))
    assert target.fake
    first, note = report.title("x.py", target)
    assert "8 FAKE CPU devices for 8 x TPU v5e (2 slices of v5e:2x2)" in first
    assert "pip install -e .[tpu]" in note
    assert target.places(target.devices)[:, 0].tolist() == [0] * 4 + [1] * 4
    with pytest.raises(ConfigError, match="16 fake devices needed, but 8"):
        targets.open_target(parse_topology("h100:16"))
    with pytest.raises(ConfigError, match="2,048 fake devices are too many, 1,024 at most"):
        targets.open_target(parse_topology("h100:2048"))


def test_the_kernel_follows_the_devices_of_the_mesh():
    q_BTNH = jax.ShapeDtypeStruct((1, 128, 2, 128), jax.numpy.bfloat16)
    mask = Mask(jax.numpy.arange(128)[None], jax.numpy.arange(128)[None])

    def chosen(platform):
        device = jax.sharding.AbstractDevice("some chip", 1, platform)
        with jax.sharding.use_abstract_mesh(
            jax.sharding.AbstractMesh((2,), ("data",), abstract_device=device)
        ):
            return sharding.platform(), choose_kernel(make_request(q_BTNH, q_BTNH, mask))

    assert chosen("tpu") == ("tpu", "splash")
    assert chosen("gpu") == ("gpu", "cudnn")
    assert chosen("cpu") == ("cpu", "blocked")
    assert sharding.platform() == jax.default_backend()


LIBTPU = pytest.mark.skipif(
    not importlib.util.find_spec("libtpu"), reason="needs libtpu: pip install -e .[tpu]"
)


@LIBTPU
@pytest.mark.parametrize(
    ("mesh", "slices"), [({"mesh.data": "4"}, 1), ({"mesh.data": "1", "mesh.fsdp": "4"}, 2)]
)
def test_libtpu_sends_what_the_closed_form_says(mesh, slices):
    """On v5e, in float32: libtpu gathers weights in bfloat16, for the matmul units round to it."""
    wide = {
        "model.embed_dim": "256", "model.num_layers": "3", "model.num_heads": "2",
        "model.seq_len": "128", "model.vocab_size": "128", "model.positions": "none",
        "model.bias": "false", "train.batch_size": "8",
    }  # fmt: skip
    target = targets.open_target(parse_topology("v5e:2x2", slices))
    assert search.largest_blocks(config(**wide | mesh), target) == ""  # of 128 tokens
    one = rehearse_step(config(**wide | mesh), target)
    assert not target.fake
    assert one.memory.fits
    assert one.unknown_loops == 0
    assert abs(one.flops.difference) < 0.01
    gradients, layers = 4 * one.num_params, 4 * 3 * 12 * 256 * 256
    if slices == 1:
        assert one.memory.parameters == gradients
        assert sent(one, "all-reduce", "data") == pytest.approx(2 * gradients * 3 / 4, rel=0.05)
        assert {row.kind for row in one.traffic} == {"all-reduce"}
        return
    gathered, scattered = sent(one, "all-gather", "fsdp"), sent(one, "reduce-scatter", "fsdp")
    assert gathered == pytest.approx(2 * layers / 2 * 3 / 4, rel=0.05)
    assert scattered == pytest.approx(layers * 3 / 4, rel=0.05)
    assert sent(one, "all-reduce", "slice") == pytest.approx(gradients / 4, rel=0.05)
    assert {row.network for row in one.traffic if row.axes == "slice"} == {"DCN"}


@LIBTPU
def test_the_first_axis_crosses_the_slices():
    two = targets.open_target(parse_topology("v5p:2x2x2", 2))
    mesh = sharding.make_mesh({"slice": 2, "data": 1, "fsdp": 8}, two.devices)
    assert two.places(list(mesh.devices.flat))[:, 0].tolist() == [0] * 8 + [1] * 8
    with pytest.raises(ConfigError, match=r"set mesh\.slice=2"):
        sharding.make_mesh({"data": 16}, two.devices)


def test_running_out_of_memory_is_read(eight):
    memory = search.exact_memory(*resolve_mesh(config(**{"mesh.data": "8"}), eight), eight)
    apart = "RESOURCE_EXHAUSTED: ... required for HLO temporaries (44.05G) exceeds available HBM"
    whole = "RESOURCE_EXHAUSTED: ... Used 20.00G of 15.75G hbm."
    error = jax.errors.JaxRuntimeError
    assert temporaries_wanted(error(apart), memory) == int(44.05 * GIB) - memory.gradients
    assert temporaries_wanted(error(whole), memory) == 20 * GIB - memory.total
    with pytest.raises(error, match="INTERNAL"):
        temporaries_wanted(error("INTERNAL: something else"), memory)


def test_advice_names_what_takes_most():
    memory = Memory(10, 20, 10, 0, 0, 50.0, False)
    cfg = config(**{"mesh.data": "4", "mesh.fsdp": "2"})
    assert "mesh.fsdp=4 mesh.data=2" in estimate.advice(cfg, memory)
    assert "remat=full" in estimate.advice(cfg, memory._replace(available=1e9))
    assert not memory.fits
    small = {"mesh.data": "3", "mesh.slice": "2", "train.batch_size": "90", "model.remat": "full"}
    cfg, memory_left = config(**small), memory._replace(available=1e9)
    assert "accumulation_steps=3" in estimate.advice(cfg, memory_left)  # 15 rows a device
    assert device_tokens(cfg) == 15 * 16
    cfg = config(**small | {"train.accumulation_steps": "15"})
    assert "mesh.fsdp=3 mesh.data=1" in estimate.advice(cfg, memory_left)


COMMAND = re.compile(r"rehearse --config=(experiments/\S+) --topology=(\S+)(?: --slices=(\d+))?")
COMMANDS = [
    c for p in sorted(ROOT.glob("experiments/*.py")) for c in COMMAND.findall(p.read_text())
]


def test_large_experiments_have_a_command():
    assert {name.split("/")[1].split(":")[0] for name, *_ in COMMANDS} >= {
        "gpt2.py", "gpt3.py", "llama3.py",
    }  # fmt: skip


@pytest.mark.parametrize(("experiment", "topology", "slices"), COMMANDS)
def test_the_commands_of_experiments_divide(experiment, topology, slices):
    """What they promise was compiled once; here the sizes only have to go on dividing."""
    cfg = load_config(f"{ROOT}/{experiment}")
    chips = parse_topology(topology, int(slices or 1))
    assert (cfg.mesh.slice, cfg.mesh.data, cfg.mesh.fsdp) == (chips.slices, 1, -1)
    assert cfg.train.batch_size % (cfg.train.accumulation_steps * chips.count) == 0
    assert cfg.model.embed_dim % (chips.count // chips.slices) == 0


@pytest.mark.slow
def test_the_search_is_bounded():
    said, four = [], targets.open_target(parse_topology("cpu:4"))
    found = search.search(config(), four, said.append, limit=1)
    assert len(found) == 1
    assert sum("compiling" in line for line in said) == 1
    assert {tuple(shape.values()) for shape in search.meshes(config(), 4, 1)} == {
        (4, 1, 1), (2, 2, 1), (2, 1, 2), (1, 4, 1), (1, 2, 2), (1, 1, 4),
    }  # fmt: skip
    assert any("MFU at most" in line for line in report.search_lines("x.py", four, found))


def test_the_search_asks_once_for_too_much(monkeypatch, parallel):
    tried = []

    def rehearsed(cfg, target):
        tried.append((cfg.model.remat, cfg.mesh.tensor))
        wanted = 0 if cfg.model.remat == "full" else 2**40
        return parallel["data"]._replace(
            memory=parallel["data"].memory._replace(temporaries=wanted)
        )

    monkeypatch.setattr(search, "rehearse_step", rehearsed)
    found = search.search(config(), targets.open_target(parse_topology("cpu:4")), print, 99)
    assert sum(one.memory.fits for one in found) == 6
    policies = search.policies(config())
    assert policies[1] == "save=q,k,v,attention,o,up"
    assert [sum(name == policy for name, _ in tried) for policy in policies] == [3, 3, 3, 6]


@pytest.mark.parametrize(
    ("room", "parts", "tried"), [(100, 4, [2, 1]), (30, 4, [2]), (9, 4, [8]), (3, 4, [8, 16])]
)
def test_the_search_goes_on_with_other_micro_batches(room, parts, tried, monkeypatch, parallel):
    """A micro-batch of n rows takes 4 n here."""

    def rehearsed(cfg, target):
        asked.append(cfg.train.accumulation_steps)
        memory = parallel["data"].memory._replace(
            temporaries=4 * 16 // cfg.train.accumulation_steps, available=room,
            parameters=0, optimizer=0, gradients=0, batch=0,
        )  # fmt: skip
        return parallel["data"]._replace(cfg=cfg, memory=memory)

    asked: list[int] = []
    monkeypatch.setattr(search, "rehearse_step", rehearsed)
    cfg = config(**{"train.accumulation_steps": str(parts), "mesh.data": "1"})
    found = search.refine([rehearsed(cfg, None)], None, print, 3)
    assert asked[1:] == [one.cfg.train.accumulation_steps for one in found] == tried


CUDA = pytest.mark.skipif(
    not targets.has_cuda_plugin(), reason="needs CUDA's plug-in: pip install -e .[cuda13]"
)


@CUDA
@pytest.mark.slow
def test_the_cuda_plug_in_compiles_a_step_for_a_gpu_that_is_not_here():
    target = targets.open_target(parse_topology("h100:4"))
    assert not target.fake
    assert target.places(target.devices).tolist() == [[0, 0], [0, 1], [0, 2], [0, 3]]
    assert "cuDNN" in report.title("x.py", target)[1]
    changes = {
        "model.compute_dtype": "bfloat16", "mesh.data": "1", "mesh.fsdp": "4",
        "model.remat": "save=q,k,v,attention offload=layer_input", "train.loss_chunks": "4",
    }  # fmt: skip
    one = rehearse_step(config(**changes), target)
    assert one.memory.fits
    assert abs(one.flops.difference) < 0.01
    assert {row.network for row in one.traffic} == {"NVLink"}
    assert sent(one, "all-gather", "fsdp") > 0


@pytest.mark.slow
def test_the_door(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(process, "keep_freed_memory", lambda: None)
    monkeypatch.setattr(targets, "has_cuda_plugin", lambda: False)
    shrink = [f"--config.{k}" for k in ("model.vocab_size=64", "model.seq_len=16")]
    base = ["rehearse", f"--config={ROOT}/experiments/quickstart.py", *shrink]
    assert main([*base, "--topology=h100:8", f"--json={tmp_path}/out.json"]) == 0
    out = capsys.readouterr().out
    assert "FAKE CPU devices for 8 x NVIDIA H100" in out
    assert "they agree (+0.00%)" in out
    (found,) = json.loads((tmp_path / "out.json").read_text())
    assert found["memory"]["fits"]
    assert found["memory"]["total"] == sum(
        found["memory"][name]
        for name in ("parameters", "optimizer", "gradients", "batch", "temporaries")
    )
    assert found["fake_devices"]
    assert {row["network"] for row in found["collectives"]} == {"NVLink"}
    assert main([*base, "--topology=h10:8"]) == 2
    assert "did you mean h100" in capsys.readouterr().err
    assert main([*base, "--topology=h100:8", f"--json={tmp_path}/no/out.json"]) == 2
    assert f"there is no folder {tmp_path}/no" in capsys.readouterr().err


def test_a_step_that_does_not_fit_is_exit_6(monkeypatch, capsys, parallel):
    monkeypatch.setattr(process, "keep_freed_memory", lambda: None)
    one = parallel["data"]
    full = one._replace(memory=one.memory._replace(available=1e5))
    monkeypatch.setattr(step, "rehearse_step", lambda cfg, target: full)
    experiment = f"--config={ROOT}/experiments/gpt2.py"
    assert main(["rehearse", experiment, "--topology=h100:8"]) == 6
    captured = capsys.readouterr()
    assert "DOES NOT FIT; try" in captured.out
    assert "the step does not fit the memory of h100:8" in captured.err


def test_the_best_come_first(parallel):
    fast = parallel["data"]
    small = parallel["fsdp"]
    both = [
        fast._replace(roofline=fast.roofline._replace(compute=1.0)),
        small._replace(roofline=small.roofline._replace(compute=2.0)),
        fast._replace(roofline=fast.roofline._replace(compute=3.0)),
    ]
    assert small.memory.total < fast.memory.total
    assert report.pareto(both[::-1]) == both[:2]
    unfit = both[0]._replace(memory=fast.memory._replace(available=1))
    assert report.pareto([unfit, both[1]]) == both[1:2]
