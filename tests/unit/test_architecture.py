"""Arrows point one way: what may import what, and who owns each third-party package."""

from __future__ import annotations

import ast
from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "neftune_dist"
# A module may import from its own group and from the groups left of it.
ORDER: list[set[str]] = [
    {"config"},
    {"system"},
    {"distributed"},
    {"optim"},
    {"data", "model", "noise"},
    {"engine"},
    {"checkpoint"},
    {"training"},
    {"evaluation"},
    {"planning", "study", "cluster"},
    {"arguments"},
    {"cli"},
]
MAX_FILE_LINES, MAX_FUNCTION_LINES = 350, 70
# What is longer today. Nothing joins; a name goes when its file or function obeys.
LONG_FILES = {"noise/hook", "noise/law"}
LONG_FUNCTIONS = {"model/loss:token_losses", "optim/kernel:update_range"}
HOMES = {
    "omegaconf": {"config/config", "config/loading"},
    "datasets": {"data/sources", "evaluation/lm_eval_adapter"},
    "deepspeed": {"engine/deepspeed"},
    "tensorboard": {"training/trackers"},
    "wandb": {"training/trackers"},
    "mlflow": {"training/trackers"},
    "triton": {"noise/kernel", "optim/kernel"},
    "liger_kernel": {"model/liger"},
    "torchao": {"model/float8"},
    "peft": {"model/adapters"},
    "bitsandbytes": {"model/nf4"},
    "lm_eval": {"evaluation/lm_eval_adapter"},
    "sacrebleu": {"evaluation/text_statistics"},
    "rouge_score": {"evaluation/text_statistics"},
    "alpaca_eval": {"evaluation/alpaca_annotators"},
    "matplotlib": {"study/plots"},
    "markdown": {"study/report"},
}


def imports(path: Path) -> list[tuple[str, bool]]:
    """Imported modules, and whether the import stands inside a function."""
    tree = ast.parse(path.read_text())
    inside = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef)
        for node in ast.walk(function)
    }
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, id(node) in inside) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            # `from neftune_dist.data import builtin` names a module by its alias.
            found += [(f"{node.module}.{alias.name}", id(node) in inside) for alias in node.names]
    return found


def modules() -> dict[str, Path]:
    return {
        str(path.relative_to(PACKAGE).with_suffix("")): path
        for path in sorted(PACKAGE.rglob("*.py"))
        if not path.stem.startswith("__")
    }


def test_arrows_point_one_way() -> None:
    level = {group: i for i, groups in enumerate(ORDER) for group in groups}
    wrong = []
    for name, path in modules().items():
        group = name.split("/")[0]
        for imported, _ in imports(path):
            parts = imported.split(".")
            if parts[0] != "neftune_dist" or len(parts) < 2 or parts[1] == "__version__":
                continue
            target = parts[1]
            if target != group and level[target] >= level[group]:
                wrong.append(f"{name} imports {imported}")
    assert not wrong


def test_third_party_packages_have_one_home() -> None:
    for name, path in modules().items():
        for imported, _ in imports(path):
            for package, homes in HOMES.items():
                if package in imported.split("."):
                    assert name in homes or imported.startswith("neftune_dist"), (name, imported)


def test_imports_stand_at_the_top() -> None:
    """But for the engine that was chosen, the command line, which answers before torch loads, the
    doctor, who comes where packages are missing, and what only some have: Triton, extras."""
    allowed = {
        "training/train",
        "cli",
        "noise/op",
        "optim/adamw_low_precision",
        "model/float8",
        "model/liger",
        "model/adapters",
        "model/nf4",
        "evaluation/alpaca_annotators",
        "training/trackers",
        "evaluation/tasks",
    }
    late = [
        f"{name}: {imported}"
        for name, path in modules().items()
        for imported, is_late in imports(path)
        if is_late and name not in allowed and not name.startswith("cluster/doctor/")
    ]
    assert not late


def long_functions(tree: ast.Module) -> list[str]:
    """Functions of a module that are longer than `MAX_FUNCTION_LINES`, as Class.name."""
    found = []
    for owner in [tree, *(node for node in ast.walk(tree) if isinstance(node, ast.ClassDef))]:
        prefix = f"{owner.name}." if isinstance(owner, ast.ClassDef) else ""
        functions = (node for node in owner.body if isinstance(node, ast.FunctionDef))
        found += [prefix + f.name for f in functions if num_lines(f) > MAX_FUNCTION_LINES]
    return found


def num_lines(function: ast.FunctionDef) -> int:
    return (function.end_lineno or 0) - function.lineno + 1


def test_files_fit_350_lines() -> None:
    lengths = {name: len(path.read_text().splitlines()) for name, path in modules().items()}
    assert {name for name, length in lengths.items() if length > MAX_FILE_LINES} == LONG_FILES


def test_functions_fit_70_lines() -> None:
    found = {
        f"{name}:{function}"
        for name, path in modules().items()
        for function in long_functions(ast.parse(path.read_text()))
    }
    assert found == LONG_FUNCTIONS


def test_loop_fits_a_page() -> None:
    """The three methods that are the training loop; a page has some 100 lines."""
    tree = ast.parse((PACKAGE / "training" / "loop.py").read_text())
    (trainer,) = (n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == "Trainer")
    methods = {m.name: m for m in trainer.body if isinstance(m, ast.FunctionDef)}
    loop = ("run", "train_step", "accumulate_gradients")
    assert sum(num_lines(methods[name]) for name in loop) <= 100
