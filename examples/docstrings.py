"""The docstrings of the Python standard library that is installed: read from its files, nothing is imported."""

import ast
import sysconfig
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

# Not of the standard library, or nothing that a program would call.
LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idlelib", "turtledemo"}


@dataclass(frozen=True)
class Docstring:
    """What a name of the standard library says of itself."""

    name: str  # such as shutil.copyfile
    text: str

    @property
    def first_line(self) -> str:
        return self.text.split("\n", 1)[0].strip()


def standard_library() -> list[Docstring]:
    """Every docstring once, in an order that is the same on every run: public modules first, then as in the files."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = [path.relative_to(root) for path in root.rglob("*.py")]
    modules = [(_module(path), path) for path in files if not LEFT_OUT & set(path.parts)]
    first: dict[str, Docstring] = {}
    for name, path in sorted(modules, key=lambda m: (_is_private(m[0]), m[0])):
        for docstring in _docstrings(root / path, name):
            first.setdefault(docstring.text, docstring)
    return list(first.values())


def _module(path: Path) -> str:
    parts = path.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _is_private(module: str) -> bool:
    return any(part.startswith("_") or not part.isidentifier() for part in module.split("."))


def _docstrings(file: Path, module: str) -> Iterator[Docstring]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of old escapes in strings
        try:
            tree = ast.parse(file.read_bytes())
        except (SyntaxError, ValueError):  # templates and the like
            return
    yield from _of_node(tree, module)


def _of_node(node: ast.AST, name: str) -> Iterator[Docstring]:
    if text := (ast.get_docstring(node) or "").strip():
        yield Docstring(name, text)
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            yield from _of_node(child, f"{name}.{child.name}")
