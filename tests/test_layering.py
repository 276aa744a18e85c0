"""Which module may import which, how long a function may be, and what the public ones document."""

import ast
from collections.abc import Callable
from pathlib import Path

from conftest import ROOT

from nanojaxgpt.__main__ import COMMANDS

PACKAGE = "nanojaxgpt"
# A module imports only modules of its own layer and of lower ones; "a.*" are the other modules of
# a package.
LAYERS = {
    # What needs neither a model nor a backend.
    0: {"", "errors", "extras", "names", "checks", "regular", "console", "chips", "config",
        "config.sections", "config.rotary", "config.remat", "config.blocks", "cpu", "horizon",
        "sweep", "sweep.space", "commands", "papers", "hosts", "data", "rehearse", "model",
        "interchange", "generate", "generate.requests"},
    # The model, and what is computed with it.
    1: {"model.config", "model.parameters", "model.projection", "model.rotary", "model.block",
        "model.lora", "model.quantize", "model.remat", "model.head", "model.transformer",
        "interchange.tensors", "attention",
        "attention.*", "sharding", "products", "loss", "schedules", "matrices", "optim",
        "trainable",
        "objectives", "objectives.*", "flops", "data.rows", "data.tasks", "data.tokenizers",
        "data.tokenizer_json", "data.tokenizer_files", "data.subwords", "papers.scaling",
        "papers.probe"},
    # Runs, data, hosts; parameters are read, evaluated, sampled.
    2: {"rundir", "arguments", "hosts.process", "hosts.lifeline", "hosts.team", "hosts.joining",
        "hosts.watchdog", "hosts.garbage", "checkpoint", "adapters", "rundiff", "metrics",
        "trackers", "finish", "sample", "perplexity", "text_stream", "interchange.*",
        "data.sources", "data.sources.*",
        "data.chat", "data.examples", "data.shards", "data.manifests", "data.exactness",
        "data.store", "data.packing", "data.loader", "data.show"},
    # Training.
    3: {"step", "teacher", "reference", "rollout", "batches", "recorder", "loop", "training",
        "memory", "branch", "validation", "language_model", "evals", "evals.*",
        "generate.slots", "generate.grammar", "generate.answers", "generate.device",
        "generate.drafts", "generate.engine", "generate.files"},
    # Many runs, absent hardware, papers.
    4: {"sweep.plan", "sweep.claims", "sweep.launch", "sweep.together", "sweep.run",
        "sweep.report", "sweep.results", "sweep.plots", "sweep.search", "sweep.slurm",
        "rehearse.collectives", "rehearse.flops", "rehearse.targets", "rehearse.estimate",
        "rehearse.step", "rehearse.search", "rehearse.report", "papers.coordcheck",
        "papers.paper", "papers.reproduce", "server", "server.*"},
    5: {"commands.*"},
    6: {"__main__", "start"},
}  # fmt: skip
ENTRIES = {name: layer for layer, names in LAYERS.items() for name in names}
# A mistake in a config is reported before jax is imported, so these import it only in functions.
EARLY = {"", "__main__", "arguments", "checks", "config", "config.sections", "config.rotary",
         "config.remat", "config.blocks", "cpu", "model.config", "errors", "horizon", "names",
         "rundir", "start", "papers.paper",
         "console", "metrics", "trackers", "finish", "extras", "rundiff", "generate",
         "generate.requests"}  # fmt: skip
EARLY |= {f"sweep.{name}" for name in ("space", "plan", "claims", "launch")}
# Where a ConfigDict comes in from an experiment, or goes out to what may change it: the edge.
TAKE_EITHER = {
    "config",
    "model.config",
    "data.loader",
    "training",
    "validation",
    "papers.coordcheck",
}
NAME_CONFIGDICT = {"config", "rundir", "papers.paper"}
NO_JAX = ("jax", "jaxlib", "flax", "optax", "orbax")
TFDS = {"data.sources.tfds", "data.sources.builders"}
MAX_LINES = 80
# They share a name with what they stand for: the console script, a protocol of an optional module,
# what an engine is asked for and answers in parts (attention and token stores have their own).
SAME = {("start", "main"), ("sweep.run", "Search"), ("generate.requests", "Request"),
        ("generate.requests", "Part")}  # fmt: skip


