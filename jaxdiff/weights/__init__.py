"""Foreign checkpoints: readers of their files, and name rules between their parameters and ours."""
