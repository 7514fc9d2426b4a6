"""A method is declared in its own module: nothing else knows one by name, and its declaration needs no torch."""

import ast
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
from making import environment

from peft_diffusion import methods
from peft_diffusion.core.errors import UnknownMethodError, UserError
from peft_diffusion.core.method import METHODS, Method, Rates

ROOT = Path(__file__).parent.parent
OWN = [one for one in methods.known().values() if one.plugin() is None]
NAMES = {one.name for one in OWN}
CLASSES = {one.__name__ for one in OWN}
SUFFIXES = {suffix for one in OWN for suffix in (*one.suffixes, *one.aliases)}

WORDS = {"tokens", "prompt", "prefix"}
"""Names that are English words too: they are a method's where they are compared, looked up, or stand beside another's."""
LOOK_UPS = {"find", "method", "get"}
PLAIN_SUFFIXES = {"alpha", "weight", "rescale"}  # English words, which are not looked for

# Scripts that measure one method against the same one in other libraries, and one that writes files as those do.
OF_OTHER_PROGRAMS = {"compare_text.py", "training_sides.py", "benchmark_train_cpu.py", "benchmark_train.py",
                     "benchmark_tools.py", "benchmark_generate.py", "check_adapters.py", "fuzz.py"}  # fmt: skip
# What other programs call things and which tensors they read, written from their sources: our methods could not be asked.
WORDS_OF_OTHERS = {"core/other_names.py", "tools/key_maps.py", "tools/reopened.py",
                   "training/settings/others/kohya.py", "training/settings/others/kohya_data.py",
                   "training/settings/others/onetrainer.py", "training/settings/others/onetrainer_data.py"}  # fmt: skip


def sources() -> list[Path]:
    package = ROOT / "peft_diffusion"
    found = [path for path in package.rglob("*.py") if path.relative_to(package).parts[0] != "methods"]
    found = [path for path in found if path.relative_to(package).as_posix() not in WORDS_OF_OTHERS]
    return sorted([*found, *(path for path in (ROOT / "scripts").glob("*.py") if path.name not in OF_OTHER_PROGRAMS)])


def alone(tree: ast.Module) -> set[int]:
    """The texts that stand alone, as docstrings do."""
    return {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}


def texts(nodes: Iterable[ast.AST | None]) -> set[str]:
    """The texts among some nodes."""
    return {one.value for one in nodes if isinstance(one, ast.Constant) and isinstance(one.value, str)}


def said(node: ast.AST) -> set[str]:
    """The words among method names that mean methods in this node."""
    if isinstance(node, ast.Compare):
        return texts(part for side in (node.left, *node.comparators) for part in ast.walk(side)) & WORDS
    if isinstance(node, ast.Subscript):
        looked_in = ast.unparse(node.value)
        return texts([node.slice]) & WORDS if "METHODS" in looked_in or "methods" in looked_in else set()
    if isinstance(node, ast.Call):
        function = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        return texts(node.args) & WORDS if function in LOOK_UPS else set()
    together = [*node.keys, *node.values] if isinstance(node, ast.Dict) else []
    together = list(node.elts) if isinstance(node, ast.Tuple | ast.List | ast.Set) else together
    found = texts(together) & NAMES
    return found if len(found) > 1 else set()


def named(tree: ast.Module) -> Iterator[str]:
    """What a module says of methods: their names, tensors, classes and modules."""
    docstrings = alone(tree)
    spoken = texts(node for node in ast.walk(tree) if id(node) not in docstrings)
    yield from spoken & (NAMES - WORDS | SUFFIXES - PLAIN_SUFFIXES)
    for node in ast.walk(tree):
        yield from said(node)
        if isinstance(node, ast.Name | ast.Attribute):
            yield from {node.id if isinstance(node, ast.Name) else node.attr} & CLASSES
        if isinstance(node, ast.ImportFrom) and node.module:
            _, _, inner = f".{node.module}".partition(".methods.")
            one = inner and inner.split(".")[0] not in {"shared", "making"}  # mathematics, and what is asked for a method
            yield from [f"import of methods.{inner}"] if one else []
            if node.module.split(".")[-1] == "methods":
                yield from (f"import of methods.{one.name}" for one in node.names if one.name in NAMES | CLASSES)


