"""What a run logs: metrics, goodput, W&B, GPU counters."""
