"""Adapters, batches and the training loop."""
