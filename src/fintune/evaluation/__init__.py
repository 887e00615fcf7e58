"""Verdicts, metrics and comparisons of predictions and models."""
