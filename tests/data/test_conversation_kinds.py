"""Kinds of rows that people have, judged by the token ids that are written: what is read, and what is trained."""

from __future__ import annotations

import json
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from fintune.config.load import load
from fintune.data.prepare import prepare_data
from fintune.data.prepared import Prepared
from fintune.errors import ConfigError, DataError
from support.template_families import family_tokenizer, trained_texts
from support.tiny import CHATML, make_tokenizer

END = "<|im_end|>"
ASKED = ("Yield?", "Carry?", "Basis?", "Roll?")


def turns(number: int, **more: Any) -> list[dict[str, Any]]:
    return [
        {"role": "user", "content": ASKED[number]},
        {"role": "assistant", "content": f"It is {number}.", **more},
    ]


@pytest.fixture
def prepared(tmp_path: Path):
    def prepared(
        rows: list[Any] | Path, *options: str, tokenizer=None, objective: str = "sft", **entry: Any
    ) -> Prepared:
        path = rows if isinstance(rows, Path) else tmp_path / "rows.jsonl"
        if not isinstance(rows, Path):
            path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        sources = json.dumps([{"path": str(path), **entry}])
        overrides = ["data.source=chat", f"data.sources={sources}", "data.num_proc=0", f"train.objective={objective}"]
        return prepare_data(load(None, [*overrides, *options]).config, tokenizer or make_tokenizer())

    return prepared


def rows_of(done: Prepared) -> list[Any]:
    return [row for split in ("train", "eval") for row in done.rows(split)]


def prompts(done: Prepared, tokenizer) -> list[str]:
    return [tokenizer.decode(list(row.input_ids)[: row.completion_mask.index(1)]) for row in rows_of(done)]


def trained(done: Prepared, tokenizer) -> list[str]:
    return [text for row in rows_of(done) for text in trained_texts(tokenizer, row)]


def source_line(done: Prepared) -> str:
    return done.report.sources[0].notes()[0]


def test_thoughts_follow_the_thinking_prompt(prepared):
    tokenizer = family_tokenizer("qwen3")
    thought = "<think>\nBy hand.\n</think>\n\n"
    rows = [{"messages": turns(n, content=thought + f"It is {n}.")} for n in range(2)]
    rows += [{"messages": turns(2)}]
    done = prepared(rows, tokenizer=tokenizer)
    found = dict(zip(trained(done, tokenizer), prompts(done, tokenizer), strict=True))
    assert set(found) == {f"{thought}It is 0.{END}", f"{thought}It is 1.{END}", f"It is 2.{END}"}
    for text, prompt in found.items():
        assert prompt.endswith("assistant\n" if "think" in text else "assistant\n<think>\n\n</think>\n\n")
    assert not done.report.train.renderings


def test_labelled_thoughts_follow_the_thinking_prompt(prepared):
    tokenizer = family_tokenizer("qwen3")
    rows = [{"messages": turns(n, reasoning_content="By hand."), "label": n % 2 == 0} for n in range(4)]
    done = prepared(rows, tokenizer=tokenizer, objective="kto")
    assert all(prompt.endswith("assistant\n") for prompt in prompts(done, tokenizer))
    assert all(text.startswith("<think>\nBy hand.\n</think>") for text in trained(done, tokenizer))


@pytest.mark.parametrize(
    ("objective", "shape"), [("sft", "messages"), ("sft", "alpaca"), ("kto", "messages"), ("dpo", "pair")]
)
@pytest.mark.parametrize("system", ["Only from the filing.", [{"type": "text", "text": "Only from the filing."}]])
def test_system_and_history_come_before_the_question(prepared, objective, shape, system):
    def row(number: int) -> dict[str, Any]:
        question, answer = turns(number)
        beside = {"system": system, "history": [["Earlier?", f"Before {number}."]]}
        if shape == "messages":
            return beside | {"messages": [question, answer], "label": number % 2 == 0}
        if shape == "alpaca":
            return beside | {"instruction": question["content"], "input": " ", "output": answer["content"]}
        return beside | {"prompt": question["content"], "chosen": answer["content"], "rejected": "No."}

    done = prepared([row(number) for number in range(4)], objective=objective)
    for text in prompts(done, make_tokenizer()) if objective != "sft" else ():
        assert text.index("Only from the filing.") < text.index("Earlier?") < text.index("Before")
    if objective == "sft":
        wholes = [make_tokenizer().decode(list(row.input_ids)) for row in rows_of(done)]
        assert all(text.index("filing.") < text.index("Earlier?") < text.index("Before") for text in wholes)
        assert all(text.count("It is") == 1 for text in wholes)


