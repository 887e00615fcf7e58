"""Check that a tokenizer splits text like llama.cpp does with the GGUF file of the same model.

A matching pre-tokenizer name or hash is no proof, so the tokens of strings are compared. A model that was trained on
``1 2 3`` and gets ``123`` answers badly without any error.
"""

from __future__ import annotations

import http.client
import json
import os
import random
import secrets
import unicodedata
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from fintune.errors import ModelError, ResourceError

_CHAT = ("<|im_start|>user\n12 %<|im_end|>\n<|im_start|>assistant\n", "text<|endoftext|>  7")
_MAX_SHOWN = 3


class LlamaCppServer(ExitStack):
    """A GGUF file in llama.cpp's server, which listens on the loopback interface and requires a random key.

    Use it as a context manager.

    Raises:
        ModelError: llama.cpp cannot load the file.
        ResourceError: xllamacpp is not installed.
    """

    def __init__(self, path: Path, *, context_tokens: int = 128, threads: int = 1) -> None:
        super().__init__()
        self._path = path
        # OpenMP reads this when it is loaded. Idle threads then sleep, and other processes can use their cores.
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")
        try:
            import xllamacpp
        except ImportError as error:
            raise ResourceError(
                "comparing a GGUF file with the model needs xllamacpp", hint="pip install 'fintune[gguf]'"
            ) from error
        key = secrets.token_urlsafe(16)
        params = xllamacpp.CommonParams()
        params.model.path = str(path)
        params.n_ctx, params.n_parallel, params.n_threads_http, params.port = context_tokens, 1, 1, 0
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
        params.warmup = params.fit_params = params.ui = False
        params.cache_ram_mib, params.verbosity = 0, -1
        params.hostnames, params.api_keys = ["127.0.0.1"], [key]
        try:
            self._server: Any = xllamacpp.Server(params)
        except RuntimeError as error:
            raise ModelError(f"{path}: llama.cpp cannot load it: {error}") from error
        self.callback(setattr, self, "_server", None)  # it stops when nothing refers to it
        address = urlsplit(self._server.listening_address)
        connection = http.client.HTTPConnection(address.hostname or "127.0.0.1", address.port)
        self._connection = self.enter_context(closing(connection))
        self._headers = {"content-type": "application/json", "authorization": f"Bearer {key}"}

    def request(self, route: str, body: Mapping[str, Any] | None = None) -> Any:
        """Return the server's JSON answer to a GET, or with a body to a POST.

        Raises:
            ModelError: The server refuses the request.
        """
        text = None if body is None else json.dumps(body)
        self._connection.request("GET" if body is None else "POST", route, text, self._headers)
        answer = json.loads(self._connection.getresponse().read())
        if "error" in answer:
            raise ModelError(f"{self._path}: llama.cpp refused a row: {answer['error'].get('message', answer)}")
        return answer


def check_tokenizer_against_llama_cpp(
    encode: Callable[[str], list[int]], gguf: Path, strings: Iterable[str] | None = None
) -> int:
    """Compare the token ids of strings, and return the number of strings.

    Args:
        encode: Function from text to token ids. It adds no special tokens, but recognises those in the text.
        gguf: A file that llama.cpp can load. Only its vocabulary matters, so its weights may be tiny.
        strings: The strings, by default :func:`probe_strings` and two chat turns with special tokens.

    Raises:
        ModelError: Some strings differ, the first of which the message shows, or llama.cpp cannot load the file.
        ResourceError: xllamacpp is not installed.
    """
    strings = (*probe_strings(), *_CHAT) if strings is None else tuple(strings)
    unlike = []
    with LlamaCppServer(gguf) as server:
        for text in strings:
            body = {"content": text, "add_special": False, "parse_special": True}
            ours, theirs = encode(text), server.request("/tokenize", body)["tokens"]
            if ours != theirs:
                unlike.append(f"{text!r} gives {ours[:12]}, llama.cpp {theirs[:12]}")
    if unlike:
        raise ModelError(
            f"{len(unlike)} of {len(strings)} strings tokenise differently from llama.cpp: "
            + "; ".join(unlike[:_MAX_SHOWN]),
            hint="the pre-tokenizer or a special token of this tokenizer is not the GGUF's",
        )
    return len(strings)


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
    *(",", ".", ";", "--", "—", "...", "(", ")", "#0", "==", "**", "<", ">", "|"),
    *("https://x.com/a?b=1", "a_b", "camelCase"),
)
# Ranges of assigned characters only, so that every version of the Unicode tables knows them.
_SCRIPTS = (
    *((0x00C0, 0x017F), (0x03B1, 0x03C9), (0x0410, 0x044F), (0x05D0, 0x05EA)),  # Latin, Greek, Cyrillic, Hebrew
    *((0x0627, 0x063A), (0x0660, 0x0669), (0x0905, 0x0939), (0x0966, 0x096F)),  # Arabic, Devanagari, with digits
    *((0x0E01, 0x0E2E), (0x3041, 0x3096), (0x4E00, 0x9FA5), (0xAC00, 0xD7A3)),  # Thai, kana, Chinese, Korean
    *((0xFF01, 0xFF5E), (0x20A0, 0x20BF), (0x2150, 0x2189), (0x2074, 0x208E)),  # full width, currency, fractions
    *((0x2190, 0x21FF), (0x2200, 0x22FF), (0x2500, 0x257F), (0x1F600, 0x1F64F)),  # arrows, mathematics, boxes, emoji
    *((0x1D400, 0x1D44F), (0x0300, 0x036F)),  # mathematical letters, combining characters
)
_SENTENCES = (
    "{c}'s {i} was {n} in {y} , compared with {n} in {y} .",
    "What was the percentage change in {i} from {y} to {y}?",
    "{c} ({y}): {i} rose {n} -- vs. {n}e -- on {i}.",
    "as of december 31 , {y} , {i} of {c} totaled {n} ( {n} ) .",
    "* {i}: {n}\n* {i}: {n}\n",
    "“{i}” isn't {n}; it's {n}!",
)
_OPERATIONS = ("add", "subtract", "multiply", "divide", "exp", "greater", "table_average", "table_max")


