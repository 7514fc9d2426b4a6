"""Real processes that begin with the libraries imported: those take six seconds, what a test does often less than one."""

import contextlib
import multiprocessing
import os
import runpy
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing import forkserver, resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import TYPE_CHECKING, Any

from little import draw_little_from_here, measure_little_from_here, measure_no_signals_from_here

if TYPE_CHECKING:
    from multiprocessing.context import ForkServerContext

HERE = str(Path(__file__).parent)
# Starting a process asks after all others; of two threads that ask after one at once, one is told that it failed.
ASKING = threading.Lock()
POSSIBLE = "forkserver" in multiprocessing.get_all_start_methods()
# From Python 3.14 on a server asks for a key that it gives to its own children alone.
SHAREABLE = POSSIBLE and sys.version_info < (3, 14)
_SHARED = "SERVER_OF_THE_TESTS"  # its address


@contextlib.contextmanager
def _path_of_the_server() -> Iterator[None]:
    """Let the server, which begins with the first process, find what is imported here."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    try:
        yield
    finally:
        os.environ.pop("PYTHONPATH")
        if before is not None:
            os.environ["PYTHONPATH"] = before


def share() -> None:
    """Start the server here, for the processes that this one starts as well, which find it by the environment.

    It says nothing of a library that it cannot import; who needs that meets the same error.
    """
    context: ForkServerContext = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["preloaded"])
    server: Any = forkserver._forkserver
    with _path_of_the_server():
        server.ensure_running()
    os.environ[_SHARED] = server._forkserver_address


def _join_the_shared() -> None:
    """Take the server that another process shares; it lasts as long as that one."""
    server: Any = forkserver._forkserver
    if _SHARED in os.environ and server._forkserver_address is None:
        server._forkserver_address = os.environ[_SHARED]
        server._forkserver_alive_fd = os.open(os.devnull, os.O_RDONLY)  # processes get one, which nobody waits for here
        server.ensure_running = resource_tracker.ensure_running


def begin(target: Callable[..., object], *arguments: object) -> BaseProcess:
    """Start a function in a process of its own, forked from one that has imported the libraries.

    Args:
        target: The function, which can be pickled.
        arguments: What it is called with.
    """
    return _fork(_little, target, arguments)


def _fork(target: Callable[..., object], *arguments: object) -> BaseProcess:
    """Start a function in a process that the server forks; it measures and draws as the package does."""
    context: ForkServerContext = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["preloaded"])
    process = context.Process(target=target, args=arguments)
    with ASKING, _path_of_the_server():
        _join_the_shared()
        process.start()
    return process


def _little(target: Callable[..., object], arguments: Sequence[object]) -> None:
    """Call a function in a process that measures and draws little."""
    measure_little_from_here()
    measure_no_signals_from_here()
    draw_little_from_here()
    target(*arguments)


def alive(process: BaseProcess) -> bool:
    """Whether a process goes on."""
    with ASKING:
        return process.is_alive()


@dataclass(frozen=True)
class _Life:
    """What a process that stands for ``python ...`` does."""

    arguments: list[str]  # as Python takes them: -m NAME, -c CODE, or a script's path, and its own arguments
    cwd: str | None
    environment: dict[str, str]
    outputs: str  # the folder of its stdout and stderr
    executable: str | None = None  # what it starts Pythons by, instead of its own

    def lead(self) -> None:
        os.setsid()  # a signal for the group of the tests is none for it
        if self.cwd is not None:
            os.chdir(self.cwd)
        os.environ.clear()
        os.environ.update(self.environment)
        for number, name in ((1, "stdout"), (2, "stderr")):
            opened = os.open(Path(self.outputs, name), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(opened, number)
            os.close(opened)
        if self.executable is not None:
            sys.executable = self.executable
        first, *rest = self.arguments
        added = [entry for entry in self.environment.get("PYTHONPATH", "").split(os.pathsep) if entry]
        beside = str(Path.cwd() if first.startswith("-") else Path(first).parent)
        sys.path[:] = [beside, *added, *(entry for entry in sys.path if entry != HERE)]
        if first == "-m":
            sys.argv[:] = rest
            runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
        elif first == "-c":
            sys.argv[:] = ["-c", *rest[1:]]
            exec(compile(rest[0], "<string>", "exec"), {"__name__": "__main__"})
        else:
            sys.argv[:] = self.arguments
            runpy.run_path(first, run_name="__main__")


class Started:
    """A process that stands for ``python ...``.

    Args:
        arguments: As Python takes them: ``-m NAME``, ``-c CODE``, or a script's path, and its own arguments.
        cwd: The folder that it works in.
        environment: All of its environment.
        forks: Whether the Pythons that it starts itself, by ``sys.executable``, are forked as it is.
    """

    def __init__(self, arguments: Sequence[str], cwd: Path | None, environment: dict[str, str], forks: bool = False) -> None:
        self.arguments = list(arguments)
        self._outputs = tempfile.TemporaryDirectory()
        executable = None
        if forks and SHAREABLE:
            if _SHARED not in os.environ:
                share()
            environment = {**environment, _SHARED: os.environ[_SHARED]}
            executable = _write_stand_in(Path(self._outputs.name, "python"))
        life = _Life(self.arguments, None if cwd is None else str(cwd), environment, self._outputs.name, executable)
        self.process = begin(life.lead)

    @property
    def pid(self) -> int:
        """Of the process, to send it signals."""
        found = self.process.pid
        assert found is not None
        return found

    def first_line(self, timeout: float = 120) -> str:
        """Wait for the first line of its stdout, and return it.

        It is cut short where the process ends before it, or the seconds of ``timeout`` do.
        """
        until = time.monotonic() + timeout
        while "\n" not in (said := self._said("stdout")) and alive(self.process) and time.monotonic() < until:
            time.sleep(0.02)
        return said.partition("\n")[0]

    def wait(self, timeout: float = 300) -> subprocess.CompletedProcess[str]:
        """What it printed, and the code that it ended with; after so many seconds it is killed."""
        self.process.join(timeout)
        with ASKING:
            self.process.kill()
            self.process.join()
        code = self.process.exitcode
        assert code is not None
        out, error = (self._said(name) for name in ("stdout", "stderr"))
        self._outputs.cleanup()
        return subprocess.CompletedProcess(self.arguments, code, out, error)

    def _said(self, name: str) -> str:
        path = Path(self._outputs.name, name)
        return path.read_text("utf-8") if path.exists() else ""


def python(
    arguments: Sequence[str], cwd: Path | None, environment: dict[str, str], forks: bool = False
) -> subprocess.CompletedProcess[str]:
    """Run ``python ARGUMENTS`` to its end: forked where that can be, else as a new interpreter.

    Args:
        arguments: As of `Started`.
        cwd: As of `Started`.
        environment: As of `Started`.
        forks: As of `Started`.

    Returns:
        What it printed, and its exit code.
    """
    if POSSIBLE:
        return Started(arguments, cwd, environment, forks).wait()
    return subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env=environment, text=True, capture_output=True, timeout=300
    )


def _write_stand_in(path: Path) -> str:
    """Write a program that is called as Python is, see `stand_in`; returns its path."""
    path.write_text(f"""#!{sys.executable}
