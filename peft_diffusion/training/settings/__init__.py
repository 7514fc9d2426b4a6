"""What a training run is told: settings, presets and blocks. Imports no torch."""
