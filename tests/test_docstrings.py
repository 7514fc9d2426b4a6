"""Docstrings: everything public has one, and functions say what goes in, what comes out and what is raised."""

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = sorted((ROOT / "peft_diffusion").rglob("*.py"))
SECTIONS = ("Args", "Returns", "Yields", "Raises", "Attributes")
# Of torch: what every module has.
OVERRIDES = frozenset({"forward"})

Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Documented:
    """A function, method or class, with the names of the classes that it lies in before its own."""

    name: str
    node: Function | ast.ClassDef

    @cached_property
    def text(self) -> str:
        return ast.get_docstring(self.node) or ""

    @cached_property
    def sections(self) -> dict[str, str]:
        """The text of each section, by its title."""
        parts = re.split(rf"(?m)^({'|'.join(SECTIONS)}):[ \t]*$", self.text)
        return dict(zip(parts[1::2], parts[2::2], strict=True))

    def entries(self, title: str) -> set[str]:
        """The names that a section explains."""
        names = re.findall(r"(?m)^ {4}\*{0,2}([\w.]+(?:, \*{0,2}\w+)*)(?: \([^)]*\))?:", self.sections.get(title, ""))
        return {name.strip(" *") for several in names for name in several.split(",")}

    @property
    def decorators(self) -> set[str]:
        return {ast.unparse(one).partition("(")[0] for one in self.node.decorator_list}


def parameters(function: Function) -> list[str]:
    """The names of the parameters, without the object or class itself."""
    given = function.args
    named = [*given.posonlyargs, *given.args, *given.kwonlyargs, *(one for one in (given.vararg, given.kwarg) if one)]
    names = [one.arg for one in named]
    return [name for name in names[names[:1] in (["self"], ["cls"]) :] if not name.startswith("_")]


def public(tree: ast.Module) -> Iterator[Documented]:
    """The public classes, functions and methods of a module; what is inside of functions is nobody's business."""

    def inside(body: list[ast.stmt], prefix: str) -> Iterator[Documented]:
        for node in body:
            if isinstance(node, ast.ClassDef | Function) and not node.name.startswith("_"):
                yield Documented(prefix + node.name, node)
                if isinstance(node, ast.ClassDef):
                    yield from inside(node.body, f"{prefix}{node.name}.")

    return inside(tree.body, "")


def own_statements(function: Function) -> Iterator[ast.AST]:
    """Everything in a function but the functions and classes inside of it."""
    waiting: list[ast.AST] = list(function.body)
    while waiting:
        node = waiting.pop()
        yield node
        if not isinstance(node, ast.ClassDef | Function | ast.Lambda):
            waiting += ast.iter_child_nodes(node)


class Package:
    """The classes of several modules, to find what a method overrides."""

    def __init__(self, trees: dict[Path, ast.Module]) -> None:
        self.bases: dict[str, set[str]] = {}
        self.named: dict[str, set[str]] = {}
        self.told: dict[str, set[str]] = {}
        for tree in trees.values():
            for node in ast.walk(tree):
                if isinstance(node, ast.ClassDef):
                    names = {ast.unparse(base).partition("[")[0].rpartition(".")[2] for base in node.bases}
                    # What keeps a protocol without deriving from it names it in its docstring.
                    kept = set(re.findall(r"`(?:\w+\.)*([A-Z]\w+)`", ast.get_docstring(node) or ""))
                    self.bases.setdefault(node.name, set()).update(names)
                    self.named.setdefault(node.name, set()).update(kept)
                    methods = {one.name for one in node.body if isinstance(one, Function) and ast.get_docstring(one)}
                    self.told.setdefault(node.name, set()).update(methods)

    def overrides(self, name: str) -> bool:
        """Whether a method, ``Class.method``, is documented in a class that its own derives from, or a protocol it keeps."""
        *_, owner, method = ["", *name.split(".")]
        protocols = {named for named in self.named.get(owner, ()) if "Protocol" in self.bases.get(named, ())}
        waiting, seen = [*self.bases.get(owner, ()), *protocols], {owner}
        while waiting:
            base = waiting.pop()
            if base not in seen:
                seen.add(base)
                if method in self.told.get(base, ()):
                    return True
                waiting += self.bases.get(base, ())
        return bool(owner) and method in OVERRIDES


