"""The documents say what is there: links, pictures, commands, flags, code, files and the pages of the site."""

import ast
import functools
import pkgutil
import re
import runpy
import shlex
import tomllib
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch

import peft_diffusion as pd
from peft_diffusion import methods
from peft_diffusion.cli import app as application
from peft_diffusion.cli.runs import RunsConfig
from peft_diffusion.core import merge, plugins, settings_file, site, target_tables, targets
from peft_diffusion.core import method as core_method
from peft_diffusion.core.settings import Settings, describe, pick, settings_of
from peft_diffusion.generation.settings import DemoConfig, InspectConfig
from peft_diffusion.library.settings import (
    LibraryAddConfig,
    LibraryListConfig,
    LibraryRemoveConfig,
    LibrarySearchConfig,
)
from peft_diffusion.serve.settings import ServeConfig
from peft_diffusion.tools.tool_settings import MetadataGetConfig, MetadataRemoveConfig, MetadataSetConfig
from peft_diffusion.training.run import next_command
from peft_diffusion.training.settings.shared import FindLr

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
GENERATED = [DOCS / "reference" / name for name in ("settings.md", "commands.md")]  # by docs/hooks.py
COMMANDS: dict[tuple[str, ...], tuple[type[Settings], ...]] = {
    ("train",): (pd.TrainConfig, FindLr),
    ("caption",): (pd.CaptionConfig,),
    ("generate",): (pd.GenerateConfig,),
    ("blend",): (pd.BlendConfig,),
    ("grid",): (pd.GridConfig,),
    ("evaluate",): (pd.EvaluateConfig,),
    ("serve",): (ServeConfig,),
    ("runs",): (RunsConfig,),
    ("runs", "export"): (pd.ExportConfig,),
    ("import-config",): (pd.ImportConfig,),
    ("inspect",): (InspectConfig,),
    ("merge",): (pd.MergeConfig,),
    ("extract",): (pd.ExtractConfig,),
    ("resize",): (pd.ResizeConfig,),
    ("strength",): (pd.StrengthConfig,),
    ("split",): (pd.SplitConfig,),
    ("join",): (pd.JoinConfig,),
    ("rename-trigger",): (pd.RenameTriggerConfig,),
    ("metadata", "get"): (MetadataGetConfig,),
    ("metadata", "set"): (MetadataSetConfig,),
    ("metadata", "remove"): (MetadataRemoveConfig,),
    ("convert",): (pd.ConvertConfig,),
    ("demo",): (DemoConfig,),
    ("compose", "train"): (pd.ComposeTrainConfig,),
    ("library", "add"): (LibraryAddConfig,),
    ("library", "search"): (LibrarySearchConfig,),
    ("library", "list"): (LibraryListConfig,),
    ("library", "remove"): (LibraryRemoveConfig,),
    ("text", "train"): (pd.TextTrainConfig, FindLr),
    ("text", "generate"): (pd.TextGenerateConfig,),
}
EVERYWHERE = {"--config", "--plugin", "--debug", "--help", "--version"}
# Flags that a sentence names without the script, and options of a line of prompts.
OF_SCRIPTS = {
    "docs/benchmarks.md": {"--methods"},
    "docs/guides/prompts.md": {"--n", "--w", "--h", "--d", "--l", "--s"},
}
OF_DIFFUSERS = {"train_text_to_image_lora.py", "train_dreambooth_lora.py"}
IN_A_RUN = {"runs/"}
every_page = pytest.mark.parametrize("page", PAGES, ids=NAMES)


# What is in a page.


def blocks(page: Path) -> Iterator[tuple[str, str]]:
    """The fenced blocks: language and text."""
    for match in re.finditer(r"^```(\w*)[^\n]*\n(.*?)^```$", page.read_text("utf-8"), re.MULTILINE | re.DOTALL):
        yield match[1], match[2]


def prose(page: Path) -> str:
    """The text without fenced blocks."""
    return re.sub(r"^```.*?^```$", "", page.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)


