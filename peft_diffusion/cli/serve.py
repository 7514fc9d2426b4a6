"""``peft-diffusion serve``: a base that stays loaded, for programs that speak A1111's HTTP interface."""

from ..core.events import Event
from ..serve.settings import ServeConfig
from .commands import reads
from .progress import show_notes
from .terminal import say


@reads(ServeConfig)
def serve(config: ServeConfig) -> None:
    """Keep a base loaded and draw for programs that speak A1111's HTTP interface (/sdapi/v1), until Ctrl-C.

    Prompts choose adapters of --adapters-dir as <lora:NAME:0.8>. Pictures are the ones that generate draws.
    """
    config.check()  # before torch is imported, which takes seconds
    from ..serve.server import Serving
    from ..serve.server import serve as run

    def tell(event: Event) -> None:
        if isinstance(event, Serving):
            for line in event.lines():
                say(line)
        show_notes(event)

    run(config, observers=[tell])
