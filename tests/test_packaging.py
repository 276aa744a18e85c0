"""What setup.cfg promises: private names of other packages have an upper bound, and exist."""

import ast
import configparser
import importlib
import re
import sys

import pytest
from conftest import ROOT

SETUP = configparser.ConfigParser()
SETUP.read(ROOT / "setup.cfg")
CORE, EXTRAS = SETUP["options"]["install_requires"], SETUP["options.extras_require"]
REQUIRED = [line.strip() for text in (CORE, *EXTRAS.values()) for line in text.strip().splitlines()]
# Names that other packages do not promise to keep: package, module, what leads to it.
PRIVATE = {
    "auto_detect_unset_distributed_params": ("jax", "jax._src.clusters", "ClusterEnv"),
    "_make_sbatch_string": ("submitit", "submitit.slurm.slurm", ""),
    "submitit_main": ("submitit", "submitit.core._submit", ""),
    "_fingerprint": ("datasets", "datasets", "Dataset.from_dict({})"),
}
# Packages without which text is trained on, evaluated and sampled, and the extra that has them.
OPTIONAL = {"matplotlib": "plots", "tensorflow-datasets": "tfds", "array_record": "tfds"}
# Modules that nothing imports but where an optional package is there: file, what it may import.
LATE = {("builders.py", "tensorflow_datasets"), ("builders.py", "absl"), ("search.py", "optuna"),
        ("lm_eval.py", "lm_eval")}  # fmt: skip
SERVER = ("h11", "prometheus_client", "pydantic", "starlette", "uvicorn")
LATE |= {(path.name, package) for path in (ROOT / "nanojaxgpt" / "server").glob("*.py")
         for package in SERVER}  # fmt: skip
WITH_JAX = {"scipy", "jaxlib"}  # jax requires them
PUBLIC = {"_replace", "_asdict", "_fields", "_exit", "_actions"}  # Python's own


@pytest.mark.parametrize("name", PRIVATE)
def test_a_private_name_exists_and_its_package_has_an_upper_bound(name):
    package, module, way = PRIVATE[name]
    bounds = [line for line in REQUIRED if re.match(rf"{package}\b(?!\[)", line)]
    assert bounds
    assert all("<" in line for line in bounds), bounds
    pytest.importorskip(package)
    found = importlib.import_module(module)
    assert hasattr(eval(f"found.{way}" if way else "found", {"found": found}), name)


def test_every_private_name_that_is_used_is_in_the_table():
    modules = {module for _, module, _ in PRIVATE.values()}
    trees = [ast.parse(path.read_text()) for path in (ROOT / "nanojaxgpt").rglob("*.py")]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    own = {n.name for n in nodes if isinstance(n, ast.FunctionDef | ast.ClassDef)}
    used = set()
    for node in nodes:
        if isinstance(node, ast.Attribute) and re.match("_[a-z]", node.attr):
            if not (isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")):
                used.add(node.attr)
        elif isinstance(node, ast.ImportFrom) and re.search(r"\._[a-z]", node.module or ""):
            assert node.module in modules
    assert {"_make_sbatch_string", "_fingerprint"} <= used
    assert not used - PRIVATE.keys() - PUBLIC - own


def test_a_private_name_is_used_in_one_module():
    texts = [path.read_text() for path in (ROOT / "nanojaxgpt").rglob("*.py")]
    for word in (
        "jax._src",
        "._make_sbatch_string",
        "submitit.core._submit",
        "dataset._fingerprint",
    ):
        assert len([text for text in texts if word in text]) == 1, word


def names_of(lines: str) -> set[str]:
    """Return the names of required packages as they are imported."""
    found = {re.match(r"[\w-]+", line)[0] for line in lines.split("\n") if line.strip()}
    return {name.lower().replace("-", "_").removesuffix("_checkpoint") for name in found}


def test_what_is_optional_is_an_extra_and_the_tests_have_it():
    core = names_of(CORE)
    for package, extra in OPTIONAL.items():
        assert package.replace("-", "_") in names_of(EXTRAS[extra]) - core
        assert extra in re.search(r"nanojaxgpt\[(.*)\]", EXTRAS["test"])[1].split(",")


def test_what_every_module_imports_is_required():
    known = names_of(CORE) | WITH_JAX | {"nanojaxgpt"} | set(sys.stdlib_module_names)
    for path in (ROOT / "nanojaxgpt").rglob("*.py"):
        tree = ast.parse(path.read_text())
        inside = {
            node
            for function in ast.walk(tree)
            if isinstance(function, ast.FunctionDef | ast.If)  # `if TYPE_CHECKING:` among them
            for node in ast.walk(function)
        }
        for node in set(ast.walk(tree)) - inside:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            for package in {name.split(".")[0] for name in names} - known:
                assert (path.name, package) in LATE, path
