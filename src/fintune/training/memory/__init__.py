"""GPU memory: how many bytes a training step needs, and which settings fit."""
