"""What a library knows of an adapter file. Imports no torch: of a file the header is read, and all bytes for its digest."""

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Self

from ..core.checksums import of_text
from ..core.errors import UserError
from ..core.files import files_below, stamp_of, weights_sha256
from ..core.parsing import json_value, number, refusing
from ..data.captions import split_tags
from ..formats import plan
from ..formats.container import title
from ..formats.inspection import tags_of, triggers_of
from ..formats.metadata import base_of
from ..formats.origin import families_of, origin
from ..formats.planning import Plan
from ..formats.sidecars import Sidecar, read_sidecars, sidecars_of
from .pictures import examples_of, prompts_of
from .terms import terms_of

_MOST_TAGS = 200
_MOST_CAPTIONS = 50
_OFTEN = 0.25  # share of its captions from which on a word is one of what it always shows
_ALL = 0.9  # share of its captions that have to begin alike for these words to call it
_FEW = 5  # captions; of fewer it may be chance
_TITLES = ("modelspec.title", "ss_output_name")


@dataclass(frozen=True)
class Entry:
    """An adapter of a library.

    Attributes:
        path: Its file.
        size: In bytes.
        modified: When it was changed last, in nanoseconds.
        sha256: Of the whole file, as hex digits.
        beside: A digest of the names, sizes and times of what stands beside it and tells of it.
        name: The file's name without ending.
        title: What it calls itself.
        description: In words.
        made_for: The model that it is for, as its makers call it; "" where nothing tells.
        families: The families of bases that it may fit; none for a model that this package does not run, and where nothing
            tells.
        base: What it says of its base: name, family, fingerprint and the like.
        trigger: What calls it, as captions have it, with ``{}`` for the caption; "" where it names nothing.
        triggers: All words that call it.
        tags: How often its captions had a tag; 0 for what it is listed under.
        captions: Prompts and captions, each once.
        examples: Pictures beside it.
        thumbnail: Whether its file holds a picture.
        strength: At which its maker, or its training, says it is used; 1 where nothing tells.
        notes: What of it was not read, and why.
    """

    path: Path
    size: int
    modified: int
    sha256: str
    beside: str = ""
    name: str = ""
    title: str = ""
    description: str = ""
    made_for: str = ""
    families: tuple[str, ...] = ()
    base: Mapping[str, str] = field(default_factory=dict)
    trigger: str = ""
    triggers: tuple[str, ...] = ()
    tags: Mapping[str, int] = field(default_factory=dict)
    captions: tuple[str, ...] = ()
    examples: tuple[Path, ...] = ()
    thumbnail: bool = False
    strength: float = 1.0
    notes: tuple[str, ...] = ()

    def to_json(self) -> str:
        """All of it, as the library keeps it."""
        return json.dumps(asdict(self), ensure_ascii=False, default=str)

    @classmethod
    def of_json(cls, text: str) -> Self:
        """Read what `to_json` gave.

        Args:
            text: That.

        Returns:
            The entry.

        Raises:
            UserError: It is damaged.
        """
        with refusing("an entry of the library is damaged; remove it, and add its file again"):
            told = json_value(text)
            known: dict[str, Any] = {one.name: told[one.name] for one in fields(cls) if one.name in told}
            for name in ("families", "triggers", "captions", "notes"):
                known[name] = tuple(known.get(name, ()))
            known["path"], known["examples"] = Path(known["path"]), tuple(map(Path, known.get("examples", ())))
            return cls(**known)

    def shown(self) -> tuple[str, ...]:
        """List what it always shows.

        Returns:
            The terms in at least a quarter of its captions, and those of the tags that it is listed under.
        """
        found: list[str] = []
        counted: Counter[str] = Counter()
        for tag, count in self.tags.items():
            words = dict.fromkeys(terms_of(tag))
            if count == 0:
                found += words
            counted.update(dict.fromkeys(words, count))
        # kohya does not tell how many captions there are: the word of most of them stands for their number.
        total = max(counted.values(), default=0)
        found += [term for term, count in counted.items() if count >= total * _OFTEN and total > 1]
        in_captions = Counter(term for caption in self.captions for term in set(terms_of(caption)))
        found += [t for t, n in in_captions.items() if n >= len(self.captions) * _OFTEN and len(self.captions) > 1]
        return tuple(dict.fromkeys(found))

    def columns(self) -> tuple[tuple[str, ...], ...]:
        """Give the words that it is found by.

        Returns:
            The terms that call it, of its names, of what it always shows, and of all else, in the order of `words.COLUMNS`;
            of the last each once, and only those that are in no other.
        """
        called = tuple(term for trigger in self.triggers for term in terms_of(trigger))
        named = terms_of(f"{self.name} {self.title}")
        shown = self.shown()
        told = (*self.tags, *self.captions, self.description)
        rest = dict.fromkeys(term for text in told for term in terms_of(text))
        known = {*called, *named, *shown}
        return called, named, shown, tuple(term for term in rest if term not in known)

    def status(self) -> str:
        """Tell whether its file is still what it was.

        Returns:
            "" where its size and time are the same, or else its bytes; "missing" or "changed".
        """
        try:
            size, modified, _ = stamp_of(self.path)
            if (size, modified) == (self.size, self.modified):
                return ""
            return "" if size == self.size and weights_sha256(self.path) == self.sha256 else "changed"
        except OSError:
            return "missing"


