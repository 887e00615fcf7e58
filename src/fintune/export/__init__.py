"""A trained model as merged safetensors and as GGUF files."""
