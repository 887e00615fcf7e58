"""Check that a tokenizer splits text like llama.cpp does with the GGUF file of the same model.

A matching pre-tokenizer name or hash is no proof, so the tokens of strings are compared. A model that was trained on
``1 2 3`` and gets ``123`` answers badly without any error.
"""

from __future__ import annotations

import http.client
import json
import random
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from fintune.errors import ModelError, ResourceError

_CHAT = ("<|im_start|>user\n12 %<|im_end|>\n<|im_start|>assistant\n", "text<|endoftext|>  7")
_MAX_SHOWN = 3


def check_tokenizer_against_llama_cpp(
    encode: Callable[[str], list[int]], gguf: Path, strings: Iterable[str] | None = None
) -> int:
    """Compare the token ids of strings.

    Args:
        encode: Function from text to token ids. It adds no special tokens, but recognises those in the text.
        gguf: A file that llama.cpp can load. Only its vocabulary matters, so its weights may be tiny.
        strings: The strings, by default :func:`probe_strings` and two chat turns with special tokens.

    Returns:
        The number of strings.

    Raises:
        ModelError: Some strings differ, the first of which the message shows, or llama.cpp cannot load the file.
        ResourceError: xllamacpp is not installed.
    """
    strings = (*probe_strings(), *_CHAT) if strings is None else tuple(strings)
    with _llama_cpp_tokenizer(gguf) as llama_encode:
        unlike = [(text, ours, theirs) for text in strings if (ours := encode(text)) != (theirs := llama_encode(text))]
    if unlike:
        shown = "; ".join(
            f"{text!r} gives {ours[:12]}, llama.cpp {theirs[:12]}" for text, ours, theirs in unlike[:_MAX_SHOWN]
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


NUM_STRINGS = 2000
"""Number of strings of :func:`probe_strings`."""

_SEED = 20190911
_COMPANIES = (
    "Apple Inc.",
    "JPMorgan Chase & Co.",
    "AT&T",
    "O'Reilly",
    "Nestlé S.A.",
    "E*TRADE",
    "3M",
    "L'Oréal",
    "UBS",
)
_ITEMS = (
    *("net revenue", "Operating income", "EBITDA", "free cash flow", "goodwill", "deferred taxes", "EPS (diluted)"),
    *("long-term debt", "R&D expense", "provision for loan losses", "non-GAAP net margin", "interest-bearing deposits"),
)
_UNITS = ("million", "billion", "thousands", "bps", "%", "per share", "x", "mn", "bn", "basis points", "MMBtu")
_SYMBOLS = ("$", "€", "£", "¥", "₹", "US$", "CHF ", "HK$", "$ ", "( $ ", "~$")
_WHITE_SPACE = (
    *(" ", " ", " ", "  ", "   ", "     ", "\t", "\t\t", "\n", "\n\n", "\n\n\n", "\r\n", " \n", "\n ", " \t ", "\t\n "),
    *("\u00a0", "\u202f", "\u2009", "\u3000"),
)
_WORDS_AND_SIGNS = (
    *("the", "Revenue", "and", "in", "of", "fiscal", "was", "I'm", "they'll", "'s", "SHAREHOLDERS'", "can't", "WE'VE"),
    *(
        ",",
        ".",
        ";",
        "--",
        "—",
        "...",
        "(",
        ")",
        "#0",
        "==",
        "**",
        "<",
        ">",
        "|",
        "https://x.com/a?b=1",
        "a_b",
        "camelCase",
    ),
)
# Ranges of assigned characters only, so that every version of the Unicode tables knows them.
_SCRIPTS = {
    "Latin": (0x00C0, 0x017F),
    "Greek": (0x03B1, 0x03C9),
    "Cyrillic": (0x0410, 0x044F),
    "Hebrew": (0x05D0, 0x05EA),
    "Arabic": (0x0627, 0x063A),
    "Arabic digits": (0x0660, 0x0669),
    "Devanagari": (0x0905, 0x0939),
    "Devanagari digits": (0x0966, 0x096F),
    "Thai": (0x0E01, 0x0E2E),
    "Kana": (0x3041, 0x3096),
    "Chinese": (0x4E00, 0x9FA5),
    "Korean": (0xAC00, 0xD7A3),
    "full width": (0xFF01, 0xFF5E),
    "currency": (0x20A0, 0x20BF),
    "fractions": (0x2150, 0x2189),
    "superscripts": (0x2074, 0x208E),
    "arrows": (0x2190, 0x21FF),
    "mathematics": (0x2200, 0x22FF),
    "boxes": (0x2500, 0x257F),
    "emoji": (0x1F600, 0x1F64F),
    "mathematical letters": (0x1D400, 0x1D44F),
    "combining": (0x0300, 0x036F),
}


def probe_strings() -> tuple[str, ...]:
    """Generate 2,000 strings on which tokenizers differ: finance text, numbers, white space, scripts and symbols.

    The strings are distinct, and the same on every machine, in the same order. They are in Unicode's composed form
    (NFC): llama.cpp never composes, so a tokenizer that composes, such as Qwen's, differs from it on every decomposed
    accent.
    """
    draw = random.Random(_SEED)  # noqa: S311 - no secret
    kinds: tuple[Callable[[random.Random], str], ...] = (
        _sentence,
        _number,
        _spaces,
        _unicode,
        _table,
        _program,
        _mixed,
    )
    strings: dict[str, None] = {}
    while len(strings) < NUM_STRINGS:
        strings[unicodedata.normalize("NFC", kinds[len(strings) % len(kinds)](draw))] = None
    return tuple(strings)


def _number(draw: random.Random) -> str:
    whole = draw.randrange(10 ** draw.randrange(1, 12))
    forms = (
        str(whole),
        f"{whole:,}",
        f"{whole / 100:,.2f}",
        f"({whole:,})",
        f"-{whole / 1000:.3f}",
        f"{whole % 1000 / 10}%",
        f"{whole % 10000} - {whole % 977}",
        f"{whole % 100:02d}/{whole % 12 + 1:02d}/{1990 + whole % 40}",
        f"{1990 + whole % 40}-{whole % 12 + 1:02d}-{whole % 28 + 1:02d}T{whole % 24:02d}:30:00Z",
        f"{whole % 1000}e-{whole % 17:02d}",
        f"0x{whole:X}",
        f"{whole:,}".replace(",", " "),
        f"{whole:,}".replace(",", "."),
        f"US{whole:010d}",
        f"Q{whole % 4 + 1}'{whole % 100:02d}",
        f"{whole % 90}th {whole % 21}st",
    )
    return (
        draw.choice(_SYMBOLS) * draw.randrange(2) + draw.choice(forms) + f" {draw.choice(_UNITS)}" * draw.randrange(2)
    )


def _sentence(draw: random.Random) -> str:
    form = draw.choice(
        (
            "{c}'s {i} was {n} in {y} , compared with {n} in {y} .",
            "What was the percentage change in {i} from {y} to {y}?",
            "{c} ({y}): {i} rose {n} -- vs. {n}e -- on {i}.",
            "as of december 31 , {y} , {i} of {c} totaled {n} ( {n} ) .",
            "* {i}: {n}\n* {i}: {n}\n",
            "“{i}” isn't {n}; it's {n}!",
        )
    )
    while "{" in form:
        key = form[form.index("{") + 1]
        value = {
            "c": draw.choice(_COMPANIES),
            "i": draw.choice(_ITEMS),
            "n": _number(draw),
            "y": str(draw.randrange(1995, 2031)),
        }
        form = form.replace("{" + key + "}", value[key].replace("{", "("), 1)
    return form


def _spaces(draw: random.Random) -> str:
    """Words and numbers with white space before, between and after them. They show a lost Digits step."""
    parts = [draw.choice(_WHITE_SPACE) * draw.randrange(2)]
    for _ in range(draw.randrange(1, 7)):
        parts += [
            draw.choice((draw.choice(_WORDS_AND_SIGNS), str(draw.randrange(10 ** draw.randrange(1, 8))))),
            draw.choice(_WHITE_SPACE),
        ]
    return "".join(parts)


def _unicode(draw: random.Random) -> str:
    parts = []
    for _ in range(draw.randrange(1, 5)):
        first, last = _SCRIPTS[draw.choice(list(_SCRIPTS))]
        parts.append("".join(chr(draw.randrange(first, last + 1)) for _ in range(draw.randrange(1, 6))))
        parts.append(draw.choice(("", "", " ", "a", "7", "\u200d", "\n", ", ")))
    return "".join(parts)


def _table(draw: random.Random) -> str:
    rows = [
        [draw.choice(_ITEMS), *(_number(draw) for _ in range(draw.randrange(1, 4)))]
        for _ in range(draw.randrange(1, 4))
    ]
    return draw.choice(("| ", "\t", " ; ")).join(cell for row in rows for cell in [*row, "\n"])


def _program(draw: random.Random) -> str:
    steps = []
    for step in range(draw.randrange(1, 4)):
        name = draw.choice(("add", "subtract", "multiply", "divide", "exp", "greater", "table_average", "table_max"))
        second = f"#{step - 1}" if step else draw.choice(("const_100", "const_m1", "none", str(draw.randrange(10000))))
        steps.append(f"{name}({draw.randrange(10**6) / 100:g}, {second})")
    return draw.choice((", ", ",", " , ")).join(steps)


def _mixed(draw: random.Random) -> str:
    return draw.choice(_WHITE_SPACE).join(draw.choice((_number, _sentence, _unicode, _program))(draw) for _ in range(2))
