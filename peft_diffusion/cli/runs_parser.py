"""``peft-diffusion runs`` as cyclopts reads it: a command, and one below it."""

from cyclopts import App

from .commands import RUNS
from .runs import runs

command = App(name="runs")
command.default(runs)
for _name, _entry in RUNS.items():
    command.command(_entry.target, name=_name, help=_entry.help)
