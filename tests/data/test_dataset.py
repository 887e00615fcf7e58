"""Several sources become two splits: mixed, drawn, cleared of duplicates, divided by a hash."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from fintune.config import DataOptions, SourceOptions
from fintune.config.load import load as load_config
from fintune.data import dataset
from fintune.data.dataset import Copy, FinqaSplit, load_finqa_splits
from fintune.data.load import load_source
from fintune.data.prepare import _one_of_each_first
from fintune.data.report import SourceReport
from fintune.data.synthetic import company_of
from fintune.data.tokenize import DroppedRow
from fintune.errors import ConfigError, DataError

TURNS = [{"role": "user", "content": "Beta?"}, {"role": "assistant", "content": "A slope."}]


def qa(number: int, topic: str = "bonds") -> dict[str, str]:
    return {"question": f"What about {topic} {number}?", "answer": f"Hold {number} {topic}."}


@pytest.fixture
def write(tmp_path):
    def write(name: str, rows: list) -> Path:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return path

    return write


@dataclass
class Mixture:
    train: list[Copy]
    eval: list[Copy]
    reports: list[SourceReport]
    broken: list[DroppedRow]
    problems: list[str]


def mix(data: DataOptions, seed: int = 1, usable: Callable[[str], bool] | None = None) -> Mixture:
    """Load, split and draw. ``usable`` says which questions can be tokenized."""
    loaded = dataset.load_sources(data, seed)
    rows = [row for source in loaded for row in source.conversations]
    holdout = dataset.split_holdout(rows, data)
    if usable and not any(usable(row.messages[0].content) for row in holdout.eval):
        holdout = holdout.widen({row.id for row in rows if usable(row.messages[0].content)})
    train, evaluation = dataset.draw_train(holdout, data, seed), dataset.draw_eval(holdout, data, seed)
    broken = [row for source in loaded for row in source.broken]
    return Mixture(train, evaluation, dataset.report_sources(data, loaded, holdout), broken, _one_of_each_first(broken))


def load(sources: list, *options: str, seed: int = 1) -> Mixture:
    entries = json.dumps([{"path": str(each)} if isinstance(each, Path) else each for each in sources])
    return mix(load_config(None, ["data.source=chat", f"data.sources={entries}", *options]).config.data, seed)


def ids(entries) -> list[str]:
    return [entry.id for entry in entries]


def test_a_folder_may_mix_shapes_by_file_and_by_row(write, tmp_path):
    turns = [{"from": "human", "value": "Size?"}, {"from": "gpt", "value": "Two lots."}]
    write("data/a.jsonl", [qa(1), {"conversations": turns}, {"instruction": "Define beta.", "output": "Slope."}])
    write("data/b.jsonl", [{"prompt": "Buy?", "chosen": "With a stop.", "rejected": "All in."}])
    found = load([tmp_path / "data"], "data.eval_share=0.5")
    assert sorted(ids(found.train + found.eval)) == ["a.jsonl:1", "a.jsonl:2", "a.jsonl:3", "b.jsonl:1"]
    report = found.reports[0]
    assert report.shapes == {"question_answer": 1, "sharegpt": 1, "alpaca": 1, "preference": 1}
    assert report.files["b.jsonl"] == {"preference": 1}
    assert "4 rows: 1 question_answer, 1 sharegpt, 1 alpaca, 1 preference" in report.notes()[0]


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize(
    ("row", "columns"),
    [
        (qa(1) | {"sources": [{"url": "x"}]}, {}),
        ({"Frage": "Beta?", "answer": "A slope.", "sources": [{"url": "x"}]}, {"question": "Frage"}),
        ({"id": 1, "dialog": {"turns": TURNS}, "sources": [{"url": "x"}]}, {"messages": "dialog.turns"}),
        ({"id": 1, "dialog": TURNS}, {"messages": "dialog"}),
        ({"id": 1, "conversation": TURNS}, {}),
    ],
)
def test_single_row_with_list_of_objects_is_a_row(tmp_path, indent, row, columns):
    (tmp_path / "one.json").write_text(json.dumps(row, indent=indent))
    (tmp_path / "wrapped.json").write_text(
        json.dumps({"title": "A set", "label": "train", "data": [row]}, indent=indent)
    )
    for name in ("one.json", "wrapped.json"):
        source = SourceOptions(path=str(tmp_path / name), columns=columns)
        data = DataOptions(source="chat", sources=(source.model_dump(),))
        assert len(load_source(data, 0, 1, set(), "answers").conversations) == 1


def test_broken_rows_are_counted_with_row_and_hint(write):
    path = write("x.jsonl", [qa(1), qa(2) | {"answer": ""}, qa(3), {"text": "x"}, qa(4) | {"answer": ""}])
    found = load([path], "data.eval_share=0.5")
    assert found.reports[0].dropped == {"no answer": 2, "unknown format": 1}
    assert found.problems[0] == f"{path}, row 2: answer: missing or empty: fill it or remove the row"
    assert [problem.split(":")[0].rpartition(" ")[2] for problem in found.problems] == ["2", "4", "5"]


def test_what_a_folder_holds_beside_its_data_has_a_line(write, tmp_path):
    write("data/a.jsonl", [qa(1), qa(2)])
    (tmp_path / "data/faq.xlsx").write_bytes(b"x")
    told = load([tmp_path / "data"], "data.eval_share=0.5").reports[0].notes()
    assert told[-1].startswith(f"{tmp_path / 'data'}: 1 file not read: faq.xlsx (the known suffixes are ")


def test_strict_stops_at_the_first_broken_row(write):
    path = write("x.jsonl", [qa(1), qa(2) | {"answer": ""}, {"text": "x"}])
    with pytest.raises(DataError, match=r"row 2: answer: missing or empty.*leave out --strict"):
        load([path], "data.strict=true")


def test_with_strict_a_question_of_the_message_stays_one(write):
    path = write("x.jsonl", [{"messages": [{"role": "usr", "content": "a"}, {"role": "assistant", "content": "b"}]}])
    with pytest.raises(DataError) as caught:
        load([path], "data.strict=true")
    assert "did you mean 'user'? Repair it, or leave out --strict" in str(caught.value)


def test_source_without_usable_row_names_first_reason(write):
    with pytest.raises(DataError, match=r"no row can be used \(unknown format: 2\); the first: .*row 1"):
        load([write("a.jsonl", [qa(1)]), write("x.jsonl", [{"text": "x"}] * 2)])


def test_the_held_out_share_depends_on_the_question_alone(write):
    rows = [qa(n) for n in range(400)]
    asked = {entry.conversation.messages[0].content for entry in load([write("x.jsonl", rows)]).eval}
    assert 1 <= len(asked) <= 20, "2 % of 400"
    more = [qa(n, "oil") for n in range(200)] + [row | {"answer": "Another."} for row in reversed(rows)]
    for seed in (1, 2):
        found = load([write("y.jsonl", more)], seed=seed)
        again = {entry.conversation.messages[0].content for entry in found.eval}
        assert {text for text in again if "bonds" in text} == asked


def test_the_same_question_never_stands_in_both_splits(write):
    rows = [qa(n) | {"answer": f"Answer {k} to {n}."} for n in range(50) for k in range(3)]
    found = load([write("x.jsonl", rows)], "data.eval_share=0.3")
    asked = [{entry.conversation.messages[0].content for entry in split} for split in (found.train, found.eval)]
    assert not asked[0] & asked[1]
    assert sum(map(len, asked)) == 50


def test_at_least_one_conversation_is_held_out(write):
    found = load([write("x.jsonl", [qa(n) for n in range(5)])], "data.eval_share=0.000001")
    assert (len(found.train), len(found.eval)) == (4, 1)


def test_holdout_widens_to_next_usable_question(write):
    rows = [{"question": f"What about bonds {n}?", "answer": f"Answer {k} to {n}."} for n in range(6) for k in range(2)]
    options = ["data.source=chat", f"data.sources=[{write('x.jsonl', rows)}]", "data.eval_share=0.000001"]
    data = load_config(None, options).config.data

    def divided(*unusable: str) -> tuple[set[str], set[str]]:
        found = mix(data, usable=lambda question: question not in unusable)
        return asked(found.train), asked(found.eval)

    def asked(entries) -> set[str]:
        return {entry.conversation.messages[0].content for entry in entries}

    gone, everything = set[str](), {row["question"] for row in rows}
    for number in range(1, 6):
        train, held = divided(*gone)
        assert (len(held), train | held, train & held) == (number, everything, set())
        assert gone < held
        gone = held
    assert divided(*gone)[1] < everything
    assert len(divided(*everything)[1]) == 1


def test_nothing_to_train_on_names_fix(write):
    with pytest.raises(DataError, match="of 1 conversations none is left to be trained on: add conversations: one at"):
        load([write("x.jsonl", [qa(1)])])
    with pytest.raises(DataError, match=r"none is left to be trained on: lower data\.eval_share, which is 0\.99"):
        load([write("x.jsonl", [qa(n) for n in range(2)])], "data.eval_share=0.99")


def test_a_source_can_be_held_out_or_trained_on_whole(write):
    a, b = write("a.jsonl", [qa(n) for n in range(30)]), write("b.jsonl", [qa(n, "oil") for n in range(20)])
    entries = [{"path": str(a), "hold_out": "none"}, {"path": str(b), "hold_out": "all"}]
    found = load(entries, "data.eval_share=0.5")
    assert (len(found.train), len(found.eval)) == (30, 20)
    with pytest.raises(DataError, match="none is left to be held out"):
        load([{"path": str(a), "hold_out": "none"}])


def test_duplicates_are_dropped_across_sources(write):
    long = "the desk cut its duration because supply was heavy and the meeting was close , " * 3
    rows = [qa(1), qa(2), {"question": "Why?", "answer": long + "so it sold."}]
    again = [qa(2) | {"question": "WHAT  about bonds 2?"}, {"question": "Why?", "answer": long + "so it sold!"}, qa(3)]
    sources = [write("a.jsonl", rows), write("b.jsonl", again)]
    found = load(sources, "data.eval_share=0.3")
    assert found.reports[0].dropped == {}
    assert found.reports[1].dropped == {"exact duplicate": 1, "near duplicate": 1}
    assert len(found.train + found.eval) == 4
    assert load(sources, "data.duplicates=exact").reports[1].dropped == {"exact duplicate": 1}
    assert load(sources, "data.duplicates=off").reports[1].dropped == {}


def test_weight_repeats_or_thins_training_rows_only(write):
    paths = [write(f"{name}.jsonl", [qa(n, name) for n in range(200)]) for name in ("thin", "thick")]
    entries = [{"path": str(path), "weight": weight} for path, weight in zip(paths, (0.25, 2.5), strict=True)]
    found, plain = load(entries, "data.eval_share=0.1"), load(paths, "data.eval_share=0.1")
    assert ids(found.eval) == ids(plain.eval)
    counts = [sum(entry.conversation.source == number for entry in found.train) for number in (0, 1)]
    whole = [report.num_train for report in found.reports]
    assert 0.1 < counts[0] / whole[0] < 0.4
    assert 2.3 < counts[1] / whole[1] < 2.7
    assert len(set(ids(found.train))) == len(found.train)


def test_limit_draws_by_seed_in_any_row_order(write):
    rows = [qa(n) for n in range(100)]
    path = write("x.jsonl", rows)
    drawn = {each.conversation.digest for each in _all(load([{"path": str(path), "max_rows": 10}]))}
    assert len(drawn) == 10
    assert {e.conversation.digest for e in _all(load([{"path": str(path), "max_rows": 10}], seed=2))} != drawn
    write("x.jsonl", rows[::-1])
    assert {e.conversation.digest for e in _all(load([{"path": str(path), "max_rows": 10}]))} == drawn
    few = load([path], "data.max_train_samples=7", "data.max_eval_samples=1")
    assert (len(few.train), len(few.eval)) == (7, 1)


def test_copy_beyond_limit_comes_from_later_source(write):
    rows = [qa(n) for n in range(10)]
    first = {"path": str(write("a.jsonl", [*rows, *rows])), "max_rows": 2}
    found = load([first, write("b.jsonl", rows)])
    assert found.reports[0].dropped == {"exact duplicate": 10, "beyond max_rows": 8}
    assert found.reports[1].dropped == {"exact duplicate": 2}
    assert len(_all(found)) == 10


def _all(found: Mixture):
    return found.train + found.eval


def test_labels_of_files_that_are_called_the_same_differ(write, tmp_path):
    one = [write(f"{folder}/x.jsonl", [qa(1, folder), qa(2, folder)]) for folder in ("a", "b")]
    for sources in (one, [{"path": f"{tmp_path}/*/x.jsonl"}], [one[0].parent, one[1].parent]):
        assert len(set(ids(_all(load(sources))))) == 4


def test_sources_split_at_commas_unless_file_exists(write, tmp_path, monkeypatch):
    def paths(text: str) -> list[str]:
        options = ["data.source=chat", f"data.sources={text}"]
        return [source.path for source in load_config(None, options).config.data.sources]

    monkeypatch.chdir(tmp_path)
    assert paths("faq.csv,chats.jsonl") == paths("faq.csv, chats.jsonl") == ["faq.csv", "chats.jsonl"]
    write("faq.csv,chats.jsonl", [qa(1)])
    assert paths("faq.csv,chats.jsonl") == ["faq.csv,chats.jsonl"]
    assert paths("[faq.csv,chats.jsonl]") == ["faq.csv", "chats.jsonl"]


def test_columns_and_shape_can_be_given(write):
    path = write("x.jsonl", [{"Frage": f"Was ist {n}?", "Antwort": f"Eine {n}."} for n in range(4)])
    found = load([{"path": str(path), "columns": {"question": "Frage", "answer": "Antwort"}}])
    assert found.reports[0].shapes == {"question_answer": 4}
    with pytest.raises(DataError, match="no row can be used"):
        load([{"path": str(path), "format": "alpaca"}])


@pytest.mark.parametrize(
    ("entry", "told"),
    [
        ({"path": "x", "weigth": 2}, r"unknown option data.sources\[0\].weigth: did you mean weight"),
        ({"format": "alpaca"}, r"data.sources\[0\].path is missing"),
        ({"path": "x", "format": "alpca"}, r'data.sources\[0\].format: got "alpca"'),
        ({"path": "x", "weight": 0}, r"data.sources\[0\].weight: got 0"),
    ],
)
def test_a_wrong_entry_of_the_sources_is_named_with_its_place(entry, told):
    with pytest.raises(ConfigError, match=told):
        load([entry])


def test_sources_are_refused_where_nothing_reads_them():
    with pytest.raises(ConfigError, match=r"set data\.source: chat"):
        load_config(None, ["data.sources=x.jsonl"])
    with pytest.raises(ConfigError, match=r"needs data\.sources"):
        load_config(None, ["data.source=chat"])


def finqa_rows(name: str, number: int) -> list[dict[str, Any]]:
    qa = {"question": "how much ?", "program": "add(1, 2)", "exe_ans": 3.0}
    page = {"pre_text": ["a ."], "post_text": [], "table": [["", "2009"], ["cash", "1"]]}
    return [{"id": f"{name}/2009/page_{n}.pdf-1", **page, "qa": qa} for n in range(number)]


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    (tmp_path / "train.json").write_text(json.dumps([*finqa_rows("A", 20), {"id": "A/none"}]), encoding="utf-8")
    (tmp_path / "eval.json").write_text(json.dumps(finqa_rows("B", 10)), encoding="utf-8")
    return ["data.source=finqa", f"data.train={tmp_path / 'train.json'}", f"data.eval={tmp_path / 'eval.json'}"]


def load_finqa(overrides: Sequence[str], limit: int | None = None) -> dict[str, FinqaSplit]:
    return load_finqa_splits(load_config(None, overrides).config, limit=limit)


def test_files_give_their_records_and_what_was_dropped(files: list[str]) -> None:
    found = load_finqa(files)
    assert [len(found[name].records) for name in ("train", "eval")] == [20, 10]
    assert found["train"].dropped == {"no question": 1}
    (unused,) = found["train"].broken
    assert (Path(unused.file), unused.row) == (Path(files[1].partition("=")[2]), 21)


def test_a_sample_keeps_the_order_and_depends_on_the_seed_alone(files: list[str]) -> None:
    one, again, other = (
        [r.id for r in load_finqa([*files, "data.max_train_samples=8", f"run.seed={seed}"])["train"].records]
        for seed in (1, 1, 2)
    )
    everything = [r.id for r in load_finqa(files)["train"].records]
    assert len(one) == 8
    assert one == again == sorted(one, key=everything.index)
    assert one != other


def test_a_limit_comes_on_top_and_never_adds(files: list[str]) -> None:
    found = load_finqa([*files, "data.max_train_samples=8"], limit=9)
    assert [len(found["train"].records), len(found["eval"].records)] == [8, 9]
    assert found["train"].num_read == 20


def test_strict_reaches_the_reader(files: list[str]) -> None:
    with pytest.raises(DataError, match="row 21, id A/none"):
        load_finqa([*files, "data.strict=true"])


def test_generated_companies_are_trained_on_or_scored_never_both() -> None:
    sizes = {"train_companies": 5, "eval_companies": 3, "pages_per_company": 2, "questions_per_page": 2}
    found = load_finqa([f"data.statements.{key}={value}" for key, value in sizes.items()])
    train, evaluation = ({company_of(r.id) for r in found[name].records} for name in ("train", "eval"))
    assert (len(train), len(evaluation)) == (5, 3)
    assert not train & evaluation