def beside_of(path: Path) -> str:
    """Tell one state of what stands beside an adapter from others, without reading it.

    Args:
        path: The adapter's file.

    Returns:
        A digest of names, sizes and times.
    """
    told = [(str(one), *stamp_of(one)[:2]) for one in (*sidecars_of(path), *examples_of(path))]
    return of_text(repr(told))[:16] if told else ""


def read_entry(path: Path, sha256: str | None = None) -> Entry:
    """Read an adapter file, and what stands beside it.

    Args:
        path: The file, of safetensors.
        sha256: Its digest where it is known already.

    Returns:
        The entry.

    Raises:
        UserError: It is no adapter, or is damaged.
    """
    found = plan(path)
    if not any(one.methods for _, _, one in found.each()) and not origin(found.header).name:
        raise found.is_none()
    size, modified, _ = found.header.stamp
    aside, metadata = read_sidecars(path), found.header.metadata
    examples = examples_of(path)
    drawn, notes = prompts_of(examples)
    tags, spoken = _tags(found, aside), triggers_of(found)
    lead = lead_of(tags)
    entry = Entry(
        path=path,
        size=size,
        modified=modified,
        sha256=sha256 or found.sha256,
        beside=beside_of(path),
        name=title(path),
        title=_title(found, aside),
        description=_one_line(_description(found), aside.description),
        trigger=_trigger(found, aside, spoken) or lead,
        triggers=tuple(dict.fromkeys((*spoken, *aside.triggers))) or tuple(filter(None, (lead,))),
        tags=tags,
        captions=tuple(dict.fromkeys((*aside.captions, *drawn)))[:_MOST_CAPTIONS],
        examples=examples,
        thumbnail="modelspec.thumbnail" in metadata,
        strength=_strength(found, aside),
        notes=(*aside.notes, *notes),
        **_made_for(found, aside),
    )
    _refuse_halves(entry)
    return entry


def _made_for(found: Plan, aside: Sidecar) -> dict[str, Any]:
    """Which base it is for: what the file says, what its names and shapes tell, or what is said beside it."""
    base = base_of(found.spec, found.header.metadata)
    told = origin(found.header).name
    families = (base["family"],) if "family" in base else families_of(told)
    if len(families) != 1 and aside.made_for and (not told or set(families_of(aside.made_for)) <= set(families)):
        told, families = aside.made_for, families_of(aside.made_for)
    return {"made_for": told, "families": families, "base": base}


def _title(found: Plan, aside: Sidecar) -> str:
    own = found.spec.title if found.spec is not None else ""
    told = (found.header.metadata.get(key, "") for key in _TITLES)
    return _one_line(next((one for one in (own, aside.title, *told) if one.strip()), ""))[:200]


