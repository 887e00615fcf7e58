"""Merged weights, GGUF files, the comparison of both with the trained model, and what is pushed to the hub."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from fintune.config.base import Options, advanced, neutral

COMPUTE = Path("compute")
"""Value of ``export.imatrix`` that names no file."""
GGUF_TYPES = ("F32", "F16", "BF16", "Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q4_K_S", "Q3_K_M")
"""Types that this package writes itself. The quantizer of a llama.cpp checkout has its own list."""
_REPO = re.compile(r"[A-Za-z0-9][\w.-]{0,94}[A-Za-z0-9]|[A-Za-z0-9]", re.ASCII)
Published = Literal["adapter", "merged", "gguf"]


class MergeOptions(Options):
    """Folding the adapter into the base weights."""

    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Type of the merged weights (`auto`: the base model's)."""
    into: Literal["16bit", "quantized_base"] = advanced("16bit")
    """Weights that the adapter is folded into: the base model's own, or, with `model.quantization: nf4`, the ones that
    training used (rounded to 4 bits and back). The manifest states how far the two differ."""


def _to_upper(types: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(map(str.upper, types))


class ExportOptions(Options):
    """GGUF files for llama.cpp."""

    types: Annotated[tuple[str, ...], Field(min_length=1), AfterValidator(_to_upper)] = ("F16", "Q4_K_M")
    """GGUF types to write."""
    source: Literal["merged", "adapter"] = "merged"
    """What is exported: the merged folder, or base + `adapter`, folded while they are read. Both give the same bytes.
    `adapter` writes no merged folder, so `predict.models` may not contain `merged`."""
    imatrix: Path | None = None
    """Importance matrix for the quantized types: a llama.cpp file (GGUF or the older binary), or `compute`, which reads
    the first 32,768 tokens of the training texts with the whole model in memory. For a file called compute, write its
    full path."""
    llama_cpp_path: Path | None = None
    """A built llama.cpp checkout. Its converter and quantizer then write the files from the merged folder. Needed for
    architectures other than llama, mistral, qwen2 and qwen3, and for SentencePiece tokenizers (Llama 2, TinyLlama,
    Mistral 7B)."""
    threads: int | None = neutral(None, advanced=True, ge=1)
    """CPU threads (default: all cores)."""

    @property
    def computes_imatrix(self) -> bool:
        """Whether this package computes the importance matrix."""
        return self.imatrix == COMPUTE

    @property
    def imatrix_file(self) -> Path | None:
        """The importance matrix that the user named, if any."""
        return None if self.computes_imatrix else self.imatrix


class ReplayOptions(Options):
    """Verification of the exports: held-out completions are compared token by token with base + adapter."""

    num_examples: int = Field(16, ge=1)
    """Number of evaluation examples that are compared."""
    max_tokens: int = Field(64, ge=1)
    """Maximum tokens of a completion that are compared, from its start."""
    min_same_share: float = advanced(0.98, ge=0, le=1)
    """Minimum share of positions at which the merged folder and the F32, F16 and BF16 files have the same most probable
    token as base + adapter (Q8_0: 0.9 at most). Below it the stage fails. A single differing position never fails it,
    unless this is 1."""
    min_same_share_quantised: float = advanced(0.5, ge=0, le=1)
    """The same for smaller files, whose most probable tokens may differ. Only a broken file falls below it."""


def is_hub_name(name: str) -> bool:
    """Whether a name is valid for a repository of the hub: ``OWNER/NAME`` or ``NAME``."""
    parts = name.split("/")
    fits = len(parts) <= 2 and len(name) <= 96 and not any(pair in name for pair in ("--", ".."))
    return fits and all(_REPO.fullmatch(part) is not None for part in parts)


class PublishOptions(Options):
    """Pushing results to the Hugging Face hub. Nothing is pushed unless `repo_id` is set."""

    repo_id: str | None = None
    """Repository: `OWNER/NAME`, or `NAME` for one of yours. It is created if it does not exist. If this is set,
    `fintune run` ends with a push. The token comes from `hf auth login` or HF_TOKEN."""
    artifacts: Annotated[tuple[Published, ...], Field(min_length=1)] = ("adapter",)
    """What is pushed: `adapter` (PEFT), `merged` (the 16-bit folder), `gguf` (the files of `export.types` and the
    Modelfile). If `merged` is pushed, the adapter goes to the folder `adapter/`."""
    private: bool = True
    """Make the repository private. A repository that is already public is then refused."""
    branch: str = advanced("main", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Branch; it is created if it does not exist."""
    base_model: str | None = advanced(None)
    """Hub id of the base model, if `model.name` is a folder. The card and the adapter's configuration name it."""
    license: str | None = None
    """License of the result as a hub identifier such as `apache-2.0` (default: what base model and data require).
    Rejected if it permits uses that the data licenses forbid."""
    each_epoch: bool = neutral(False)
    """Also push the adapter after every epoch, in the background. If a push fails, training continues."""

    @property
    def adapter_folder(self) -> str:
        """Folder of the adapter in the repository: its root, unless the merged model is there.

        transformers would apply an adapter beside a model on top of it, and so a second time.
        """
        return "adapter" if "merged" in self.artifacts else ""
