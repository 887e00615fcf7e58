"""The requests to llama.cpp's ``/completion``, its answers, and the GGUF header values that they need."""

from __future__ import annotations

import math
import mmap
import struct
from collections import deque
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fintune.errors import ModelError
from fintune.finqa.grammar import Grammar
from fintune.inference.protocol import Completion, Decoding, parse_logprob

# These override the sampling defaults that a file may carry (`general.sampling.*`).
_FIXED = {
    "samplers": ["temperature", "top_p"],
    "repeat_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "n_probs": 2,
    "return_tokens": True,
    "cache_prompt": True,
    # Only a prompt's prefix is reused, never a piece that is moved from another position.
    "n_cache_reuse": 0,
}
_NUM_SEEDS = 2**32 - 1
"""llama.cpp takes seeds below this value; the value itself would mean a random seed."""
_SEED_STEP = 1_000_003
"""Distance between the seeds of consecutive runs; the seeds of candidates are consecutive."""
_PROMPTS_PER_SLOT = 4
"""Ungrouped prompts of one request for each slot. More would delay its answer."""
_CONTROL_TOKEN = 3
"""GGUF's type of tokens that mark turns and texts."""


def request_body(
    decoding: Decoding, candidate: int, grammar: Grammar | None, hidden_tokens: Sequence[int] = ()
) -> dict[str, Any]:
    """Return the body of a request, without its prompts. ``hidden_tokens`` are needed only with a grammar."""
    is_greedy = decoding.greedy_first and candidate == 0
    body: dict[str, Any] = {
        **_FIXED,
        "n_predict": decoding.max_new_tokens,
        "temperature": 0.0 if is_greedy else decoding.temperature,
        "top_p": decoding.top_p,
        "seed": (decoding.seed * _SEED_STEP + candidate) % _NUM_SEEDS,
    }
    if grammar is not None:
        body |= {"grammar": grammar.gbnf(), "logit_bias": [[token, False] for token in hidden_tokens]}
    return body


def slot_batches(groups: Sequence[Sequence[int]], num_slots: int) -> Iterator[list[int]]:
    """Yield requests such that a group's next prompt finds its predecessor in a slot.

    A request holds one prompt for each slot: first the prompts whose group has a slot already, so that no other prompt
    takes it, then first prompts of other groups, then ungrouped prompts. The remaining ungrouped prompts need no order:
    their requests are longer, and the prompts follow each other as slots become free.

    Args:
        groups: Indices of prompts by shared prefix, see :func:`fintune.inference.prefix_cache.group_by_prefix`.
        num_slots: Number of prompts that the server computes together.
    """
    grouped = deque(deque(group) for group in groups if len(group) > 1)
    single = deque(deque(group) for group in groups if len(group) == 1)
    active: list[deque[int]] = []
    while grouped or active:
        while len(active) < num_slots and (grouped or single):
            active.append((grouped or single).popleft())
        yield [group.popleft() for group in active]
        active = [group for group in active if group]
    rest = [group[0] for group in single]
    size = num_slots * _PROMPTS_PER_SLOT
    yield from (rest[start : start + size] for start in range(0, len(rest), size))


def split_by_grammar(indices: Sequence[int], decoding: Decoding) -> list[list[int]]:
    """Split the prompts of a request so that each request has one grammar."""
    grammars = decoding.grammars
    if grammars is None or all(grammars[index] is grammars[indices[0]] for index in indices):
        return [list(indices)]
    return [[index] for index in indices]


def parse_completion(answer: Mapping[str, Any], seconds: float, num_prompt_tokens: int) -> Completion:
    """Return the completion in an answer; ``seconds`` is the prompt's share of the request's time."""
    assert answer["tokens_evaluated"] == num_prompt_tokens, "llama.cpp changed the prompt"
    tokens = tuple(int(token) for token in answer["tokens"])
    logprobs, margins = _token_values(tokens, answer.get("completion_probabilities", []))
    return Completion(
        token_ids=tokens,
        text=str(answer["content"]),
        finish_reason="stop" if answer["stop_type"] == "eos" else "length",
        margins=margins,
        num_prompt_tokens=num_prompt_tokens,
        seconds=seconds,
        logprobs=logprobs,
    )


