"""Decoder layers with adapters, forward and backward written out: fewer passes over memory, fewer launches."""