def module_name(path: Path) -> str:
    """Return "a.b" for nanojaxgpt/a/b.py, and "" for the package itself."""
    parts = path.relative_to(ROOT / PACKAGE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


PATHS = {module_name(path): path for path in sorted((ROOT / PACKAGE).rglob("*.py"))}
TREES = {name: ast.parse(path.read_text()) for name, path in PATHS.items()}
LAYER = {name: ENTRIES[entry] for name in PATHS
         for entry in (f"{name.rpartition('.')[0]}.*", name) if entry in ENTRIES}  # fmt: skip


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


def packages(names: set[str]) -> set[str]:
    """Return the top-level packages of imported names."""
    return {name.split(".")[0] for name in names}


def top_level(tree: ast.Module) -> ast.Module:
    """Return the statements that run on import: no functions, no classes, no types alone."""
    kept = [n for n in tree.body if not isinstance(n, ast.FunctionDef | ast.ClassDef)]
    kept = [n for n in kept if not (isinstance(n, ast.If) and "TYPE_CHECKING" in ast.dump(n.test))]
    return ast.Module(kept, [])


def modules_used(tree: ast.AST) -> set[str]:
    """Return the modules of the package that a module imports."""
    found = set()
    for name in imported(tree):
        parts = name.split(".")
        if parts[0] != PACKAGE:
            continue
        prefixes = [".".join(parts[1:size]) for size in range(len(parts), 0, -1)]
        found.add(next(prefix for prefix in prefixes if prefix in PATHS))
    return found


USES = {name: modules_used(tree) - {name} for name, tree in TREES.items()}


def offenders(check: Callable[[str, ast.Module], object]) -> dict[str, object]:
    """Return {module: what `check` found}, for the modules where it found something."""
    found = {name: check(name, tree) for name, tree in TREES.items()}
    return {name: problem for name, problem in found.items() if problem}


def cycle(uses: dict[str, set[str]]) -> list[str]:
    """Return modules on an import cycle or depending on one; empty if there is none."""
    left = {name: set(used) for name, used in uses.items()}
    while free := [name for name, used in left.items() if not used & left.keys()]:
        for name in free:
            del left[name]
    return sorted(left)


def test_every_module_has_a_layer():
    new = set(PATHS) - set(LAYER)
    assert not new, f"add {new} to LAYERS in this file"
    known = set(PATHS) | {f"{name.rpartition('.')[0]}.*" for name in PATHS}
    assert not set(ENTRIES) - known, "LAYERS names modules that do not exist"


def test_no_module_imports_from_a_higher_layer():
    assert not offenders(lambda name, _: {u for u in USES[name] if LAYER[u] > LAYER[name]})


def test_nothing_imports_a_command():
    assert not offenders(lambda name, _: {u for u in USES[name] if u.startswith("commands.")})


def assigned(nodes: list[ast.stmt]) -> set[str]:
    """Return the names that statements define, those in `if`, `try` and `with` included."""
    found = set()
    for node in nodes:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found |= {n.id for t in targets for n in ast.walk(t) if isinstance(n, ast.Name)}
        else:
            found |= assigned([n for n in ast.iter_child_nodes(node) if isinstance(n, ast.stmt)])
    return found


def test_names_are_imported_from_the_module_that_defines_them():
    defined = {name: assigned(tree.body) for name, tree in TREES.items()}
    paths = [path for folder in (PACKAGE, "tests", "scripts", "experiments")
             for path in (ROOT / folder).rglob("*.py")]  # fmt: skip
    foreign = []
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text())):
            # The package itself is left out: its modules and the public API are found there.
            if isinstance(node, ast.ImportFrom) and str(node.module).startswith(f"{PACKAGE}."):
                owner = str(node.module).removeprefix(f"{PACKAGE}.")
                names = {alias.name for alias in node.names} - defined[owner]
                foreign += [f"{path}: {owner}.{n}" for n in names if f"{owner}.{n}" not in PATHS]
    assert not foreign


def test_one_name_has_one_meaning():
    commands = {(one.run.__module__, one.run.__name__) for one in COMMANDS.values()}
    owners: dict[str, list[str]] = {}
    for module, tree in TREES.items():
        for name in [name for name, _ in public(tree) if "." not in name]:
            kernel = module.startswith("attention.") and name in ("supports", "run")
            command = (f"{PACKAGE}.{module}", name) in commands  # has the name of what it does
            loss = module.startswith("objectives.") and name == "make_loss"
            if not (kernel or command or loss or (module, name) in SAME):
                owners.setdefault(name, []).append(module)
    assert not {name: modules for name, modules in owners.items() if len(modules) > 1}


