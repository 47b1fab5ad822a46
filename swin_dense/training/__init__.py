"""Training in plain PyTorch: optimiser, schedules, processes, checkpoints, records and the loop; no data set, no head."""
