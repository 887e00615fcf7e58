"""Load models and tokenizers. No other module does.

::

    folder = fetch("builtin:smollm2-135m")      # or a local folder, or a hub id
    tokenizer = load_tokenizer(folder)
    model = load_model(folder, dtype="auto")
"""

from __future__ import annotations

import importlib.util
import platform
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel

from fintune.errors import ModelError, ResourceError
from fintune.models.chat_template import end_of_turn_ids
from fintune.models.folder import count_tokens, model_fingerprint, read_model_config
from fintune.models.resolve import ModelFolder, ModelName, fetch, fetch_base, fetch_config, resolve
from fintune.util.console import quiet_libraries
from fintune.util.files import read_json_as
from fintune.util.memory import advice_on_memory
from fintune.util.text import first_line

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = [
    "ModelFolder",
    "ModelName",
    "Precision",
    "check_four_bit",
    "detect_precision",
    "ensure_pad",
    "fetch",
    "fetch_base",
    "fetch_config",
    "load_model",
    "load_tokenizer",
    "model_fingerprint",
    "resolve",
]

DtypeName = Literal["float32", "bfloat16", "float16"]
Quantization = Literal["none", "nf4"]

# Special tokens that models have for padding, or do not use. The first unused one in the vocabulary is chosen.
_PAD_TOKENS = ("<pad>", "[PAD]", "<|pad|>", "<|finetune_right_pad_id|>", "<|padding|>", "<|endoftext|>", "<|dummy_0|>")
_RESERVED = re.compile(r"reserved|unused|extra_?id|_pad\b|_pad_|dummy", re.IGNORECASE)


class TokenizerConfig(BaseModel):
    """The keys of ``tokenizer_config.json`` whose types transformers does not check."""

    model_max_length: int | float | None = None
    bos_token: str | dict[str, object] | None = None
    eos_token: str | dict[str, object] | None = None
    pad_token: str | dict[str, object] | None = None
    unk_token: str | dict[str, object] | None = None


@dataclass(frozen=True)
class Precision:
    """A number type for the arithmetic: the name of the torch type, and for the user why it was chosen."""

    dtype: DtypeName
    reason: str


