"""A command that is run when a training has ended, however it ended."""

import logging
import os
import shlex
import shutil
import subprocess
import time
from pathlib import Path

from ...core.events import Ended, Event, Warned

_LIMIT = 60.0  # seconds
_PREFIX = "PEFT_DIFFUSION_"
logger = logging.getLogger("peft_diffusion")


def missing_program(command: str) -> Warned | None:
    """Look for the program of a command before a run of hours is over.

    Args:
        command: The command line.

    Returns:
        A warning where there is no such program.
    """
    program = shlex.split(command)[0]
    if shutil.which(program) is not None:
        return None
    return Warned(f"--notify: there is no program {program}, so nobody will be told of the end")


class Notifier:
    """Runs a command with the outcome in environment variables, without a shell; an observer.

    The variables are ``PEFT_DIFFUSION_STATE`` (finished, stopped or failed), ``_OUTPUT``, ``_RUN_DIR``, ``_SECONDS`` and
    ``_ERROR``, which is empty where nothing went wrong. Whatever becomes of the command, the run stays what it is.

    Args:
        command: The command line.
        output: The adapter file of the run.
        run_dir: Its folder.
    """

    def __init__(self, command: str, output: Path, run_dir: Path) -> None:
        self.command = command
        self.output = output
        self.run_dir = run_dir
        self.began = time.monotonic()

    def __call__(self, event: Event) -> None:
        """Run the command, where the event is the last."""
        if not isinstance(event, Ended):
            return
        told = {
            "STATE": event.state,
            "OUTPUT": str(self.output.absolute()),
            "RUN_DIR": str(self.run_dir.absolute()),
            "SECONDS": f"{time.monotonic() - self.began:.0f}",
            "ERROR": (event.error or "").replace("\0", ""),
        }
        environment = os.environ | {f"{_PREFIX}{name}": value for name, value in told.items()}
        try:
            # In a session of its own, a Ctrl-C that ended the run does not end it.
            done = subprocess.run(
                shlex.split(self.command), env=environment, stdin=subprocess.DEVNULL, timeout=_LIMIT, start_new_session=True
            )
        except (OSError, ValueError, subprocess.SubprocessError) as error:
            logger.warning(f"--notify {self.command}: {error}")
            return
        if done.returncode:
            logger.warning(f"--notify {self.command}: ended with code {done.returncode}")
