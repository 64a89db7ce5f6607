"""The functions of the Python standard library that is installed: read from its files, nothing is imported."""

import ast
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

from docstrings import LEFT_OUT


def functions() -> list[bytes]:
    """The source of every function and method once, in an order that is the same on every run."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(path.relative_to(root) for path in root.rglob("*.py"))
    found: dict[bytes, None] = {}
    for file in files:
        if not LEFT_OUT & set(file.parts):
            found.update(dict.fromkeys(_functions_of(root / file)))
    return list(found)


def _functions_of(file: Path) -> Iterator[bytes]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of old escapes in strings
        try:
            text = file.read_text(encoding="utf-8")
            tree = ast.parse(text)
        except (SyntaxError, ValueError):  # templates and the like
            return
    yield from _functions_in(tree, text.split("\n"))


def _functions_in(parent: ast.AST, lines: list[str]) -> Iterator[bytes]:
    for node in ast.iter_child_nodes(parent):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            first = min(x.lineno for x in (node, *node.decorator_list))
            indent = lines[first - 1][: node.col_offset]
            text = "\n".join(line.removeprefix(indent) for line in lines[first - 1 : node.end_lineno])
            yield text.replace("\0", "").encode() + b"\n"
        elif isinstance(node, ast.ClassDef):
            yield from _functions_in(node, lines)
