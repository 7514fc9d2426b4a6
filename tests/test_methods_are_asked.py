"""A method is declared in its own module: nothing else knows one by name, and its declaration needs no torch."""

import ast
import subprocess
import sys
from collections.abc import Iterator
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

# Methods are named after English words, too. Where such a word stands for something else, and for what.
ELSEWHERE = {
    ("peft_diffusion/bases/words.py", "tokens"): "a key of the tokenizers library's JSON",
    ("peft_diffusion/cli/inspect.py", "tokens"): "how many tokens of text were learned from",
    ("peft_diffusion/core/targets.py", "tokens"): "the target that is the token embedding",
    ("peft_diffusion/data/caption_files.py", "prompt"): "a column of a file of captions",
    ("peft_diffusion/formats/layouts/embedding.py", "tokens"): "the target that is the token embedding",
    ("peft_diffusion/formats/layouts/embedding.py", "tokens_vectors"): "what embeddings of other programs become",
    ("peft_diffusion/formats/layouts/embedding.py", "tokens_words"): "what embeddings of other programs become",
    ("peft_diffusion/generation/recipe.py", "prompt"): "a field of a recipe",
    ("peft_diffusion/generation/text_settings.py", "tokens"): "a unit",
    ("peft_diffusion/training/settings/text.py", "tokens"): "a unit",
    ("peft_diffusion/training/texts.py", "tokens"): "how many tokens of text were learned from",
}
PLAIN_SUFFIXES = {"alpha", "weight", "rescale"}  # which are English words, and are not looked for

# Scripts that measure one method against the same one in other libraries.
COMPARISONS = {"compare_text.py", "training_sides.py", "benchmark_train_cpu.py", "benchmark_train.py"}


def sources() -> list[Path]:
    package = ROOT / "peft_diffusion"
    found = [path for path in package.rglob("*.py") if path.relative_to(package).parts[0] != "methods"]
    return sorted([*found, *(path for path in (ROOT / "scripts").glob("*.py") if path.name not in COMPARISONS)])


def texts(tree: ast.Module) -> Iterator[str]:
    """The texts of a module, without those that stand alone, as docstrings do."""
    alone = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in alone:
            yield node.value


def named(tree: ast.Module) -> Iterator[str]:
    """What a module says of methods: their names, tensors, classes and modules."""
    yield from (text for text in texts(tree) if text in NAMES or text in SUFFIXES - PLAIN_SUFFIXES)
    for node in ast.walk(tree):
        if isinstance(node, ast.Name | ast.Attribute):
            found = node.id if isinstance(node, ast.Name) else node.attr
            yield from {found} & CLASSES
        if isinstance(node, ast.ImportFrom) and node.module:
            _, _, inner = f".{node.module}".partition(".methods.")
            yield from [f"import of methods.{inner}"] if inner else []
            if node.module.split(".")[-1] == "methods" or (node.level and not node.module):
                yield from (f"import of methods.{one.name}" for one in node.names if one.name in NAMES | CLASSES)


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_else_names_a_method(path: Path) -> None:
    place = path.relative_to(ROOT).as_posix()
    found = {name for name in named(ast.parse(path.read_text("utf-8"))) if (place, name) not in ELSEWHERE}
    assert not found


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("x = 'lora'", "lora"),
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
    assert not set(named(ast.parse('def f():\n    """The lora."""\n    from .. import methods\n    return methods.known()')))


def test_what_stands_elsewhere_is_there() -> None:
    for (place, word), meaning in ELSEWHERE.items():
        assert word in set(texts(ast.parse((ROOT / place).read_text("utf-8")))), (place, meaning)


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
    assert method.told({}, {}) is None
    assert method.told(dict.fromkeys(method.suffixes, (2, 2)), dict.fromkeys(method.constants, 1.0)) is not None


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