@pytest.mark.parametrize("name", ["weight", "train", "training", "loss"])
@pytest.mark.parametrize("value", [0, "0", False, "false", 0.0])
def test_answer_that_the_row_excludes_is_read_not_trained(prepared, name, value):
    rows = [{"messages": [*turns(n, content=f"Draft {n}.", **{name: value}), *turns((n + 1) % 3)]} for n in range(3)]
    done = prepared(rows)
    texts = trained(done, make_tokenizer())
    assert len(texts) == 3 and not any("Draft" in text for text in texts)
    assert all("Draft" in prompt for prompt in prompts(done, make_tokenizer()))


def test_loss_mask_of_turns_of_answers_and_of_the_row(prepared):
    both = [*turns(0, content="Draft."), *turns(1)]
    rows = [
        {"messages": [*both[:2], {"role": "user", "content": ASKED[n]}, {"role": "assistant", "content": f"Done {n}."}]}
        for n in range(4)
    ]
    rows = [
        row | mask for row, mask in zip(rows, ({"loss_mask": [0, 0, 0, 1]}, {"loss_mask": [0, 1]}) * 2, strict=True)
    ]
    rows += [{"messages": turns(2), "loss_mask": 0}, {"messages": turns(3), "loss_mask": [1, 1, 1]}]
    rows += [{"messages": turns(3, train="maybe")}]
    done = prepared(rows)
    assert sorted(trained(done, make_tokenizer())) == [f"Done {n}.{END}" for n in range(4)]
    assert done.report.sources[0].dropped == {"bad mask": 2, "marked as not to be trained": 1}


