"""An adapter folded into its base, streamed as safetensors."""
