"""Hugging Face tokenizers as GGUF metadata.

llama.cpp splits text into words with its own code, which ``tokenizer.ggml.pre`` selects. Two methods determine this
name and must agree: the pre-tokenizer of ``tokenizer.json``, and the hash of the tokens of a probe text, which
llama.cpp's converter uses. The hash alone proves nothing: a tokenizer without its Digits step has the same hash.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fintune.errors import ModelError
from fintune.models.chat_template import read_chat_template, special_token_texts, turn_ending
from fintune.models.folder import count_tokens
from fintune.util.files import read_json

if TYPE_CHECKING:
    from gguf import GGUFWriter
    from tokenizers import Tokenizer

# The probe text of llama.cpp's converter. The hashes below are those of its tokens.
_PROBE = (
    "\n \n\n \n\n\n \t \t\t \t\n  \n   \n    \n     \n🚀 (normal) 😶\u200d🌫️ (multiple emojis concatenated) ✅ 🦙🦙 "
    "3 33 333 3333 33333 333333 3333333 33333333 3.3 3..3 3...3 កាន់តែពិសេសអាច😁 ?我想在apple工作1314151天～ "
    "------======= нещо на Български ''''''```````\"\"\"\"......!!!!!!?????? I've been 'told he's there, 'RE you "
    "sure? 'M not sure I'll make it, 'D you like some tea? We'Ve a'lL"
)
_PRE_BY_HASH = {
    "855059429035d75a914d1eda9f10a876752e281a054a7a3d421ef0533e5b6249": "smollm",
    "0ef9807a4087ebef797fc749390439009c3b9eda9ad1a097abbe738f486c01e5": "llama-bpe",
    "c136ed14d01c2745d4f60a9596ae66800e2b61fa45643e72436041855ad4089d": "smaug-bpe",
    "e636dc30a262dcc0d8c323492e32ae2b70728f4df7dfe9737d9f920a282b8aea": "qwen2",
    "d4540891389ea895b53b399da6ac824becc30f2fba0e9ddbb98f92e55ca0e97c": "qwen2",
    "b3f499bb4255f8ca19fccd664443283318f2fd2414d5e0b040fbdd0cc195d6c5": "deepseek-r1-qwen",
    "3ce83efda5659b07b1ad37ca97ca5797ea4285d9b9ab0dc679e4a720c9da7454": "gpt-2",
    "0fe1cf6eda062318a1af7270f3331a85c539a01778ff948e24388e949c5282f4": "gpt-2",
    "63b97e4253352e6f357cc59ea5b583e3a680eaeaf2632188c2b952de2588485e": "tekken",
}
# Other names of the same pre-tokenizer.
_SAME_SPLIT = {"smaug-bpe": "llama-bpe", "deepseek-r1-qwen": "qwen2"}
_LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_PRE_BY_SPLIT = {_LLAMA3_SPLIT: "llama-bpe", _LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}"): "qwen2"}
_WIDTH = 32
"""Width of the tiny model in :func:`write_vocabulary_file`."""


@dataclass(frozen=True)
class GgufVocabulary:
    """The ``tokenizer.*`` metadata of a GGUF file, from a model folder or from a file of llama.cpp's converter."""

    source: Path
    pre: str
    """llama.cpp's name of the pre-tokenizer."""
    tokens: tuple[str, ...]
    """Token texts in order of id, padded to the rows of the embedding."""
    chat_template: str | None
    eos_id: int | None
    """Token that ends generation, or None. With a chat template it is the end of a turn."""
    kinds: tuple[int, ...] = ()
    """llama.cpp's token types in order of id (1 normal, 3 control, 4 user-defined, 5 unused)."""
    eos_replaced: int | None = None
    """The folder's own end token if it is not the end of a turn, else None."""
    model: str = "gpt2"
    """llama.cpp's name of the tokenizer's algorithm: gpt2 is byte-level BPE, llama is SentencePiece."""

    def write_metadata(self, writer: GGUFWriter) -> None:
        """Add the ``tokenizer.*`` keys, in the order of llama.cpp's converter."""
        import gguf

        if self.source.is_file():
            for field in gguf.GGUFReader(self.source).fields.values():
                if field.name.startswith("tokenizer."):
                    inner = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
                    writer.add_key_value(field.name, field.contents(), field.types[0], sub_type=inner)
            return
        writer.add_tokenizer_model(self.model)
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(list(self.tokens))
        writer.add_token_types(list(self.kinds))
        special = gguf.SpecialVocab(self.source, load_merges=True, n_vocab=len(self.tokens))
        if special.chat_template is None or isinstance(special.chat_template, str):
            special.chat_template = self.chat_template
        if self.eos_id is not None:
            special.special_token_ids["eos"] = self.eos_id
        special.add_to_gguf(writer, quiet=True)


