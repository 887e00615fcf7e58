"""Resolve a model's name, fetch its files, and load model and tokenizer. No other module loads models.

::

    folder = fetch("builtin:smollm2-135m")      # or a local folder, or a hub id OWNER/NAME
    tokenizer = load_tokenizer(folder)
    model = load_model(folder, dtype="auto")

Only the two loading functions need torch.
"""

from __future__ import annotations

import importlib.util
import platform
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from fintune.config import Config
from fintune.errors import FintuneError, ModelError, ResourceError
from fintune.models import builtin
from fintune.models.chat_template import end_of_turn_ids
from fintune.models.folder import MODEL_FILES, check_model_folder, count_tokens, read_model_config, stated_licence
from fintune.util.console import quiet_libraries, say
from fintune.util.hub import offline_unless_resolved, quiet_hub
from fintune.util.memory import advice_on_memory
from fintune.util.text import first_line

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DtypeName = Literal["float32", "bfloat16", "float16"]
Quantization = Literal["none", "nf4"]

# Special tokens that models have for padding, or do not use. The first unused one in the vocabulary is chosen.
_PAD_TOKENS = ("<pad>", "[PAD]", "<|pad|>", "<|finetune_right_pad_id|>", "<|padding|>", "<|endoftext|>", "<|dummy_0|>")
_NO_ADAPTER = "no-adapter"
"""A folder that no model has."""
_RESERVED = re.compile(r"reserved|unused|extra_?id|_pad\b|_pad_|dummy", re.IGNORECASE)


# --- names and files


@dataclass(frozen=True)
class ModelName:
    """A model's name, as the user wrote it, that was checked. Its files may still be on the hub."""

    name: str
    base_name: str
    """Short name for reports and file names."""
    local_path: Path | None = None
    """Folder with its files; None for a model that was not fetched yet."""
    licence: str | None = None
    """SPDX-like name; None if it is not known."""
    revision: str | None = None
    """Hub revision to fetch; None takes the default branch."""


@dataclass(frozen=True)
class ModelFolder:
    """A model whose files are in the local folder ``path``, in Hugging Face form. The rest is as in ModelName."""

    name: str
    path: Path
    base_name: str
    licence: str | None = None


def resolve(name: str, *, revision: str | None = None) -> ModelName:
    """Check a model's name, without loading or downloading anything.

    Args:
        name: ``builtin:NAME``, a local folder, or a hub id (``OWNER/NAME``).
        revision: Branch, tag or commit on the hub.

    Raises:
        ModelError: There is no such folder or built-in model, the folder is incomplete, or the name is none of the
            three.
    """
    if name.startswith(builtin.PREFIX):
        spec = builtin.describe(name)
        return ModelName(name, name.removeprefix(builtin.PREFIX), builtin.cached(name), spec.licence)
    folder = Path(name).expanduser()
    if name and folder.is_dir():
        check_model_folder(folder)
        return ModelName(name, folder.resolve().name, folder, stated_licence(folder))
    if folder.is_file():
        raise ModelError(f"{name} is a file", hint="give a model folder in Hugging Face form")
    if name.lower() in builtin.BUILTIN:
        raise ModelError(f"there is no folder {name}", hint=f"did you mean {builtin.PREFIX}{name.lower()}?")
    if not re.fullmatch(r"[\w][\w.-]*(/[\w][\w.-]*)?", name, re.ASCII) or name.endswith(".gguf"):
        raise ModelError(
            f"there is no folder {name}", hint="give an existing model folder, a hub id OWNER/NAME, or builtin:NAME"
        )
    return ModelName(name, name.rpartition("/")[2], revision=revision)


def fetch(model: str | ModelName, *, revision: str | None = None) -> ModelFolder:
    """Fetch a model's files into a local folder. Files that are already there are not downloaded again.

    From the hub, only configuration, tokenizer and safetensors files are downloaded. The revision of a name that was
    resolved is ignored.

    Raises:
        ModelError: The model is unknown, gated or incomplete.
        ResourceError: The hub cannot be reached and the model is not in its local cache.
    """
    if isinstance(model, str):
        model = resolve(model, revision=revision)
    path, licence = model.local_path, model.licence
    if path is None and model.name.startswith(builtin.PREFIX):
        path = builtin.ensure(model.name)
    elif path is None:
        from huggingface_hub import snapshot_download

        patterns = [*MODEL_FILES, "README.md", "LICENSE*"]
        with _explain_hub_errors(model), offline_unless_resolved():
            path = Path(snapshot_download(model.name, revision=model.revision, allow_patterns=patterns))
        check_model_folder(path)
        licence = stated_licence(path)
    return ModelFolder(model.name, path, model.base_name, licence)


