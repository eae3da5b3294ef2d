"""Reads our own source: modules, their imports, classes and calls, as the architecture tests need them."""

from __future__ import annotations

import ast
import functools
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("launcher", "solomonov", "data_pipeline")


@dataclass(frozen=True)
class Import:
    """One import statement's target, written out: `import a.b` and `from a import b` both give a.b."""

    target: str
    line: int
    inside_function: bool
    for_types_only: bool


@dataclass(frozen=True)
class Module:
    """One source file of ours."""

    name: str  # dotted; a package is named without __init__
    path: Path
    tree: ast.Module

    @property
    def file(self) -> str:
        return self.path.relative_to(ROOT).as_posix()

    @property
    def package(self) -> str:
        return self.name.partition(".")[0]

    @property
    def is_init(self) -> bool:
        return self.path.name == "__init__.py"

    def at(self, node: ast.AST) -> str:
        """`file:line`, for messages."""
        return f"{self.file}:{getattr(node, 'lineno', 1)}"


def read_module(path: Path) -> Module:
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    if parts[-1] == "__init__":
        parts.pop()
    return Module(".".join(parts), path, ast.parse(path.read_text(encoding="utf-8"), filename=str(path)))


@functools.cache
def modules() -> tuple[Module, ...]:
    """Every module of the three packages."""
    return tuple(read_module(path) for name in PACKAGES for path in sorted((ROOT / name).rglob("*.py")))


@functools.cache
def test_modules() -> tuple[Module, ...]:
    """Every module of the tests."""
    return tuple(read_module(path) for path in sorted((ROOT / "tests").rglob("*.py")))


test_modules.__test__ = False  # type: ignore[attr-defined]


@functools.cache
def tracked_files() -> tuple[Path, ...]:
    """The files that git tracks or would track, deleted ones left out."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return tuple(path for name in sorted(set(listed.split("\0")) - {""}) if (path := ROOT / name).is_file())


def imports(module: Module) -> list[Import]:
    """Every import of a module, those inside functions and those of `import_module("literal")` included."""
    return list(_imports(module, module.tree, inside_function=False, for_types_only=False))


def _imports(module: Module, node: ast.AST, *, inside_function: bool, for_types_only: bool) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        for target in _targets(module, child):
            yield Import(target, child.lineno, inside_function, for_types_only)  # type: ignore[attr-defined]
        if isinstance(child, ast.If) and _is_type_checking(child.test):
            for part in child.body:
                wrapped = ast.Module(body=[part], type_ignores=[])
                yield from _imports(module, wrapped, inside_function=inside_function, for_types_only=True)
            rest = ast.Module(body=child.orelse, type_ignores=[])
            yield from _imports(module, rest, inside_function=inside_function, for_types_only=for_types_only)
            continue
        function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        yield from _imports(module, child, inside_function=inside_function or function, for_types_only=for_types_only)


def _is_type_checking(test: ast.expr) -> bool:
    return ast.unparse(test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def _targets(module: Module, node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        base = node.module or ""
        if node.level:
            parts = module.name.split(".")
            parts = parts[: len(parts) - node.level + (1 if module.is_init else 0)]
            base = ".".join([*parts, *([base] if base else [])])
        return [f"{base}.{alias.name}" for alias in node.names]
    if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module") and node.args:
        name = node.args[0]
        return [name.value] if isinstance(name, ast.Constant) and isinstance(name.value, str) else []
    return []


def own_module(target: str) -> str | None:
    """The module of ours that an import target names: itself, or the one that defines the imported name."""
    names = {module.name for module in modules()}
    if target in names:
        return target
    parent = target.rpartition(".")[0]
    return parent if parent in names else None


def functions(module: Module) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """Every function and method, nested ones too."""
    for node in ast.walk(module.tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def classes(module: Module) -> Iterator[ast.ClassDef]:
    """Every class, nested ones too."""
    for node in ast.walk(module.tree):
        if isinstance(node, ast.ClassDef):
            yield node


def enclosing(module: Module, node: ast.AST) -> str:
    """The name of the innermost function around a node, or `<module>`."""
    line = getattr(node, "lineno", 0)
    around = [item for item in functions(module) if item.lineno <= line <= (item.end_lineno or item.lineno)]
    return max(around, key=lambda item: item.lineno).name if around else "<module>"


def called_name(call: ast.Call) -> str:
    """The last part of what is called: `f` for f(...), module.f(...) and object.f(...)."""
    return ast.unparse(call.func).rpartition(".")[2]


def find_cycle(edges: dict[str, set[str]]) -> list[str]:
    """One cycle of a directed graph as a path that ends where it starts; empty when there is none."""
    done: set[str] = set()

    def visit(node: str, path: list[str]) -> list[str]:
        if node in path:
            return [*path[path.index(node) :], node]
        if node in done:
            return []
        for following in sorted(edges.get(node, ())):
            if cycle := visit(following, [*path, node]):
                return cycle
        done.add(node)
        return []

    for start in sorted(edges):
        if cycle := visit(start, []):
            return cycle
    return []


def fail_with(lines: list[str], law: str) -> None:
    """Fails, naming each offender, unless there is none."""
    if lines:
        pytest.fail(f"{law}:\n" + "\n".join(f"  {line}" for line in dict.fromkeys(lines)), pytrace=False)
