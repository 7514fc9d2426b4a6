"""What a run leaves behind: its folder, checkpoints, plots and report."""
