"""Safetensors to GGUF: types, quantisation, vocabulary."""