@pytest.mark.slow
@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_else_names_a_method(path: Path) -> None:
    assert not set(named(ast.parse(path.read_text("utf-8"))))


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("x = 'lora'", "lora"),
        ("x == 'prompt'", "prompt"),
        ("x in ('text', 'prompt')", "prompt"),
        ("METHODS['tokens']", "tokens"),
        ("methods.find('tokens')", "tokens"),
        ("x = {'tokens': 1e-2, 'prompt': 1e-3}", "tokens"),
        ("x = ('tokens', 'lora')", "tokens"),
        ("x = {'hada_w1_a': 1}", "hada_w1_a"),
        ("isinstance(x, Tokens)", "Tokens"),
        ("isinstance(x, tokens.Tokens)", "Tokens"),
        ("from ..methods.lora import Lora", "import of methods.lora"),
        ("from peft_diffusion.methods.lora.adapter import fresh_pair", "import of methods.lora.adapter"),
        ("from ..methods import lora", "import of methods.lora"),
    ],
)
def test_the_search_finds_what_it_looks_for(code: str, expected: str) -> None:
    assert expected in set(named(ast.parse(code)))


@pytest.mark.parametrize(
    "code",
    [
        'def f():\n    """The lora."""\n    from .. import methods\n    return methods.known()',
        "x = {'prompt': 3, 'negative': 4}",
        "targets.match(part, 'tokens')",
        "from ..core.weight_change import Change",
        "x['prompt'] = 3",
    ],
)
def test_the_search_leaves_other_things_alone(code: str) -> None:
    assert not set(named(ast.parse(code)))


def test_declarations_import_no_torch() -> None:
    code = (
        "import sys; from peft_diffusion import methods;"
        "[methods.method(name) for name in methods.known()]; methods.lines(); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, env=environment()).returncode == 0


@pytest.mark.parametrize("method", OWN, ids=lambda method: method.name)
def test_declarations_hold_together(method: type[Method]) -> None:
    for part in (method.constants, method.fillers, method.ranked, set(method.aliases.values())):
        assert part <= method.suffixes
    assert method.recognizes(method.suffixes)
    assert not method.recognizes(frozenset())
    assert methods.lines()[method.name].endswith(".")
    assert method.read_hyper_parameters({}, {}) is None
    shapes, scalars = dict.fromkeys(method.suffixes, (2, 2)), dict.fromkeys(method.constants, 1.0)
    assert method.read_hyper_parameters(shapes, scalars) is not None


def test_rates() -> None:
    own = Rates(factor=3.0, own=0.5, own_small=0.25, text=0.125, text_small=0.0625)
    assert Rates(factor=3.0).on_pictures(2.0, small=True) == 6.0
    assert [own.on_pictures(2.0, small=small) for small in (False, True)] == [0.5, 0.25]
    assert Rates(own=0.5).on_pictures(2.0, small=True) == 0.5
    assert [own.on_text(2.0, small=small) for small in (False, True)] == [0.125, 0.0625]
    assert [Rates(text=0.5).on_text(2.0, small=small) for small in (False, True)] == [0.5, 2.0]


def test_a_name_that_is_taken_is_refused() -> None:

    before = dict(METHODS)
    with pytest.raises(UserError, match=r"there is a method 'lora' already, of peft_diffusion\.methods\.lora"):

        class Other(Method, name="lora"):
            pass

    assert before == METHODS


def test_a_method_that_there_is_not_is_named() -> None:

    with pytest.raises(UnknownMethodError, match="there is no method 'nope'; there are: bitfit, bottleneck, dora") as told:
        methods.find("nope")
    assert told.value.name == "nope"
    with pytest.raises(UserError, match="method lora has no ranks; it has: alpha, b_rate_ratio"):
        methods.method("lora", ranks=3)
