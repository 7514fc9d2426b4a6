"""What the scripts that compare have in common: how they end, the peak of memory, and tables as Markdown."""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from peft_diffusion.core.errors import UserError

MIB = 2**20


def run(main: Callable[[], None]) -> None:
    """Run a script; what the person can mend ends it with a line and exit code 1."""
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")


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
