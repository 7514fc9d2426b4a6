"""Teach Stable Diffusion a style from a folder of images, generate with it, blend several."""

__version__ = "0.1.0"