def spans(text: str) -> list[str]:
    """What stands in backticks, in one line each."""
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", text)]


def links(page: Path) -> list[str]:
    """The targets of links and pictures that are no addresses of the web."""
    found = re.findall(r"\]\(([^)\s]+)\)|src=\"([^\"]+)\"", prose(page))
    return [one for pair in found for one in pair if one and not re.match(r"[a-z]+:", one)]


def anchors(page: Path) -> set[str]:
    """What a link can name of a page, as python-markdown makes it from headings."""
    found = set()
    for heading in re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE):
        plain = re.sub(r"[^\w\s-]", "", heading.replace("`", "")).strip().lower()
        found.add(re.sub(r"[-\s]+", "-", plain))
    return found


def commands(page: Path) -> Iterator[list[str]]:
    """The words after each ``peft-diffusion``, in blocks and in backticks."""
    lines = [line for _, text in blocks(page) for line in text.replace("\\\n", " ").splitlines()]
    for line in [*lines, *spans(prose(page))]:
        for part in line.split("&&"):
            words = shlex.split(part, comments=True) if re.search(r"\bpeft-diffusion ", part) else []
            if "peft-diffusion" in words:
                yield words[words.index("peft-diffusion") + 1 :]


# What is looked for.


@every_page
def test_links_and_pictures_lead_somewhere(page: Path) -> None:
    for link in links(page):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if target not in GENERATED:
            assert target.exists(), link
            assert not anchor or anchor in anchors(target), f"{link}: there are {sorted(anchors(target))}"


@every_page
def test_commands_can_be_typed(page: Path) -> None:
    for words in commands(page):
        assert isinstance(parse(words), tuple)  # it raises for what cannot be typed


def parse(words: list[str]) -> tuple[Settings, ...]:
    """The settings that a command line makes, without running it. Raises for a flag or a value that there is not."""
    _, meta, *_ = application.app.meta.parse_args(words, exit_on_error=False, print_error=False)
    tokens = list(meta.args)
    if not tokens:
        return ()
    if "config" in meta.arguments:  # which is not there; say what it would
        tokens.append("pictures")
    _, bound, *_ = application.app.parse_args(tokens, exit_on_error=False, print_error=False)
    command = max(
        (name for name in COMMANDS if tuple(tokens[: len(name)]) == name), key=len
    )  # runs export is no run of runs
    given = next(iter(bound.arguments.values()), None)
    return () if given is None else tuple(pick(kind, given) for kind in COMMANDS[command])


@pytest.mark.parametrize("prompt", ["a red cat", "- one, it's two", "--recipe", "-n"])
def test_the_command_that_a_run_proposes_can_be_typed_whatever_the_words(prompt: str) -> None:
    line = next_command("generate", prompt, {"adapter": "my ink.safetensors"}, ())
    (made,) = parse(shlex.split(line)[1:])
    assert isinstance(made, pd.GenerateConfig)
    assert made.prompts == (prompt,) and made.adapter == ("my ink.safetensors",)


def test_a_command_that_is_wrong_is_found() -> None:
    for words in (["train", "pictures", "--colour", "red"], ["paint", "a cat"], ["train", "pictures", "--loss", "l7"]):
        with pytest.raises(Exception, match=r"colour|paint|l7"):
            parse(words)


@functools.cache
def flags() -> set[str]:
    """The flags of all commands."""
    kinds = [kind for several in COMMANDS.values() for kind in several]
    told = [
        (row["flags"], one.setting.flag)
        for kind in kinds
        for row, one in zip(describe(kind), settings_of(kind), strict=True)
    ]
    negative = {f"--no-{names[0][2:]}" for names, flag in told if flag.negative}
    return EVERYWHERE | negative | {name for names, _ in told for name in names}


