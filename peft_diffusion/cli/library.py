"""``peft-diffusion library``: adapters by what they teach."""

import json
from typing import Any

from ..core.errors import UserError
from ..library.library import Library, Listed
from ..library.ranking import Found
from ..library.settings import LibraryAddConfig, LibraryListConfig, LibraryRemoveConfig, LibrarySearchConfig
from .flags import reads
from .progress import GenerationConsole, show_notes
from .terminal import say


@reads(LibraryAddConfig)
def add_adapters(config: LibraryAddConfig) -> None:
    """Add adapter files and folders to a library, or bring it up to date.

    Of each file the triggers, tags, captions and example pictures are kept that it, or what stands beside it, tells. What
    is as it was is not read again.
    """
    with Library(config.library) as library, GenerationConsole("library") as console:
        made = library.add(config.paths, encoder=config.encoder, observers=[console])
    for line in made.lines():
        say(line)
    if config.paths and made.left_out and not (made.added or made.changed or made.moved or made.unchanged or made.copies):
        raise UserError("none of the files could be added")


@reads(LibrarySearchConfig)
def search_adapters(config: LibrarySearchConfig) -> None:
    """Find the adapters of a library that a prompt or a description asks for, and say why."""
    with Library(config.library, make=False) as library:
        found = library.search(
            config.query, base=config.base, limit=config.limit, words_only=config.words, observers=[show_notes]
        )
    if config.json:
        say(json.dumps([_plain(one) for one in found], indent=2, ensure_ascii=False))
        return
    _show_found(found, config.query)


@reads(LibraryListConfig)
def list_adapters(config: LibraryListConfig) -> None:
    """List the adapters of a library, and which of their files moved, changed or are gone."""
    with Library(config.library, make=False) as library:
        listed = library.entries()
        title = f"{library.path}, embedded by {library.encoder}"
    if config.json:
        told = [{**json.loads(one.entry.to_json()), "status": one.status or "there"} for one in listed]
        say(json.dumps(told, indent=2, ensure_ascii=False))
        return
    _show_list(listed, title)


@reads(LibraryRemoveConfig)
def remove_adapters(config: LibraryRemoveConfig) -> None:
    """Take adapters out of a library; their files stay."""
    with Library(config.library, make=False) as library:
        for entry in library.remove(config.names, missing=config.missing):
            say(f"taken out: {entry.path}")


def _show_found(found: list[Found], query: str) -> None:
    from rich.text import Text

    from .screen import Screen

    screen = Screen()
    for one in found:
        for_base = one.entry.base.get("name") or one.entry.made_for or "a base that it does not tell"
        head = f"{one.score:.2f}  {one.entry.name}  (for {for_base}, at strength {one.strength:g})"
        screen.print(Text(head, style="bold"), soft_wrap=True)
        for line in (*one.because, str(one.entry.path)):
            screen.print(Text(f"      {line}"), soft_wrap=True)
        if one.status:
            told = "is not there any more" if one.status == "missing" else "was changed since: library add reads it again"
            screen.print(Text(f"      the file {told}", style="yellow"), soft_wrap=True)
    if not found:
        say(f'no adapter of the library has to do with "{query}"')


def _show_list(listed: list[Listed], title: str) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    from .screen import Screen

    named = Text(title, style="bold")
    table = Table(title=named, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    for heading in ("adapter", "for", "triggers", "shows", "captions", "pictures", "file"):
        table.add_column(heading, justify="right" if heading in ("captions", "pictures") else "left", overflow="fold")
    for one in listed:
        entry = one.entry
        state = f" ({one.status})" if one.status else ""
        table.add_row(
            Text(entry.name, style="yellow" if state else ""),
            Text(entry.base.get("name") or entry.made_for or "not told"),
            Text(", ".join(entry.triggers[:3])),
            Text(", ".join(entry.shown()[:6])),
            str(len(entry.captions) or len(entry.tags)),
            str(len(entry.examples) + entry.thumbnail),
            Text(f"{entry.path}{state}", style="yellow" if state else ""),
        )
    Screen().show(table)


def _plain(one: Found) -> dict[str, Any]:
    """What was found, as JSON values."""
    return {
        "name": one.entry.name,
        "path": str(one.entry.path),
        "score": round(one.score, 4),
        "strength": one.strength,
        "words": round(one.words, 4),
        "meaning": round(one.meaning, 4),
        "called": one.called,
        "because": list(one.because),
        "trigger": one.entry.trigger,
        "made_for": one.entry.made_for,
        "families": list(one.entry.families),
        "sha256": one.entry.sha256,
        "status": one.status or "there",
    }
