"""``python -m peft_diffusion``: the command ``peft-diffusion``."""

import sys

from .cli.app import main

sys.exit(main())