def is_bare(function: Function) -> bool:
    """Whether it is but a signature, as in a protocol: ``...``, after a docstring perhaps."""
    values = [one.value.value for one in function.body if isinstance(one, ast.Expr) and isinstance(one.value, ast.Constant)]
    return len(values) == len(function.body) and ... in values


def problems(tree: ast.Module, package: Package) -> Iterator[str]:
    """What is wrong with the docstrings of a module."""
    if not ast.get_docstring(tree):
        yield "the module has no docstring"
    for one in public(tree):
        if isinstance(one.node, ast.ClassDef):
            yield from (f"{one.name}: {problem}" for problem in of_class(one, one.node))
        elif not package.overrides(one.name) and not is_bare(one.node):
            yield from (f"{one.name}: {problem}" for problem in of_function(one, one.node))


def of_class(one: Documented, node: ast.ClassDef) -> Iterator[str]:
    if not one.text:
        yield "no docstring"
    made = next((method for method in node.body if isinstance(method, Function) and method.name == "__init__"), None)
    if made is not None:
        yield from (f"there is no parameter {name}" for name in sorted(one.entries("Args") - set(parameters(made))))


def of_function(one: Documented, node: Function) -> Iterator[str]:
    if not one.text:
        yield "no docstring"
        return
    if one.decorators & {"property", "cached_property", "overload", "reads"} or any(
        d.endswith(".setter") for d in one.decorators
    ):
        return
    given, entries = parameters(node), one.entries("Args")
    yield from (f"Args lacks {name}" for name in given if name not in entries)
    yield from (f"there is no parameter {name}" for name in sorted(entries - set(given)))
    returned = ast.unparse(node.returns) if node.returns else "None"
    nothing = returned in ("None", "NoReturn") or ("contextmanager" in one.decorators and returned == "Iterator[None]")
    tells = "Returns" in one.sections or "Yields" in one.sections
    if given and not nothing and not tells:
        yield "no Returns"
    if returned in ("None", "NoReturn") and tells:
        yield "Returns of what returns nothing"
    raises = any(isinstance(part, ast.Raise) and part.exc is not None for part in own_statements(node))
    if raises and "Raises" not in one.sections:
        yield "no Raises"


@cache
def trees() -> dict[Path, ast.Module]:
    """All modules, read when the first test asks: every process that collects the tests imports this one."""
    return {path: ast.parse(path.read_text("utf-8")) for path in FILES}


@cache
def package() -> Package:
    return Package(trees())


@pytest.mark.parametrize("path", FILES, ids=[str(path.relative_to(ROOT)) for path in FILES])
def test_what_is_public_is_explained(path: Path) -> None:
    assert list(problems(trees()[path], package())) == []


BAD = '''
"""A module."""
class Base:
    def kept(self, x: int) -> int:
        """Keep.

        Args:
            x: A number.

        Returns:
            The number.
        """
        return x
class Derived(Base):
    """Derived."""
    def kept(self, x: int) -> int:
        return x
    @property
    def size(self) -> int:
        """The size."""
        return 1
    def grow(self, by: int, to: int) -> int:
        """Grow.

        Args:
            by: So much.
            until: Gone.
        """
        raise ValueError
def clear() -> None:
    """Clear.

    Returns:
        Nothing.
    """
def _private(x: int) -> int:
    return x
def silent(x: int) -> None:
    pass
'''


def test_what_is_lacking_is_found() -> None:
    tree = ast.parse(BAD)
    assert list(problems(tree, Package({Path("bad.py"): tree}))) == [
        "Base: no docstring",
        "Derived.grow: Args lacks to",
        "Derived.grow: there is no parameter until",
        "Derived.grow: no Returns",
        "Derived.grow: no Raises",
        "clear: Returns of what returns nothing",
        "silent: no docstring",
    ]