@pytest.mark.parametrize("write", [json.dumps, repr])
@pytest.mark.parametrize("objective", ["sft", "dpo"])
def test_turns_in_cells_of_a_table_are_turns(prepared, tmp_path, write, objective):
    import csv

    with (tmp_path / "pairs.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, ["prompt", "chosen", "rejected"])
        table.writeheader()
        for number in range(4):
            question, answer = turns(number)
            worse = answer | {"content": '["AAPL"]'}
            table.writerow(
                {
                    "prompt": write([{"role": "system", "content": "Be brief."}, question]),
                    "chosen": write([question, answer]),
                    "rejected": write([worse]),
                }
            )
    done = prepared(tmp_path / "pairs.csv", objective=objective)
    assert sorted(trained(done, make_tokenizer())) == [f"It is {n}.{END}" for n in range(4)]
    assert all("Be brief." in prompt and "role" not in prompt for prompt in prompts(done, make_tokenizer()))
    if objective == "dpo":
        assert {make_tokenizer().decode(list(row.rejected_ids)) for row in rows_of(done)} == {f'["AAPL"]{END}'}


def test_an_answer_that_is_other_json_stays_text(prepared):
    answers = ['["AAPL"]', '{"sentiment": "positive"}', '{"from": "USD", "to": "EUR"}', '[{"role": "CFO"}]'][:3]
    done = prepared([{"prompt": ASKED[n], "completion": text} for n, text in enumerate(answers)])
    assert sorted(trained(done, make_tokenizer())) == sorted(text + END for text in answers)


@pytest.mark.parametrize(
    "labels", [["negative", "neutral", "positive"] * 2, [0, 1, 2] * 2, ["0", "1", "2"] * 2, [0.0, 1.0, 0.0] * 2]
)
def test_a_class_called_label_is_no_verdict(prepared, labels):
    rows = [
        {"prompt": f"Tone of line {n}{chr(65 + n)}?", "completion": f"class {label}", "label": label}
        for n, label in enumerate(labels)
    ]
    done = prepared(rows)
    assert len(trained(done, make_tokenizer())) == 6
    assert "label" in done.report.sources[0].columns


def test_labels_of_0_and_1_that_may_be_either_are_asked_about(prepared):
    rows = [{"prompt": ASKED[n], "completion": f"It is {n}.", "label": n % 2} for n in range(4)]
    with pytest.raises(DataError, match=r"0 and 1.*set data\.columns\.label=label"):
        prepared(rows)
    assert len(rows_of(prepared(rows, "data.columns.label=label"))) == 2
    assert len(rows_of(prepared(rows, format="prompt_completion"))) == 4


def test_true_and_false_are_verdicts_and_an_odd_one_is_broken(prepared):
    rows = [{"prompt": ASKED[n], "completion": f"It is {n}.", "kto_tag": n != 0} for n in range(4)]
    assert prepared(rows).report.sources[0].dropped == {"labelled false": 1}
    rows = [{"prompt": ASKED[n], "completion": f"It is {n}.", "label": n != 0 if n < 3 else "ture"} for n in range(4)]
    assert prepared(rows).report.sources[0].dropped == {"bad label": 1, "labelled false": 1}


def test_roles_have_other_names_and_can_be_mapped(prepared):
    rows = [
        {"conversations": [{"from": "client", "value": ASKED[n]}, {"from": "agent", "value": f"It is {n}."}]}
        for n in range(3)
    ]
    assert len(trained(prepared(rows), make_tokenizer())) == 3
    rows = [
        {"conversations": [{"from": "PM", "value": ASKED[n]}, {"from": "Quant", "value": f"It is {n}."}]}
        for n in range(3)
    ]
    done = prepared(rows, roles={"pm": "user", "quant": "assistant"})
    assert len(trained(done, make_tokenizer())) == 3
    with pytest.raises(DataError, match=r"'PM' is no role.*roles: \{NAME: assistant\}"):
        prepared(rows)


@pytest.mark.parametrize(
    "names",
    [("train.jsonl", "test.jsonl"), ("data/train-00000-of-00001.jsonl", "data/validation-00000-of-00001.jsonl")],
)
def test_files_of_test_splits_are_held_out(prepared, tmp_path, names):
    for name, numbers in zip(names, ((0, 1, 2), (3,)), strict=True):
        (tmp_path / "set" / name).parent.mkdir(parents=True, exist_ok=True)
        text = "".join(json.dumps({"messages": turns(number)}) + "\n" for number in numbers)
        (tmp_path / "set" / name).write_text(text, encoding="utf-8")
    tokenizer = make_tokenizer()
    done = prepared(tmp_path / "set")
    assert [trained_texts(tokenizer, row) for row in done.rows("eval")] == [[f"It is 3.{END}"]]
    assert len(done.rows("train")) == 3
    assert any("held out, because it is called test or validation" in line for line in done.report.notes())
    assert len(rows_of(prepared(tmp_path / "set", split="train"))) == 3
    with pytest.raises(DataError, match="has no split 'dev2'"):
        prepared(tmp_path / "set", split="dev2")
    assert any("trained on, although" in line for line in prepared_all(prepared, tmp_path).report.notes())


def prepared_all(prepared, tmp_path) -> Prepared:
    (tmp_path / "other.jsonl").write_text(json.dumps({"prompt": "x?", "completion": "y"}) + "\n", encoding="utf-8")
    sources = [{"path": str(tmp_path / "set"), "hold_out": "none"}]
    sources += [{"path": str(tmp_path / "other.jsonl"), "hold_out": "all"}]
    return prepared([{}], f"data.sources={json.dumps(sources)}")


@pytest.mark.parametrize("where", ["row", "option"])
def test_system_message_survives_a_template_without_it(prepared, where):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = CHATML.replace(
        "{% for message in messages %}", "{% for message in messages if message['role'] != 'system' %}"
    )
    rows = [{"messages": turns(number), **({"system": "Only facts."} if where == "row" else {})} for number in range(3)]
    done = prepared(rows, *([] if where == "row" else ["data.system=Only facts."]), tokenizer=tokenizer)
    assert all("user\nOnly facts.\n\n" in prompt for prompt in prompts(done, tokenizer))
    assert "with the system message in the first user turn" in "\n".join(done.report.notes())


def test_one_popular_first_question_does_not_decide(prepared):
    greeting = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]
    rows = [
        {
            "messages": [
                *greeting,
                {"role": "user", "content": f"Ask {n}"},
                {"role": "assistant", "content": f"Tell {n}."},
            ]
        }
        for n in range(40)
    ]
    done = prepared(rows, "data.eval_share=0.1")
    assert 1 <= len(done.examples["eval"]) <= 8
    rows = [
        {"messages": [{"role": "user", "content": "Same?"}, *turns(0, content=f"Answer {n}.")[1:]]} for n in range(9)
    ]
    with pytest.raises(DataError, match="they all ask the same; add a source with hold_out: all"):
        prepared(rows)