@every_page
def test_flags_are_flags(page: Path) -> None:
    text = prose(page)
    if page.name.startswith("from-"):  # the left column of a table has those of another program
        text = re.sub(r"^\| (?:`[^`]*`|[^|`])*\|", "|", text, flags=re.MULTILINE)
    allowed = flags() | OF_SCRIPTS.get(str(page.relative_to(ROOT)), set())
    for span in spans(text):
        program, _, own = span.rpartition("peft-diffusion")
        script = ROOT / span.split()[0]
        named = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", own))
        if script.suffix == ".py" and script.exists():
            assert all(f'"{flag}"' in script.read_text("utf-8") for flag in named), span
        elif span.startswith("--") or program or not named:
            assert named <= allowed, span


@every_page
def test_files_that_are_named_are_there(page: Path) -> None:
    rooms = [ROOT, *(path for path in (ROOT / "peft_diffusion", *(ROOT / "peft_diffusion").rglob("*")) if path.is_dir())]
    named = r"[\w-]+(/[\w-]+)*\.py|[a-z_]+(/[a-z_]+)*/|(tests|scripts|docs|samples|examples)/[\w./-]+"
    for span in spans(prose(page)):
        path = span.split()[0]
        if re.fullmatch(named, path) and path not in OF_DIFFUSERS | IN_A_RUN:
            assert any((room / path).exists() for room in rooms), span


@every_page
def test_values_of_flags_are_among_the_choices(page: Path) -> None:
    choices = {
        flag: row["choices"]
        for kinds in COMMANDS.values()
        for kind in kinds
        for row in describe(kind)
        for flag in row["flags"]
    }
    options = {field.name for method in methods.known().values() for field in fields(method)}
    for span in spans(prose(page)):
        flag, _, value = span.partition(" ")
        if choices.get(flag) and value and " " not in value:
            assert set(value.split("|")) <= set(choices[flag]), span
        for option in re.findall(r"--option ([a-z]\w*)=", span):
            assert option in options, span


def test_targets_are_those_of_the_code() -> None:
    (told,) = re.findall(
        r"^## Targets\n\n(.+?); or a regular", (DOCS / "methods.md").read_text("utf-8"), re.MULTILINE | re.DOTALL
    )
    known = {name for table in target_tables.TABLES.values() for name in table.targets} | set(targets.KINDS)
    assert set(spans(told)) == known


def test_methods_are_those_of_the_code() -> None:
    own = {name for name, method in methods.known().items() if method.plugin() is None}
    rows = re.findall(r"^\| `(\w+)` \| .*https://", (DOCS / "methods.md").read_text("utf-8"), re.MULTILINE)
    assert sorted(rows) == sorted(own)


@every_page
def test_python_names_what_there_is(page: Path) -> None:
    for code in (text for language, text in blocks(page) if language == "python"):
        tree = ast.parse(code)
        imported = {"pd": "peft_diffusion"}
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("peft_diffusion"):
                imported |= {name.name: f"{node.module}.{name.name}" for name in node.names}
        assert all(exists(name) for name in imported.values()), imported
        for node in ast.walk(tree):
            match node:
                case ast.Attribute(value=ast.Name(name), attr=attribute) if name in imported:
                    assert exists(f"{imported[name]}.{attribute}"), f"{name}.{attribute}"
    packages = "|".join(path.name for path in (ROOT / "peft_diffusion").iterdir() if path.is_dir())
    for span in spans(prose(page)):
        if match := re.match(r"pd\.(\w+)", span):
            assert match[1] in pd.__all__, span
        if match := re.match(rf"(?:peft_diffusion\.)?((?:{packages})(?:\.\w+)+)(?:\(|$)", span):
            assert match[1].endswith(".py") or span in plugins.GROUPS or exists(f"peft_diffusion.{match[1]}"), span


