"""What ``serve`` is told. Imports no torch."""

import ipaddress
from dataclasses import fields
from pathlib import Path

from ..bases.asked import AskedPrediction
from ..core.errors import UserError
from ..core.files import at_home
from ..core.settings import (
    COUNT,
    NATURAL,
    PARAMETERS,
    Flag,
    OptionalPath,
    Range,
    Texts,
    as_in,
    explained,
    setting,
    settings_class,
    settle,
)
from ..generation.recipe import check_folder
from ..generation.settings import GenerateConfig, Offload, Precision, Quantize

_LEAST_TOKEN = 8  # letters; fewer are guessed in no time


@explained
@settings_class(kw_only=True)
class ServeConfig:
    """How ``serve`` draws, for whom, and how much."""

    base: str = setting(
        "icons",
        'The base to begin with: the embedded "icons", a diffusers folder, a checkpoint file or a hub id.',
        PARAMETERS,
    )
    bases_dir: OptionalPath = setting(
        None,
        "A folder of checkpoint files and diffusers folders that requests may choose as sd_model_checkpoint.",
        PARAMETERS,
    )
    adapters_dir: OptionalPath = setting(
        None,
        "The folder where <lora:NAME:0.8> in a prompt finds NAME.safetensors, also in its subfolders. No other file is "
        "opened for a request, but those that --max-auto lets a library choose.",
        PARAMETERS,
        flag=Flag(aliases=("--lora-dir",)),
    )
    embeddings_dir: OptionalPath = setting(
        None, "The folder of learned words (textual inversion), which prompts call by the names of their files.", PARAMETERS
    )
    wildcards_dir: OptionalPath = as_in(GenerateConfig, "wildcards_dir")
    output: OptionalPath = setting(
        None, "The folder for pictures that a request asks to save (save_images); by default none are saved.", PARAMETERS
    )
    host: str = setting(
        "127.0.0.1", "The address to listen at; any but that of this machine alone needs a token.", PARAMETERS
    )
    port: int = setting(7860, "The port to listen at; 0 takes a free one.", PARAMETERS, Range(0, 65535))
    hosts: Texts = setting(
        (),
        "Names that this machine is called by in requests, beside localhost and addresses in digits.",
        PARAMETERS,
        flag=Flag(default_shown=False),
    )
    token: str | None = setting(
        None,
        "What requests must carry, as a Bearer token or as the password of HTTP basic. Other users of the machine see "
        "flags: --token-file keeps it from them.",
        PARAMETERS,
        kept=False,
    )
    token_file: OptionalPath = setting(None, "A file with the token in its first line.", PARAMETERS)
    max_request_mb: int = setting(64, "The largest request, pictures and all.", PARAMETERS, COUNT, unit="MiB")
    max_pixels: int = setting(
        2048 * 2048,
        "The largest picture that is drawn; those in requests may have four times as many.",
        PARAMETERS,
        COUNT,
        unit="pixels",
    )
    max_steps: int = setting(150, "The most denoising steps of a picture.", PARAMETERS, COUNT)
    max_pictures: int = setting(64, "The most pictures of a request.", PARAMETERS, COUNT)
    max_batch: int = setting(8, "The most pictures computed at once.", PARAMETERS, COUNT)
    max_waiting: int = setting(64, "The most requests that wait; more are refused.", PARAMETERS, COUNT)
    adapter_memory: int = setting(
        1024,
        "The most memory for adapters that stay from one request to the next, so that no file is read again; those used "
        "longest ago go first. 0 keeps none.",
        PARAMETERS,
        Range(0),
        unit="MiB",
    )
    max_auto: int = setting(
        0,
        "The most adapters of the library that a request may have chosen for its prompts, wherever their files are; by "
        "default none are.",
        PARAMETERS,
        NATURAL,
    )
    library: OptionalPath = as_in(GenerateConfig, "library")
    strict: bool = as_in(GenerateConfig, "strict")
    prediction: AskedPrediction = as_in(GenerateConfig, "prediction")
    device: str = as_in(GenerateConfig, "device")
    precision: Precision = as_in(GenerateConfig, "precision")
    quantize: Quantize | None = as_in(GenerateConfig, "quantize")
    offload: Offload | None = as_in(GenerateConfig, "offload")
    vae_tiling: bool = as_in(GenerateConfig, "vae_tiling")
    attention_slicing: bool = as_in(GenerateConfig, "attention_slicing")
    fast: bool | None = setting(
        None,
        "Draw by recorded steps: several times as fast, the same up to rounding. By default on CUDA.",
        PARAMETERS,
        flag=Flag(negative=True),
    )

    def __post_init__(self) -> None:
        settle(self)
        if self.token is not None and self.token_file is not None:
            raise UserError("give either --token or --token-file")
        if self.token is not None:
            _check_token(self.token, "--token")
        self.drawing(self.base)

    def drawing(self, source: str) -> GenerateConfig:
        """How all requests are drawn, whatever each asks for.

        Args:
            source: The base, as ``--base`` takes it.

        Returns:
            The settings of a picture without words.

        Raises:
            UserError: Two of them cannot be together.
        """
        names = {one.name for one in fields(self)} - {"base", "output"}
        told = {one.name: getattr(self, one.name) for one in fields(GenerateConfig) if one.name in names}
        return GenerateConfig(("",), base=source, **told)

    @property
    def max_given_pixels(self) -> int:
        """The pixels that a picture in a request may have."""
        return 4 * self.max_pixels

    def check(self) -> None:
        """Find out what can be told before anything is loaded.

        Raises:
            UserError: A folder or file is not there, or a server without a token would be open to others.
        """
        for flag, folder in (
            ("--adapters-dir", self.adapters_dir),
            ("--embeddings-dir", self.embeddings_dir),
            ("--wildcards-dir", self.wildcards_dir),
            ("--bases-dir", self.bases_dir),
        ):
            if folder is not None and not at_home(folder).is_dir():
                raise UserError(f"there is no folder {folder}, which {flag} names")
        if self.library is not None and not self.max_auto:
            raise UserError("--library is where requests have adapters chosen; give --max-auto too, as in --max-auto 2")
        if self.max_auto:
            from ..library import Library  # which brings numpy

            Library(self.library, make=False).close()
        if self.output is not None:
            check_folder(at_home(self.output))
        if self.secret() is None and not is_loopback(self.host):
            raise UserError(
                f"--host {self.host} is open to other machines, which needs a token: give --token-file FILE, or leave --host"
                " away and reach it through a tunnel"
            )

    def secret(self) -> str | None:
        """The token, from wherever it is.

        Returns:
            The token; None for none.

        Raises:
            UserError: Its file cannot be read, or it is too short.
        """
        if self.token_file is None:
            return self.token
        path = at_home(self.token_file)
        try:
            lines = path.read_text("utf-8").splitlines()
        except (OSError, ValueError) as error:
            raise UserError(f"the file of the token {path} cannot be read: {error}") from None
        found = lines[0].strip() if lines else ""
        _check_token(found, str(path))
        return found


def _check_token(token: str, where: str) -> None:
    if len(token) < _LEAST_TOKEN or not token.isascii() or not token.isprintable():
        raise UserError(
            f"{where}: a token has {_LEAST_TOKEN} letters or more, of ASCII, as `openssl rand -hex 16` makes one"
        )


def is_loopback(host: str) -> bool:
    """Tell whether an address is that of this machine alone.

    Args:
        host: The address, or localhost.

    Returns:
        Whether it is.
    """
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def sources(config: ServeConfig) -> tuple[str, ...]:
    """List the bases that requests may choose.

    Args:
        config: The settings.

    Returns:
        The one to begin with, then those of the folder, as ``--base`` takes them.
    """
    folder = None if config.bases_dir is None else at_home(config.bases_dir)
    there = [] if folder is None else sorted(folder.iterdir())
    found = [str(path) for path in there if _is_base(path)]
    return tuple(dict.fromkeys((config.base, *found)))


def _is_base(path: Path) -> bool:
    if path.name.startswith("."):
        return False
    if path.is_dir():
        return (path / "model_index.json").is_file()
    return path.suffix.lower() in (".safetensors", ".ckpt") and path.is_file()
