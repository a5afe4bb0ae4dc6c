"""A run on N GPUs, by arithmetic alone: memory, traffic and time. Estimates; nothing of it is measured."""
