"""The model card as Markdown: its YAML block, what others wrote in it, and snippets for what is there alone."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from ruamel.yaml import YAML

from fintune.records import Message
from fintune.report.card import Card, CardBase, CardSource, escape_markdown, render_card

CARD = Card(
    repo="ann/model",
    branch="main",
    private=True,
    licence="apache-2.0",
    licence_known=True,
    base=CardBase("acme/base", "acme/base", "apache-2.0"),
    sources=[
        CardSource("FinLang/inv", True, "CC-BY-NC-4.0", True, 1200, 30),
        CardSource("own.csv", False, "mit", False, 5, 1),
    ],
    used="1,205 examples were trained on.",
    program=False,
    method=[("method", "QLoRA")],
    training=[("steps", "12")],
    messages=[Message(role="user", content='He said "no\\yes"\nand {{ left }}')],
    max_new_tokens=64,
    context_tokens=512,
    adapter="",
)


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
    joined = replace(CARD, licence="llama3.2-and-cc-by-nc-4.0", licence_known=False, merged=True, gguf=["a.gguf"])
    block = front(joined)
    assert (block["license"], block["license_name"]) == ("other", "llama3.2-and-cc-by-nc-4.0")
    assert (block["library_name"], block["base_model_relation"]) == ("transformers", "finetune")
    assert "base_model" not in front(replace(CARD, base=CardBase("mine", "", "mit")))


def test_a_non_commercial_source_or_base_stands_at_the_top():
    text = render_card(CARD)
    assert "> **Not for commercial use.** The model was trained with FinLang/inv (CC-BY-NC-4.0)." in text
    assert text.index("Not for commercial use") < text.index("## Base model and data")
    assert "| [FinLang/inv](https://huggingface.co/datasets/FinLang/inv): 1,200 examples" in text
    free = replace(CARD, sources=CARD.sources[1:])
    assert "Not for commercial use" not in render_card(free)
    assert "trained with acme/base (x-nc)" in render_card(
        replace(free, base=CardBase("acme/base", "acme/base", "x-nc", non_commercial=True))
    )


def test_what_others_wrote_means_nothing_in_markdown_or_html():
    nasty = "a|b <img src=x>\n# head [x](y) `code` *bold*_"
    card = replace(CARD, sources=[CardSource(nasty, False, nasty, False, 1, 1)], method=[("x", nasty)])
    text = render_card(card)
    assert nasty not in text
    assert r"a\|b \<img src=x\> \# head \[x\](y) \`code\` \*bold\*\_" in text
    assert escape_markdown("two\nlines") == "two lines"


@pytest.mark.parametrize("adapter", [None, "", "adapter"])
@pytest.mark.parametrize("merged", [True, False])
@pytest.mark.parametrize("gguf", [(), ("my model-F16.gguf", "my model-Q4_K_M.gguf")])
def test_only_what_is_there_is_explained_and_the_python_compiles(adapter, merged, gguf):
    text = render_card(replace(CARD, adapter=adapter, merged=merged, gguf=gguf, modelfile=bool(gguf), branch="try"))
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) == (adapter is not None) + merged
    for block in blocks:
        compile(block, "card", "exec")
        assert 'revision="try"' in block
    assert ("PeftModel" in text) == (adapter is not None)
    assert ('subfolder="adapter"' in text) == (adapter == "adapter")
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
    base = CardBase("acme/base", "acme/base", "mit", remote_code=True)
    text = render_card(replace(CARD, base=base, merged=True))
    assert text.count("trust_remote_code=True") == 4
    assert "trust_remote_code" not in render_card(CARD)
