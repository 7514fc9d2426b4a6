"""Runs the server until it is told to end."""

import socket
from collections.abc import Sequence
from dataclasses import dataclass
from types import FrameType

from ..core.errors import UserError
from ..core.events import Event, Observer, Observers
from .settings import ServeConfig

try:
    import uvicorn

    from .app import application
except ModuleNotFoundError as error:
    if error.name not in ("fastapi", "uvicorn", "starlette", "pydantic", "psutil"):
        raise
    raise UserError(f"serve needs {error.name}: pip install 'peft_diffusion[serve]'") from None

from .engine import Engine

_GRACE = 30  # seconds for answers that are under way when it ends


@dataclass(frozen=True)
class Serving(Event):
    """The base is loaded, and requests are answered.

    Attributes:
        address: Where.
    """

    address: str

    def lines(self) -> tuple[str, ...]:
        """Tell where."""
        return (f"serving at {self.address}; Ctrl-C ends it",)


class _Server(uvicorn.Server):
    """Ends what is drawn as soon as it is told to end, so that its answer need not be waited for."""

    def __init__(self, config: uvicorn.Config, engine: Engine) -> None:
        super().__init__(config)
        self._engine = engine

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._engine.close()
        super().handle_exit(sig, frame)


def serve(config: ServeConfig, *, observers: Sequence[Observer] = ()) -> None:
    """Load a base and answer requests until a signal ends it.

    Args:
        config: The settings.
        observers: Are told of `Serving`, and of what the person should know of bases, adapters and prompts.

    Raises:
        UserError: The base cannot be loaded, or nothing can listen at the address.
    """
    config.check()
    tell = Observers(observers)
    with _listening(config) as listening:
        engine = Engine(config, tell)
        engine.load().future.result()
        host = f"[{config.host}]" if ":" in config.host else config.host
        options = uvicorn.Config(
            application(config, engine),
            log_level="warning",
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=_GRACE,
        )
        tell(Serving(f"http://{host}:{listening.getsockname()[1]}"))
        try:
            _Server(options, engine).run(sockets=[listening])
        finally:
            engine.close()
            engine.worker.join()
            engine.files.close()


def _listening(config: ServeConfig) -> socket.socket:
    """A socket at the address. Raises UserError where none can be."""
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    try:
        return socket.create_server((config.host, config.port), family=family, backlog=128)
    except OSError as error:
        raise UserError(
            f"nothing can listen at {config.host}:{config.port}: {error.strerror or error}; take another --port"
        ) from None
