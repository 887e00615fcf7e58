"""Files, terminal, signals, hub and machine: no machine learning, no finance."""
