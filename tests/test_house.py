"""The house: small enough to read, imports that run down, and one room for private names."""

import ast
import functools
import re
import sys

from conftest import ROOT, SOURCES

from support.trainer import PRIVATE

COMMANDS = ("cold_start", "demo", "evaluate", "train_grpo")


@functools.cache
def modules() -> dict[str, ast.Module]:
    """Every module of the product by its dotted name."""
    paths = [*ROOT.glob("*.py"), *(ROOT / "support").glob("*.py")]
    return {".".join(path.relative_to(ROOT).with_suffix("").parts): ast.parse(path.read_text()) for path in paths}


def imports(name: str) -> set[tuple[str, str]]:
    """(module, name) of what a module imports, anywhere in it."""
    nodes = [node for node in ast.walk(modules()[name]) if isinstance(node, ast.ImportFrom | ast.Import)]
    return {(getattr(node, "module", alias.name), alias.name) for node in nodes for alias in node.names}


@functools.cache
def floor(name: str) -> int:
    """1 for a module that imports no other of the house; a circle would be a RecursionError."""
    used = {module for module, _ in imports(name)} | {f"{module}.{item}" for module, item in imports(name)}
    return 1 + max((floor(each) for each in used & modules().keys()), default=0)


def test_imports_run_down_from_the_commands_on_eight_floors():
    assert max(map(floor, modules())) <= 8
    for name in modules():
        assert not [m for m, _ in imports(name) if m in COMMANDS], f"{name} imports a command"
        private = [item for m, item in imports(name) if m.startswith("support") and item.startswith("_")]
        assert not private, f"{name} imports {private}"


def test_the_house_stays_small_enough_to_read():
    lines = {path.stem: len(path.read_text().splitlines()) for path in (ROOT / "support").glob("*.py")}
    assert sum(lines.values()) <= 3200
    assert len(lines) <= 21  # 20, and __init__
    assert len((ROOT / "train_grpo.py").read_text().splitlines()) <= 230
    assert sorted(path.stem for path in ROOT.glob("*.py")) == sorted((*COMMANDS, "rewards"))


def test_private_names_of_libraries_stand_in_one_module():
    """But for argparse's actions, torch's rate and the process' own end, which other modules have in mind."""
    others = {("support.settings", "_actions"), ("support.faults", "_last_lr"), ("support.processes", "_exit")}
    found, named = set(), {name for _, name, _, _ in PRIVATE if name.startswith("_")}
    for name, tree in modules().items():
        for node in ast.walk(tree):
            is_foreign = isinstance(node, ast.Attribute) and not (
                isinstance(node.value, ast.Name) and node.value.id in ("self", "cls", "parser")
            )
            own = isinstance(node, ast.FunctionDef) and node.name in named
            word = node.attr if is_foreign else node.name if own else ""
            if word.startswith("_") and not word.startswith("__"):
                found.add((name, word))
    assert {pair for pair in found if pair[0] != "support.trainer"} <= others


def test_requirements_name_what_is_imported():
    """But for packages that only a flag needs."""
    lines = (ROOT / "requirements.txt").read_text().lower().splitlines()
    named = {re.split("[=<> #]", line)[0].replace("-", "_") for line in lines} | {"yaml", "vllm", "bitsandbytes"}
    own = {path.stem for path in SOURCES} | {"support", "tests", "benchmarks"}
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            tops = {name.partition(".")[0].lower() for name in names} - own - set(sys.stdlib_module_names)
            assert tops <= named, f"{path} imports {tops - named}"
