"""The model card: what it says of a run's manifests, its YAML block, and its snippets."""

from __future__ import annotations

import re
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from ruamel.yaml import YAML

from fintune.config import PublishOptions
from fintune.config.load import load
from fintune.publish import card as module
from fintune.publish.card import Card, card_of, escape_markdown, render_card, unstated_licences
from fintune.publish.files import CardOrigin, Publication
from fintune.records import Message
from support.example_run import manifest
from support.published_run import TRAIN_FACTS, TRAIN_OPTIONS


def training(options: dict[str, Any], facts: dict[str, Any], guard: dict[str, Any] | None = None) -> dict[str, str]:
    """The rows of the card on method and training."""
    made = manifest("train")
    key = made.key.model_copy(update={"options": TRAIN_OPTIONS | options})
    manifests = {"train": made.model_copy(update={"key": key, "facts": TRAIN_FACTS | facts})}
    if guard is not None:
        manifests["guard"] = manifest("guard").model_copy(update={"facts": guard})
    config = load(None, ["data.source=chat", "data.sources=[{path: rows.jsonl}]"]).config
    card = card_of(config, "ann/demo", Publication([], manifests, CardOrigin("mine", "", "mit")), {})
    return dict([*card.method, *card.training])


@pytest.mark.parametrize(
    ("options", "facts", "told"),
    [
        ({}, {"num_steps": 60, "num_examples": 159}, "3, 8"),
        ({"train.max_steps": 3}, {"num_steps": 3, "num_examples": 159}, "0.15, 8"),
        ({"train.max_steps": 50}, {"num_steps": 50, "num_examples": 100}, "4, 8"),
        ({"train.gpus": 2}, {"num_steps": 15, "num_examples": 160}, "1.5, 16"),
        ({}, {}, "3, 8"),
    ],
    ids=["to the end", "max_steps", "more than epochs", "out of patience on two GPUs", "of a manifest without rows"],
)
def test_passes_are_those_that_were_made(options, facts, told):
    assert training(options, facts)["passes, examples a step"] == told


def test_the_guards_share_of_right_programs_has_its_interval():
    groups = [
        {"name": "finance", "num_prompts": 20, "right_before": None, "right_after": None},
        {"name": "statements", "num_prompts": 12, "right_before": 0, "right_after": 3},
    ]
    rows = training({}, {}, {"summary": "finance 2.00 to 2.06 nats a token", "groups": groups})
    assert rows["fixed prompts, before and after"] == "finance 2.00 to 2.06 nats a token"
    told = rows["statements right, before and after, 95 % intervals"]
    assert told == "0 of 12 (0.0\u201324.2 %), 3 of 12 (8.9\u201353.2 %)"
    assert not any(name.startswith("finance right") for name in rows)


@pytest.mark.parametrize(
    ("source", "base", "given", "lines"),
    [
        ("chat", "mit", None, ["license: rows.jsonl states none: set `license` of its entry in data.sources, or "]),
        ("finqa", "mit", None, ["license: rows.jsonl states none: set publish.license"]),
        ("chat", "not stated", "mit", []),
        ("finqa", "not stated", None, ["license: the base model mine states none: set publish", "rows.jsonl states"]),
    ],
)
def test_unstated_licences_name_file_and_option(source, base, given, lines):
    data = ["data.sources=[{path: rows.jsonl}]"] if source == "chat" else ["data.train=rows.jsonl", "data.eval=b.jsonl"]
    options = [f"data.source={source}", *data, *([f"publish.license={given}"] if given else [])]
    sources = [CardOrigin("rows.jsonl", "", "not stated"), CardOrigin("b.jsonl", "", "mit")]
    card = SimpleNamespace(base=CardOrigin("mine", "", base), sources=sources, is_program=source != "chat")
    found = unstated_licences(load(None, options).config, card)
    assert len(found) == len(lines)
    assert all(line in text for line, text in zip(lines, found, strict=True))


def test_card_counts_examples_that_could_not_be_encoded(monkeypatch, tmp_path):
    train = SimpleNamespace(num_examples=97, dropped={"not encodable": 1})
    held = SimpleNamespace(num_examples=5, dropped={})
    report = SimpleNamespace(train=train, eval=held, sources=[SimpleNamespace(dropped={"exact duplicate": 2})])
    monkeypatch.setattr(module.prepared, "read_report", lambda _: report)
    assert module._used(tmp_path) == (
        "97 examples were trained on, 5 held out; left out: 1 not encodable, 2 exact duplicate. "
        "Of the examples above, 1 could not be encoded."
    )


