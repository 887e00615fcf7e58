"""What llama.cpp's ``/completion`` is asked, and how its answer is read."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fintune.finqa.grammar import Grammar
from fintune.inference.gguf_header import numbers
from fintune.inference.protocol import Completion, Decoding, log_probability

# Nothing that `general.sampling.*` of the file says holds.
_FIXED = {
    "samplers": ["temperature", "top_p"],
    "repeat_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "n_probs": 2,
    "return_tokens": True,
    "cache_prompt": True,
    # Only what a prompt begins with is reused, never a piece from elsewhere that is moved to another position.
    "n_cache_reuse": 0,
}
_SEEDS = 2**32 - 1
"""llama.cpp takes seeds below this; that one would mean any."""
_SEED_STEP = 1_000_003
"""Seeds of candidates lie next to each other, those of runs so far apart."""
_CONTROL = 3
"""GGUF's type of tokens that mark turns and texts."""


def question(
    decoding: Decoding, candidate: int, grammar: Grammar | None, unwritten: Sequence[int] = ()
) -> dict[str, Any]:
    """The body of a request, without its prompts.

    Args:
        decoding: How tokens are chosen.
        candidate: Which candidate of each prompt is asked for.
        grammar: What the completions may say.
        unwritten: See :func:`unwritten_tokens`; only needed with a grammar.
    """
    greedy = decoding.greedy_first and candidate == 0
    body: dict[str, Any] = {
        **_FIXED,
        "n_predict": decoding.max_new_tokens,
        "temperature": 0.0 if greedy else decoding.temperature,
        "top_p": decoding.top_p,
        "seed": (decoding.seed * _SEED_STEP + candidate) % _SEEDS,
    }
    if grammar is not None:
        body |= {"grammar": grammar.gbnf(), "logit_bias": [[token, False] for token in unwritten]}
    return body


def unwritten_tokens(path: Path) -> list[int]:
    """Control tokens of a GGUF file but its end tokens.

    A grammar of llama.cpp sees their names as text, which the completion then does not hold.
    """
    types, ends = "tokenizer.ggml.token_type", [f"tokenizer.ggml.{kind}_token_id" for kind in ("eos", "eot", "eom")]
    found = numbers(path, (types, *ends))
    last = {int(found[name][0]) for name in ends if name in found}
    return [token for token, kind in enumerate(found.get(types, ())) if kind == _CONTROL and token not in last]


def of_one_grammar(places: Sequence[int], decoding: Decoding) -> list[list[int]]:
    """Places of prompts, by the requests that can hold them together."""
    grammars = decoding.grammars
    if grammars is None or all(grammars[place] is grammars[places[0]] for place in places):
        return [list(places)]
    return [[place] for place in places]


def completion(answer: Mapping[str, Any], seconds: float, num_prompt_tokens: int) -> Completion:
    """One answer; ``seconds`` is its share of the time."""
    assert answer["tokens_evaluated"] == num_prompt_tokens, "llama.cpp changed the prompt"
    tokens = tuple(int(token) for token in answer["tokens"])
    logprobs, margins = _numbers(tokens, answer.get("completion_probabilities", []))
    return Completion(
        token_ids=tokens,
        text=str(answer["content"]),
        finish_reason="stop" if answer["stop_type"] == "eos" else "length",
        margins=margins,
        num_prompt_tokens=num_prompt_tokens,
        seconds=seconds,
        logprobs=logprobs,
    )


def _numbers(tokens: Sequence[int], steps: Sequence[Mapping[str, Any]]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Log-probability and margin of each token; llama.cpp reports none where one ends within a UTF-8 character."""
    logprobs, margins, waiting = [], [], list(reversed(steps))
    for token in tokens:
        if waiting and waiting[-1]["id"] == token:
            step = waiting.pop()
            first, second = (log_probability(best["logprob"]) for best in step["top_logprobs"])
            logprobs.append(log_probability(step["logprob"]))
            margins.append(first - second)
        else:
            logprobs.append(math.nan)
            margins.append(0.0)
    assert not waiting, "llama.cpp reported tokens that it did not generate"
    return tuple(logprobs), tuple(margins)
