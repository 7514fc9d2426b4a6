"""The training loop: trainer, optimizers, learning rate and seeds. Knows nothing of images or text."""
