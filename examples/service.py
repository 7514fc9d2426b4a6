"""A service: load a base once, answer requests in a thread, tell each client what happens, and let it cancel."""

import argparse
import queue
import threading
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import peft_diffusion as pd
from peft_diffusion.core.errors import Interrupted
from peft_diffusion.core.events import Ended, Event
from peft_diffusion.generation.events import PictureMade


@dataclass
class Request:
    """What a client asks for, where it reads what becomes of it, and how it cancels."""

    config: pd.GenerateConfig
    events: queue.Queue[Event] = field(default_factory=queue.Queue)
    stop: threading.Event = field(default_factory=threading.Event)


def serve(base: str, requests: queue.Queue[Request | None]) -> None:
    """Answer requests one after the other, until None comes. Each finds the base as it was loaded."""
    pipe = pd.load_base(base)
    for request in iter(requests.get, None):
        with suppress(pd.UserError, Interrupted):  # the client is told: the last event is Ended, with the reason
            pd.generate(request.config, pipe=pipe, observers=[request.events.put], stop=request.stop)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("prompts", nargs="*", default=["emoji of a red apple", "emoji of a blue house"])
    parser.add_argument("--adapter", action="append", default=[], help="FILE or FILE=STRENGTH; again for more")
    parser.add_argument("--count", type=int, default=3, help="pictures of each prompt")
    parser.add_argument("--steps", type=int, default=8, help="denoising steps")
    parser.add_argument("--output", type=Path, default=Path("pictures"), help="a folder")
    given = parser.parse_args()
    asked = {"adapter": tuple(given.adapter), "steps": given.steps, "output": given.output}
    requests: queue.Queue[Request | None] = queue.Queue()
    threading.Thread(target=serve, args=("icons", requests)).start()
    clients = [Request(pd.GenerateConfig((prompt,), count=given.count, batch_size=1, **asked)) for prompt in given.prompts]
    for request in (*clients, None):
        requests.put(request)
    for request in clients:
        while not isinstance(event := request.events.get(), Ended):
            if isinstance(event, PictureMade):
                print(event.picture.path)
                if request is clients[-1]:
                    request.stop.set()  # the last client has enough after one picture
        print(f"{request.config.prompts[0]}: {event.state}{f', {event.error}' if event.error else ''}")


if __name__ == "__main__":
    main()
