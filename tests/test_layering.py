"""The house's floors: who may import whom, how long a function may be, what the public ones say."""

import ast
from pathlib import Path

import pytest
from conftest import ROOT

PACKAGE = "nanojaxgpt"
FLOORS = {
    0: {"", "errors", "names", "checks", "model", "attention", "loss", "optim", "sharding",
        "data.tokenizers", "data.subwords", "projection", "probe", "scaling", "data.rows",
        "data.tasks", "sweep", "sweep.space", "rehearse.chips", "rehearse.collectives"},
    1: {"config", "rundir", "arguments", "hosts", "hosts.process", "hosts.lifeline", "hosts.team",
        "hosts.joining", "hosts.watchdog", "checkpoint", "metrics", "sample", "evaluate", "data",
        "data.sources", "data.sources.documents", "data.sources.files", "data.sources.stdlib",
        "data.sources.download", "data.sources.parquet", "data.sources.tfds",
        "data.sources.builders", "data.sources.hub",
        "data.shards", "data.store", "data.packing", "data.loader", "data.show"},
    2: {"train", "coordcheck", "sweep.plan", "sweep.claims", "sweep.launch", "sweep.together",
        "sweep.run", "sweep.report", "sweep.results", "sweep.plots", "sweep.search",
        "sweep.slurm", "sweep.verb",
        "rehearse", "rehearse.flops", "rehearse.targets", "rehearse.estimate", "rehearse.step",
        "rehearse.search", "rehearse.report", "step", "loop", "memory", "paper", "reproduce"},
    3: {"__main__"},
}  # fmt: skip
FLOOR = {name: floor for floor, names in FLOORS.items() for name in names}
NO_JAX = ("jax", "jaxlib", "flax", "optax", "orbax")
TFDS = {"data.sources.tfds", "data.sources.builders"}
MAX_LINES = 80
TABLES = {"base_config"}  # a list of fields with a comment each, not a course of action


