"""``python -m peft_diffusion``: the command ``peft-diffusion``."""

import sys

from .cli.app import run_process

sys.exit(run_process())
