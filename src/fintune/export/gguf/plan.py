"""Decides everything about a GGUF file before a weight is read: header, order, types and places of the tensors."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from fintune.errors import ModelError
from fintune.export.gguf.families import ModelConfig, gguf_names, heads_to_permute, rope_factors
from fintune.export.gguf.ggml import TYPES, row_bytes
from fintune.export.gguf.importance import Importance
from fintune.export.gguf.mixtures import mixture, tensor_types
from fintune.export.gguf.vocab import Vocabulary, read_vocabulary
from fintune.export.merge.merged_weights import Weights
from fintune.export.merge.safetensor_reader import StoredTensor

if TYPE_CHECKING:
    import numpy as np
    from gguf import GGUFWriter
    from numpy.typing import NDArray

_ALIGNMENT = 32
_ROPE_FACTORS = "rope_freqs.weight"


@dataclass(frozen=True)
class Source:
    """Where the values of one GGUF tensor come from.

    Attributes:
        name: GGUF name.
        shape: Rows first.
        stored: The tensor in the folder, None where ``values`` holds the data.
        values: Computed data, None where it is stored.
        num_heads: Heads whose rows are interleaved, None where rows stay in order.
    """

    name: str
    shape: tuple[int, ...]
    stored: StoredTensor | None
    values: NDArray[np.float32] | None = None
    num_heads: int | None = None


@dataclass(frozen=True)
class Place:
    """Type and position of one tensor within a file."""

    type_name: str
    offset: int
    num_bytes: int


@dataclass(frozen=True)
class FilePlan:
    """One output file.

    Attributes:
        kind: A key of :data:`fintune.export.gguf.mixtures.MIXTURES`.
        header: All bytes before the first tensor.
        places: GGUF name -> place.
        num_bytes: Size of the finished file.
        quantised: Whether llama.cpp's quantiser would have written it, not its converter.
    """

    kind: str
    header: bytes
    places: Mapping[str, Place]
    num_bytes: int
    quantised: bool


class ModelPlan:
    """A folder, checked and understood.

    Args:
        folder: A Hugging Face folder.
        weights: Its open weights.
        name: ``general.name``; the folder's own metadata or name where None.
        importance: What the quantised files are weighed with, which they say.

    Attributes:
        sources: In the order of the folder, computed tensors first.
        vocabulary: The tokenizer.

    Raises:
        ModelError: See :mod:`fintune.export.gguf.export`.
    """

    def __init__(
        self, folder: Path, weights: Weights, name: str | None = None, importance: Importance | None = None
    ) -> None:
        self.folder = folder
        self._importance = importance
        self.name = name
        self.config = ModelConfig(folder)
        self.sources = {source.name: source for source in self._sources(weights)}
        rows = self.sources["token_embd.weight"].shape[0]
        if rows != self.config.vocab_size:
            raise ModelError(
                f"{folder}: the embedding has {rows} rows, config.json says vocab_size {self.config.vocab_size}",
                hint="the vocabulary was resized without saving one of the two",
            )
        self.vocabulary: Vocabulary = read_vocabulary(folder, self.config.vocab_size)
        if importance is not None:
            importance.check({name: source.shape for name, source in self.sources.items()})

    def _sources(self, weights: Weights) -> Iterator[Source]:
        factors = rope_factors(self.config)
        if factors is not None:
            yield Source(_ROPE_FACTORS, factors.shape, None, values=factors)
        for theirs, ours in gguf_names(self.config, weights.tensors).items():
            stored = weights.tensors[theirs]
            if len(stored.shape) not in (1, 2) or not prod(stored.shape):
                raise ModelError(f"{stored.path}: tensor {theirs} has the shape {stored.shape}")
            yield Source(ours, stored.shape, stored, num_heads=heads_to_permute(self.config, ours))

    def file(self, kind: str) -> FilePlan:
        """Plan the file of one kind.

        Raises:
            ModelError: The kind is not known.
        """
        shapes = {name: source.shape for name, source in self.sources.items()}
        types = tensor_types(kind, shapes, is_70b=self.config.is_70b)
        header = self._header(kind, types)
        places: dict[str, Place] = {}
        position = len(header)
        for name, type_name in types.items():
            shape = shapes[name]
            num_bytes = prod(shape[:-1]) * row_bytes(type_name, shape[-1])
            places[name] = Place(type_name, position, num_bytes)
            position += num_bytes + -num_bytes % _ALIGNMENT
        return FilePlan(kind, header, places, position, mixture(kind).quantised)

    def _header(self, kind: str, types: Mapping[str, str]) -> bytes:
        import gguf
        import numpy as np
        from gguf.gguf_writer import WriterState

        mix = mixture(kind)
        config = self.config
        writer = gguf.GGUFWriter(None, config.family.arch)
        self._general(writer)
        config.write_metadata(writer)
        # llama.cpp's converter writes these two where they stand here; its quantiser moves them to the end.
        if not mix.quantised:
            writer.add_file_type(mix.file_type)
        config.write_rope_dimension(writer)
        if not mix.quantised:
            writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        self.vocabulary.write_metadata(writer)
        if config.family.arch == "llama" and config.vocab_size == 49152:
            # Tokenizers of this size declare a BOS that they do not prepend (SmolLM2, Granite).
            writer.add_add_bos_token(False)
        if mix.quantised:
            writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
            writer.add_file_type(mix.file_type)
            if self._importance is not None:
                self._importance.write_metadata(writer)
        for name, type_name in types.items():
            shape = self.sources[name].shape
            num_bytes = prod(shape[:-1]) * row_bytes(type_name, shape[-1])
            writer.add_tensor_info(
                name, shape, np.dtype(np.float32), num_bytes, gguf.GGMLQuantizationType(TYPES[type_name].id)
            )
        # A stream in place of a file: the weights are written by the export, not by the writer.
        stream = io.BytesIO()
        writer.fout, writer.state = [stream], WriterState.EMPTY
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        stream.write(bytes(-stream.tell() % _ALIGNMENT))
        return stream.getvalue()

    def _general(self, writer: GGUFWriter) -> None:
        import gguf

        num_parameters = sum(prod(source.shape) for source in self.sources.values())
        metadata = gguf.Metadata.load(None, self.folder, self.name, num_parameters)
        if self.name is not None:
            metadata.name = self.name
        if metadata.name is None:
            metadata.name = self.folder.name
        if metadata.size_label is None:
            metadata.size_label = gguf.size_label(num_parameters, num_parameters, 0, 0)
        writer.add_type(gguf.GGUFType.MODEL)
        metadata.set_gguf_meta_model(writer)
