"""A GGUF with a model's whole vocabulary and a model of next to nothing: for what only reads the tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from fintune.errors import ModelError

if TYPE_CHECKING:
    from gguf import GGUFWriter

_WIDTH = 32


class TokenizerKeys(Protocol):
    """What ``tokenizer.*`` of a GGUF file says: :class:`fintune.export.gguf.vocab.Vocabulary` or :class:`Converted`."""

    @property
    def model(self) -> str:
        """llama.cpp's name of the kind of tokenizer: gpt2 is byte-level BPE, llama SentencePiece."""

    @property
    def pre(self) -> str:
        """llama.cpp's name of the pre-tokenizer."""

    @property
    def tokens(self) -> Sequence[str]:
        """Text of each id."""

    @property
    def chat_template(self) -> str | None:
        """Default template, or None."""

    @property
    def eos_id(self) -> int | None:
        """The token at which generation ends."""

    def write_metadata(self, writer: GGUFWriter) -> None:
        """Add the ``tokenizer.*`` keys."""


@dataclass(frozen=True)
class Converted:
    """The ``tokenizer.*`` keys of a file that another tool wrote.

    Attributes:
        path: The file.
        model: See :class:`TokenizerKeys`.
        pre: See :class:`TokenizerKeys`.
        tokens: See :class:`TokenizerKeys`.
        chat_template: See :class:`TokenizerKeys`.
        eos_id: See :class:`TokenizerKeys`.
    """

    path: Path
    model: str
    pre: str
    tokens: tuple[str, ...]
    chat_template: str | None
    eos_id: int | None

    def write_metadata(self, writer: GGUFWriter) -> None:
        """Copy the keys."""
        import gguf

        for field in gguf.GGUFReader(self.path).fields.values():
            if field.name.startswith("tokenizer."):
                inner = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
                writer.add_key_value(field.name, field.contents(), field.types[0], sub_type=inner)


def read_converted(path: Path) -> Converted:
    """The vocabulary of a GGUF file, which may hold no weights.

    Raises:
        ModelError: It has no tokens.
    """
    import gguf

    fields = gguf.GGUFReader(path).fields

    def value(name: str) -> object:
        field = fields.get(f"tokenizer.{name}")
        return None if field is None else field.contents()

    tokens, template, eos = value("ggml.tokens"), value("chat_template"), value("ggml.eos_token_id")
    if not isinstance(tokens, list):
        raise ModelError(f"{path}: no tokenizer in it", hint="the converter does not know this tokenizer")
    return Converted(
        path,
        str(value("ggml.model")),
        str(value("ggml.pre") or value("ggml.model")),
        tuple(str(token) for token in tokens),
        template if isinstance(template, str) else None,
        eos if isinstance(eos, int) else None,
    )


def write_vocabulary_file(vocabulary: TokenizerKeys, path: Path) -> Path:
    """Write the file, with the ``tokenizer.*`` keys that an export of the model would have.

    llama.cpp's server loads no file without weights, so there is one layer of width 32, all zeros.

    Args:
        vocabulary: From :func:`fintune.export.gguf.vocab.read_vocabulary` or :func:`read_converted`.
        path: The file, replaced where it exists.

    Returns:
        ``path``.
    """
    import gguf
    import numpy as np

    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(128)
    writer.add_embedding_length(_WIDTH)
    writer.add_feed_forward_length(_WIDTH)
    writer.add_head_count(1)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(vocabulary.tokens))
    vocabulary.write_metadata(writer)
    matrices = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
    shapes: dict[str, tuple[int, ...]] = {f"blk.0.{name}": (_WIDTH, _WIDTH) for name in matrices}
    shapes |= dict.fromkeys(("blk.0.attn_norm", "blk.0.ffn_norm", "output_norm"), (_WIDTH,))
    shapes["token_embd"] = (len(vocabulary.tokens), _WIDTH)
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", np.zeros(shape, np.float16 if len(shape) == 2 else np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
