"""What a run needs and how long it takes, worked out before it starts: memory, traffic, time, and what to change."""
