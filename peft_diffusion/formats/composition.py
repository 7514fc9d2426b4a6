"""The file of a learned composition: what `compose train` writes beside the adapters that it weighs. Imports no torch.

It is a safetensors file of a few numbers. Its metadata name the adapters by the digests of their files, which stay as they
are, and for people by the names of these.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core.errors import UserError
from ..core.files import at_home, files_below
from ..core.learned_kinds import LEARNED_KINDS
from ..core.parsing import json_value, refusing
from . import container
from .container import COMPOSITION

if TYPE_CHECKING:
    from ..core.learned_strengths import LearnedStrengths

VERSION = 1
_SHOWN = 12  # digits of a digest in messages


@dataclass(frozen=True)
class Member:
    """An adapter of a composition.

    Attributes:
        file: The name of its file, for people.
        sha256: The digest of the file's bytes, by which it is found.
        size: The bytes of the file, so that others need not be read to be told apart.
        triggers: The words that call it.
    """

    file: str
    sha256: str
    size: int
    triggers: tuple[str, ...] = ()


@dataclass(frozen=True)
class CompositionSpec:
    """What a file of a composition says of itself.

    Attributes:
        kind: What makes the strengths: see `core.learned_kinds`.
        adapters: Those that it weighs, in the order of its strengths.
        blocks: The blocks of the network that denoises, in the order of its strengths.
        base: What is known of the base.
        training: How it was learned.
        path: The file.
    """

    kind: str
    adapters: tuple[Member, ...]
    blocks: tuple[str, ...]
    base: Mapping[str, Any] = field(default_factory=dict)
    training: Mapping[str, Any] = field(default_factory=dict)
    path: Path = Path()

    def learned(self) -> "LearnedStrengths":
        """Read what makes the strengths.

        Returns:
            It, on the CPU.

        Raises:
            UserError: The file is damaged, or changed since.
        """
        from ..core.learned_strengths import KINDS

        tensors = container.read_tensors(container.read_header(self.path))
        with refusing(f"{self.path} is damaged"):
            made = KINDS[self.kind].of(tensors)
            if made.shape != (len(self.adapters), len(self.blocks)):
                raise ValueError("its tensors are of other adapters or blocks than it names")
        made.requires_grad_(False)
        return made

    def find(self, given: Sequence[Path], folder: Path | None = None) -> tuple[Path, ...]:
        """Find the files of the adapters: among those given, beside the file, or in a folder.

        Args:
            given: Adapter files.
            folder: Another folder, with those in it; None for none.

        Returns:
            A file for each adapter, in order.

        Raises:
            UserError: One is not there, or is another than it was.
        """
        further = [] if folder is None else files_below(at_home(folder))
        candidates = [path for path in (*given, *sorted(self.path.parent.iterdir()), *further) if path.is_file()]
        return tuple(self._found(member, candidates) for member in self.adapters)

    def _found(self, member: Member, candidates: Sequence[Path]) -> Path:
        by_name = sorted(candidates, key=lambda path: path.name != member.file)  # which is stable
        for path in by_name:
            if path.stat().st_size == member.size and container.sha256(path) == member.sha256:
                return path
        named = [path for path in by_name if path.name == member.file]
        if named:
            raise UserError(
                f"{self.path} composes a {member.file} with sha256 {member.sha256[:_SHOWN]}, and {named[0]} is another file"
                f" ({container.sha256(named[0])[:_SHOWN]}); give the one that it was learned with, or learn it again"
            )
        raise UserError(
            f"{self.path} composes {member.file} (sha256 {member.sha256[:_SHOWN]}), which is neither given with --adapter"
            " nor beside it; name it, or its folder with --adapters-dir"
        )


def told(path: Path) -> CompositionSpec | None:
    """Read what a file of a composition says of itself; its header is all that is read.

    Args:
        path: Any file.

    Returns:
        What it says; None for a file of something else, whatever it is.

    Raises:
        UserError: It is one, and damaged or of a newer version.
    """
    try:
        metadata = container.read_header(at_home(path)).metadata
    except UserError:
        return None
    return _read(at_home(path), metadata) if COMPOSITION in metadata else None


def read(path: Path) -> CompositionSpec:
    """Read what a file of a composition says of itself.

    Args:
        path: The file.

    Returns:
        What it says.

    Raises:
        UserError: There is no such file, it is none, or it is damaged or of a newer version.
    """
    place = at_home(path)
    metadata = container.read_header(place).metadata
    if COMPOSITION not in metadata:
        raise UserError(f"{place} is no composition, as `compose train` writes it; an adapter is given with --adapter")
    return _read(place, metadata)


def write(path: Path, composition: CompositionSpec, learned: "LearnedStrengths") -> None:
    """Write the file of a composition, aside and then renamed.

    Args:
        path: The file, which is replaced.
        composition: What it says of itself.
        learned: What makes the strengths.

    Raises:
        UserError: It cannot be written.
    """
    values = {name: value for name, value in asdict(composition).items() if name != "path"}
    told = json.dumps({"version": VERSION, **values}, sort_keys=True, ensure_ascii=False)
    container.write(path, learned.tensors(), {COMPOSITION: told})


def _read(path: Path, metadata: Mapping[str, str]) -> CompositionSpec:
    with refusing(f"{path}: its {COMPOSITION!r} metadata is damaged"):
        values = json_value(metadata[COMPOSITION])
        if values.pop("version") > VERSION:
            raise UserError(f"{path}: written by a newer peft_diffusion; update the package")
        adapters = tuple(_member(one) for one in values["adapters"])
        blocks = tuple(_printable(block) for block in values["blocks"])
        base, training = dict(values["base"]), dict(values["training"])
        if not adapters or not blocks or values["kind"] not in LEARNED_KINDS:
            raise ValueError(f"it has no adapters, no blocks, or is of an unknown kind {values['kind']!r}")
        return CompositionSpec(str(values["kind"]), adapters, blocks, base, training, path)


def _member(values: Mapping[str, Any]) -> Member:
    triggers = tuple(_printable(word) for word in values.get("triggers", ()))
    file, digest = _printable(values["file"]), values["sha256"]
    if Path(file).name != file or not re.fullmatch("[0-9a-f]{64}", digest):
        raise ValueError(f"an adapter {file!r} is named by no file name and SHA-256")
    return Member(file, digest, int(values["size"]), triggers)


def _printable(text: object) -> str:
    """A text that messages can show. Raises ValueError for what is none."""
    if not isinstance(text, str) or not text or not text.isprintable():
        raise ValueError(f"{text!r:.80} is no name")
    return text
