"""What is learned: denoising of images, or the next token of a text."""
