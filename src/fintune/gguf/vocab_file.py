"""A GGUF with a model's whole vocabulary and a model of next to nothing: for what only reads the tokenizer."""

from __future__ import annotations

from pathlib import Path

from fintune.gguf.vocab import Vocabulary

_WIDTH = 32


def write_vocabulary_file(vocabulary: Vocabulary, path: Path) -> Path:
    """Write the file, with the ``tokenizer.*`` keys that an export of the model would have.

    llama.cpp's server loads no file without weights, so there is one layer of width 32, all zeros.

    Args:
        vocabulary: From :func:`fintune.gguf.vocab.read_vocabulary`.
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
