"""What runs under one version of Python and not under another that is supported."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp)
Function = ast.FunctionDef | ast.AsyncFunctionDef


def targets(comprehension: ast.ListComp | ast.SetComp | ast.DictComp) -> set[str]:
    """The names that a comprehension gives to what it goes through."""
    names = (one for part in comprehension.generators for one in ast.walk(part.target))
    return {one.id for one in names if isinstance(one, ast.Name)}


def names_read(node: ast.AST, own: frozenset[str] = frozenset()) -> Iterator[ast.Name]:
    """The names that are read inside, but for those that a comprehension around them gave."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Name) and isinstance(child.ctx, ast.Load) and child.id not in own:
            yield child
        yield from names_read(child, own | targets(child) if isinstance(child, COMPREHENSIONS) else own)


def hidden(source: str) -> list[tuple[int, str]]:
    """Lines and names that a function reads of its module, and that a comprehension of the same function gives."""
    found = []
    for function in (one for one in ast.walk(ast.parse(source)) if isinstance(one, Function)):
        inside = list(ast.walk(function))
        given = [(one, targets(one)) for one in inside if isinstance(one, COMPREHENSIONS)]
        if not given:
            continue
        inner = {id(name) for one, _ in given for part in one.generators for name in ast.walk(part.target)}
        stored = (one for one in inside if isinstance(one, ast.Name) and isinstance(one.ctx, ast.Store))
        own = {one.id for one in stored if id(one) not in inner} | {one.arg for one in inside if isinstance(one, ast.arg)}
        names = set().union(*(names for _, names in given)) - own
        found += [(one.lineno, one.id) for one in names_read(function) if one.id in names]
    return found


@pytest.mark.parametrize("folder", ["peft_diffusion", "scripts", "examples", "tests"])
def test_no_comprehension_gives_a_name_that_its_function_reads_of_the_module(folder: str) -> None:
    """Python 3.12 runs comprehensions in their function, and up to 3.12.3 at least looks for such a name there in vain."""
    found = {path.name: lines for path in (ROOT / folder).rglob("*.py") if (lines := hidden(path.read_text("utf-8")))}
    assert not found


def test_such_a_name_is_found() -> None:
    read = (
        "def f(many):\n    a = [2 * times for times in many]\n    return a, [[times(one) for one in many] for _ in many]\n"
    )
    assert hidden(read) == [(3, "times")]
    assert not hidden(read.replace("2 * times for times", "2 * one for one"))
    assert not hidden(read.replace("def f(many)", "def f(many, times)"))
