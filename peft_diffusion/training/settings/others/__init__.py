"""What other programs call the settings of a training: their dataset files and their configurations. Imports no torch."""
