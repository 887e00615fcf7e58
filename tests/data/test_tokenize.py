"""Tokenizing in several processes: the same results, errors in order, and nothing left behind."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from fintune.data import tokenize
from fintune.data.synthetic import generate
from fintune.data.tokenize import Tokenizing, TokenRow
from fintune.data.tokenize_finqa import FinqaEncoder
from fintune.errors import DataError, ModelError
from fintune.models.chat_cache import CachedChatTokenizer
from support.tiny import make_tokenizer

ITEMS = [str(number) for number in range(40)]


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenize, "_CHUNK_CHARACTERS", 3)
    # Functions of this file have to be found by the workers.
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    for function in (start_doubling, double, start_failing, start_dying, fail_at_seven, die):
        monkeypatch.setattr(function, "__module__", "test_tokenize")
    monkeypatch.setitem(__import__("sys").modules, "test_tokenize", __import__("sys").modules[__name__])


def start_doubling() -> Any:
    return double


def double(items: Sequence[str]) -> list[str]:
    return [item * 2 for item in items]


def start_failing() -> Any:
    return fail_at_seven


def fail_at_seven(items: Sequence[str]) -> list[str]:
    if "7" in items:
        raise ModelError("seven", hint="take six")
    return list(items)


def start_dying() -> Any:
    return die


def die(items: Sequence[str]) -> list[str]:
    os._exit(3)


@pytest.mark.parametrize("num_workers", [0, 1, 3])
def test_tokenizing_keeps_order(num_workers: int) -> None:
    assert list(Tokenizing(start_doubling, len, num_workers=num_workers).run(ITEMS)) == double(ITEMS)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_tokenizing_raises_error_in_order(num_workers: int) -> None:
    results = Tokenizing(start_failing, len, num_workers=num_workers).run(ITEMS)
    assert [next(results) for _ in range(4)] == ITEMS[:4]
    with pytest.raises(ModelError, match="seven: take six"):
        list(results)


def test_tokenizing_reports_dead_worker() -> None:
    with pytest.raises(DataError, match=r"ended early.*data\.num_proc=0"):
        list(Tokenizing(start_dying, len, num_workers=2).run(ITEMS))


def test_tokenizing_stops_workers_when_abandoned() -> None:
    results = Tokenizing(start_doubling, len, num_workers=2).run(ITEMS)
    next(results)
    results.close()
    deadline = time.monotonic() + 5
    while _children() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert _children() == []


def _children() -> list[int]:
    """Worker processes of this process; empty where /proc does not list them."""
    path = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children")
    pids = path.read_text(encoding="ascii").split() if path.exists() else []
    return [int(pid) for pid in pids if _is_worker(int(pid))]


def _is_worker(pid: int) -> bool:
    try:
        return b"fintune.data.tokenize" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


def test_tokenizing_starts_no_workers_for_little_data(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenize, "_run_in_workers", None)
    assert len(list(Tokenizing(start_doubling, len).run(ITEMS))) == len(ITEMS)


def test_workers_give_rows_of_one_process() -> None:
    records = list(generate(3, pages_per_company=1, questions_per_page=4, seed=3, size="small"))
    start = partial(_start_encoder, make_tokenizer())
    pages = [records[k : k + 4] for k in range(0, 12, 4)]
    alone, together = (list(Tokenizing(start, len, num_workers=number).run(pages)) for number in (0, 2))
    assert alone == together
    assert sum(len(result.rows) for page in alone for result in page) == 3


def _start_encoder(tokenizer: Any) -> Any:
    return FinqaEncoder(tokenizer, system="Write.", max_length=2000, num_questions=4).encode_pages


_start_encoder.__module__ = "test_tokenize"


def test_token_row_counts_both_sequences_of_a_pair() -> None:
    row = TokenRow("a", [1, 2, 3, 4], [0, 0, 1, 1], rejected_ids=[5, 6, 7])
    assert (row.num_tokens, row.num_context_tokens) == (9, 5)
    assert list(row.compact().input_ids) == row.input_ids


LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PATTERNS = {
    "gpt-2": ("", True),
    "llama-3": (LLAMA_3, True),
    "newline joins the word": (r"\s?\p{L}+|[^\p{L}]", False),
    "lookbehind": (r"(?<=\n)\p{L}+|\p{L}+|[^\p{L}]", False),
    "any character": (r".+|\n", False),
}


@pytest.mark.parametrize("pattern", PATTERNS)
def test_heading_splits_give_ids_of_whole_text(pattern: str) -> None:
    from tokenizers import Regex, pre_tokenizers

    tokenizer = make_tokenizer()
    regex, is_split = PATTERNS[pattern]
    if regex:
        parts = [pre_tokenizers.Split(Regex(regex), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(parts)
    cached = CachedChatTokenizer(tokenizer, heading="Question:")
    pages = ("net sales .", "| 2019: 5,829 |", "a  ", "( 1.5 )", "é", "<|im_end|>", "Question: x\n\nQuestion:", "")
    for page in pages:
        for question in ("what ?", " <|im_end|> x", "12.5", "Question:"):
            text = f"<|im_start|>user\n{page}\n\nQuestion: {question}<|im_end|>\n"
            assert cached.encode(text) == tokenizer(text, add_special_tokens=False)["input_ids"], text
    assert bool(cached._heading) is is_split
