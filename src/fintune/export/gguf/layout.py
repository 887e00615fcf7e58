"""The layout of a GGUF file, fixed before a weight is read: header, order, type and offset of every tensor."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from fintune.errors import ModelError
from fintune.export.gguf.architectures import ModelConfig, heads_to_permute, map_tensor_names, rope_factors
from fintune.export.gguf.ggml import QUANT_TYPES, TYPES, row_bytes, tensor_types
from fintune.export.gguf.imatrix import ImportanceMatrix
from fintune.export.gguf.vocabulary import GgufVocabulary, read_vocabulary
from fintune.export.merge.merged_weights import WeightSource
from fintune.models.folder import check_config_fits, check_unquantised
from fintune.models.safetensors_files import StoredTensor
from fintune.util.text import first_line

if TYPE_CHECKING:
    import numpy as np
    from gguf import GGUFWriter
    from numpy.typing import NDArray

_ALIGNMENT = 32
_ROPE_FACTORS = "rope_freqs.weight"


class TensorSource(NamedTuple):
    """The source of the values of one GGUF tensor: a tensor in the model folder, or computed values."""

    name: str
    shape: tuple[int, ...]
    stored: StoredTensor | None
    values: NDArray[np.float32] | None = None
    num_heads: int | None = None
    """Number of heads whose rows are interleaved, or None if the rows keep their order."""


class TensorSlot(NamedTuple):
    """Type of one tensor in a file, and its position in bytes from the file's start."""

    type_name: str
    offset: int


class FileLayout(NamedTuple):
    """The layout of one output file of a kind in :data:`fintune.export.gguf.ggml.QUANT_TYPES`."""

    kind: str
    header: bytes
    slots: Mapping[str, TensorSlot]
    """GGUF name -> slot."""
    num_bytes: int


class ModelLayout:
    """A model folder whose configuration, tensors and tokenizer have been checked.

    Args:
        folder: A Hugging Face folder.
        weights: The open weights of the folder.
        name: As for :func:`fintune.export.gguf.writer.write_gguf`.
        imatrix: As for the same function.

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
        check_unquantised(folder)
        check_config_fits(folder, weights.tensors.values())
        self.config = ModelConfig.read(folder)
        self.sources = {source.name: source for source in self._sources(weights)}
        self._shapes = {name: source.shape for name, source in self.sources.items()}
        self.vocabulary: GgufVocabulary = read_vocabulary(folder, self.config.vocab_size)
        if imatrix is not None:
            imatrix.check_fits(self._shapes)

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
        """Lay out the file of one kind, a key of :data:`fintune.export.gguf.ggml.QUANT_TYPES`.

        Raises:
            ModelError: The kind is unknown.
        """
        types = tensor_types(kind, self._shapes, is_70b=self.config.is_70b)
        sizes = {name: prod(shape[:-1]) * row_bytes(types[name], shape[-1]) for name, shape in self._shapes.items()}
        header = self._header(kind, types, sizes)
        slots: dict[str, TensorSlot] = {}
        position = len(header)
        for name, type_name in types.items():
            slots[name] = TensorSlot(type_name, position)
            position += sizes[name] + -sizes[name] % _ALIGNMENT
        return FileLayout(kind, header, slots, position)

    def _header(self, kind: str, types: Mapping[str, str], sizes: Mapping[str, int]) -> bytes:
        import gguf
        import numpy as np
        from gguf.gguf_writer import WriterState

        file_type, _, quantised = QUANT_TYPES[kind]
        config = self.config
        writer = gguf.GGUFWriter(None, config.architecture.arch)
        self._write_general(writer)
        config.write_metadata(writer)
        # llama.cpp's converter writes file type and quantisation version at this point; its quantiser, at the end.
        if not quantised:
            writer.add_file_type(file_type)
        config.write_rope_dimension(writer)
        if not quantised:
            writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        self.vocabulary.write_metadata(writer)
        if config.architecture.is_llama and config.vocab_size == 49152:
            # Tokenizers of this size declare a BOS that they do not prepend (SmolLM2, Granite).
            writer.add_add_bos_token(False)
        if quantised:
            writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
            writer.add_file_type(file_type)
            if self._imatrix is not None:
                self._imatrix.write_metadata(writer)
        for name, type_name in types.items():
            number = gguf.GGMLQuantizationType(TYPES[type_name].id)
            writer.add_tensor_info(name, self._shapes[name], np.dtype(np.float32), sizes[name], number)
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

        num_parameters = sum(prod(shape) for shape in self._shapes.values())
        try:
            metadata = gguf.Metadata.load(None, self.folder, self.name, num_parameters)
        except Exception as error:  # it reads the YAML of README.md, too
            raise ModelError(f"{self.folder}: README.md has unreadable metadata ({first_line(error)})") from error
        if self.name is not None:
            metadata.name = self.name
        if metadata.name is None:
            metadata.name = self.folder.name
        if metadata.size_label is None:
            metadata.size_label = gguf.size_label(num_parameters, num_parameters, 0, 0)
        writer.add_type(gguf.GGUFType.MODEL)
        metadata.set_gguf_meta_model(writer)
