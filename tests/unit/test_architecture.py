"""Arrows point one way: what may import what, and who owns each third-party package."""

from __future__ import annotations

import ast
import re
from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "neftune_dist"
# A module may import from its own group and from the groups left of it.
ORDER: list[set[str]] = [
    {"config"},
    {"system"},
    {"compat"},
    {"distributed"},
    {"arguments"},
    {"optim"},
    {"data", "model"},
    {"noise"},  # reads a family's embedding scale in the table of `model/families`
    {"engine"},
    {"checkpoint"},
    {"training"},
    {"evaluation"},
    {"planning", "study", "cluster"},
    {"verbs"},
    {"cli"},
]
MAX_FILE_LINES, MAX_FUNCTION_LINES = 350, 70
# What is longer today. Nothing joins; a name goes when its file or function obeys.
LONG_FILES: set[str] = set()
LONG_FUNCTIONS: set[str] = set()
HOMES = {
    "omegaconf": {"config/config", "config/loading"},
    "datasets": {"compat/datasets", "data/sources", "evaluation/lm_eval_adapter"},
    "deepspeed": {"compat/deepspeed"},
    "tensorboard": {"training/trackers"},
    "wandb": {"training/trackers"},
    "mlflow": {"training/trackers"},
    "triton": {"noise/kernel", "optim/kernel"},
    "liger_kernel": {"model/liger"},
    "torchao": {"model/float8"},
    "peft": {"model/adapters"},
    "bitsandbytes": {"model/nf4"},
    "lm_eval": {"compat/lm_eval", "evaluation/lm_eval_adapter"},
    "sacrebleu": {"evaluation/text_statistics"},
    "rouge_score": {"evaluation/text_statistics"},
    "alpaca_eval": {"evaluation/alpaca_annotators"},
    "matplotlib": {"study/plots"},
    "markdown": {"study/report"},
    "psutil": {"system/children", "system/network"},
}

# Documented, in spite of their names.
PUBLIC = {"_exit", "_current_frames", "_replace", "_typeshed"}
# Private names of libraries, by module. A new one is a decision: is there no public way? Then it
# belongs in `compat/`, with its reason.
PRIVATE_NAMES = {
    "compat/datasets": {"_fingerprint"},
    "compat/dcp": {"_MEM_FORMAT_ENCODING", "_StorageInfo"},
    "compat/deepspeed": {
        "_apply",
        "_hp_mapping",
        "_reassign_or_swap_out_partitioned_parameters",
    },
    "compat/fake_tensors": {
        "_chunk_cat",
        "_internal",
        "_propagate_tensor_meta_non_cached",
        "_python_dispatch",
        "_pytree",
        "_sharding_prop",
        "_subclasses",
    },
    "compat/lm_eval": {"_yaml_loader"},
    "compat/torch": {
        "_C",
        "_assert_async",
        "_autograd",
        "_cdata",
        "_current_autograd_node",
        "_current_graph_task_id",
        "_distributed_c10d",
        "_dynamo",
        "_flash_attention_backward",
        "_flash_attention_forward",
        "_foreach_copy_",
        "_foreach_norm",
        "_forward_hooks",
        "_functional_collectives",
        "_get_default_store",
        "_grouped_mm",
        "_get_sequence_nr",
        "_is_replica",
        "_is_view",
        "_orig_mod",
        "_scaled_dot_product_cudnn_attention",
        "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_flash_attention_for_cpu_backward",
        "_scaled_mm",
        "_sequence_nr",
        "_set_pg_timeout",
        "_utils",
        "_version",
        "_world",
    },
    "compat/transformers": {"_attn_implementation", "_is_hf_initialized", "_no_split_modules"},
}
# Functions put in the place of a library's, or of one of its objects' methods, by module.
PATCHES = {
    "compat/deepspeed": {
        "_apply",
        "build_shm_op",
        "complete_grad_norm_calculation_for_cpu_offload",
        "forward",
        "get_grad_norm_direct",
    },
    "compat/fake_tensors": {"_propagate_tensor_meta_non_cached", "resize_"},
    "model/modules": {"forward"},  # within a block: the projection gives the loss, no logits
    "model/optimizations": {"forward"},  # a block recomputes, or is compiled
    "planning/simulate": {"step"},
    "training/trackers": {"excepthook"},  # of Python's threading, which documents it
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


def private_names(tree: ast.Module) -> set[str]:
    """Private names of other people's objects: attributes, also by getattr and its like, that this
    module does not define itself, and private modules or names that it imports."""
    own, found = set(), set()
    for node in ast.walk(tree):
        match node:
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name):
                own.add(name)
            case ast.Name(id=name, ctx=ast.Store()):
                own.add(name)
            case ast.Attribute(value=ast.Name(id="self"), attr=name, ctx=ast.Store()):
                own.add(name)
            case ast.Attribute(attr=name):
                found.add(name)
            case ast.Call(
                func=ast.Name(id="getattr" | "hasattr" | "setattr"),
                args=[_, ast.Constant(value=str(name)), *_],
            ):
                found.add(name)
            case ast.ImportFrom(module=str(name)) if not name.startswith("neftune_dist"):
                found |= {*name.split("."), *(alias.name for alias in node.names)}
            case ast.Import():
                found |= {part for alias in node.names for part in alias.name.split(".")}
    private = {name for name in found if name.startswith("_") and not name.startswith("__")}
    return private - own - PUBLIC


def test_private_names_of_libraries_are_listed() -> None:
    found = {name: private_names(ast.parse(path.read_text())) for name, path in modules().items()}
    assert {name: names for name, names in found.items() if names} == PRIVATE_NAMES


def patches(tree: ast.Module) -> set[str]:
    """Attributes of other objects than `self` to which a function is assigned."""
    functions = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    return {
        target.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Attribute)
        and ast.unparse(target.value) != "self"
        and (
            isinstance(node.value, ast.Lambda)
            or ast.unparse(node.value) in functions
            or target.attr == "forward"
        )
    }


def test_patches_are_listed() -> None:
    found = {name: patches(ast.parse(path.read_text())) for name, path in modules().items()}
    assert {name: names for name, names in found.items() if names} == PATCHES
    assert not [n for n, path in modules().items() if "unittest" in path.read_text()]


def test_imports_stand_at_the_top() -> None:
    """But for the engine that was chosen, the command line, which answers before torch loads, the
    doctor, who comes where packages are missing, and what only some have: Triton, extras."""
    allowed = {
        "training/train",
        "verbs/training",
        "verbs/results",
        "data/sources",
        "noise/op",
        "noise/callback",
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


def test_no_test_imports_another() -> None:
    """What several need lies in `tests/support/` or in a fixture."""
    tests = PACKAGE.parent / "tests"
    found = [
        f"{path.relative_to(tests)}: {imported}"
        for path in tests.rglob("*.py")
        for imported, _ in imports(path)
        if re.match(r"tests\.\w+\.(test_|conftest)", imported)
    ]
    assert not found
