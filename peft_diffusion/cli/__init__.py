"""The command ``peft-diffusion``: one file a command, each thin over the package."""
