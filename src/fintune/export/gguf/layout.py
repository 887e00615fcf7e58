"""The layout of a GGUF file, fixed before a weight is read: header, order, type and offset of every tensor."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from fintune.errors import ModelError
from fintune.export.gguf.architectures import ModelConfig, heads_to_permute, map_tensor_names, rope_factors
from fintune.export.gguf.ggml import TYPES, row_bytes
from fintune.export.gguf.imatrix import ImportanceMatrix
from fintune.export.gguf.quant_types import quant_type, tensor_types
from fintune.export.gguf.vocabulary import GgufVocabulary, read_vocabulary
from fintune.export.merge.safetensors_files import StoredTensor, WeightSource

if TYPE_CHECKING:
    import numpy as np
    from gguf import GGUFWriter
    from numpy.typing import NDArray

_ALIGNMENT = 32
_ROPE_FACTORS = "rope_freqs.weight"


@dataclass(frozen=True)
class TensorSource:
    """The source of the values of one GGUF tensor.

    Attributes:
        name: GGUF name.
        shape: Dimensions, rows first.
        stored: The tensor in the model folder, or None if ``values`` holds the data.
        values: Computed data, or None if the data are stored.
        num_heads: Number of heads whose rows are interleaved, or None if the rows keep their order.
    """

    name: str
    shape: tuple[int, ...]
    stored: StoredTensor | None
    values: NDArray[np.float32] | None = None
    num_heads: int | None = None


@dataclass(frozen=True)
class TensorSlot:
    """Type and position of one tensor in a file; ``offset`` and ``num_bytes`` are in bytes from the file's start."""

    type_name: str
    offset: int
    num_bytes: int


@dataclass(frozen=True)
class FileLayout:
    """The layout of one output file.

    Attributes:
        kind: A key of :data:`fintune.export.gguf.quant_types.QUANT_TYPES`.
        header: All bytes before the first tensor.
        slots: GGUF name -> slot.
        num_bytes: Size of the finished file.
        quantised: Whether the file follows llama.cpp's quantiser; otherwise it follows llama.cpp's converter.
    """

    kind: str
    header: bytes
    slots: Mapping[str, TensorSlot]
    num_bytes: int
    quantised: bool


class ModelLayout:
    """A model folder whose configuration, tensors and tokenizer have been checked.

    Args:
        folder: A Hugging Face folder.
        weights: The open weights of the folder.
        name: ``general.name`` of the files; None takes the folder's own metadata, or its name.
        imatrix: Importance matrix of the quantised files, which is named in their headers.

    Attributes:
        sources: GGUF name -> source, computed tensors first, then in the order of the folder.
        vocabulary: The tokenizer.

    Raises:
        ModelError: The model cannot be exported; see :mod:`fintune.export.gguf.writer`.
    """

    def __init__(
        self, folder: Path, weights: WeightSource, name: str | None = None, imatrix: ImportanceMatrix | None = None
    ) -> None:
        self.folder = folder
        self._imatrix = imatrix
        self.name = name
        self.config = ModelConfig(folder)
        self.sources = {source.name: source for source in self._sources(weights)}
        num_rows = self.sources["token_embd.weight"].shape[0]
        if num_rows != self.config.vocab_size:
            raise ModelError(
                f"{folder}: the embedding has {num_rows} rows, but config.json has vocab_size {self.config.vocab_size}",
                hint="the vocabulary was resized and only one of the two was saved: save the model again",
            )
        self.vocabulary: GgufVocabulary = read_vocabulary(folder, self.config.vocab_size)
        if imatrix is not None:
            imatrix.check_fits({name: source.shape for name, source in self.sources.items()})

    def _sources(self, weights: WeightSource) -> Iterator[TensorSource]:
        factors = rope_factors(self.config)
        if factors is not None:
            yield TensorSource(_ROPE_FACTORS, factors.shape, None, values=factors)
        for hf_name, gguf_name in map_tensor_names(self.config, weights.tensors).items():
            stored = weights.tensors[hf_name]
            if len(stored.shape) not in (1, 2) or not prod(stored.shape):
                raise ModelError(f"{stored.path}: tensor {hf_name} has the shape {stored.shape}")
            yield TensorSource(gguf_name, stored.shape, stored, num_heads=heads_to_permute(self.config, gguf_name))

    def file(self, kind: str) -> FileLayout:
        """Lay out the file of one kind.

        Args:
            kind: A key of :data:`fintune.export.gguf.quant_types.QUANT_TYPES`.

        Raises:
            ModelError: The kind is unknown.
        """
        shapes = {name: source.shape for name, source in self.sources.items()}
        types = tensor_types(kind, shapes, is_70b=self.config.is_70b)
        header = self._header(kind, types)
        slots: dict[str, TensorSlot] = {}
        position = len(header)
        for name, type_name in types.items():
            shape = shapes[name]
            num_bytes = prod(shape[:-1]) * row_bytes(type_name, shape[-1])
            slots[name] = TensorSlot(type_name, position, num_bytes)
            position += num_bytes + -num_bytes % _ALIGNMENT
        return FileLayout(kind, header, slots, position, quant_type(kind).quantised)

    def _header(self, kind: str, types: Mapping[str, str]) -> bytes:
        import gguf
        import numpy as np
        from gguf.gguf_writer import WriterState

        file_kind = quant_type(kind)
        config = self.config
        writer = gguf.GGUFWriter(None, config.architecture.arch)
        self._write_general(writer)
        config.write_metadata(writer)
        # llama.cpp's converter writes file type and quantisation version at this point; its quantiser, at the end.
        if not file_kind.quantised:
            writer.add_file_type(file_kind.file_type)
        config.write_rope_dimension(writer)
        if not file_kind.quantised:
            writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        self.vocabulary.write_metadata(writer)
        if config.architecture.arch == "llama" and config.vocab_size == 49152:
            # Tokenizers of this size declare a BOS that they do not prepend (SmolLM2, Granite).
            writer.add_add_bos_token(False)
        if file_kind.quantised:
            writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
            writer.add_file_type(file_kind.file_type)
            if self._imatrix is not None:
                self._imatrix.write_metadata(writer)
        for name, type_name in types.items():
            shape = self.sources[name].shape
            num_bytes = prod(shape[:-1]) * row_bytes(type_name, shape[-1])
            writer.add_tensor_info(
                name, shape, np.dtype(np.float32), num_bytes, gguf.GGMLQuantizationType(TYPES[type_name].id)
            )
        # The header goes to a stream in memory, because `write_gguf` writes the weights itself.
        stream = io.BytesIO()
        writer.fout, writer.state = [stream], WriterState.EMPTY
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        stream.write(bytes(-stream.tell() % _ALIGNMENT))
        return stream.getvalue()

    def _write_general(self, writer: GGUFWriter) -> None:
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
