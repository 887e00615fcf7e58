from __future__ import annotations

import re

import pytest

from fintune.errors import ModelError
from fintune.export.gguf.modelfile import render_modelfile
from fintune.models.chat_template import render_template
from support.synthetic import write_tokenizer
from support.tiny import CHATML, patch_json

LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{{ m.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
DEFAULT_SYSTEM = "{% if messages[0].role != 'system' %}<|im_start|>system\nYou compute.<|im_end|>\n{% endif %}" + CHATML

# As DeepSeek-R1's does: the thought of an earlier answer goes, and a new answer begins with one.
FORGETS_THOUGHTS = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}{% elif m.role == 'user' %}"
    "<|User|>{{ m.content }}{% else %}<|Assistant|>{{ m.content.split('</think>')[-1] }}<|im_end|>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|Assistant|><think>\n{% endif %}"
)


@pytest.fixture
def folder(tmp_path):
    write_tokenizer(tmp_path)
    return tmp_path


def written(folder, name="m.gguf", context_tokens=512):
    return render_modelfile(folder, name, context_tokens=context_tokens)[0]


def go(text: str, messages: list[dict[str, str]]) -> str:
    """Run the part of Go's template language that a Modelfile of ours uses."""
    body = re.search(r'TEMPLATE """(.*?)"""', text, re.DOTALL)[1]
    head, loop, tail = re.fullmatch(
        r"(.*)\{\{ range \.Messages \}\}(.*\{\{ end \}\})\{\{ end \}\}(.*)", body, re.DOTALL
    ).groups()
    default = re.search(r"\{\{ if not \.System \}\}(.*?)\{\{ end \}\}", head, re.DOTALL)
    opening = head[: default.start()] if default else head
    branches = dict(re.findall(r'\{\{ (?:else )?if eq \.Role "(\w+)" \}\}(.*?)(?=\{\{ (?:else|end))', loop, re.DOTALL))
    no_system = all(message["role"] != "system" for message in messages)
    turns = "".join(branches[message["role"]].replace("{{ .Content }}", message["content"]) for message in messages)
    return opening + (default[1] if default and no_system else "") + turns + tail


@pytest.mark.parametrize("template", [CHATML, DEFAULT_SYSTEM, LLAMA3, FORGETS_THOUGHTS])
@pytest.mark.parametrize("roles", [["user"], ["system", "user"], ["user", "assistant", "user"]])
def test_ollama_renders_what_the_chat_template_renders(folder, template, roles):
    (folder / "chat_template.jinja").write_text(template)
    messages = [{"role": role, "content": f"{role} says {index} %"} for index, role in enumerate(roles)]
    expected = render_template(
        template, messages, special_tokens={"bos_token": "<|im_start|>"}, add_generation_prompt=True
    )
    assert go(written(folder), messages) == expected


def test_bos_is_left_to_ollama_where_the_vocabulary_adds_it(folder):
    (folder / "chat_template.jinja").write_text(LLAMA3)
    patch_json(folder / "tokenizer_config.json", add_bos_token=True)
    assert 'TEMPLATE """{{ range' in written(folder)


def test_it_names_the_file_the_stop_token_and_the_context(folder):
    lines = written(folder, "m-Q4_K_M.gguf", context_tokens=512).splitlines()
    assert lines[0] == "FROM ./m-Q4_K_M.gguf"
    assert {'PARAMETER stop "<|im_end|>"', "PARAMETER num_ctx 512", "PARAMETER temperature 0"} <= set(lines)


def test_modelfile_notes_thoughts_in_earlier_answers(folder):
    (folder / "chat_template.jinja").write_text(FORGETS_THOUGHTS)
    text, (note,) = render_modelfile(folder, "m.gguf", context_tokens=512)
    assert "send earlier answers without their thoughts" in note
    assert text.splitlines()[:2] == [f"# {note}", "FROM ./m.gguf"]
    thinking = [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "<think>two</think>three"},
        {"role": "user", "content": "four"},
    ]
    special = {"bos_token": "<|im_start|>"}
    expected = render_template(FORGETS_THOUGHTS, thinking, special_tokens=special, add_generation_prompt=True)
    assert go(text, thinking) != expected
    thinking[1]["content"] = "three"
    assert go(text, thinking) == expected


@pytest.mark.parametrize("cut", ["| trim", ".strip('\\n')", ".rstrip()", ".lstrip()"])
@pytest.mark.parametrize("role", ["system", "user", "assistant"])
def test_white_space_that_a_template_takes_off_any_role_is_noted(folder, cut, role):
    content = "(message['content']" + cut + " if message['role'] == '" + role + "' else message['content'])"
    template = CHATML.replace("message['content']", content)
    (folder / "chat_template.jinja").write_text(template)
    text, (note,) = render_modelfile(folder, "m.gguf", context_tokens=512)
    assert "white space from the ends of messages" in note
    assert text.splitlines()[:2] == [f"# {note}", "FROM ./m.gguf"]
    messages = [{"role": role, "content": "\nhi \n"}]
    special = {"bos_token": "<|im_start|>"}
    expected = render_template(template, messages, special_tokens=special, add_generation_prompt=True)
    assert go(text, messages) != expected


def test_llama_3_takes_white_space_off(folder):
    (folder / "chat_template.jinja").write_text(LLAMA3)
    _, (note,) = render_modelfile(folder, "m.gguf", context_tokens=512)
    assert "white space" in note


@pytest.mark.parametrize("template", [CHATML, DEFAULT_SYSTEM])
def test_a_template_that_leaves_words_alone_gets_no_note(folder, template):
    (folder / "chat_template.jinja").write_text(template)
    text, notes = render_modelfile(folder, "m.gguf", context_tokens=512)
    assert notes == []
    assert text.startswith("FROM ")


def test_a_template_that_is_not_made_of_turns_is_refused(folder):
    (folder / "chat_template.jinja").write_text(CHATML + "{{ messages | length }}")
    with pytest.raises(ModelError, match="cannot be written as an Ollama template"):
        written(folder)


def test_a_folder_without_a_template_is_refused(folder):
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(ModelError, match="no chat template"):
        written(folder)
