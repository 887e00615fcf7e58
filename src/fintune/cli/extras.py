"""Which extra of this package brings a library that is not installed."""

from __future__ import annotations

from collections.abc import Mapping

from fintune.errors import ResourceError

_TRAIN = (
    "accelerate bitsandbytes datasets huggingface_hub llguidance numpy pandas peft pyarrow safetensors tensorboard "
    "tokenizers torch tqdm transformers trl"
)
_GGUF = "gguf libggml threadpoolctl xllamacpp"
EXTRAS: Mapping[str, str] = {
    **dict.fromkeys(_TRAIN.split(), "train"),
    **dict.fromkeys(_GGUF.split(), "gguf"),
    "vllm": "vllm",
    "wandb": "wandb",
}
"""Extra by the name under which a library is imported; libraries that several bring stand with the larger one."""


def not_installed(error: ModuleNotFoundError) -> ResourceError | None:
    """What to install where an optional library is missing; None for any other module, whose lack is a bug of ours."""
    library = (error.name or "").partition(".")[0]
    if library not in EXTRAS:
        return None
    return ResourceError(
        f"{library} is not installed, and this command needs it", hint=f'pip install "fintune[{EXTRAS[library]}]"'
    )