CARD = Card(
    repo="ann/model",
    options=PublishOptions(),
    licence="apache-2.0",
    base=CardOrigin("acme/base", "acme/base", "apache-2.0"),
    sources=[
        CardOrigin("FinLang/inv", "FinLang/inv", "CC-BY-NC-4.0", True, "1,200 examples to train on, 30 held out"),
        CardOrigin("own.csv", "", "mit"),
    ],
    used="1,205 examples were trained on.",
    is_program=False,
    method=[("method", "QLoRA")],
    training=[("steps", "12")],
    messages=[Message(role="user", content='He said "no\\yes"\nand {{ left }}')],
    max_new_tokens=64,
    context_tokens=512,
)


def with_artifacts(*artifacts: str, **more: object) -> Card:
    return replace(CARD, options=PublishOptions(artifacts=artifacts, branch="try"), **more)


def front(card: Card) -> dict[str, object]:
    text = render_card(card)
    assert text.startswith("---\n")
    return YAML(typ="safe").load(text.split("---\n")[1])


def test_the_yaml_block_says_what_the_hub_reads():
    assert front(CARD) == {
        "base_model": "acme/base",
        "base_model_relation": "adapter",
        "datasets": ["FinLang/inv"],
        "license": "apache-2.0",
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["fintune", "finance"],
    }
    joined = with_artifacts("adapter", "merged", "gguf", licence="llama3.2-and-cc-by-nc-4.0", gguf=["a.gguf"])
    block = front(joined)
    assert (block["license"], block["license_name"]) == ("other", "llama3.2-and-cc-by-nc-4.0")
    assert (block["library_name"], block["base_model_relation"]) == ("transformers", "finetune")
    assert "base_model" not in front(replace(CARD, base=CardOrigin("mine", "", "mit")))


def test_a_non_commercial_source_or_base_stands_at_the_top():
    text = render_card(CARD)
    assert "> **Not for commercial use.** The model was trained with FinLang/inv (CC-BY-NC-4.0)." in text
    assert text.index("Not for commercial use") < text.index("## Base model and data")
    assert "| [FinLang/inv](https://huggingface.co/datasets/FinLang/inv): 1,200 examples" in text
    free = replace(CARD, sources=CARD.sources[1:])
    assert "Not for commercial use" not in render_card(free)
    assert "trained with acme/base (x-nc)" in render_card(
        replace(free, base=CardOrigin("acme/base", "acme/base", "x-nc", non_commercial=True))
    )


def test_what_others_wrote_means_nothing_in_markdown_or_html():
    nasty = "a|b <img src=x>\n# head [x](y) `code` *bold*_"
    card = replace(CARD, sources=[CardOrigin(nasty, "", nasty)], method=[("x", nasty)])
    text = render_card(card)
    assert nasty not in text
    assert r"a\|b \<img src=x\> \# head \[x\](y) \`code\` \*bold\*\_" in text
    assert escape_markdown("two\nlines") == "two lines"


@pytest.mark.parametrize("artifacts", [("adapter",), ("gguf",), ("adapter", "merged"), ("merged", "gguf")])
def test_card_explains_only_what_is_pushed(artifacts):
    gguf = ("my model-F16.gguf", "my model-Q4_K_M.gguf") if "gguf" in artifacts else ()
    text = render_card(with_artifacts(*artifacts, gguf=gguf, has_modelfile=bool(gguf)))
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) == ("adapter" in artifacts) + ("merged" in artifacts)
    for block in blocks:
        compile(block, "card", "exec")
        assert 'revision="try"' in block
    assert ("PeftModel" in text) == ("adapter" in artifacts)
    assert ('subfolder="adapter"' in text) == (artifacts == ("adapter", "merged"))
    assert ("ollama create model -f model/Modelfile" in text) == bool(gguf)
    if gguf:
        assert "hf download ann/model 'my model-Q4_K_M.gguf' --local-dir . --revision try" in text
        assert "llama-server -m 'my model-Q4_K_M.gguf' --jinja -c 512" in text
    assert "\n\n\n" not in text


def test_a_conversation_stands_in_the_snippet_as_it_is():
    (block,) = re.findall(r"(messages = \[.*?^\])", render_card(CARD), re.DOTALL | re.MULTILINE)
    names: dict[str, object] = {}
    exec(block, names)
    assert names["messages"] == [{"role": "user", "content": 'He said "no\\yes"\nand {{ left }}'}]


def test_remote_code_is_asked_for_where_the_base_brings_it():
    text = render_card(with_artifacts("adapter", "merged", needs_remote_code=True))
    assert text.count("trust_remote_code=True") == 4
    assert "trust_remote_code" not in render_card(CARD)
