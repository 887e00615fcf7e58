"""The untrained built-in model under a grammar: left alone it writes prose, under a grammar nothing but programs."""

from __future__ import annotations

from contextlib import closing

import pytest

from fintune.config import PredictOptions
from fintune.export.gguf.writer import write_gguf
from fintune.finqa.grammar import shortest_ending
from fintune.finqa.parse import ParseError, parse
from fintune.inference.decoding_strategies import choose_prediction, make_grammars
from fintune.inference.llama_cpp import LlamaCppEngine
from fintune.inference.protocol import Decoding, sorted_by_prompt
from fintune.inference.transformers_engine import TransformersEngine
from fintune.models import chat_template as chat
from fintune.models import load as models
from fintune.records import FinQARecord, Message

pytestmark = pytest.mark.slow

RECORDS = [
    FinQARecord.model_validate(
        {
            "id": str(number),
            "pre_text": [],
            "post_text": [],
            "table": [["", "2019", "2018"], ["net sales", f"$ 5,{number}29", "5735"], ["costs", "4100", "( 39.5 ) %"]],
            "qa": {"question": question, "program": "add(1, 2)", "exe_ans": 3.0},
        }
    )
    for number, question in enumerate(("what was the growth of net sales?", "what are total costs?", "is 5 below 7?"))
]


@pytest.fixture(scope="module")
def tokenizer(builtin_model):
    return models.load_tokenizer(models.fetch(str(builtin_model)))


@pytest.fixture(scope="module", params=["transformers", "llama.cpp"])
def engine(request, builtin_model, tokenizer, tmp_path_factory):
    if request.param == "transformers":
        model = models.load_model(models.fetch(str(builtin_model)), dtype="float32", device="cpu")
        yield TransformersEngine(model.eval(), tokenizer, 3)
        return
    file = tmp_path_factory.mktemp("builtin") / "m.gguf"
    write_gguf(builtin_model, {"F16": file})
    with closing(LlamaCppEngine(file, context_tokens=512)) as started:
        yield started


def programs(engine, tokenizer, **options):
    chosen = PredictOptions(**options)
    allowed = make_grammars(chosen, RECORDS)
    prompts = [
        chat.render(tokenizer, [Message(role="user", content=f"{each.table}\n{each.qa.question} Write a program.")])
        for each in RECORDS
    ]
    found = sorted_by_prompt(engine.generate(prompts, Decoding(64, grammars=allowed)))
    predictions = [
        choose_prediction(record.id, [done], chosen, record.table, allowed[place] if allowed else None)
        for place, (record, done) in enumerate(zip(RECORDS, found, strict=True))
    ]
    return found, predictions, allowed


def parses(program):
    try:
        return bool(parse(program))
    except ParseError:
        return False


def test_left_alone_it_writes_no_program(engine, tokenizer):
    assert not any(parses(each.program) for each in programs(engine, tokenizer)[1])


@pytest.mark.parametrize("constrain", ["general", "page"])
def test_grammar_allows_nothing_else_and_the_end_of_turn(engine, tokenizer, constrain):
    found, predictions, allowed = programs(engine, tokenizer, constrain=constrain)
    end = chat.end_of_turn_ids(tokenizer)[0]
    assert all(parses(each.program) for each in predictions)
    assert any(each.finish_reason == "stop" for each in found)
    for each, grammar in zip(found, allowed, strict=True):
        assert (each.finish_reason == "stop") == (each.token_ids[-1] == end)
        assert each.finish_reason == "length" or shortest_ending(grammar, each.text) == ""
