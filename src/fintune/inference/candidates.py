"""From one or several completions of a prompt to its prediction: run the programs, then rank or let them vote.

Execution-guided decoding after Wang et al. 2018 (arXiv 1807.03100): the most probable candidate whose program runs.
Self-consistency after Wang et al. 2022 (arXiv 2203.11171): the result that most candidates have. Candidates are ranked
by the log-probability of the whole completion; where an engine does not tell it, in the order in which they came.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from fintune.config import PredictOptions
from fintune.finqa.ending import ending
from fintune.finqa.execute import NO_RESULT, Table, execute
from fintune.finqa.grammar import Grammar, general, restricted, vocabulary
from fintune.finqa.program import extract_program, tokenize
from fintune.inference.protocol import Completion, Decoding
from fintune.records import Candidate, FinQARecord, Prediction


def decoding(options: PredictOptions, grammars: tuple[Grammar, ...] | None) -> Decoding:
    """What the options ask of an engine."""
    greedy = options.strategy == "greedy" or (options.strategy == "execution_guided" and options.num_candidates == 1)
    return Decoding(
        options.max_new_tokens,
        temperature=0.0 if greedy else options.temperature,
        top_p=options.top_p,
        seed=options.seed,
        num_candidates=options.num_candidates,
        greedy_first=options.strategy == "execution_guided",
        grammars=grammars,
    )


def grammars(options: PredictOptions, records: Iterable[FinQARecord]) -> tuple[Grammar, ...] | None:
    """What may be said about each record; one and the same grammar for all where it is the whole language."""
    mode = options.decoding_modes[0]
    if mode == "none":
        return None
    if mode == "general":
        whole = general()
        return tuple(whole for _ in records)
    return tuple(
        restricted(vocabulary(each.table, (*each.pre_text, *each.post_text, each.qa.question))) for each in records
    )


def predict_one(
    example_id: str,
    completions: Sequence[Completion],
    options: PredictOptions,
    table: Table,
    grammar: Grammar | None = None,
) -> Prediction:
    """The prediction for one prompt.

    Args:
        example_id: Its id.
        completions: All candidates, in the order in which the engine gave them.
        options: The strategy.
        table: What table operations read.
        grammar: What the completions were kept to. One that the token limit cut gets the shortest ending that makes it
            a program; its text, tokens and finish reason stay as generated.
    """
    candidates = [_candidate(each, table, grammar) for each in completions]
    ranked = sorted(range(len(candidates)), key=lambda place: -_nats(candidates[place]))
    best, confidence = ranked[0], None
    if options.strategy == "execution_guided":
        best = next((place for place in ranked if candidates[place].result is not None), best)
    elif options.strategy == "vote":
        votes = _votes(candidates)
        # Of results with as many votes the one with the most probable candidate wins: max takes the first.
        best = max(ranked, key=lambda place: votes.get(candidates[place].result, 0))
        confidence = votes.get(candidates[best].result, 0) / len(candidates)
    chosen, completion = candidates[best], completions[best]
    if confidence is None and chosen.logprob is not None:
        confidence = math.exp(chosen.logprob)
    return Prediction(
        id=example_id,
        text=completion.text,
        program=chosen.program,
        finish_reason=completion.finish_reason,
        seconds=sum(each.seconds for each in completions),
        num_prompt_tokens=completion.num_prompt_tokens,
        token_ids=completion.token_ids,
        margins=completion.margins,
        logprob=chosen.logprob,
        confidence=confidence,
        candidates=tuple(candidates) if len(candidates) > 1 else (),
    )


def _candidate(completion: Completion, table: Table, grammar: Grammar | None) -> Candidate:
    program = extract_program(completion.text)
    if grammar is not None:
        # A character whose last bytes were cut off is not the model's.
        whole = completion.text.rstrip("\ufffd") if completion.finish_reason == "length" else completion.text
        end = ending(grammar, whole)
        program = program if end is None else whole + end
    execution = execute(tokenize(program), table)
    runs = not execution.invalid and execution.result != NO_RESULT
    logprob = sum(completion.logprobs) if completion.logprobs else math.nan
    return Candidate(
        program=program,
        logprob=None if math.isnan(logprob) else logprob,
        result=execution.result if runs else None,
        num_tokens=len(completion.token_ids),
    )


def _nats(candidate: Candidate) -> float:
    return -math.inf if candidate.logprob is None else candidate.logprob


def _votes(candidates: Iterable[Candidate]) -> Mapping[float | str | None, int]:
    """Votes by result; a program that does not run has none."""
    votes: dict[float | str | None, int] = {}
    for each in candidates:
        if each.result is not None:
            votes[each.result] = votes.get(each.result, 0) + 1
    return votes
