"""One file for each layout of tensor names that adapter files use."""