def test_there_are_no_import_cycles():
    assert cycle({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}, "e": set()}) == list("abcd")
    assert USES["training"] >= {"model.transformer", "checkpoint", "data.loader", "loop", "step"}
    assert cycle(USES) == []


def test_config_errors_come_before_jax_is_imported():
    def jax_on_import(name: str, _: ast.Module) -> list[str]:
        if name not in EARLY and not name.startswith(("commands", "data", "hosts")):
            return []
        seen, waiting = set(), [name]
        while waiting:
            current = waiting.pop()
            seen.add(current)
            waiting += modules_used(top_level(TREES[current])) - seen
        return [used for used in seen if packages(imported(top_level(TREES[used]))) & set(NO_JAX)]

    assert not offenders(jax_on_import)


def test_below_the_edge_of_a_job_configs_are_typed():
    def untyped(name: str, tree: ast.Module) -> set[str]:
        used = {part for full in imported(tree) for part in full.split(".")}
        used |= {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute)}  # config.AnyConfig
        if name not in NAME_CONFIGDICT and used & {"ml_collections", "ConfigDict"}:
            return used & {"ml_collections", "ConfigDict"}
        return set() if name in TAKE_EITHER else used & {"AnyConfig", "Either"}

    assert not offenders(untyped)


def test_experiments_do_not_import_jax():
    begins = {f"{PACKAGE}.{n}" for n in ("config.base_config", "config.load_experiment")}
    begins.add(f"{PACKAGE}.papers.paper.Paper")
    for path in sorted((ROOT / "experiments").rglob("*.py")):
        # A paper's measures may import it when they run.
        names = imported(top_level(ast.parse(path.read_text())))
        assert names & begins, path
        assert not packages(names) & set(NO_JAX), path


def test_no_other_framework_is_imported():
    def other(name: str, tree: ast.Module) -> set[str]:
        # TensorFlow Datasets runs without TensorFlow where it only reads.
        outside = {"tensorflow_datasets"} if name not in TFDS else set()
        return packages(imported(tree)) & ({"tensorflow", "torch", "tf", "clu"} | outside)

    assert not offenders(other)


def functions(tree: ast.AST) -> list[ast.FunctionDef]:
    """Return every function of a module, nested ones and methods included."""
    return [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]


def test_no_function_is_long():
    def too_long(_: str, tree: ast.Module) -> dict[str, int]:
        sizes = [(f.name, f.end_lineno - f.lineno + 1) for f in functions(tree)]
        return {name: n for name, n in sizes if n > MAX_LINES}

    assert not offenders(too_long)


def test_every_function_has_type_hints():
    def bare(_: str, tree: ast.Module) -> set[str]:
        found = set()
        for function in functions(tree):
            a = function.args
            arguments = [*a.posonlyargs, *a.args, *a.kwonlyargs, *filter(None, [a.vararg, a.kwarg])]
            untyped = {x.arg for x in arguments if not x.annotation} - {"self", "cls"}
            if untyped or not function.returns:
                found.add(function.name)
        return found

    assert not offenders(bare)


def public(tree: ast.Module) -> list[tuple[str, ast.AST]]:
    """Return (name, node) of public classes and functions, and of the classes' public methods."""
    kinds = ast.FunctionDef | ast.AsyncFunctionDef
    found = [(n.name, n) for n in tree.body if isinstance(n, kinds | ast.ClassDef)]
    for owner in [n for _, n in found if isinstance(n, ast.ClassDef)]:
        methods = [n for n in owner.body if isinstance(n, kinds)]
        found += [(f"{owner.name}.{n.name}", n) for n in methods]
    return [(name, node) for name, node in found if not node.name.startswith("_")]


def test_everything_public_has_a_docstring():
    def undocumented(_: str, tree: ast.Module) -> set[str]:
        if not ast.get_docstring(tree):
            return {"the module"}
        docs = {full: ast.get_docstring(node) for full, node in public(tree)}
        # Implementations of a Protocol are documented there.
        protocols = {n.name for n in tree.body if isinstance(n, ast.ClassDef)
                     for base in n.bases if ast.unparse(base) == "Protocol"}  # fmt: skip
        known = {full.split(".")[1] for full in docs
                 if full.split(".")[0] in protocols and "." in full}  # fmt: skip
        return {full for full, text in docs.items()
                if not text and full.split(".")[-1] not in known}  # fmt: skip

    assert not offenders(undocumented)
