"""The files that a user's reward function is made of: its own, and those beside it that they import.

Seen from the import statements, nothing is run; installed packages and this one are left out.
"""

import ast
import hashlib
from collections.abc import Collection, Iterator
from contextlib import suppress
from pathlib import Path

INSTALLED = {"site-packages", "dist-packages"}
THIS_PACKAGE = __name__.partition(".")[0]


def hashes_of(files: Collection[tuple[Path, Path]]) -> dict[str, list[str]]:
    """Return the hashes of these files and of what they import, by the path below their folder.

    files: (a file, the folder in which its imports are found). Files of two folders may have one name.
    """
    found = {(path, folder) for file, folder in files for path in _with_imports(file, folder)}
    hashes: dict[str, list[str]] = {}
    for path, folder in sorted(found):
        name = path.relative_to(folder).as_posix()
        hashes.setdefault(name, []).append(hashlib.sha256(path.read_bytes()).hexdigest())
    return hashes


def folder_of_imports(file: Path) -> Path:
    """Return the folder in which a module lies, or its outermost package."""
    folder = file.parent
    while (folder / "__init__.py").is_file():
        folder = folder.parent
    return folder


def _with_imports(file: Path, folder: Path) -> set[Path]:
    waiting, seen = [file], set[Path]()
    while waiting:
        if (path := waiting.pop()) not in seen:
            seen.add(path)
            waiting += [] if INSTALLED.intersection(path.parts) else _imported_by(path, folder)
    return seen


def syntax_tree(source: str | bytes) -> ast.Module | None:
    """Return the syntax tree of a module; None if it is not Python.

    CPython 3.11 may raise SystemError if it collects garbage meanwhile (its issue 106905), but not twice.
    """
    with suppress(SyntaxError, ValueError):
        try:
            return ast.parse(source)
        except SystemError:
            return ast.parse(source)
    return None


def _imported_by(file: Path, folder: Path) -> list[Path]:
    """Return the files below `folder` that the file's import statements name, packages' __init__.py included."""
    if (tree := syntax_tree(file.read_bytes())) is None:  # a compiled module
        return []
    places = [it for node in ast.walk(tree) for it in _places(node, file, folder) if folder in it.parents]
    packages = {above for place in places for above in (place, *place.parents) if folder in above.parents}
    files = [*(place.with_name(f"{place.name}.py") for place in places), *(it / "__init__.py" for it in packages)]
    return sorted({path for path in files if path.is_file()})


def _places(node: ast.AST, file: Path, folder: Path) -> Iterator[Path]:
    """Yield the paths, without .py, of the modules that an import statement may mean."""
    match node:
        case ast.Import():
            names, start = [alias.name for alias in node.names], folder
        case ast.ImportFrom(level=level, module=module):
            start = [folder, file.parent, *file.parent.parents][level] if level <= len(file.parents) else folder
            inner = [f"{module}.{alias.name}" if module else alias.name for alias in node.names]
            names = [*([module] if module else []), *inner]
        case _:
            return
    for name in names:
        if name.partition(".")[0] != THIS_PACKAGE and "*" not in name:
            yield start.joinpath(*name.split("."))
