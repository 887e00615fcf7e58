"""Whether a tokenizer splits text as llama.cpp does with the GGUF of the same model.

A matching pre-tokenizer name or hash is no proof: the strings themselves are compared, because a model that was trained
on ``1 2 3`` and is asked with ``123`` answers badly without any error.
"""

from __future__ import annotations

import http.client
import itertools
import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from fintune.errors import ModelError, ResourceError

_FINANCE = (
    "net revenue was $ 1,234.5 million in 2009 , compared with $ ( 832 ) million in 2008 .",
    "subtract(5829, 5735), divide(#0, 5735)",
    "divide(const_100, 3.75%), table_average(total assets, none)",
    "| year ended december 31 , | 2017 | 2016 |\n| --- | ---: | ---: |\n| EBITDA | -32 ( 32 ) | 12.5% |",
    "what was the percentage change in operating income from 2013 to 2014?",
    "AAPL.O 52-wk high: 199.62; P/E 28.4x; yield 0.55 %; mkt cap $3.05tn",
    "Q3'24 EPS €1.07 vs. £0.93e (+15bps), 5¼% notes due 2031",
    "the company2019s long-term debt\t$\t 12 345 678 ,90",
    "CUSIP 037833100 ISIN US0378331005 LEI HWUPKR0MPOU8FGXBT394",
    "2024-09-30T16:00:00Z 1e-05 1.0E+10 0x1F #0 const_m1",
)
_UNICODE = (
    "naïve Zürich Straße İstanbul café é ﬁ",
    "日本銀行は金利を0.25％に引き上げた。",
    "Выручка выросла на 12,3 % до 4 567 млн ₽",
    "النمو ١٢٫٥٪ في الربع الثالث",
    "आय ₹१२३४ करोड़",
    "non\u00a0breaking\u202fthin\u2009spaces\u3000wide\u200bzero",
    "½ ² ₃ Ⅷ ① 𝟙𝟚 ٣",
    "🚀📈 to the moon 👩🏽‍💻 🇨🇭 ✓ — – … “quotes” ‘x’ don't I'LL we've",
    "a\u0000b \u007f \ufeffbom \ufffd",
    "\r\nline\rline\n\n\nline \n \n\t\tindent",
)
_SPACES = ("", " ", "  ", "   ", "\n", "\n\n", "\t", " \n ", "\r\n", "\u00a0")
_NUMBERS = ("7", "12", "345", "1,234", "0.5", "-3.2%", "$ 99", "(1,000)", "2009", "10000000")
_WORDS = ("the", "Revenue", "'s", ",", "#0", "==", "ß")
_CHAT = ("<|im_start|>user\n12 %<|im_end|>\n<|im_start|>assistant\n", "text<|endoftext|>  7")
_SHOWN = 3


def probe_strings() -> tuple[str, ...]:
    """Some hundred strings: finance prose, programs and tables, numbers beside white space, Unicode, special tokens.

    In Unicode's composed form (NFC): llama.cpp never composes, so that a tokenizer which does, as Qwen's, parts from it
    on every decomposed accent. ``fintune preflight`` says which tokenizers do.
    """
    beside = (
        f"{before}{space}{after}"
        for space, (before, after) in itertools.product(
            _SPACES,
            [*zip(_WORDS, _NUMBERS, strict=False), *zip(_NUMBERS, _NUMBERS[::-1], strict=True), ("", "x"), ("9", "")],
        )
    )
    return tuple(dict.fromkeys([*_FINANCE, *_UNICODE, *_CHAT, *filter(None, beside)]))


def check_tokenizer_against_llama_cpp(
    encode: Callable[[str], list[int]], gguf: Path, strings: Iterable[str] | None = None
) -> int:
    """Compares token ids string by string.

    Args:
        encode: Text to ids, adding no special tokens but reading those in the text.
        gguf: A file that llama.cpp can load; only its vocabulary matters, so tiny weights do.
        strings: What to compare; ``probe_strings()`` by default.

    Returns:
        The number of strings, all alike.

    Raises:
        ModelError: Some differ (the first are shown), or llama.cpp cannot load the file.
        ResourceError: xllamacpp is not installed.
    """
    strings = tuple(probe_strings() if strings is None else strings)
    with _llama_cpp_tokenizer(gguf) as llama_encode:
        unlike = [(text, ours, theirs) for text in strings if (ours := encode(text)) != (theirs := llama_encode(text))]
    if unlike:
        shown = "; ".join(
            f"{text!r} gives {ours[:12]}, llama.cpp {theirs[:12]}" for text, ours, theirs in unlike[:_SHOWN]
        )
        raise ModelError(
            f"{len(unlike)} of {len(strings)} strings tokenise differently from llama.cpp: {shown}",
            hint="the pre-tokenizer or a special token of this tokenizer is not the GGUF's",
        )
    return len(strings)


@contextmanager
def _llama_cpp_tokenizer(gguf: Path) -> Iterator[Callable[[str], list[int]]]:
    try:
        import xllamacpp
    except ImportError as error:
        raise ResourceError("comparing with llama.cpp needs xllamacpp", hint="pip install 'fintune[gguf]'") from error

    params = xllamacpp.CommonParams()
    params.model.path = str(gguf)
    params.n_ctx, params.n_parallel, params.n_threads_http = 128, 1, 1
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    params.n_gpu_layers = 0
    params.warmup = params.fit_params = params.ui = False
    params.verbosity = -1
    try:
        server = xllamacpp.Server(params)  # listens on a free port of the loopback interface
    except RuntimeError as error:
        raise ModelError(f"{gguf}: llama.cpp cannot load it ({error})") from error
    connection = http.client.HTTPConnection(server.listening_address.partition("://")[2], timeout=60)

    def encode(text: str) -> list[int]:
        body = json.dumps({"content": text, "add_special": False, "parse_special": True})
        connection.request("POST", "/tokenize", body, {"Content-Type": "application/json"})
        tokens: list[int] = json.loads(connection.getresponse().read())["tokens"]
        return tokens

    try:
        yield encode
    finally:
        connection.close()
        del server
