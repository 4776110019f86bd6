"""Fine-tuning: configuration, optimizer, step, loop, checkpoints, metrics."""