def _description(found: Plan) -> str:
    own = found.spec.description if found.spec is not None else ""
    return own or found.header.metadata.get("modelspec.description", "")


def _trigger(found: Plan, aside: Sidecar, spoken: Sequence[str]) -> str:
    """What a person wrote beside the file counts most; then what the file says."""
    own = found.spec.trigger if found.spec is not None else ""
    return next((one for one in (*aside.triggers[:1], own, *spoken) if one), "")


def _strength(found: Plan, aside: Sidecar) -> float:
    if aside.strength is not None:
        return aside.strength
    told = number(found.spec.training.get("suggested_strength")) if found.spec is not None else None
    return told if told is not None and 0 < told <= 2 else 1.0


def _tags(found: Plan, aside: Sidecar) -> dict[str, int]:
    """The most frequent tags; those that it is listed under have 0."""
    counted = dict(list(tags_of(found).items())[:_MOST_TAGS])
    told = found.header.metadata.get("modelspec.tags", "")
    listed = (tag for one in (*aside.tags, told) for tag in split_tags(one))
    return {**counted, **{tag: 0 for tag in listed if tag not in counted}}


def _one_line(*texts: str) -> str:
    """The first text that says something, in one line of at most 2,000 letters."""
    return " ".join(next((text for text in texts if text.strip()), "").split())[:2000]


def _refuse_halves(entry: Entry) -> None:
    """Raise UserError for half a character in a name or a text, which no database keeps."""
    try:
        entry.to_json().encode()
    except UnicodeEncodeError:
        raise UserError(f"{entry.path!s:a} holds half a character in its name or texts; rename it") from None


def lead_of(tags: Mapping[str, int]) -> str:
    """Find the words that all captions begin with: they call an adapter whose file names no trigger.

    Args:
        tags: How often captions had each tag, which is a whole caption where these have no commas.

    Returns:
        The words as a template, such as "openmoji emoji of {}"; "" where captions are few, or begin with nothing in common.
    """
    captions = [(tag.split(), count) for tag, count in tags.items() if count and len(tag.split()) > 1]
    total = sum(count for _, count in captions)
    lead: list[str] = []
    while total >= _FEW:
        following: Counter[str] = Counter()
        for words, count in captions:
            if words[: len(lead)] == lead and len(words) > len(lead):
                following[words[len(lead)]] += count
        word, count = following.most_common(1)[0] if following else ("", 0)
        if count < total * _ALL:
            break
        lead.append(word)
    while lead and lead[-1].casefold() in ("a", "an", "the"):
        lead.pop()
    return " ".join([*lead, "{}"]) if terms_of(" ".join(lead)) and not {"{", "}"} & set("".join(lead)) else ""


def files_in(paths: Iterable[Path]) -> tuple[list[Path], list[tuple[Path, str]]]:
    """Find the adapter files that paths mean.

    Args:
        paths: Files, and folders, which are gone through with all below them but what is hidden.

    Returns:
        The safetensors files, each once and with its whole path; and what is left out, with the reason.

    Raises:
        UserError: A path is not there.
    """
    found: dict[Path, None] = {}
    left: list[tuple[Path, str]] = []
    for path in paths:
        if not path.exists():
            raise UserError(f"there is no file or folder {path}")
        below = files_below(path) if path.is_dir() else [path]
        if not any(one.suffix.lower() == ".safetensors" for one in below) and path.is_dir():
            left.append((path, "holds no safetensors file"))
        for one in below:
            kind = one.suffix.lower()
            if one.is_symlink() and not one.exists():
                left.append((one, "leads nowhere"))
            elif one.is_file() and kind == ".safetensors":
                found[one.absolute()] = None
            elif one.is_file() and (kind in (".pt", ".ckpt", ".bin") or not path.is_dir()):
                left.append((one, "is no safetensors file; make one of an adapter with: peft-diffusion convert"))
    return list(found), left
