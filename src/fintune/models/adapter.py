"""Load a PEFT adapter on its base model, and check that the two belong together.

::

    model = load_adapter(load_model(folder), Path("runs/x/train/adapter"))

An adapter on other weights of the same shapes gives wrong answers without an error, and on the model that it was merged
into it counts twice. Names identify public models, but folders move. The weights themselves are therefore compared by
hash, which needs no torch.
"""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
import warnings
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from pydantic import BaseModel, ConfigDict, Field

from fintune.errors import FintuneError, ModelError
from fintune.models.folder import Count, adapter_base_name, cached_sha256
from fintune.models.load import library_errors
from fintune.models.safetensors_files import read_safetensors_header, weight_files
from fintune.util.files import read_json, read_json_as

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

BASE_FILE = "fintune.json"
"""File beside ``adapter_config.json`` with the hash of the base weights. PEFT neither writes nor reads it."""

_BASE = "base_weights_sha256"
_MERGED = "adapter_sha256"
_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PUBLIC_NAME = re.compile(r"builtin:\S+|[\w.-]+/[\w.-]+")
_PLAIN_PATTERN = re.compile(r"(?:[\w|-]|\\?\.)*")
"""Names and alternatives of names, which every pattern engine matches in linear time."""
_MATCH_SECONDS = 10
_MATCH = """import json, re, sys
patterns, names = json.load(sys.stdin)
for pattern in map(re.compile, patterns):
    for name in names:
        pattern.match(name), pattern.fullmatch(name)
"""
Alpha = Annotated[float, Field(ge=-1e6, le=1e6)]
Finite = Annotated[float, Field(allow_inf_nan=False)]


# --- the configuration of an adapter


class AdapterConfig(BaseModel):
    """The keys of ``adapter_config.json`` on which loading and merging depend. Names and defaults are PEFT's."""

    model_config = ConfigDict(extra="allow")

    peft_type: str
    base_model_name_or_path: str | None = None
    r: Count = 8
    lora_alpha: Alpha = 8
    alpha_pattern: dict[str, Alpha] | None = None
    rank_pattern: dict[str, Count] | None = None
    use_rslora: bool = False
    use_dora: bool = False
    fan_in_fan_out: bool = False
    ensure_weight_tying: bool = False
    bias: str = "none"
    init_lora_weights: bool | str | None = True
    target_modules: str | list[str] | None = None
    exclude_modules: str | list[str] | None = None
    modules_to_save: list[str] | None = None
    layers_pattern: str | list[str] | None = None

    @property
    def patterns(self) -> list[str]:
        """The regular expressions that PEFT matches with module names, without plain names and alternatives of them."""
        layers = [self.layers_pattern] if isinstance(self.layers_pattern, str) else self.layers_pattern or []
        forms = [(text, text) for text in (self.target_modules, self.exclude_modules) if isinstance(text, str)]
        forms += [(text, rf".*\.{text}\.(\d+)\.") for text in layers]
        forms += [(text, rf"(.*\.)?({text})$") for text in {**(self.alpha_pattern or {}), **(self.rank_pattern or {})}]
        return [form for text, form in forms if not _PLAIN_PATTERN.fullmatch(text)]

    def rank_and_alpha(self, module: str) -> tuple[int, float]:
        """Return a module's values: those of the first pattern that matches the end of its name."""
        ranks = (v for p, v in (self.rank_pattern or {}).items() if re.match(rf"(.*\.)?({p})$", module))
        alphas = (v for p, v in (self.alpha_pattern or {}).items() if re.match(rf"(.*\.)?({p})$", module))
        return next(ranks, self.r), next(alphas, self.lora_alpha)


def read_adapter_config(folder: Path) -> AdapterConfig:
    """Read the configuration of a PEFT adapter.

    Raises:
        ModelError: The folder holds no adapter, or a key has another type.
    """
    check_is_adapter(folder, _CONFIG, _WEIGHTS)
    return read_json_as(folder / _CONFIG, AdapterConfig, ModelError)


