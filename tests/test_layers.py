"""The house rule: a folder is a layer, imports run downward, and each heavy library has one owner."""

import ast
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1] / "grpo_ds"
# From the ground up; a module imports from lower layers and from its own. Folders of one layer do not meet.
LAYERS = [
    {"terminal"},
    {"errors"},
    {"system"},
    {"core", "task", "optim"},
    {"settings"},
    {"models", "run_folder"},
    {"memory"},
    {"report"},
    {"training"},
    {"commands"},
    {"__main__"},
]
OWNERS = {
    "deepspeed": {"training/engine.py"},
    "torch.distributed": {"system/ranks.py"},
    "bitsandbytes": {"optim", "models"},
    "peft": {"models"},
    "wandb": {"report/wandb_tracker.py"},
    "tensorboard": {"report/tensorboard_tracker.py"},
    "torch.utils.tensorboard": {"report/tensorboard_tracker.py"},
    "trackio": {"report/trackio_tracker.py"},
    "rich": {"report", "commands"},
    "matplotlib": {"report"},
    "jinja2": {"report"},
    "psutil": {"system/signals.py"},
}
HEIGHT = {name: height for height, layer in enumerate(LAYERS) for name in layer}


def imports():
    """(file, its folder or, at the top, its name, imported module) for every import, wherever it stands."""
    for path in PACKAGE.rglob("*.py"):
        file = path.relative_to(PACKAGE)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                yield from ((file, file.parts[0].removesuffix(".py"), alias.name) for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                yield file, file.parts[0].removesuffix(".py"), node.module


def test_a_folder_is_a_layer():
    parts = {
        path.name.removesuffix(".py") for path in PACKAGE.iterdir() if path.name not in ("__pycache__", "__init__.py")
    }
    assert parts == HEIGHT.keys()


def test_imports_run_downward():
    broken = [
        f"{file} imports {module}"
        for file, part, module in imports()
        if module.startswith("grpo_ds.") and (other := module.split(".")[1]) != part and HEIGHT[other] >= HEIGHT[part]
    ]
    assert not broken


def test_every_heavy_library_has_one_owner():
    broken = [
        f"{file} imports {module}"
        for file, part, module in imports()
        for library, owners in OWNERS.items()
        if (module == library or module.startswith(f"{library}.")) and not {part, str(file)} & owners
    ]
    assert not broken


def test_task_knows_no_tensors():
    heavy = ("torch", "transformers", "numpy")
    assert not [f"{file} imports {m}" for file, part, m in imports() if part == "task" and m.split(".")[0] in heavy]