def room(path: Path) -> str:
    parts = path.relative_to(ROOT / PACKAGE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


ROOMS = {room(path): path for path in sorted((ROOT / PACKAGE).rglob("*.py"))}
TREES = {name: ast.parse(path.read_text()) for name, path in ROOMS.items()}


def imported(tree: ast.AST) -> set[str]:
    """Return the full names of what a module imports anywhere, `a.b` for `from a import b`."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def top(tree: ast.Module) -> ast.Module:
    """Return what runs as a module is imported, without its functions and classes."""
    kept = [n for n in tree.body if not isinstance(n, ast.FunctionDef | ast.ClassDef)]
    return ast.Module(kept, [])


def rooms_used(tree: ast.AST) -> set[str]:
    """Return the rooms of the package that a module imports."""
    found = set()
    for name in imported(tree):
        parts = name.split(".")
        if parts[0] != PACKAGE:
            continue
        inside = [".".join(parts[1:size]) for size in range(len(parts), 0, -1)]
        found.add(next(candidate for candidate in inside if candidate in ROOMS))
    return found


USES = {name: rooms_used(tree) - {name} for name, tree in TREES.items()}


def cycle(uses: dict[str, set[str]]) -> list[str]:
    """Return rooms that import each other in a circle, or nothing."""
    left = {name: set(used) for name, used in uses.items()}
    while free := [name for name, used in left.items() if not used & left.keys()]:
        for name in free:
            del left[name]
    return sorted(left)


def test_every_room_has_a_floor():
    new = set(ROOMS) - set(FLOOR)
    assert not new, f"give {new} a floor in this test"
    assert not set(FLOOR) - set(ROOMS)


@pytest.mark.parametrize("name", ROOMS)
def test_rooms_import_from_no_higher_floor(name):
    higher = {used for used in USES[name] if FLOOR[used] > FLOOR[name]}
    assert not higher, f"{name} (floor {FLOOR[name]}) imports {higher}"


def test_no_rooms_import_each_other():
    assert cycle({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}, "e": set()}) == list("abcd")
    assert USES["train"] >= {"model", "checkpoint", "data.loader", "loop", "step"}
    assert cycle(USES) == []


EARLY = {"", "__main__", "arguments", "checks", "config", "errors", "names", "rundir", "paper"} | {
    f"sweep.{name}" for name in ("space", "plan", "claims", "launch")
}


@pytest.mark.parametrize(
    "name", [n for n in ROOMS if n in EARLY or n.startswith(("data", "hosts"))]
)
def test_these_rooms_answer_before_jax_is_imported(name):
    seen, waiting = set(), [name]
    while waiting:
        current = waiting.pop()
        seen.add(current)
        tree = top(TREES[current])
        assert not {n for n in imported(tree) if n.split(".")[0] in NO_JAX}, current
        waiting += rooms_used(tree) - seen


@pytest.mark.parametrize("path", sorted((ROOT / "experiments").rglob("*.py")), ids=str)
def test_experiments_import_no_jax(path):
    names = imported(top(ast.parse(path.read_text())))  # a paper's measures may, when they run
    begins = ("config.base_config", "config.load_experiment", "paper.Paper")
    assert names & {f"{PACKAGE}.{name}" for name in begins}
    assert not {name for name in names if name.split(".")[0] in NO_JAX}


@pytest.mark.parametrize("name", ROOMS)
def test_one_framework(name):
    roots = {imported_name.split(".")[0] for imported_name in imported(TREES[name])}
    # Of TensorFlow Datasets only what runs without TensorFlow, and only where it is read.
    outside = {"tensorflow_datasets"} if name not in TFDS else set()
    assert not roots & ({"tensorflow", "torch", "tf", "clu"} | outside)


def functions(tree: ast.AST) -> list[ast.FunctionDef]:
    return [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]


@pytest.mark.parametrize("name", ROOMS)
def test_no_function_is_long(name):
    long = {
        f.name: f.end_lineno - f.lineno + 1
        for f in functions(TREES[name])
        if f.end_lineno - f.lineno >= MAX_LINES and f.name not in TABLES
    }
    assert not long


@pytest.mark.parametrize("name", ROOMS)
def test_every_function_has_type_hints(name):
    bare = set()
    for function in functions(TREES[name]):
        a = function.args
        arguments = [*a.posonlyargs, *a.args, *a.kwonlyargs, *filter(None, [a.vararg, a.kwarg])]
        untyped = {x.arg for x in arguments if not x.annotation} - {"self", "cls"}
        if untyped or not function.returns:
            bare.add(function.name)
    assert not bare


def public(tree: ast.Module) -> list[tuple[str, ast.AST]]:
    """Return (name, node) of public classes and functions, and of the classes' public methods."""
    kinds = ast.FunctionDef | ast.ClassDef
    found = [(n.name, n) for n in tree.body if isinstance(n, kinds)]
    for owner in [n for _, n in found if isinstance(n, ast.ClassDef)]:
        methods = [n for n in owner.body if isinstance(n, ast.FunctionDef)]
        found += [(f"{owner.name}.{n.name}", n) for n in methods]
    return [(name, node) for name, node in found if not node.name.startswith("_")]


@pytest.mark.parametrize("name", ROOMS)
def test_everything_public_says_what_it_is(name):
    tree = TREES[name]
    assert ast.get_docstring(tree), "a module begins with one sentence of what goes in and out"
    told = {full: ast.get_docstring(node) for full, node in public(tree)}
    # What implements a Protocol is told there.
    protocols = {n.name for n in tree.body if isinstance(n, ast.ClassDef)
                 for base in n.bases if ast.unparse(base) == "Protocol"}  # fmt: skip
    known = {full.split(".")[1] for full in told if full.split(".")[0] in protocols and "." in full}
    silent = {full for full, text in told.items() if not text and full.split(".")[-1] not in known}
    assert not silent