def check_patterns(folder: Path, config: AdapterConfig, modules: Collection[str]) -> None:
    """Check that an adapter's patterns can be matched with the names of modules in bounded time.

    A pattern can need exponential time, which no thread can interrupt. So a process that can be killed tries first.

    Raises:
        ModelError: A pattern is no regular expression, or matching takes more than ten seconds.
    """
    if not config.patterns:
        return
    command, work = [sys.executable, "-I", "-c", _MATCH], json.dumps([config.patterns, sorted(modules)])
    try:
        done = subprocess.run(command, input=work, capture_output=True, text=True, timeout=_MATCH_SECONDS, check=False)  # noqa: S603
        problem = done.stderr.strip().splitlines()[-1][:200] if done.returncode else ""
    except subprocess.TimeoutExpired:
        problem = f"matching them takes more than {_MATCH_SECONDS} seconds"
    if problem:
        raise ModelError(f"{folder / _CONFIG}: its patterns of module names cannot be used ({problem})")


def check_is_adapter(folder: Path, *files: str) -> None:
    """Check that a folder has the files of a PEFT adapter, by default its configuration alone.

    Raises:
        ModelError: A file is missing.
    """
    for name in files or (_CONFIG,):
        if not (folder / name).is_file():
            raise ModelError(f"{folder} holds no adapter: {name} is missing", hint="give a folder in PEFT format")


# --- loading


def load_adapter(model: PreTrainedModel, path: Path, *, trainable: bool = False) -> PeftModel:
    """Load a PEFT adapter (LoRA or DoRA) on a model. If training changed the vocabulary, the embeddings are resized.

    Raises:
        ModelError: The folder holds no adapter, or the adapter was trained on another base.
    """
    from peft import PeftModel

    check_patterns(path, read_adapter_config(path), [name for name, _ in model.named_modules()])
    shapes = {tensor.name: tensor.shape for tensor in read_safetensors_header(path / _WEIGHTS)}
    _fit_vocabulary(model, path, shapes)
    _check_shapes(model, path, shapes)
    if (Path(model.name_or_path) / "config.json").is_file():
        check_adapter_base(Path(model.name_or_path), path)
    with library_errors(f"{path}: PEFT cannot load the adapter"), quiet_peft():
        adapted: PeftModel = PeftModel.from_pretrained(model, path, is_trainable=trainable)
    return adapted


