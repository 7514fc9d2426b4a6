"""What the scripts that compare have in common: how they end, processes, the peak of memory, tables and what is written."""

import argparse
import json
import multiprocessing
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch

from peft_diffusion.core.errors import UserError

MIB = 2**20
Job = TypeVar("Job")


def run(main: Callable[[], None]) -> None:
    """Run a script; what the person can mend ends it with a line and exit code 1."""
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")


def say(text: str, began: float) -> None:
    """Tell a line, with the seconds since the start."""
    print(f"{time.monotonic() - began:6.1f} s  {text}", flush=True)


def late(began: float, minutes: float) -> bool:
    """Whether so many minutes are over since the start."""
    return time.monotonic() - began > 60 * minutes


def in_processes(
    work: Callable[[Job], str],
    jobs: Sequence[Job],
    processes: int,
    began: float,
    minutes: float,
    threads: int | None = None,
) -> None:
    """Do jobs in several processes, and tell what is said of each; "" is not.

    No job begins when so many minutes are over. ``threads`` are those of torch in each process; by default as many as suit.
    """
    if not jobs:
        return
    start = (None, ()) if threads is None else (torch.set_num_threads, (threads,))
    with multiprocessing.get_context("spawn").Pool(min(len(jobs), processes), *start) as pool:
        for told in pool.imap_unordered(partial(_in_time, work, began, minutes), jobs, chunksize=1):
            if told:
                say(told, began)


def _in_time(work: Callable[[Job], str], began: float, minutes: float, job: Job) -> str:
    return "" if late(began, minutes) else work(job)


def circumstances(options: argparse.Namespace) -> dict[str, Any]:
    """On which device figures were found, and with which settings."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    return {"device": device, "settings": {name: str(value) for name, value in vars(options).items()}}


def write_results(folder: Path, figures: Any, table: str) -> None:
    """Write ``figures.json`` and ``table.md``."""
    (folder / "figures.json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    (folder / "table.md").write_text(table, encoding="utf-8")


@contextmanager
def peak_memory() -> Iterator[dict[str, int]]:
    """Finds the most memory in use inside, in bytes: ``peak`` is of the GPU, or of the process where Linux tells it."""
    found: dict[str, int] = {}
    clear, status = Path("/proc/self/clear_refs"), Path("/proc/self/status")
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    elif clear.exists():
        clear.write_text("5")  # the peak begins anew
    yield found
    if cuda:
        found["peak"] = torch.cuda.max_memory_allocated()
    elif clear.exists():
        lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
        found["peak"] = 1024 * int(lines["VmHWM"].split()[0])


def size_words(size: int) -> str:
    """Bytes for people: MiB from one up, KiB below."""
    return f"{size / MIB:.2f} MiB" if size >= MIB else f"{size / 2**10:.0f} KiB"


def memory_words(peak: int | None) -> str:
    """The peak of memory for people, or a dash where it is not known."""
    return "-" if peak is None else f"{peak / MIB:.0f} MiB"


def markdown_table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown: the first column to the left, the others to the right."""
    marks = ["---" if number == 0 else "---:" for number in range(len(headings))]
    return "".join(f"| {' | '.join(row)} |\n" for row in (headings, marks, *rows))