def probe_strings() -> tuple[str, ...]:
    """Generate 2,000 strings on which tokenizers differ: finance text, numbers, white space, scripts and symbols.

    The strings are distinct, and the same on every machine, in the same order. They are in Unicode's composed form
    (NFC): llama.cpp never composes, so a tokenizer that composes, such as Qwen's, differs from it on every decomposed
    accent.
    """
    draw = random.Random(_SEED)  # noqa: S311 - no secret
    kinds = (_sentence, _number, _spaces, _unicode, _table, _program, _mixed)
    strings: dict[str, None] = {}
    while len(strings) < NUM_STRINGS:
        strings[unicodedata.normalize("NFC", kinds[len(strings) % len(kinds)](draw))] = None
    return tuple(strings)


def _number(draw: random.Random) -> str:
    n = draw.randrange(10 ** draw.randrange(1, 12))
    forms = (
        *(f"{n}", f"{n:,}", f"{n / 100:,.2f}", f"({n:,})", f"-{n / 1000:.3f}", f"{n % 1000 / 10}%"),
        *(f"{n % 10000} - {n % 977}", f"{n % 100:02d}/{n % 12 + 1:02d}/{1990 + n % 40}"),
        *(f"{1990 + n % 40}-{n % 12 + 1:02d}-{n % 28 + 1:02d}T{n % 24:02d}:30:00Z", f"{n % 1000}e-{n % 17:02d}"),
        *(f"0x{n:X}", f"{n:,}".replace(",", " "), f"{n:,}".replace(",", "."), f"US{n:010d}"),
        *(f"Q{n % 4 + 1}'{n % 100:02d}", f"{n % 90}th {n % 21}st"),
    )
    return (
        draw.choice(_SYMBOLS) * draw.randrange(2) + draw.choice(forms) + f" {draw.choice(_UNITS)}" * draw.randrange(2)
    )


def _sentence(draw: random.Random) -> str:
    form = draw.choice(_SENTENCES)
    while "{" in form:
        company, item = draw.choice(_COMPANIES), draw.choice(_ITEMS)
        value = {"c": company, "i": item, "n": _number(draw), "y": str(draw.randrange(1995, 2031))}
        key = form[form.index("{") + 1]
        form = form.replace("{" + key + "}", value[key].replace("{", "("), 1)
    return form


def _spaces(draw: random.Random) -> str:
    """Words and numbers with white space before, between and after them. They show a lost Digits step."""
    parts = [draw.choice(_WHITE_SPACE) * draw.randrange(2)]
    for _ in range(draw.randrange(1, 7)):
        word = draw.choice((draw.choice(_WORDS_AND_SIGNS), str(draw.randrange(10 ** draw.randrange(1, 8)))))
        parts += [word, draw.choice(_WHITE_SPACE)]
    return "".join(parts)


def _unicode(draw: random.Random) -> str:
    parts = []
    for _ in range(draw.randrange(1, 5)):
        first, last = draw.choice(_SCRIPTS)
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
        name = draw.choice(_OPERATIONS)
        second = f"#{step - 1}" if step else draw.choice(("const_100", "const_m1", "none", str(draw.randrange(10000))))
        steps.append(f"{name}({draw.randrange(10**6) / 100:g}, {second})")
    return draw.choice((", ", ",", " , ")).join(steps)


def _mixed(draw: random.Random) -> str:
    return draw.choice(_WHITE_SPACE).join(draw.choice((_number, _sentence, _unicode, _program))(draw) for _ in range(2))