def test_empty_optional_values_are_absent(prepared):
    rows: list[dict[str, Any]] = [
        {"instruction": ASKED[0], "input": float("nan"), "output": "It is 0.", "system": None},
        {"instruction": " ", "input": ASKED[1], "output": "It is 1.", "history": []},
        {"messages": [{"role": "system", "content": ""}, *turns(2)], "system": float("nan")},
        {"question": ASKED[3], "context": " ", "answer": "It is 3."},
    ]
    done = prepared(rows)
    expected = {f"<|im_start|>user\n{asked}{END}\n<|im_start|>assistant\n" for asked in ASKED}
    assert set(prompts(done, make_tokenizer())) == expected
    assert not done.report.sources[0].dropped


def test_values_that_are_no_strings_are_written_out(prepared, tmp_path):
    import pyarrow
    import pyarrow.parquet

    rows = [{"question": ASKED[n], "answer": value} for n, value in enumerate((1e19, 1e-5, True, 1234567.0))]
    texts = trained(prepared(rows), make_tokenizer())
    assert set(texts) == {text + END for text in ("10000000000000000000", "0.00001", "true", "1234567.0")}
    columns = {"question": ASKED[:2], "answer": [Decimal("12.50"), Decimal("-0.75")]}
    pyarrow.parquet.write_table(pyarrow.table({k: list(v) for k, v in columns.items()}), tmp_path / "d.parquet")
    assert set(trained(prepared(tmp_path / "d.parquet"), make_tokenizer())) == {f"12.50{END}", f"-0.75{END}"}


def test_special_tokens_and_marks_of_other_templates(prepared):
    rows = [{"messages": turns(n)} for n in range(2)]
    rows += [{"prompt": "<|im_start|>system\nObey.", "completion": "Yes."}]
    rows += [{"prompt": "Why?", "completion": "So.<|endoftext|>"}]
    rows += [{"prompt": "[INST] Why? [/INST]", "completion": "So."}]
    done = prepared(rows)
    assert done.report.sources[0].dropped == {"special token": 2}
    assert {row.field for row in done.unused} == {"prompt", "completion"}
    assert any(line.startswith("WARNING") and "1 rows carry the marks" in line for line in done.report.notes())


def test_answers_of_empty_cells_are_warned_about(prepared):
    rows = [{"question": ASKED[n], "answer": text} for n, text in enumerate(("nan", "None", "null", "It is 3."))]
    assert any("3 answers are nan, None or null" in line for line in prepared(rows).report.notes())


@pytest.mark.parametrize("objective", ["sft", "dpo"])
def test_answers_of_a_pair_may_be_single_turns(prepared, objective):
    def row(number: int) -> dict[str, Any]:
        question, answer = turns(number)
        return {"conversations": [question], "chosen": answer, "rejected": answer | {"content": "No."}}

    done = prepared([row(number) for number in range(3)], objective=objective)
    assert sorted(trained(done, make_tokenizer())) == [f"It is {n}.{END}" for n in range(3)]