def fetch_base(config: Config) -> ModelFolder:
    """Fetch the base model of a run, ``model.name`` at ``model.revision``; errors as for :func:`fetch`."""
    return fetch(config.model.name, revision=config.model.revision)


def fetch_config(name: str, *, revision: str | None = None) -> Path:
    """Return a local folder that holds at least the model's ``config.json``. From the hub, nothing else is fetched.

    Raises:
        ModelError: The model is unknown or gated, or has no configuration.
        ResourceError: The hub cannot be reached and the file is not in its local cache.
    """
    folder = Path(name).expanduser()
    if name and (folder / "config.json").is_file():
        return folder
    model = resolve(name, revision=revision)
    if model.local_path is not None or name.startswith(builtin.PREFIX):
        return fetch(model).path
    from huggingface_hub import hf_hub_download

    with _explain_hub_errors(model), offline_unless_resolved(), quiet_hub():
        return Path(hf_hub_download(name, "config.json", revision=revision)).parent


@contextmanager
def _explain_hub_errors(model: ModelName) -> Iterator[None]:
    from huggingface_hub import errors

    what = f"{model.name}, revision {model.revision}" if model.revision else model.name
    try:
        yield
    except errors.GatedRepoError as error:
        raise ModelError(
            f"the hub gives {what} only to those who accepted its licence",
            hint="accept the licence on the model's page and log in with `hf auth login`",
        ) from error
    except errors.RevisionNotFoundError as error:
        raise ModelError(f"the hub has no revision {model.revision} of {model.name}") from error
    except errors.RepositoryNotFoundError as error:
        raise ModelError(
            f"there is no folder {model.name} here and no model of that name on the hub",
            hint="check the spelling; for a private model, log in with `hf auth login`",
        ) from error
    except errors.RemoteEntryNotFoundError as error:
        raise ModelError(f"{what} on the hub has no config.json", hint="give a model in Hugging Face form") from error
    except (errors.HfHubHTTPError, OSError) as error:
        # The first sentence of the message. The rest is advice for users of the library.
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].split(". ")[0][:200]
        raise ResourceError(
            f"there is no folder {model.name} here; taken for a hub id, {what} cannot be fetched: the hub cannot be "
            f"reached and the model is not in the local hub cache ({reason})",
            hint="check the path, or connect once, or use builtin:smollm2-135m",
        ) from error


# --- tokenizers and models


@contextmanager
def library_errors(problem: str) -> Iterator[None]:
    """Silence transformers and PEFT in the block. What they raise for a damaged folder becomes one line.

    Raises:
        ModelError: With the problem and the first line of the library's message.
    """
    try:
        with quiet_libraries():
            yield
    except FintuneError:
        raise
    except Exception as error:  # of any class: tokenizers raises a bare Exception for a file that it cannot parse
        raise ModelError(f"{problem} ({first_line(error)})") from error


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
    with library_errors(f"{folder}: the tokenizer cannot be loaded"):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    if not tokenizer.is_fast:
        raise ModelError(f"{folder} has only a slow tokenizer", hint="add its tokenizer.json")
    vocab_size = read_model_config(folder).get("vocab_size")
    num_tokens = 1 + max(tokenizer.get_vocab().values(), default=-1)
    if isinstance(vocab_size, int) and num_tokens > vocab_size:
        raise ModelError(f"{folder}: the tokenizer has {num_tokens} tokens, but the model only {vocab_size}")
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
    if (path / "adapter_config.json").is_file():
        say(f"{path} holds an adapter beside the model's own weights: the adapter is not loaded")
    with library_errors(f"{path}: the model cannot be loaded"), advice_on_memory(advice, during=f"loading {path}"):
        model, loading = AutoModelForCausalLM.from_pretrained(
            path,
            dtype=stored,
            device_map={"": device},
            use_safetensors=True,
            # Otherwise transformers also loads an adapter beside the weights.
            adapter_kwargs={"subfolder": _NO_ADAPTER},
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
            **options,
        )
    if loading["missing_keys"]:
        missing = sorted(loading["missing_keys"])
        raise ModelError(
            f"{path}: the weight files lack {len(missing)} tensors that config.json asks for: {missing[0]}",
            hint="they would start at random values; take weights and config.json from the same model",
        )
    if getattr(model, "_hf_peft_config_loaded", False):
        raise ModelError(
            f"{path}: transformers loaded the adapter beside the weights", hint="move adapter_config.json elsewhere"
        )
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # Otherwise the first forward pass reorders 4-bit weights, which DoRA and the backward pass cannot read.
            module.support_avx512bf16_for_cpu = False
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
