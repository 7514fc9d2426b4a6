"""What the commands on a library can be told. Imports no torch."""

from dataclasses import KW_ONLY, field

from ..core.errors import UserError
from ..core.settings import (
    COUNT,
    PARAMETERS,
    Flag,
    OptionalPath,
    Paths,
    Texts,
    about,
    explained,
    setting,
    settings_class,
    settle,
)

LIBRARY_HELP = (
    "The file of the library; by default peft-diffusion/library.sqlite3 in the user's folder for data (XDG_DATA_HOME, or "
    "~/.local/share)."
)


@explained
@settings_class()
class LibraryAddConfig:
    """What ``library add`` adds."""

    paths: Paths = setting(
        (),
        "Adapter files of safetensors, and folders, which are gone through with all below them. Without any, --encoder "
        "embeds what is there anew.",
        PARAMETERS,
        flag=Flag(default_shown=False),
    )
    _: KW_ONLY
    library: OptionalPath = setting(None, LIBRARY_HELP, PARAMETERS)
    encoder: str | None = setting(
        None,
        "What tells which texts and pictures mean the same, from now on: icons (the words of the embedded base, no "
        "pictures), a folder or hub id of CLIP (texts and pictures) or of a base (its text encoder), or none. By default "
        "the one that the library has; a new one has icons.",
        PARAMETERS,
    )

    def __post_init__(self) -> None:
        settle(self)
        if not self.paths and self.encoder is None:
            raise UserError("there is nothing to add; name adapter files or folders")


@explained
@settings_class()
class LibrarySearchConfig:
    """What ``library search`` looks for."""

    query: str = field(metadata=about("A prompt, or a description of what is looked for.", PARAMETERS))
    _: KW_ONLY
    library: OptionalPath = setting(None, LIBRARY_HELP, PARAMETERS)
    base: str | None = setting(
        None,
        "Only adapters for this base: icons, the name of a family, as inspect shows it of an adapter, a diffusers folder, a "
        "checkpoint file or a hub id.",
        PARAMETERS,
    )
    limit: int = setting(10, "How many are shown at most.", PARAMETERS, COUNT)
    words: bool = setting(False, "Go by words alone, and not by what they mean; nothing is loaded then.", PARAMETERS)
    json: bool = setting(False, "As JSON.", PARAMETERS)

    def __post_init__(self) -> None:
        settle(self)
        if not self.query.strip():
            raise UserError('there is nothing to look for; say it, as in "a pencil drawing of a cat"')


@explained
@settings_class(kw_only=True)
class LibraryListConfig:
    """Which library ``library list`` shows."""

    library: OptionalPath = setting(None, LIBRARY_HELP, PARAMETERS)
    json: bool = setting(False, "As JSON, with all that is known of each.", PARAMETERS)

    def __post_init__(self) -> None:
        settle(self)


@explained
@settings_class()
class LibraryRemoveConfig:
    """What ``library remove`` takes out."""

    names: Texts = setting(
        (),
        "Adapters by their names or files, and folders, with all below them.",
        PARAMETERS,
        flag=Flag(default_shown=False),
    )
    _: KW_ONLY
    library: OptionalPath = setting(None, LIBRARY_HELP, PARAMETERS)
    missing: bool = setting(False, "Take out all adapters whose files are not there any more.", PARAMETERS)

    def __post_init__(self) -> None:
        settle(self)
        if not self.names and not self.missing:
            raise UserError("there is nothing to take out; name adapters, files or folders, or give --missing")