def _token_values(
    tokens: Sequence[int], steps: Sequence[Mapping[str, Any]]
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return log-probability and margin of each token; llama.cpp reports none for a token within a UTF-8 character."""
    logprobs, margins, remaining = [], [], list(reversed(steps))
    for token in tokens:
        if remaining and remaining[-1]["id"] == token:
            step = remaining.pop()
            first, second = (parse_logprob(best["logprob"]) for best in step["top_logprobs"])
            logprobs.append(parse_logprob(step["logprob"]))
            margins.append(first - second)
        else:
            logprobs.append(math.nan)
            margins.append(0.0)
    assert not remaining, "llama.cpp reported tokens that it did not generate"
    return tuple(logprobs), tuple(margins)


# --- the header of a GGUF file

_FORMATS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_START = struct.Struct("<4sIQQ")
_LENGTH = struct.Struct("<Q")
_TYPE = struct.Struct("<I")

Values = tuple[int | float | bool, ...]


def hidden_tokens(path: Path) -> list[int]:
    """Return the control tokens of a GGUF file except its end tokens.

    A grammar of llama.cpp sees their names as text, but the completion does not contain them.
    """
    types, ends = "tokenizer.ggml.token_type", [f"tokenizer.ggml.{kind}_token_id" for kind in ("eos", "eot", "eom")]
    values = read_gguf_numbers(path, (types, *ends))
    end_ids = {int(values[name][0]) for name in ends if name in values}
    return [
        token for token, kind in enumerate(values.get(types, ())) if kind == _CONTROL_TOKEN and token not in end_ids
    ]


def read_gguf_numbers(path: Path, keys: Collection[str]) -> dict[str, Values]:
    """Read numbers and arrays of numbers from a GGUF header, skipping the rest; a single number is an array of one.

    The gguf package makes an array of every string of the vocabulary, which takes seconds for a hundred thousand
    tokens. The layout is that of ggml's docs/gguf.md, versions 2 and 3, little-endian.

    Returns:
        Values by key, for the keys that the file has.

    Raises:
        ModelError: The header cannot be read.
    """
    values: dict[str, Values] = {}
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        try:
            _, version, _, num_pairs = _START.unpack_from(data)
            if version not in (2, 3):
                raise ModelError(f"{path}: GGUF version {version} is not supported", hint="export the model again")
            offset = _START.size
            for _ in range(num_pairs):
                key, offset = _read_text(data, offset)
                (kind,) = _TYPE.unpack_from(data, offset)
                numbers, offset = _read_value(data, offset + _TYPE.size, kind)
                if key in keys:
                    values[key] = numbers
        except (struct.error, KeyError, UnicodeDecodeError):
            raise ModelError(f"{path}: its header is damaged", hint="export the model again") from None
    return values


def _read_text(data: mmap.mmap, offset: int) -> tuple[str, int]:
    (length,) = _LENGTH.unpack_from(data, offset)
    offset += _LENGTH.size
    return data[offset : offset + length].decode(), offset + length


def _read_value(data: mmap.mmap, offset: int, kind: int) -> tuple[Values, int]:
    """Return a value and the offset after it. A string is skipped, and its value is empty."""
    if kind == _STRING:
        return (), _skip_strings(data, offset, 1)
    number = 1
    if kind == _ARRAY:
        kind, number = struct.unpack_from("<IQ", data, offset)
        offset += 12
        if kind == _STRING:
            return (), _skip_strings(data, offset, number)
    form = f"<{number}{_FORMATS[kind]}"
    return struct.unpack_from(form, data, offset), offset + struct.calcsize(form)


def _skip_strings(data: mmap.mmap, offset: int, number: int) -> int:
    unpack = _LENGTH.unpack_from
    for _ in range(number):
        offset += 8 + unpack(data, offset)[0]
    return offset
