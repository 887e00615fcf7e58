import pytest

from fintune.errors import DataError
from fintune.evaluation.metrics import compute_scores
from fintune.finqa.execute import Execution, execute
from fintune.finqa.program import tokenize
from fintune.finqa.verdict import agrees_with_answer
from fintune.records import FinQAQuestion, FinQARecord

TABLE = (("", "2019", "2018"), ("sales", "120", "100"))


def record(
    record_id: str,
    program: str,
    *,
    answer: str | None = None,
    inds: tuple[str, ...] = (),
    question: str = "what is it?",
) -> FinQARecord:
    return FinQARecord(
        id=record_id,
        pre_text=(),
        post_text=(),
        table=TABLE,
        qa=FinQAQuestion(
            question=question,
            program=program,
            exe_ans=execute(tokenize(program), TABLE).result,
            gold_inds=dict.fromkeys(inds, "") or None,
            answer=answer,
        ),
    )


GOLD = [
    record("a", "subtract(120, 100), divide(#0, 100)", answer="20.0%", inds=("table_1",)),
    record("b", "greater(120, 100)", answer="yes", inds=("table_1", "text_0")),
    record("c", "table_sum(sales, none)", question="what portion is it?"),
    record("d", "divide(7, 3)", answer="2.33", inds=("text_4",)),
]


def _tokens(*rows: tuple[str, str]) -> list[tuple[str, list[str]]]:
    return [(record_id, tokenize(program)) for record_id, program in rows]


def test_compute_scores_over_predictions_and_whole_file() -> None:
    figures, verdicts = compute_scores(
        GOLD,
        _tokens(
            ("a", "divide(120, 100), subtract(#0, const_1)"),
            ("b", "greater(120, 100)"),
            ("d", "divide(7, 0)"),
            ("b", "greater(100, 120)"),
            ("b", "add(100, 120"),
        ),
    )
    assert (figures.num_predictions, figures.num_duplicates) == (5, 2)
    assert (figures.execution_accuracy, figures.program_accuracy, figures.invalid_rate) == (2 / 5, 1 / 5, 1 / 5)
    assert (figures.whole_file.num_gold, figures.whole_file.num_missing) == (4, 1)
    assert (figures.whole_file.execution_accuracy, figures.whole_file.program_accuracy) == (2 / 4, 1 / 4)
    assert [verdict.outcome for verdict in verdicts] == [
        "other_program",
        "equal_program",
        "invalid",
        "wrong_result",
        "no_result",
    ]
    assert figures.outcomes == dict.fromkeys((verdict.outcome for verdict in verdicts), 1)


def test_by_num_steps_is_in_numeric_order() -> None:
    gold = [
        record(str(number), ", ".join(["add(1, 2)", *(f"add(#{step}, 1)" for step in range(number - 1))]))
        for number in (10, 2, 1)
    ]
    figures, _ = compute_scores(gold, _tokens(*((each.id, each.qa.program) for each in gold)))
    assert list(figures.by_num_steps) == [1, 2, 10]


def test_breakdowns_are_by_the_gold_program_and_its_evidence() -> None:
    figures, _ = compute_scores(
        GOLD, [(gold.id, tokenize(gold.qa.program if gold.id != "d" else "add(7, 3)")) for gold in GOLD]
    )
    assert {number: rates.num_predictions for number, rates in figures.by_num_steps.items()} == {1: 3, 2: 1}
    assert figures.by_num_steps[1].execution_accuracy == 2 / 3
    assert {name: rates.execution_accuracy for name, rates in figures.by_operation.items()} == {
        "divide": 0.5,
        "greater": 1.0,
        "subtract": 1.0,
        "table_sum": 1.0,
    }
    assert list(figures.by_evidence) == ["both", "table", "text", "unknown"]
    assert figures.by_evidence["text"].execution_accuracy == 0
    assert {kind: rates.num_predictions for kind, rates in figures.by_question_type.items()} == {
        "amount": 1,
        "percent": 2,
        "yes_no": 1,
    }


@pytest.mark.parametrize(
    ("program", "sign", "scale", "near"),
    [
        ("divide(7, 3)", True, True, True),
        ("divide(-7, 3)", True, False, False),
        ("divide(700, 3)", False, True, False),
        ("divide(0.07, 3)", False, True, False),
        ("divide(7.05, 3)", False, False, True),
        ("divide(7.1, 3)", False, False, False),
        ("divide(-700, 3)", False, False, False),
        ("greater(7, 3)", False, False, False),
        ("divide(7, 0)", False, False, False),
    ],
)
def test_tolerant_views_never_touch_the_headline(program: str, sign: bool, scale: bool, near: bool) -> None:
    figures, [verdict] = compute_scores(GOLD, _tokens(("d", program)))
    assert (verdict.sign_insensitive, verdict.scale_100, verdict.within_1_percent) == (sign, scale, near)
    assert figures.execution_accuracy == (program == "divide(7, 3)")
    assert figures.tolerant.sign_insensitive == sign


def test_a_scaled_result_is_compared_before_it_is_rounded() -> None:
    gold = record("x", "divide(5, 74), multiply(#0, const_100)")
    _, [verdict] = compute_scores([gold], _tokens(("x", "divide(5, 74)")))
    assert verdict.result == 0.06757
    assert verdict.exe_ans == 6.75676
    assert verdict.scale_100


def test_equal_program_with_another_result_is_counted() -> None:
    figures, [verdict] = compute_scores(
        [record("x", "add(1, 2)")], _tokens(("x", "subtract(1, 1), divide(2, #0), add(1, 2)"))
    )
    assert (verdict.program_correct, verdict.exe_correct, verdict.invalid, verdict.equality_raised) == (
        True,
        False,
        True,
        True,
    )
    assert figures.num_equality_raised == 1


def test_a_gold_program_that_is_none_is_counted() -> None:
    gold = record("x", "add(1, 2)")
    broken = gold.model_copy(update={"qa": gold.qa.model_copy(update={"program": "add(1)"})})
    figures, [verdict] = compute_scores([broken], _tokens(("x", "add(1, 2)")))
    assert (verdict.exe_correct, verdict.program_correct, figures.num_gold_not_comparable) == (True, False, 1)


@pytest.mark.parametrize(
    ("result", "answer", "agrees"),
    [
        (0.1579, "15.8 %", True),
        (0.1579, "15.7%", True),
        (0.1579, "15.6%", False),
        (0.1579, "15.8", False),
        (15.79, "15.8%", True),
        (-0.1579, "15.8%", False),
        (1234.4, "$ 1,234 million", True),
        (12.0, "between 10 and 14", None),
        (12.0, "", None),
        (12.0, None, None),
        (12.0, "no", False),
    ],
)
def test_agreement_with_the_free_text_answer(result: float, answer: str | None, agrees: bool | None) -> None:
    assert agrees_with_answer(Execution(False, round(result, 5), result), answer) is agrees


def test_agrees_with_answer_of_yes_and_of_invalid_programs() -> None:
    assert agrees_with_answer(Execution(False, "yes"), " Yes ") is True
    assert agrees_with_answer(Execution(True, 3.0, 3.0), "3") is False


def test_nothing_to_score_and_unknown_ids_are_refused() -> None:
    with pytest.raises(DataError, match="no predictions"):
        compute_scores(GOLD, [])
    with pytest.raises(DataError, match="id zzz"):
        compute_scores(GOLD, _tokens(("zzz", "add(1, 2)")))
