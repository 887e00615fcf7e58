from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from fintune.cli.inspect import TRAINED_SPECIAL_STYLE, inspect_data, render_example, split_row
from fintune.config import Config
from fintune.config.load import load
from fintune.data.tokenize import TokenRow
from fintune.errors import FintuneError
from fintune.models.load import fetch, load_tokenizer
from fintune.pipeline.stages.prepare import prepare
from support.command import fintune
from support.outline import outline
from support.published_run import finish


def record(record_id: str, **qa: Any) -> dict[str, Any]:
    return {
        "id": record_id,
        "pre_text": ["the [bold]company[/bold] grew ."],
        "post_text": [],
        "table": [["", "2009", "2008"], ["revenue", "$ 12", "10"]],
        "qa": {"question": "what was revenue ?", "program": "subtract(12, 10)", "exe_ans": 2.0, **qa},
    }


@pytest.fixture
def config(tmp_path: Path, tiny_model: Path) -> Config:
    rows = [record("A/1.pdf-1"), record("A/2.pdf-1"), record("A/3.pdf-1", program=None)]
    (tmp_path / "train.json").write_text(json.dumps(rows), encoding="utf-8")
    (tmp_path / "eval.json").write_text(json.dumps([record("B/1.pdf-1")]), encoding="utf-8")
    files = [f"data.{name}={tmp_path / name}.json" for name in ("train", "eval")]
    return load(
        None, ["data.source=finqa", *files, f"model.name={tiny_model}", f"run.dir={tmp_path}", "run.name=r"]
    ).config


