"""Names, folders, tokenizers, chat templates, adapters, and the built-in model."""