import sys
sys.path.append({HERE!r})
import forked
if __name__ == "__main__":
    forked.stand_in()
""")
    path.chmod(0o755)
    return str(path)


def stand_in() -> None:
    """Do what ``python ARGUMENTS`` does, in a process that is forked from the one that has imported the libraries.

    A launcher of several processes finds one of its own to signal and to wait for, which imports next to nothing.
    """
    arguments = sys.argv[2:] if sys.argv[1] == "-u" else sys.argv[1:]  # what is printed goes to a file first
    started = Started(arguments, Path.cwd(), dict(os.environ))
    signal.signal(signal.SIGTERM, lambda number, frame: os.kill(started.pid, number))
    done = started.wait()
    print(done.stdout, end="", flush=True)
    print(done.stderr, end="", file=sys.stderr, flush=True)
    if done.returncode < 0:  # ended by a signal, which whoever waits shall see
        with contextlib.suppress(OSError):  # of one that cannot be caught, such as SIGKILL
            signal.signal(-done.returncode, signal.SIG_DFL)
        os.kill(os.getpid(), -done.returncode)
    sys.exit(done.returncode)


# What xdist starts its workers by, in place of a Python that imports the libraries for nine seconds. It is read as words of
# a shell, and ends with two slashes.
_WORKER = shlex.join([sys.executable, str(Path(HERE, "worker.py"))])
WORKER = "popen" if "//" in _WORKER else f"popen//python={_WORKER}"


def work(arguments: Sequence[str]) -> int:
    """Be a worker of xdist: fork one from the server, which talks by the streams of this process, and wait for its end.

    Args:
        arguments: As Python takes them: ``-u -c CODE``.

    Returns:
        The code that it ended with.
    """
    streams = (Connection(os.dup(number), readable=number == 0, writable=number != 0) for number in range(3))
    process = _fork(_work, arguments[arguments.index("-c") + 1], str(Path.cwd()), dict(os.environ), *streams)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the worker too, which ends by it
    process.join()
    assert process.exitcode is not None
    return process.exitcode


def _work(code: str, cwd: str, environment: dict[str, str], *streams: Connection) -> None:
    """Run the code of a worker, in a process that is as a Python of its own but for what is imported."""
    multiprocessing.set_start_method(None, force=True)  # which a process that was forked so has chosen
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    for number, (name, stream) in enumerate(zip(("stdin", "stdout", "stderr"), streams, strict=True)):
        os.dup2(stream.fileno(), number)
        stream.close()
        setattr(sys, name, os.fdopen(number, "r" if number == 0 else "w", closefd=False))
    sys.argv[:] = ["-c"]
    from preloaded import speak  # in the server alone, as it imports the libraries

    speak()
    exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})