def load_tokenizer(model: ModelFolder, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Load the model's fast tokenizer, with a padding token that is not its end token.

    Raises:
        ModelError: There is no fast tokenizer, it exceeds the model's vocabulary, or it has no token for padding.
    """
    from transformers import AutoTokenizer

    folder = model.path
    count_tokens(folder)
    if (folder / "tokenizer_config.json").is_file():
        read_json_as(folder / "tokenizer_config.json", TokenizerConfig, ModelError)
    try:
        with quiet_libraries():
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
                folder, trust_remote_code=trust_remote_code
            )
    except Exception as error:  # tokenizers raises a bare Exception for a file that it cannot parse
        raise ModelError(f"{folder}: the tokenizer cannot be loaded ({first_line(error)})") from error
    if not tokenizer.is_fast:
        raise ModelError(f"{folder} has only a slow tokenizer", hint="add its tokenizer.json")
    vocab_size = read_model_config(folder).get("vocab_size")
    if isinstance(vocab_size, int) and len(tokenizer) > vocab_size:
        raise ModelError(f"{folder}: the tokenizer has {len(tokenizer)} tokens, but the model only {vocab_size}")
    return ensure_pad(tokenizer)


def ensure_pad(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Give the tokenizer a padding token from its vocabulary that does not end anything, and return the same object.

    If it were the end token, masking the padding would mask the end of every answer, and the model would never stop.
    The vocabulary is never enlarged.

    Raises:
        ModelError: The vocabulary has no unused special token.
    """
    template = tokenizer.chat_template if isinstance(tokenizer.chat_template, str) else ""
    taken = {tokenizer.eos_token_id, tokenizer.bos_token_id} | set(end_of_turn_ids(tokenizer) if template else ())
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id not in taken:
        return tokenizer
    added = tokenizer.added_tokens_decoder.items()
    spare = [t.content for i, t in added if t.special and i not in taken and t.content not in template]
    choices = [t for t in _PAD_TOKENS if t in spare] + [t for t in spare if _RESERVED.search(t)]
    # Last choice: byte-fallback vocabularies never write their unknown token.
    choices += [t for t in spare if t == tokenizer.unk_token]
    if not choices:
        raise ModelError(
            f"the tokenizer of {tokenizer.name_or_path} has no special token to pad with besides its end token",
            hint="set pad_token in its tokenizer_config.json to a special token that no text uses",
        )
    tokenizer.pad_token = choices[0]
    return tokenizer


def detect_precision() -> Precision:
    """Return the 16-bit type that this machine multiplies natively, otherwise float32, with the reason."""
    import torch

    if torch.cuda.is_available():
        gpu = torch.cuda.get_device_name(0)
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return Precision("bfloat16", f"{gpu} computes in bfloat16")
        return Precision("float16", f"{gpu} has no bfloat16 units, so float16")
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    units = ["amx_bf16", "avx512_bf16"]
    if platform.system() == "Linux":  # torch's Arm kernels for bfloat16 are in the Linux builds
        units += ["sve_bf16", "bf16"]
    native = next((unit for unit in units if capabilities.get(unit)), None)
    if native:
        return Precision("bfloat16", f"no CUDA GPU; this processor multiplies bfloat16 natively ({native})")
    return Precision("float32", "no CUDA GPU, and this processor has no bfloat16 multiplication, so float32")


def load_model(
    folder: ModelFolder,
    *,
    dtype: Literal["auto", DtypeName] = "auto",
    device: str = "auto",
    quantization: Quantization = "none",
    compute: DtypeName | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """Load a causal language model in evaluation mode.

    Args:
        folder: The model, from ``fetch``.
        dtype: Type of the weights, with ``quantization="nf4"`` of those that are not packed; "auto" takes
            ``detect_precision``'s.
        device: A torch device, or "auto": the first CUDA GPU, else the processor.
        quantization: "nf4" stores the linear layers as 4-bit NormalFloat with double quantisation (QLoRA, arXiv
            2305.14314).
        compute: Type in which products with 4-bit weights are taken; ``dtype``'s where None.
        trust_remote_code: Whether the model's own Python code may run.

    Raises:
        ModelError: The weights do not fit the configuration, or transformers does not know the architecture.
        ResourceError: bitsandbytes is missing for 4-bit, or the memory does not suffice.
    """
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    path = folder.path
    stored = getattr(torch, detect_precision().dtype if dtype == "auto" else dtype)
    if device == "auto":
        device = "cuda:0" if torch.cuda.is_available() else "cpu"
    options, smaller = {}, "take a smaller model or a machine with more memory"
    if quantization == "nf4":
        check_four_bit()
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=stored if compute is None else getattr(torch, compute),
        )
    advice = smaller if options else f"load it in 4 bits, or {smaller}"
    try:
        with quiet_libraries(), advice_on_memory(advice, during=f"loading {path}"):
            model, loading = AutoModelForCausalLM.from_pretrained(
                path,
                dtype=stored,
                device_map={"": device},
                use_safetensors=True,
                trust_remote_code=trust_remote_code,
                output_loading_info=True,
                **options,
            )
    except ResourceError:
        raise
    except Exception as error:  # for a configuration that it cannot use, transformers raises errors of many kinds
        raise ModelError(f"{path}: the model cannot be loaded ({first_line(error)})") from error
    if loading["missing_keys"]:
        missing = sorted(loading["missing_keys"])
        raise ModelError(
            f"{path}: the weight files lack {len(missing)} tensors that config.json asks for: {missing[0]}",
            hint="they would start at random values; take weights and config.json from the same model",
        )
    loaded: PreTrainedModel = model.eval()
    return loaded


def check_four_bit() -> None:
    """Refuse 4-bit loading where its package is missing.

    Raises:
        ResourceError: With what to install.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ResourceError(
            "4-bit loading needs bitsandbytes",
            hint="pip install bitsandbytes, or set model.quantization: none",
            option="model.quantization",
        )