@contextmanager
def quiet_peft() -> Iterator[None]:
    """Silence the one warning that PEFT 0.21 causes in transformers 5.23 whenever it wraps a model."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
        yield


def _fit_vocabulary(model: PreTrainedModel, path: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    """Resize the embeddings to the size that was saved with the adapter; PEFT fills only existing rows."""
    embeddings = [model.get_input_embeddings(), model.get_output_embeddings()]
    names = [name for name, module in model.named_modules() if any(module is layer for layer in embeddings)]
    num_rows: dict[str, int] = {}
    for key, shape in shapes.items():
        module = re.sub(r"\.(modules_to_save(\.default)?|base_layer)(?=\.weight$)", "", key)
        module = module.removeprefix("base_model.model.").removesuffix(".weight")
        if module in names and shape:
            num_rows[module] = shape[0]
    vocab_size = embeddings[0].weight.shape[0]
    sizes = set(num_rows.values())
    if sizes <= {vocab_size}:
        return
    is_tied = embeddings[1] is None or embeddings[1].weight is embeddings[0].weight
    if len(sizes) > 1 or (len(num_rows) < len(names) and not is_tied):
        raise ModelError(
            f"{path} was trained with a vocabulary of {max(sizes)} tokens, {model.name_or_path} has {vocab_size}, and "
            f"only {' and '.join(name for name in num_rows if num_rows[name] != vocab_size)} was saved in that size",
            hint="save the adapter with save_embedding_layers=True",
        )
    model.resize_token_embeddings(sizes.pop(), mean_resizing=False)


def _check_shapes(model: PreTrainedModel, path: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    modules = dict(model.named_modules())
    base_name = adapter_base_name(path)
    is_other = not is_base_of(Path(model.name_or_path), base_name)
    problem = f"{path} was trained on {base_name}, not on {model.name_or_path}" if is_other else str(path)
    # lora_A is [rank, in], lora_B is [out, rank]. Embeddings are stored transposed, and PEFT checks them.
    for key, shape in shapes.items():
        module, _, part = key.removeprefix("base_model.model.").partition(".lora_")
        if part not in ("A.weight", "B.weight") or len(shape) != 2:
            continue
        if module not in modules:
            raise ModelError(f"{problem}: it adapts {module}, which this model does not have")
        side, adapter_size = ("in_features", shape[1]) if part.startswith("A") else ("out_features", shape[0])
        model_size = getattr(modules[module], side, adapter_size)
        if model_size != adapter_size:
            raise ModelError(f"{problem}: {module} has {model_size} {side} here and {adapter_size} in the adapter")


# --- which base an adapter belongs to


def weights_sha256(folder: Path) -> str:
    """Return a SHA-256 over the contents of a model's weight files alone; equal bases may differ in other files.

    Raises:
        ModelError: The folder holds no weights.
    """
    hashes = sorted(map(cached_sha256, weight_files(folder)))
    return hashlib.sha256("\n".join(hashes).encode()).hexdigest()


def record_base(adapter: Path, base: Path) -> None:
    """Write the hash of the base weights beside an adapter."""
    (adapter / BASE_FILE).write_text(json.dumps({_BASE: weights_sha256(base)}) + "\n", encoding="utf-8")


def merged_facts(adapter: Path) -> dict[str, str]:
    """Return the facts by which :func:`check_adapter_base` recognises a folder that the adapter was merged into."""
    return {_MERGED: cached_sha256(adapter / _WEIGHTS)}


def read_merged_facts(base: Path) -> dict[str, str]:
    """Return what a model folder that :func:`merged_facts` was noted in was merged from; nothing for other models."""
    manifest = _read_if_readable(base / "manifest.json")
    facts, key = manifest.get("facts"), manifest.get("key")
    if not isinstance(facts, dict) or _MERGED not in facts:
        return {}
    options = key.get("options") if isinstance(key, dict) else None
    name = options.get("model.name") if isinstance(options, dict) else None
    return {_MERGED: str(facts[_MERGED])} | ({"base_model": str(name)} if name is not None else {})


def check_base_name(name: str, adapter: Path) -> None:
    """Compare a model's name, as the user wrote it, with the adapter's, before anything is fetched or loaded.

    Raises:
        ModelError: The folder holds no adapter, or the adapter names another public model as its base.
    """
    check_is_adapter(adapter)
    base_name = adapter_base_name(adapter)
    is_public = [bool(_PUBLIC_NAME.fullmatch(model)) and not Path(model).exists() for model in (name, base_name)]
    if all(is_public) and name.casefold() != base_name.casefold():
        raise ModelError(f"{adapter} was trained on {base_name}, not on {name}", hint=f"use it with {base_name}")


def is_base_of(base: Path, base_name: str) -> bool:
    """Whether a model folder is the base that an adapter names: that folder itself, or the hub's copy of it."""
    if Path(base_name).expanduser().resolve() == base.resolve():
        return True
    return "models--" + base_name.replace("/", "--") in base.resolve().parts


def check_adapter_base(base: Path, adapter: Path, *, name: str | None = None) -> None:
    """Compare a model's weights with those that an adapter was trained on, if these are known.

    Adapters of this package come with the hash of their base. For others, the folder that ``adapter_config.json`` names
    is hashed if it exists. Messages call the model by ``name``, as the user wrote it.

    Raises:
        ModelError: The weights are others, or already contain this adapter.
    """
    shown, base_name = name or str(base), adapter_base_name(adapter)
    merged = read_merged_facts(base).get(_MERGED)
    if merged is not None and (adapter / _WEIGHTS).is_file() and merged == cached_sha256(adapter / _WEIGHTS):
        raise ModelError(
            f"{adapter} is already merged into {shown}", hint=f"leave the adapter out, or use it with {base_name}"
        )
    expected, folder = _read_if_readable(adapter / BASE_FILE).get(_BASE), Path(base_name).expanduser()
    if not isinstance(expected, str):
        is_known = (folder / "config.json").is_file() and folder.resolve() != base.resolve()
        expected = weights_sha256(folder) if is_known else None
    if expected is not None and expected != weights_sha256(base):
        raise ModelError(
            f"{adapter} was trained on {base_name}, not on the weights of {shown}", hint=f"use it with {base_name}"
        )


def _read_if_readable(path: Path) -> dict[str, object]:
    try:
        return read_json(path)
    except FintuneError:
        return {}
