"""Training: configuration, schedules, the loop, checkpoints, logs."""