def read_vocabulary(folder: Path, vocab_size: int) -> GgufVocabulary:
    """Read ``tokenizer.json`` and ``tokenizer_config.json``.

    Args:
        folder: A Hugging Face folder.
        vocab_size: Number of rows of the embedding. Ids without a token become unused tokens.

    Raises:
        ModelError: There is no tokenizer, its algorithm is not supported, llama.cpp does not have its pre-tokenizer,
            there are more tokens than rows, or the chat template cannot be rendered.
    """
    import gguf
    from tokenizers import Tokenizer

    path = folder / "tokenizer.json"
    if count_tokens(folder) is None:
        raise ModelError(
            f"{folder}: no tokenizer.json with a vocabulary",
            hint="save the tokenizer with transformers' AutoTokenizer(...).save_pretrained",
        )
    try:
        tokenizer = Tokenizer.from_file(str(path))
    # The Rust library raises a bare Exception for a file that it cannot parse.
    except Exception as error:
        raise ModelError(f"{path}: unreadable: {error}") from error
    pre = _recognise_pre_tokenizer(tokenizer, read_json(path, ModelError), path)
    tokens, kinds = _token_list(tokenizer, vocab_size, path)
    template, special = read_chat_template(folder), special_token_texts(folder)
    eos = config_eos = gguf.SpecialVocab(folder).special_token_ids.get("eos")
    if template is not None:
        specials = {t for t, token in tokenizer.get_added_tokens_decoder().items() if token.special}
        ids = tokenizer.encode(turn_ending(template, special).strip(), add_special_tokens=False).ids
        eos = ids[0] if ids and ids[0] in specials else config_eos
    replaced = config_eos if config_eos != eos else None
    return GgufVocabulary(folder, pre, tokens, template, eos, kinds, replaced)


def read_converted_vocabulary(path: Path) -> GgufVocabulary:
    """Read the vocabulary of a GGUF file that llama.cpp's converter wrote, with or without weights.

    Raises:
        ModelError: The file has no tokens.
    """
    import gguf

    known: dict[str, Any] = {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}
    tokens, model = known.get("tokenizer.ggml.tokens"), known.get("tokenizer.ggml.model")
    if not isinstance(tokens, list):
        raise ModelError(f"{path} holds no tokenizer", hint="the converter does not support this tokenizer")
    pre, template = known.get("tokenizer.ggml.pre") or model, known.get("tokenizer.chat_template")
    eos = known.get("tokenizer.ggml.eos_token_id")
    return GgufVocabulary(path, str(pre), tuple(map(str, tokens)), template, eos, model=str(model))


