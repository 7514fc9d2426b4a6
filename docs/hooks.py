"""Makes the pages that follow from the code: the references of settings and of commands."""

import html
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from peft_diffusion.cli.commands import ROOT, Entry
from peft_diffusion.core.settings import Settings, describe
from peft_diffusion.training.settings.datasets import Dataset

_EVERYWHERE = """Every command takes `--config FILE.toml`, whose keys are the names of its flags without dashes; flags
override it. `--debug` shows where in the program an error came from, `--help` lists the flags, and `--plugin MODULE` brings
in methods, families of bases and layouts of others."""


def _listed(entry: Entry, before: str = "") -> Iterator[tuple[str, Entry]]:
    """The commands below an entry, by all their names, and those below each."""
    for name, one in entry.below.items():
        if one.target is not None:
            yield f"{before}{name}", one
        yield from _listed(one, f"{before}{name} ")


LISTED: Mapping[str, Entry] = dict(_listed(ROOT))
SETTINGS: Mapping[str, tuple[type[Settings], ...]] = {
    name: command.kinds for name, one in LISTED.items() if (command := one.command()) is not None
}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages.

    Args:
        files: Those of the folder.
        config: That of the site.

    Returns:
        The same, with more in it.
    """
    for name, text in (("settings", settings_page()), ("commands", commands_page())):
        files.append(File.generated(config, f"reference/{name}.md", content=text))
    return files


def settings_page() -> str:
    """Describe every dataclass of settings, group by group.

    Returns:
        Markdown.
    """
    parts = [
        "# Settings\n\nThe dataclasses of settings, as Python and TOML take them; each command's flags have the same names."
        " A value is checked and brought to its type when the dataclass is made, in the same words as on the command line.\n"
    ]
    commands: dict[type[Settings], list[str]] = {}
    for command, kinds in SETTINGS.items():
        for kind in kinds:
            commands.setdefault(kind, []).append(f"`peft-diffusion {command}`")
    for kind, names in commands.items():
        parts.append(f"## {kind.__name__}\n\nWhat {' and '.join(names)} {'are' if len(names) > 1 else 'is'} told.\n")
        parts += _tables(kind)
    parts.append("## Dataset\n\nA folder with settings of its own, a `[[dataset]]` of a `TrainConfig`.\n")
    parts += _tables(Dataset)
    return "\n".join(parts)


def _tables(kind: type[Settings]) -> list[str]:
    """The settings of a class, a table a group."""
    parts = []
    for group, rows in _groups(describe(kind)):
        parts.append(f"### {group} {{ #{_anchor(kind.__name__, group)} }}\n")
        parts.append("| setting | type | default | takes | |\n| --- | --- | --- | --- | --- |")
        parts += [_row(f"`{one['name']}`", one) for one in rows]
        parts.append("")
    return parts


def commands_page() -> str:
    """Describe every command with its flags.

    Returns:
        Markdown.
    """
    parts = [f"# Commands\n\n{_EVERYWHERE}\n"]
    for command, kinds in SETTINGS.items():
        rows = [row for kind in kinds for row in describe(kind)]
        needed = [one["name"].upper() for one in rows if one["required"]]
        parts.append(f"## peft-diffusion {command}\n\n{LISTED[command].help}\n")
        parts.append(f"```\npeft-diffusion {command} {' '.join([*needed, '[OPTIONS]'])}\n```\n")
        parts.append("| flag | type | default | takes | |\n| --- | --- | --- | --- | --- |")
        parts += [_row(" ".join(f"`{flag}`" for flag in one["flags"]), one) for one in rows]
        parts.append("")
    return "\n".join(parts)


def _groups(rows: Iterable[Mapping[str, Any]]) -> list[tuple[str, list[Mapping[str, Any]]]]:
    found: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        found.setdefault(row["group"] or "Parameters", []).append(row)
    return list(found.items())


def _anchor(kind: str, group: str) -> str:
    return f"{kind}-{group}".lower().replace(" ", "-")


def _row(name: str, one: Mapping[str, Any]) -> str:
    """One line of a table."""
    default = "required" if one["required"] else "" if one["default"] in (None, [], "") else f"`{one['default']}`"
    kind = f"{one['type']}{', several' if one['several'] else ''}"
    said = html.escape(one["help"], quote=False).replace("|", "\\|").replace("{", "&#123;")
    cells = (name, kind, default, _taken(one), said)
    return f"| {' | '.join(cells)} |"


def _taken(one: Mapping[str, Any]) -> str:
    """Choices or range, in words."""
    if one["choices"]:
        return ", ".join(f"`{choice}`" for choice in one["choices"] if choice is not None)
    limits = one["range"]
    if limits is None:
        return one["unit"] or ""
    low = None if limits["low"] is None else f"{'from' if limits['low_included'] else 'above'} {limits['low']:g}"
    high = None if limits["high"] is None else f"{'to' if limits['high_included'] else 'below'} {limits['high']:g}"
    return " ".join([*(part for part in (low, high) if part), *([one["unit"]] if one["unit"] else [])])