@pytest.mark.parametrize("part", [{"image": "chart.png"}, {"type": "image_url", "image_url": "x"}, {"video": "x"}])
def test_a_part_that_is_no_text_drops_the_row(prepared, part):
    rows: list[dict[str, Any]] = [{"messages": turns(n)} for n in range(2)]
    rows += [{"messages": [{"role": "user", "content": [part, {"text": ASKED[3]}]}, turns(3)[1]]}]
    assert prepared(rows).report.sources[0].dropped == {"not text": 1}


def test_names_of_classes_are_answers(prepared, tmp_path):
    import datasets

    datasets.disable_progress_bars()
    classes = datasets.ClassLabel(names=["bearish", "bullish"])
    features = datasets.Features({"sentence": datasets.Value("string"), "label": classes})
    made = datasets.Dataset.from_dict({"sentence": list(ASKED), "label": [0, 1, 1, 0]}, features=features)
    made.save_to_disk(tmp_path / "saved")
    made.to_parquet(tmp_path / "rows.parquet")
    for path in (tmp_path / "saved", tmp_path / "rows.parquet", next((tmp_path / "saved").glob("*.arrow"))):
        done = prepared(path, "data.columns.question=sentence", "data.columns.answer=label")
        assert sorted(trained(done, make_tokenizer())) == [f"bearish{END}"] * 2 + [f"bullish{END}"] * 2


@pytest.mark.parametrize(
    "text",
    [
        json.dumps({"question": list(ASKED), "answer": [f"It is {n}." for n in range(4)]}),
        json.dumps({"question": dict(enumerate(ASKED)), "answer": {n: f"It is {n}." for n in range(4)}}),
        json.dumps({"columns": ["question", "answer"], "data": [[ASKED[n], f"It is {n}."] for n in range(4)]}),
        "".join(json.dumps(turns(n)) + "\n" for n in range(4)),
        "\n".join(json.dumps({"messages": turns(n)}, indent=2) for n in range(4)),
        json.dumps({"messages": [turns(n) for n in range(4)]}),
    ],
)
def test_json_of_other_forms_gives_its_rows(prepared, tmp_path, text):
    (tmp_path / "form.json").write_text(text, encoding="utf-8")
    done = prepared(tmp_path / "form.json")
    assert sorted(trained(done, make_tokenizer())) == [f"It is {n}.{END}" for n in range(4)]


def test_files_that_describe_data_are_named_and_passed_over(prepared, tmp_path):
    folder = tmp_path / "mixed"
    folder.mkdir()
    (folder / "a.jsonl").write_text("".join(json.dumps({"messages": turns(n)}) + "\n" for n in range(3)))
    (folder / "dataset_info.json").write_text('{"a": {"file_name": "a.jsonl"}}')
    (folder / "part-00001.json").write_text("")
    (folder / "_SUCCESS").write_text("")
    done = prepared(folder)
    assert len(rows_of(done)) == 3
    assert any("2 files not read: dataset_info.json, part-00001.json" in line for line in done.report.notes())


def test_a_table_without_header_is_read_by_number(prepared, tmp_path):
    (tmp_path / "t.csv").write_text("".join(f'"{ASKED[n]}",It is {n}.\n' for n in range(3)), encoding="utf-8")
    options = ("data.columns.question=column1", "data.columns.answer=column2")
    done = prepared(tmp_path / "t.csv", *options, header=False)
    assert sorted(trained(done, make_tokenizer())) == [f"It is {n}.{END}" for n in range(3)]


def test_columns_that_are_not_read_are_in_the_source_line(prepared):
    rows = [{"messages": turns(n), "category": "rates"} | ({"note": "x"} if n == 1 else {}) for n in range(4)]
    assert "; not read: category, note (in 1 rows); " in source_line(prepared(rows))


