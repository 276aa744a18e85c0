"""What setup.cfg promises: private names of other packages have an upper bound, and exist."""

import ast
import configparser
import importlib
import re

import pytest
from conftest import ROOT

SETUP = configparser.ConfigParser()
SETUP.read(ROOT / "setup.cfg")
REQUIRED = [
    line.strip()
    for section in ("options", "options.extras_require")
    for field, text in SETUP[section].items()
    if field == "install_requires" or section.endswith("require")
    for line in text.strip().splitlines()
]
# Names that other packages do not promise to keep: package, module, what leads to it.
PRIVATE = {
    "auto_detect_unset_distributed_params": ("jax", "jax._src.clusters", "ClusterEnv"),
    "_make_sbatch_string": ("submitit", "submitit.slurm.slurm", ""),
    "submitit_main": ("submitit", "submitit.core._submit", ""),
    "_trial_id": ("optuna", "optuna.trial", "create_trial(value=0.0)"),
    "_fingerprint": ("datasets", "datasets", "Dataset.from_dict({})"),
}
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
    assert {"_trial_id", "_make_sbatch_string"} <= used
    assert not used - PRIVATE.keys() - PUBLIC - own