def test_the_method_of_the_documents_keeps_its_word(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(core_method, "METHODS", dict(core_method.METHODS))
    core_method.METHODS.pop("gain", None)  # that of another test
    code = next(text for language, text in blocks(DOCS / "extending.md") if language == "python")
    made: dict[str, Any] = {"__name__": "docs_gain"}
    exec(compile(code, "extending.md", "exec"), made)
    model, x = torch.nn.Sequential(torch.nn.Linear(3, 2)), torch.randn(4, 3)
    before = model(x)
    assert site.attach(model, "a", made["Gain"](), "all-linear") == ["0"]
    assert torch.equal(model(x), before), "fresh, it changes nothing"
    (adapter,) = site.adapters(model, "a").values()
    adapter.get_parameter("gain").data.copy_(torch.tensor([1.0, -0.5]))
    changed = model(x)
    assert torch.allclose(changed, before * torch.tensor([2.0, 0.5]))
    merge.merge(model)
    assert torch.allclose(model(x), changed)


def exists(name: str) -> bool:
    """Whether there is a module of that name, or something in one."""
    try:
        pkgutil.resolve_name(name)
    except (ImportError, AttributeError):
        return False
    return True


def test_the_errors_that_are_explained_are_those_of_the_code() -> None:
    files = (path.read_text("utf-8") for path in (ROOT / "peft_diffusion").rglob("*.py"))
    source = re.sub(r'"\n *f?"', "", "\n".join(files))  # of texts that go over several lines
    for heading in re.findall(r"^\*\*(.+)\*\*$", (DOCS / "faq.md").read_text("utf-8"), re.MULTILINE):
        for part in re.split(r"\.\.\.|'[^']*'|\d+|\(\w+\)|\bcuda\b", heading):
            words = part.strip(" ,;:()")
            assert len(words.split()) < 2 or words in source, f"{heading}: {words}"


@every_page
def test_settings_files_can_be_read(page: Path, tmp_path: Path) -> None:
    for number, (_, text) in enumerate(block for block in blocks(page) if block[0] == "toml"):
        tomllib.loads(text)
        path = tmp_path / f"{number}.toml"
        path.write_text(text if "folder" in text else f'folder = ["pictures"]\n{text}', "utf-8")
        assert settings_file.load(pd.TrainConfig, path).block


def test_the_site_lists_every_page() -> None:
    _, _, nav = (ROOT / "mkdocs.yml").read_text("utf-8").partition("\nnav:\n")
    pages = [str(page.relative_to(DOCS)) for page in [*PAGES[2:], *GENERATED]]
    assert sorted(re.findall(r"[\w/-]+\.md", nav)) == sorted(pages)


def test_the_references_list_every_flag() -> None:
    pytest.importorskip("mkdocs")
    made = runpy.run_path(str(DOCS / "hooks.py"))
    pages: list[str] = [made["commands_page"](), made["settings_page"]()]
    for command, kinds in COMMANDS.items():
        own = pages[0].partition(f"\n## peft-diffusion {' '.join(command)}\n")[2].partition("\n## ")[0]
        rows = [row for kind in kinds for row in describe(kind)]
        assert {flag for row in rows for flag in row["flags"]} == set(re.findall(r"`(-[\w-]+)`", _first_cells(own)))
        for kind in kinds:
            own = pages[1].partition(f"\n## {kind.__name__}\n")[2].partition("\n## ")[0]
            assert {row["name"] for row in describe(kind)} == set(re.findall(r"`(\w+)`", _first_cells(own)))


def _first_cells(page: str) -> str:
    """The first column of all tables."""
    return "\n".join(re.findall(r"^\| (`[^|]+) \|", page, re.MULTILINE))


def test_the_readme_is_short() -> None:
    assert len(PAGES[0].read_text("utf-8").splitlines()) <= 120


def test_every_command_is_shown() -> None:
    assert {" ".join(name) for name in COMMANDS} == {
        *application.COMMANDS,
        *(f"runs {name}" for name in application.RUNS_COMMANDS),
        *(f"text {name}" for name in application.TEXT_COMMANDS),
        *(f"metadata {name}" for name in application.METADATA_COMMANDS),
        *(f"compose {name}" for name in application.COMPOSE_COMMANDS),
        *(f"library {name}" for name in application.LIBRARY_COMMANDS),
    }
    typed = [words for page in PAGES for words in commands(page)]
    assert all(any(tuple(words[: len(name)]) == name for words in typed) for name in COMMANDS)