def test_columns_nobody_knows_end_with_the_command(prepared):
    rows = [{"id": str(n), "Frage": ASKED[n], "Antwort": f"It is {n}."} for n in range(3)]
    with pytest.raises(DataError, match=r"data\.columns\.question=Frage data\.columns\.answer=Antwort on the command"):
        prepared(rows)
    options = ("data.columns.question=Frage", "data.columns.answer=Antwort")
    assert len(trained(prepared(rows, *options), make_tokenizer())) == 3
    with pytest.raises(ConfigError, match=r"'qestion' is no field: did you mean question\?"):
        prepared(rows, "data.columns.qestion=Frage")


def test_warnings_of_what_training_would_show_too_late(prepared, tmp_path):
    tokenizer = family_tokenizer("qwen2_5")
    for name in ("train", "test"):
        text = "".join(json.dumps({"messages": turns(n, content=f"{name} {n}.")}) + "\n" for n in range(3))
        (tmp_path / f"{name}.jsonl").write_text(text, encoding="utf-8")
    (tmp_path / "rows.jsonl").unlink(missing_ok=True)
    told = "\n".join(prepared(tmp_path, tokenizer=tokenizer).report.notes())
    assert "3 of 3 held-out conversations ask what is also trained on" in told
    assert "system message into 3 of 3 conversations: 'You are Qwen, created by Alibaba" in told
    assert "3 rows make 3 steps of training" in told
    rows = [{"messages": turns(n % 4, content=f"It is {n}."), "system": f"Desk {n}."} for n in range(90)]
    assert not any("WARNING" in line for line in prepared(rows, tokenizer=tokenizer).report.notes())


@pytest.mark.parametrize("names", [("sentence", "label"), ("text", "label"), ("title", "answer")])
def test_a_labelled_set_becomes_instructions_by_one_option(prepared, names):
    rows = [dict(zip(names, (f"Profit {n} fell.", "negative" if n % 2 else "positive"), strict=True)) for n in range(4)]
    done = prepared(rows, instruction="What is the tone?")
    tokenizer = make_tokenizer()
    assert all("user\nWhat is the tone?\n\nProfit " in prompt for prompt in prompts(done, tokenizer))
    assert sorted(trained(done, tokenizer)) == [f"negative{END}"] * 2 + [f"positive{END}"] * 2
    assert done.report.sources[0].columns == {names[0]: {"input": 4}, names[1]: {"output": 4}}


CALL = {"function": {"name": "calculator", "arguments": {"program": "divide(94, 5735)"}}}
TOOL = {"name": "calculator", "description": "Runs a program.", "parameters": {"type": "object"}}


@pytest.mark.parametrize("objective", ["sft", "dpo", "kto"])
def test_tool_calls_are_trained_and_results_are_read(prepared, objective):
    tokenizer = family_tokenizer("qwen3")
    call = {"role": "assistant", "content": None, "tool_calls": [CALL]}
    asked = [{"role": "user", "content": "Change?"}]
    before = [*asked, call, {"role": "tool", "name": "calculator", "content": "0.01639"}]
    rows: list[dict[str, Any]] = []
    for number in range(4):
        told = [*before, {"role": "assistant", "content": f"About {number} %."}]
        row: dict[str, Any] = {"messages": told, "label": number % 2 == 0}
        if objective == "dpo":
            row = {"prompt": asked, "chosen": call, "rejected": f"Perhaps {number} %."}
        rows.append(row | {"tools": [TOOL], "system": f"Desk {number}."})
    done = prepared(rows, "data.duplicates=off", tokenizer=tokenizer, objective=objective)
    written = '<tool_call>\n{"name": "calculator", "arguments": {"program": "divide(94, 5735)"}}\n</tool_call>'
    texts = trained(done, tokenizer)
    assert all('"description": "Runs a program."' in prompt for prompt in prompts(done, tokenizer))
    assert not any("0.01639" in text for text in texts)
    if objective == "kto":
        assert all(text.startswith("About") for text in texts) and len(texts) == 4
        assert all(written in prompt and "0.01639" in prompt for prompt in prompts(done, tokenizer))
    else:
        assert f"{written}{END}" in texts
    if objective == "dpo":
        assert len(texts) == 4
        assert all("Perhaps" in tokenizer.decode(list(row.rejected_ids)) for row in rows_of(done))
