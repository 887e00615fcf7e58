from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from fintune.config import load
from fintune.models import load_tokenizer, resolve
from fintune.options import Config
from fintune.stages.inspect import TRAINED_SPECIAL_STYLE, Shown, inspect, render
from fintune.stages.prepare import prepare


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


def printed(config: Config, *, color: bool = False, num_examples: int = 1) -> str:
    out = io.StringIO()
    console = Console(file=out, width=120, force_terminal=color, color_system="truecolor" if color else None)
    inspect(config, console, num_examples=num_examples)
    return out.getvalue()


def test_before_a_run_it_prepares_in_memory_and_writes_nothing(config: Config, tmp_path: Path) -> None:
    text = printed(config)
    assert "not prepared yet" in text
    assert "dropped: no program" in text
    assert "row 3, id A/3.pdf-1" in text
    assert "FinQA test" in text
    assert "46.3%" in text  # divide in FinQA's test set
    assert not (tmp_path / "r").exists()


def test_text_of_a_page_is_never_taken_for_markup(config: Config) -> None:
    assert "the [bold]company[/bold] grew ." in printed(config)


def test_without_colour_brackets_show_what_is_trained_the_end_of_turn_included(config: Config) -> None:
    text = printed(config)
    assert "⟦subtract(12, 10)<|im_end|>⟧" in text
    assert text.count("⟦") == 2  # the example and the legend


def test_with_colour_the_end_of_turn_of_the_completion_is_marked_as_trained(config: Config) -> None:
    text = printed(config, color=True)
    assert "⟦" not in text
    assert "\x1b[32msubtract(12, 10)\x1b[0m\x1b[1;7;32m<|im_end|>" in text


def test_only_as_many_examples_as_asked_for_are_shown(config: Config) -> None:
    assert printed(config, num_examples=0).count("trained") == 0
    assert printed(config, num_examples=2).count("<|im_start|>assistant") == 2


def test_a_prepared_folder_is_read_only_where_the_options_are_the_same(config: Config) -> None:
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


def test_characters_spread_over_several_tokens_are_shown_whole(tiny_model: Path) -> None:
    tokenizer = load_tokenizer(resolve(str(tiny_model)))
    ids = tokenizer("é€<|im_end|>", add_special_tokens=False)["input_ids"]
    text = render(tokenizer, Shown("A", ids, [1] * len(ids)))
    assert text.plain == "é€<|im_end|>"
    assert text.spans[-1].style == TRAINED_SPECIAL_STYLE