def _recognise_pre_tokenizer(tokenizer: Tokenizer, raw: Mapping[str, Any], path: Path) -> str:
    """Return llama.cpp's name of a tokenizer's pre-tokenizer; structure and hash must agree."""
    model = raw["model"]
    if model.get("type") != "BPE" or model.get("byte_fallback"):
        raise ModelError(
            f"{path}: a {model.get('type')} tokenizer with byte fallback or without byte-level BPE is not supported",
            hint="export SentencePiece models (Llama 2, TinyLlama, Mistral 7B) with a llama.cpp checkout: "
            "export.llama_cpp_path=FOLDER; or train without GGUF files: --skip export",
        )
    by_structure = _pre_by_structure(raw)
    digest = hashlib.sha256(str(tokenizer.encode(_PROBE).ids).encode()).hexdigest()
    by_hash = _PRE_BY_HASH.get(digest)
    if by_hash and by_structure and _SAME_SPLIT.get(by_hash, by_hash) != by_structure:
        raise ModelError(
            f"{path}: splits text like {by_structure}, but its tokens are those of {by_hash}",
            hint="its pre_tokenizer was lost or changed: copy tokenizer.json from the original model",
        )
    name = by_hash or by_structure
    if name is None:
        kind = json.dumps(raw.get("pre_tokenizer"), ensure_ascii=True)[:200]
        raise ModelError(
            f"{path}: pre-tokenizer not recognised (probe hash {digest[:12]}): {kind}",
            hint=f"known: {', '.join(sorted(set(_PRE_BY_HASH.values())))}",
        )
    return name


def _pre_by_structure(raw: Mapping[str, Any]) -> str | None:
    top = raw.get("pre_tokenizer") or {}
    steps = top.get("pretokenizers", []) if top.get("type") == "Sequence" else [top]
    kinds = [step.get("type") for step in steps]
    if not kinds or kinds[-1] != "ByteLevel" or steps[-1].get("add_prefix_space"):
        return None
    splits_words = steps[-1].get("use_regex", True)
    name = None
    if kinds == ["ByteLevel"] and splits_words:
        name = "gpt-2"
    elif kinds == ["Digits", "ByteLevel"] and splits_words and steps[0].get("individual_digits"):
        name = "smollm"
    elif kinds == ["Split", "ByteLevel"] and not splits_words and steps[0].get("behavior") == "Isolated":
        name = _PRE_BY_SPLIT.get(str((steps[0].get("pattern") or {}).get("Regex")))
    # With ignore_merges a word of the vocabulary is not split. llama.cpp does so under the name llama-bpe alone.
    return name if bool(raw["model"].get("ignore_merges")) == (name == "llama-bpe") else None


def _token_list(tokenizer: Tokenizer, vocab_size: int, path: Path) -> tuple[tuple[str, ...], tuple[int, ...]]:
    from gguf import TokenType

    text_of = {token_id: text for text, token_id in tokenizer.get_vocab(with_added_tokens=True).items()}
    if text_of and max(text_of) >= vocab_size:
        raise ModelError(
            f"{path}: token id {max(text_of)} has no row in an embedding of {vocab_size}",
            hint="resize the model's embeddings to the tokenizer, or copy the tokenizer of this model",
        )
    added = tokenizer.get_added_tokens_decoder()
    tokens, kinds = [], []
    for token_id in range(vocab_size):
        text = text_of.get(token_id)
        kind = TokenType.NORMAL
        if text is None:
            text, kind = f"[PAD{token_id}]", TokenType.UNUSED
        elif token_id in added:
            # llama.cpp matches these tokens literally, so it needs their normalised text.
            if not added[token_id].normalized:
                ids = tokenizer.encode(text, add_special_tokens=False).ids
                text = tokenizer.decode(ids, skip_special_tokens=False)
            if added[token_id].special or _looks_special(text):
                kind = TokenType.CONTROL
            else:
                text, kind = text.replace("\u2581", " "), TokenType.USER_DEFINED
        tokens.append(text)
        kinds.append(int(kind))
    return tuple(tokens), tuple(kinds)


def _looks_special(text: str) -> bool:
    return text in ("<pad>", "<mask>") or (text.startswith(("<|", "<｜")) and text.endswith(("|>", "｜>")))


def write_vocabulary_file(vocabulary: GgufVocabulary, path: Path) -> Path:
    """Write a GGUF file with a whole vocabulary and a tiny model, to test the tokenizer. Return its path.

    llama.cpp's server loads no file without weights, so the model is one layer of width 32 with zeros.
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
