"""Train from Python: print what happens, stop after some steps, and go on from the checkpoint to the end."""

import argparse
import threading
from dataclasses import replace
from pathlib import Path

import peft_diffusion as pd
from peft_diffusion.core.errors import Interrupted
from peft_diffusion.core.events import Event
from peft_diffusion.training.events import Losses, Saved, Step


def show(event: Event) -> None:
    """Print an event. Each kind is a dataclass; its ``lines()`` are what the command line says of it."""
    match event:
        case Losses(losses=losses):
            print(*(f"step {one.step}: loss {one.loss:.3f}" for one in losses), sep="\n")
        case Saved(what=what, path=path):
            print(f"wrote the {what} {path}")
        case _:
            print("".join(f"{line}\n" for line in event.lines()), end="")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", nargs="?", type=Path, default=Path("samples/styles/openmoji"), help="of pictures")
    parser.add_argument("--output", type=Path, default=Path("style.safetensors"), help="the adapter file")
    parser.add_argument("--steps", type=int, default=8, help="300 teach a style well")
    parser.add_argument("--stop-after", type=int, default=4, help="steps")
    parser.add_argument("--resolution", type=int, default=64, help="pixels a side; 128 is the base's own")
    given = parser.parse_args()
    config = pd.TrainConfig(
        folder=(given.folder,),
        output=given.output,
        steps=given.steps,
        resolution=given.resolution,
        batch_size=2,
        save_every=max(1, given.steps // 2),
        log_every=1,
        preview_steps=0,  # draws none
    )
    stop = threading.Event()

    def count(event: Event) -> None:
        """An observer may do anything; a page with a button would set the same stop from another thread."""
        if isinstance(event, Step) and event.step >= given.stop_after:
            stop.set()

    try:
        result = pd.train(config, observers=[show, count], stop=stop)
    except Interrupted as reason:  # with a checkpoint; going on gives the bytes of a run that was not stopped
        print(reason)
        result = pd.train(replace(config, resume=True), observers=[show])
    print(f"{result.steps} steps in {result.seconds:.0f} s, held-out loss {result.held_out_after}")


if __name__ == "__main__":
    main()