@pytest.fixture
def chat(tmp_path: Path, tiny_model: Path) -> Config:
    def turns(number: int, **user: Any) -> dict[str, Any]:
        question = {"role": "user", "content": f"what is cash {number} <b>?", **user}
        return {"messages": [question, {"role": "assistant", "content": f"cash is {number} </pre><script>x()"}]}

    rows = [*(turns(number) for number in range(30)), turns(31, role="usr"), turns(3), turns(32, content="")]
    (tmp_path / "sft.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    source = f"data.sources=[{{path: {tmp_path / 'sft.jsonl'}, license: CC-BY-NC-4.0}}]"
    options = ["data.source=chat", source, "data.eval_share=0.2", "data.duplicates=exact", f"model.name={tiny_model}"]
    return load(None, [*options, f"run.dir={tmp_path}", "run.name=c"]).config


def page(config: Config, folder: Path, num_examples: int = 2) -> str:
    inspect_data(config, Console(file=io.StringIO()), num_examples=num_examples, html=folder / "page.html")
    return (folder / "page.html").read_text(encoding="utf-8")


def printed(config: Config, *, color: bool = False, num_examples: int = 1) -> str:
    out = io.StringIO()
    console = Console(file=out, width=120, force_terminal=color, color_system="truecolor" if color else None)
    inspect_data(config, console, num_examples=num_examples)
    return out.getvalue()


def test_inspect_before_prepare_writes_nothing(config: Config, tmp_path: Path) -> None:
    text = printed(config)
    assert "not prepared yet" in text
    assert re.search(r"no program +train +1", text)
    assert "row 3, id A/3.pdf-1" in " ".join(text.split())  # a long path wraps the line
    assert "FinQA test" in text
    assert "46.3%" in text  # divide in FinQA's test set
    assert not (tmp_path / "r").exists()


def test_inspect_escapes_markup(config: Config) -> None:
    assert "the [bold]company[/bold] grew ." in printed(config)


def test_render_brackets_include_the_end_of_turn(config: Config) -> None:
    text = printed(config)
    assert "⟦subtract(12, 10)<|im_end|>⟧" in text
    assert text.count("⟦") == 2  # the example and the legend


def test_render_colours_the_end_of_turn(config: Config) -> None:
    text = printed(config, color=True)
    assert "⟦" not in text
    assert "\x1b[32msubtract(12, 10)\x1b[0m\x1b[1;7;32m<|im_end|>" in text


def test_inspect_shows_the_number_of_examples_asked(config: Config) -> None:
    assert printed(config, num_examples=0).count("trained") == 0
    assert printed(config, num_examples=2).count("<|im_start|>assistant") == 2


@pytest.mark.parametrize("stored", [False, True])
def test_inspect_shows_examples_of_every_file(tmp_path: Path, tiny_model: Path, stored: bool) -> None:
    folder = tmp_path / "rows"
    folder.mkdir()
    for file in "abc":
        rows = [{"prompt": f"what is {file} {number} ?", "completion": f"{file} is {number}"} for number in range(9)]
        (folder / f"{file}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    options = ["data.source=chat", f"data.sources=[{{path: {folder}}}]", f"model.name={tiny_model}"]
    config = load(None, [*options, f"run.dir={tmp_path}", "run.name=s"]).config
    if stored:
        (config.folder / "prepare").mkdir(parents=True)
        prepare(config, {}, config.folder / "prepare")
        (config.folder / "prepare" / "manifest.json").write_text("{}", encoding="utf-8")
    text = printed(config, num_examples=3)
    assert ("not prepared yet" in text) is not stored
    assert re.findall(r"\u27e6(.) is", text) == ["a", "b", "c"]


def test_inspect_reads_prepare_only_with_equal_options(config: Config) -> None:
    folder = config.folder / "prepare"
    folder.mkdir(parents=True)
    prepare(config, {}, folder)
    assert "not prepared yet" in printed(config)  # no manifest: not finished
    (folder / "manifest.json").write_text("{}", encoding="utf-8")
    text = printed(config)
    assert "prepare, all examples" in text.replace("\n", " ")
    assert "⟦subtract(12, 10)<|im_end|>⟧" in text
    prompt = config.prompt.model_copy(update={"system": "Another."})
    assert "not prepared yet" in printed(config.model_copy(update={"prompt": prompt}))


def test_inspect_accepts_a_run_folder(tmp_path: Path, tiny_model: Path) -> None:
    rows = [{"prompt": f"what is {number} ?", "completion": f"it is {number}"} for number in range(4)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (tmp_path / "config.yaml").write_text(
        json.dumps(
            {
                "data": {"source": "chat", "sources": [{"path": str(tmp_path / "rows.jsonl")}]},
                "model": {"name": str(tiny_model)},
                "run": {"dir": str(tmp_path / "lora"), "name": "run"},
            }
        ),
        encoding="utf-8",
    )
    run = tmp_path / "lora" / "run"
    assert fintune("prepare", str(tmp_path / "config.yaml")).status == 0
    (tmp_path / "config.yaml").unlink()
    done = fintune("inspect", str(run), "--html", str(tmp_path / "page.html"))
    assert done.status == 0, done.err
    assert "prepare, all examples" in done.out.replace("\n", " ")
    assert "it is" in (tmp_path / "page.html").read_text(encoding="utf-8")
    done = fintune("inspect", str(tmp_path))
    assert (done.status, done.err.count("\n")) == (2, 1)
    assert "holds no finished stage" in done.err


def test_inspect_run_folder_without_prepare_is_refused(tmp_path: Path) -> None:
    run = tmp_path / "lora" / "run"
    (run / "train").mkdir(parents=True)
    finish(run / "train", "train", options={"model.name": "builtin:smollm2-135m-instruct"})
    done = fintune("inspect", str(run))
    assert (done.status, done.out, done.err.count("\n")) == (2, "", 1)
    assert "has no result of prepare, so its data are unknown" in done.err


def test_render_joins_characters_of_several_tokens(tiny_model: Path) -> None:
    tokenizer = load_tokenizer(fetch(str(tiny_model)))
    ids = tokenizer("é€<|im_end|>", add_special_tokens=False)["input_ids"]
    text = render_example(split_row(tokenizer, TokenRow("A", ids, [1] * len(ids))))
    assert text.plain == "é€<|im_end|>"
    assert text.spans[-1].style == TRAINED_SPECIAL_STYLE


def test_inspect_page_marks_exactly_the_trained_tokens(config: Config, tmp_path: Path) -> None:
    html = page(config, tmp_path)
    assert html.count('<span class="t">subtract(12, 10)</span><span class="t s">&lt;|im_end|&gt;</span>') == 2
    assert html.count('class="t">') == 3  # two examples and the legend
    assert '<span class="s">&lt;|im_start|&gt;</span>assistant' in html
    parsed = outline(html)
    for words in ("Counts", "Dropped rows", "Token lengths", "Programs", "Examples"):
        assert words in parsed.text, words
    assert "A/3.pdf-1" in parsed.text
    assert "no program" in parsed.text
    assert 'id="prompt-plot-' in html
    assert 'id="completion-plot-' in html


def test_inspect_page_of_conversations(chat: Config, tmp_path: Path) -> None:
    html = page(chat, tmp_path)
    parsed = outline(html)  # its elements would not close if a conversation could open one
    assert not any(tag == "script" for tag, _ in parsed.tags)
    assert "cash is" in parsed.text
    assert "&lt;/pre&gt;&lt;script&gt;x()" in html
    for told in ("bad role", "exact duplicate", "no content", "Not for commercial use", "31 messages", "CC-BY-NC-4.0"):
        assert told in parsed.text, told
    assert "Programs" not in parsed.text
    assert "evidence" not in parsed.text


def test_inspect_names_sources_and_broken_rows_once(chat: Config) -> None:
    text = " ".join(printed(chat).split())
    assert re.search(r"bad role \S+sft\.jsonl 1 ", text)
    assert "not for commercial use" in text
    assert text.count("'usr' is no role") == 1
    assert "conversations cut to fit" in text
    assert "evidence" not in text


def test_inspect_escapes_control_characters(tmp_path: Path, tiny_model: Path) -> None:
    rows = [{"prompt": f"\ta{n}\x1b]0;x\x07?\n", "completion": f"b{n}\x9b2J\r"} for n in range(3)] + [{"c\x1b[2J": "d"}]
    (tmp_path / "sft.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    options = ["data.source=chat", f"data.sources=[{tmp_path / 'sft.jsonl'}]", f"model.name={tiny_model}"]
    config = load(None, [*options, f"run.dir={tmp_path}", "run.name=c"]).config
    text = printed(config, num_examples=3)
    assert {letter for letter in text if not letter.isprintable()} == {"\n"}
    assert r"c\x1b[2J" in " ".join(text.split())
    assert r"\x1b]0;x\x07?" in text and r"\x9b2J\x0d" in text


def test_inspect_reports_what_was_read_and_what_not(tmp_path: Path, tiny_model: Path) -> None:
    turns = [{"role": "user", "content": "cash?"}, {"role": "assistant", "content": "1", "reasoning_content": "Hm."}]
    rows = [{"messages": turns, "note": "x"}, {"messages": [{"role": "user", "content": "debt?"}, turns[1]]}]
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "sft.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (tmp_path / "data" / "faq.xlsx").write_bytes(b"PK")
    options = ["data.source=chat", f"data.sources=[{tmp_path / 'data'}]", f"model.name={tiny_model}"]
    config = load(None, [*options, f"run.dir={tmp_path}", "run.name=c"]).config
    for text in (printed(config, num_examples=0), outline(page(config, tmp_path)).text):
        assert f"{tmp_path / 'data'}: columns messages: turns (2); note: not read (1)" in text
        assert f"{tmp_path / 'data'}: 1 file not read: faq.xlsx (the known suffixes are " in text


def test_inspect_page_without_examples(config: Config, tmp_path: Path) -> None:
    assert "trained special token" not in page(config, tmp_path, num_examples=0)


def test_inspect_colours_the_rejected_answer(tmp_path: Path, tiny_model: Path) -> None:
    rows = [{"prompt": f"what is cash {n}?", "chosen": f"it is {n}", "rejected": f"no idea {n}"} for n in range(30)]
    (tmp_path / "dpo.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    options = ["data.source=chat", f"data.sources=[{tmp_path / 'dpo.jsonl'}]", "data.duplicates=exact"]
    options += ["train.objective=dpo", f"model.name={tiny_model}", f"run.dir={tmp_path}", "run.name=p"]
    config = load(None, options).config
    html = page(config, tmp_path, num_examples=1)
    assert re.search(
        r'<span class="t">it is (\d+)</span><span class="t s">.*<span class="t r">no idea \1</span>', html, re.DOTALL
    )
    assert "rejected answer" in html
    assert re.search(r"⟦it is (\d+)<\|im_end\|>⟧.*rejected: no idea \1", printed(config), re.DOTALL)


def test_inspect_counts_and_colours_labelled_answers(tmp_path: Path, tiny_model: Path) -> None:
    rows = [{"prompt": f"what is cash {n}?", "completion": f"it is {n}", "label": n % 3 == 0} for n in range(30)]
    (tmp_path / "kto.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    options = ["data.source=chat", f"data.sources=[{tmp_path / 'kto.jsonl'}]", "data.duplicates=exact"]
    options += ["train.objective=kto", f"model.name={tiny_model}", f"run.dir={tmp_path}", "run.name=k"]
    config = load(None, [*options, "data.eval_share=0.2"]).config
    text = printed(config, num_examples=99)
    counted = {name: [int(n) for n in re.findall(rf"(?<!un){name} answers +(\d+) +(\d+)", text)[0]]
               for name in ("desired", "undesired")}  # fmt: skip
    assert {name: sum(numbers) for name, numbers in counted.items()} == {"desired": 10, "undesired": 20}
    shown_in = {n: label for label, n in re.findall(r"trained, (\w+) .*?⟦it is (\d+)<", text, re.DOTALL)}
    assert shown_in
    assert all(label == ("desired" if int(n) % 3 == 0 else "undesired") for n, label in shown_in.items())
    html = page(config, tmp_path, num_examples=99)
    assert {int(n) % 3 == 0 for n in re.findall(r'<span class="t">it is (\d+)</span>', html)} == {True}
    assert {int(n) % 3 == 0 for n in re.findall(r'<span class="t r">it is (\d+)</span>', html)} == {False}
    assert "undesired answer</span>" in html


def test_inspect_unwritable_page_is_refused_first(chat: Config, tmp_path: Path) -> None:
    for wrong, told in (
        (tmp_path, "a folder, so no file can be written there"),
        (tmp_path / "nothere" / "page.html", "its folder does not exist"),
        (tmp_path / "sft.jsonl", "is read, and would be overwritten"),
    ):
        with pytest.raises(FintuneError, match=told):
            inspect_data(chat, Console(file=io.StringIO()), html=wrong)


def test_inspect_keeps_the_end_of_a_long_path(tmp_path: Path, tiny_model: Path) -> None:
    folder = tmp_path / ("a long name " * 9)
    folder.mkdir()
    rows = [{"prompt": f"what is cash {n}?", "completion": f"it is {n}"} for n in range(4)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    options = ["data.source=chat", f"data.sources=[{json.dumps(str(folder / 'rows.jsonl'))}]", f"run.dir={tmp_path}"]
    text = printed(load(None, [*options, f"model.name={tiny_model}", "data.eval_share=0.2"]).config, num_examples=1)
    assert re.search(r"…[a-z /]+/rows\.jsonl, row \d: \d+ tokens, \d+ trained ─", text), text
