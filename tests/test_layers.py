"""The house rule: imports run downward, and each heavy library has one owner."""

import ast
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1] / "grpo_ds"
# From the ground up; a module imports from lower layers and from its own.
LAYERS = [
    {"errors", "hub", "invocation", "terminal"},
    {"core", "task"},
    {"config", "command_line", "ds_config", "ds_json", "ds_keys", "machine", "memory", "versions", "world"},
    {"checkpoint", "interruption", "progress", "resumption", "run_folder", "run_status"},
    {"models", "optim"},
    {"sampling"},
    {"engine", "rollouts", "dynamic_sampling", "collector"},
    {"update", "bad_numbers", "preflight", "evaluation", "inference", "rank_state"},
    {"report"},
    {"trainer", "snapshot", "run"},
    {"commands", "__main__"},
]
OWNERS = {
    "deepspeed": {"engine"},
    "torch.distributed": {"world"},
    "bitsandbytes": {"optim", "models"},
    "peft": {"models"},
    "wandb": {"report"},
    "tensorboard": {"report"},
    "torch.utils.tensorboard": {"report"},
    "trackio": {"report"},
    "rich": {"report", "commands"},
    "matplotlib": {"report"},
    "jinja2": {"report"},
    "psutil": {"interruption"},
    "jsonargparse": {"command_line"},
}
HEIGHT = {name: height for height, layer in enumerate(LAYERS) for name in layer}


def imports():
    """(file, part of the house it stands in, imported module) for every import, wherever it stands."""
    for file in PACKAGE.rglob("*.py"):
        part = file.relative_to(PACKAGE).parts[0].removesuffix(".py")
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                yield from ((file.name, part, alias.name) for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                yield file.name, part, node.module


def test_imports_run_downward():
    broken = []
    for file, part, module in imports():
        if part == "__init__" or not module.startswith("grpo_ds."):
            continue
        other = module.split(".")[1]
        if (other != part and HEIGHT[other] > HEIGHT[part]) or {other, part} == {"core", "task"}:
            broken.append(f"{part}/{file} imports {module}")
    assert not broken


def test_every_heavy_library_has_one_owner():
    broken = [
        f"{part}/{file} imports {module}"
        for file, part, module in imports()
        for library, owners in OWNERS.items()
        if (module == library or module.startswith(f"{library}.")) and part not in owners
    ]
    assert not broken


def test_task_knows_no_tensors():
    heavy = ("torch", "transformers", "numpy")
    assert not [
        f"task/{file} imports {m}" for file, part, m in imports() if part == "task" and m.split(".")[0] in heavy
    ]
