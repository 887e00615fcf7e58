"""From the completions of a prompt to its prediction: execute the programs, then rank them or let them vote.

Execution-guided decoding after Wang et al. 2018 (arXiv 1807.03100): the most probable candidate whose program executes.
Self-consistency after Wang et al. 2022 (arXiv 2203.11171): the result that most candidates have. Candidates are ranked
by the log-probability of the whole completion, or by their order if an engine does not report it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fintune.config import PredictOptions
from fintune.finqa.execute import NO_RESULT, Table, execute
from fintune.finqa.grammar import Grammar, general, restricted, shortest_ending, vocabulary
from fintune.finqa.program import extract_program, tokenize
from fintune.inference.protocol import Completion, Decoding
from fintune.records import Candidate, FinQARecord, Prediction


def decoding_from_options(options: PredictOptions, grammars: Sequence[Grammar] | None) -> Decoding:
    """Return the decoding that the options ask of an engine."""
    is_greedy = options.strategy == "greedy" or (options.strategy == "execution_guided" and options.num_candidates == 1)
    return Decoding(
        options.max_new_tokens,
        temperature=0.0 if is_greedy else options.temperature,
        top_p=options.top_p,
        seed=options.seed,
        num_candidates=options.num_candidates,
        greedy_first=options.strategy == "execution_guided",
        grammars=grammars,
    )


def make_grammars(options: PredictOptions, records: Sequence[FinQARecord]) -> Sequence[Grammar] | None:
    """Return a grammar for each record; the same object for all if it is the whole language, None for free text."""
    mode = options.decoding_modes[0]
    if mode == "none":
        return None
    return (general(),) * len(records) if mode == "general" else PageGrammars(records)


class PageGrammars(Sequence[Grammar]):
    """The grammar of each record's page. It is made when it is read, so that an engine can do so in the background."""

    def __init__(self, records: Sequence[FinQARecord]) -> None:
        self._records = records
        self._made: dict[int, Grammar] = {}

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: Any) -> Any:
        if index not in self._made:
            record = self._records[index]
            words = vocabulary(record.table, (*record.pre_text, *record.post_text, record.qa.question))
            self._made[index] = restricted(words)
        return self._made[index]


def choose_prediction(
    example_id: str,
    completions: Sequence[Completion],
    options: PredictOptions,
    table: Table,
    grammar: Grammar | None = None,
) -> Prediction:
    """Choose the prediction of one prompt from all its candidates, which are in the engine's order.

    With a grammar, a completion that the token limit cut off gets the shortest ending that makes it a program; its
    text, tokens and finish reason stay as generated.
    """
    candidates = [_candidate(completion, table, grammar) for completion in completions]
    ranked = sorted(range(len(candidates)), key=lambda index: -_rank_logprob(candidates[index]))
    best, confidence = ranked[0], None
    if options.strategy == "execution_guided":
        best = next((index for index in ranked if candidates[index].result is not None), best)
    elif options.strategy == "vote":
        votes = _count_votes(candidates)
        # Ties are broken by probability: max takes the first of the ranked candidates.
        best = max(ranked, key=lambda index: votes.get(candidates[index].result, 0))
        confidence = votes.get(candidates[best].result, 0) / len(candidates)
    candidate, completion = candidates[best], completions[best]
    if confidence is None and candidate.logprob is not None:
        confidence = math.exp(candidate.logprob)
    return Prediction(
        id=example_id,
        text=completion.text,
        program=candidate.program,
        finish_reason=completion.finish_reason,
        seconds=sum(completion.seconds for completion in completions),
        num_prompt_tokens=completion.num_prompt_tokens,
        token_ids=completion.token_ids,
        margins=completion.margins,
        logprob=candidate.logprob,
        confidence=confidence,
        candidates=tuple(candidates) if len(candidates) > 1 else (),
    )


def _candidate(completion: Completion, table: Table, grammar: Grammar | None) -> Candidate:
    program = extract_program(completion.text)
    if grammar is not None:
        # A character whose last bytes were cut off is not part of the model's text.
        whole = completion.text.rstrip("\ufffd") if completion.finish_reason == "length" else completion.text
        end = shortest_ending(grammar, whole)
        program = program if end is None else whole + end
    execution = execute(tokenize(program), table)
    has_result = not execution.invalid and execution.result != NO_RESULT
    logprob = sum(completion.logprobs) if completion.logprobs else math.nan
    return Candidate(
        program=program,
        logprob=None if math.isnan(logprob) else logprob,
        result=execution.result if has_result else None,
        num_tokens=len(completion.token_ids),
    )


def _rank_logprob(candidate: Candidate) -> float:
    return -math.inf if candidate.logprob is None else candidate.logprob


def _count_votes(candidates: Iterable[Candidate]) -> Mapping[float | str | None, int]:
    """Count the votes for each result. A program that does not execute has no vote."""
    votes: dict[float | str | None, int] = {}
    for candidate in candidates:
        if candidate.result is not None:
            votes[candidate.result] = votes.get(candidate.result, 0) + 1
    return votes
