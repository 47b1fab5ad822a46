"""Training in plain PyTorch: optimiser, schedules, processes, checkpoints, records, loop; no data set, no head."""
