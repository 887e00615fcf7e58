from __future__ import annotations

import json
import math
import shutil
from contextlib import closing
from dataclasses import replace

import pytest
from tokenizers import Tokenizer

from fintune.errors import ModelError
from fintune.export.gguf.writer import write_gguf
from fintune.finqa.grammar import (
    Characters,
    Grammar,
    Repeated,
    Series,
    Text,
    general,
    restricted,
    shortest_ending,
    vocabulary,
)
from fintune.inference.llama_cpp import LlamaCppEngine
from fintune.inference.llama_requests import read_gguf_numbers
from fintune.inference.prefix_cache import num_shared_tokens
from fintune.inference.protocol import Decoding, sorted_by_prompt
from fintune.models.tokenizer_check import probe_strings
from fintune.records import Message
from support.synthetic import PRE_TOKENIZERS, write_folder
from support.tiny import patch_json

PROMPTS = [
    f"<|im_start|>user\n{'the revenue ' * (i % 4)}in 20{i:02}<|im_end|>\n<|im_start|>assistant\n" for i in range(7)
]

PAGES = [
    f"<|im_start|>user\n20{page:02} {'the revenue ' * (9 + page)}\n{'in the ' * question}{question}<|im_end|>\n"
    for question in range(3)
    for page in range(4)
]


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("engine")
    write_folder(folder / "model", num_layers=2)
    write_gguf(folder / "model", {"F16": folder / "m.gguf", "Q4_K_M": folder / "q.gguf"})
    return folder / "m.gguf"


@pytest.fixture(scope="module")
def engine(gguf_file):
    with closing(LlamaCppEngine(gguf_file, context_tokens=256, parallel=3)) as started:
        yield started


@pytest.mark.parametrize("pre", PRE_TOKENIZERS)
def test_llama_cpp_splits_text_as_the_tokenizer_does(tmp_path, pre):
    folder = write_folder(tmp_path / "model", num_layers=1, pre=pre)
    write_gguf(folder, {"F16": tmp_path / "m.gguf"})
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    texts = probe_strings()
    with closing(LlamaCppEngine(tmp_path / "m.gguf", context_tokens=64, parallel=1)) as engine:
        ours = engine.tokenise(texts)
    theirs = [tokenizer.encode(text, add_special_tokens=False).ids for text in texts]
    assert len(texts) > 100
    assert [text for text, a, b in zip(texts, ours, theirs, strict=True) if a != b] == []


def test_conversations_are_rendered_by_the_template_of_the_file(engine, gguf_file):
    from fintune.models import chat_template as chat
    from fintune.models import load as models

    tokenizer = models.load_tokenizer(models.fetch(str(gguf_file.parent / "model")))
    turns = [Message(role="system", content="Answer."), Message(role="user", content="in the\n\nrevenue {{ 1 }}")]
    assert engine.render(turns) == chat.render(tokenizer, turns)


def test_completions_come_in_the_order_of_the_prompts(engine):
    prompts = PROMPTS * 3
    together = sorted_by_prompt(engine.generate(prompts, Decoding(6)))
    counts = [len(row) for row in engine.tokenise(prompts)]
    assert [completion.num_prompt_tokens for completion in together] == counts
    assert len(set(counts)) > 1


@pytest.mark.parametrize("name", ["m.gguf", "q.gguf"])
def test_batched_decoding_repeats_itself(gguf_file, name):
    def run():
        with closing(LlamaCppEngine(gguf_file.with_name(name), context_tokens=256, parallel=2)) as fresh:
            found = sorted_by_prompt(fresh.generate(PROMPTS * 2 + PAGES, Decoding(12)))
            return [(done.token_ids, done.margins) for done in found]

    assert run() == run()


@pytest.mark.parametrize("parallel", [1, 3])
def test_a_page_is_computed_once_for_its_questions(gguf_file, monkeypatch, parallel):
    with closing(LlamaCppEngine(gguf_file, context_tokens=256, parallel=parallel)) as fresh:
        post, computed = fresh._post, []

        def counting(connection, route, body):
            answer = post(connection, route, body)
            if route == "/completion":
                computed.extend(
                    each["timings"]["prompt_n"] for each in (answer if isinstance(answer, list) else [answer])
                )
            return answer

        monkeypatch.setattr(fresh, "_post", counting)
        completions = sorted_by_prompt(fresh.generate(PAGES, Decoding(4)))
        rows = fresh.tokenise(PAGES)
    counts = [completion.num_prompt_tokens for completion in completions]
    assert counts == list(map(len, rows))
    begun = [row for page in range(4) for row in rows[page::4][:1]]
    own = [len(row) - num_shared_tokens(row, first) for page, first in enumerate(begun) for row in rows[page::4]]
    assert sum(computed) <= sum(map(len, begun)) + sum(own) + len(rows)
    assert sum(computed) < 0.6 * sum(counts)


def test_what_a_slot_holds_moves_nothing_but_near_ties(gguf_file, engine):
    together = sorted_by_prompt(engine.generate(PAGES, Decoding(12)))
    for prompt, found in zip(PAGES, together, strict=True):
        with closing(LlamaCppEngine(gguf_file, context_tokens=256, parallel=1)) as fresh:
            (alone,) = sorted_by_prompt(fresh.generate([prompt], Decoding(12)))
        num_same = num_shared_tokens([*found.token_ids], [*alone.token_ids])
        assert found.margins[:num_same] == pytest.approx(alone.margins[:num_same], abs=0.01)
        if num_same < 12:
            assert max(found.margins[num_same], alone.margins[num_same]) < 0.01


def test_the_same_prompt_twice_is_answered_twice(engine):
    first, second, third = sorted_by_prompt(engine.generate([PAGES[0]] * 3, Decoding(8)))
    assert first.token_ids == second.token_ids == third.token_ids
    assert first.num_prompt_tokens == third.num_prompt_tokens


def test_llama_cpp_margins_and_seconds(engine):
    for completion in sorted_by_prompt(engine.generate(PROMPTS, Decoding(5))):
        assert len(completion.margins) == len(completion.token_ids) <= 5
        assert all(margin >= 0 and math.isfinite(margin) for margin in completion.margins)
        assert completion.seconds >= 0


def test_tokens_within_a_utf8_character_are_kept(engine):
    # Random weights write single bytes: most tokens end within a character, for which no margin is reported.
    completions = sorted_by_prompt(engine.generate(PROMPTS, Decoding(30)))
    assert any("\ufffd" in completion.text for completion in completions)
    assert all(len(c.token_ids) == 30 for c in completions if c.finish_reason == "length")


def test_the_limit_and_the_end_token_are_told_apart(engine):
    endings = set()
    for completion in sorted_by_prompt(engine.generate(PROMPTS, Decoding(200))):
        endings.add(completion.finish_reason)
        assert (completion.token_ids[-1] == 2) == (completion.finish_reason == "stop")
        assert completion.finish_reason == "stop" or len(completion.token_ids) == 200
        assert "<|im_end|>" not in completion.text
    (short,) = sorted_by_prompt(engine.generate(PROMPTS[:1], Decoding(1)))
    assert short.finish_reason == "length" or short.token_ids == (2,)


def test_llama_cpp_adds_no_bos(gguf_file, tmp_path):
    folder = shutil.copytree(gguf_file.parent / "model", tmp_path / "model")
    patch_json(folder / "tokenizer_config.json", add_bos_token=True)
    write_gguf(folder, {"F16": tmp_path / "m.gguf"})
    with closing(LlamaCppEngine(tmp_path / "m.gguf", context_tokens=128, parallel=1)) as engine:
        (completion,) = sorted_by_prompt(engine.generate(["in the"], Decoding(1)))
        assert completion.num_prompt_tokens == len(engine.tokenise(["in the"])[0])
        assert engine.tokenise(["in the"])[0][0] != 1


def test_sampling_defaults_of_the_file_are_not_used(gguf_file, tmp_path, engine):
    folder = shutil.copytree(gguf_file.parent / "model", tmp_path / "model")
    (folder / "generation_config.json").write_text(json.dumps({"temperature": 5.0, "penalty_repeat": 3.0}))
    write_gguf(folder, {"F16": tmp_path / "m.gguf"})
    with closing(LlamaCppEngine(tmp_path / "m.gguf", context_tokens=256, parallel=1)) as other:
        (theirs,) = sorted_by_prompt(other.generate(PROMPTS[:1], Decoding(20)))
    (ours,) = sorted_by_prompt(engine.generate(PROMPTS[:1], Decoding(20)))
    assert theirs.token_ids == ours.token_ids


def test_a_consumer_may_stop_early(engine):
    completions = engine.generate(PROMPTS, Decoding(20))
    next(completions)
    completions.close()
    assert len(sorted_by_prompt(engine.generate(PROMPTS[:2], Decoding(2)))) == 2


def test_a_quantised_file_runs(gguf_file):
    with closing(LlamaCppEngine(gguf_file.with_name("q.gguf"), context_tokens=128, parallel=1)) as engine:
        assert len(sorted_by_prompt(engine.generate(PROMPTS[:1], Decoding(3)))) == 1


def test_a_prompt_longer_than_the_context_is_named(engine):
    with pytest.raises(ModelError, match=r"prompt 2 has \d+ tokens, with 10 new ones it .* the context of 256"):
        engine.generate([PROMPTS[0], "in the " * 300], Decoding(10))


def test_context_longer_than_the_models_is_refused(gguf_file):
    (trained,) = read_gguf_numbers(gguf_file, ["llama.context_length"]).values()
    with closing(LlamaCppEngine(gguf_file, context_tokens=trained[0] + 64, parallel=1)) as engine:
        long = "in the " * trained[0]
        with pytest.raises(ModelError, match=rf"the context of {trained[0]} that m.gguf was trained for: lower prompt"):
            engine.generate([long], Decoding(1))


def test_an_empty_prompt_is_named(engine):
    with pytest.raises(ModelError, match="prompt 1 is empty"):
        engine.generate([""], Decoding(1))


def test_a_folder_a_missing_file_and_another_format_are_refused(tmp_path):
    with pytest.raises(ModelError, match="is a folder"):
        LlamaCppEngine(tmp_path)
    with pytest.raises(ModelError, match="no such file"):
        LlamaCppEngine(tmp_path / "none.gguf")
    (tmp_path / "text.gguf").write_text("no model")
    with pytest.raises(ModelError, match="not a GGUF file"):
        LlamaCppEngine(tmp_path / "text.gguf")


def test_a_truncated_file_is_refused(gguf_file, tmp_path):
    (tmp_path / "m.gguf").write_bytes(gguf_file.read_bytes()[:-200_000])
    with pytest.raises(ModelError, match=r"llama\.cpp cannot load it"):
        LlamaCppEngine(tmp_path / "m.gguf", context_tokens=64, parallel=1)


DRAWN = Decoding(10, temperature=1.0, top_p=0.9, seed=5, num_candidates=3)


def test_candidates_stand_together_differ_and_come_again(gguf_file):
    def run(decoding):
        with closing(LlamaCppEngine(gguf_file, context_tokens=256, parallel=2)) as fresh:
            return [
                (each.token_ids, each.num_prompt_tokens) for each in sorted_by_prompt(fresh.generate(PROMPTS, decoding))
            ]

    found = run(DRAWN)
    assert len(found) == 3 * len(PROMPTS)
    assert all(len(set(found[at : at + 3])) == 3 for at in range(0, len(found), 3))
    assert all(len({num for _, num in found[at : at + 3]}) == 1 for at in range(0, len(found), 3))
    assert found == run(DRAWN)
    assert found != run(replace(DRAWN, seed=6))
    with_greedy = run(replace(DRAWN, greedy_first=True))
    assert [with_greedy[at + 1 : at + 3] for at in range(0, len(found), 3)] == [
        found[at + 1 : at + 3] for at in range(0, len(found), 3)
    ]
    assert with_greedy[::3] == run(Decoding(10))


def test_llama_cpp_logprobs_before_temperature(engine):
    free = Decoding(8)
    hot = Decoding(8, temperature=50.0, seed=1)
    for cold_one, hot_one in zip(
        sorted_by_prompt(engine.generate(PROMPTS, free)), sorted_by_prompt(engine.generate(PROMPTS, hot)), strict=True
    ):
        assert len(hot_one.logprobs) == len(hot_one.token_ids)
        # Another first token is no better than the second-best; at this temperature any would be about -6.
        if cold_one.margins[0] and hot_one.margins[0] and cold_one.token_ids[0] != hot_one.token_ids[0]:
            assert hot_one.margins[0] == pytest.approx(cold_one.margins[0], abs=0.01)
            assert hot_one.logprobs[0] <= cold_one.logprobs[0] - cold_one.margins[0] + 0.01


PAGE_GRAMMARS = [restricted(vocabulary([["a", "x"], [f"net income {p}", f"{p}5", "12,345"]], ())) for p in range(7)]


@pytest.mark.parametrize("temperature", [0.0, 1.5])
@pytest.mark.parametrize("grammars", [(general(),) * 7, tuple(PAGE_GRAMMARS)], ids=["general", "pages"])
def test_a_grammar_is_kept_to_and_ended(engine, grammars, temperature):
    decoding = Decoding(180, temperature=temperature, num_candidates=2, grammars=grammars)
    found = sorted_by_prompt(engine.generate(PROMPTS, decoding))
    assert len(found) == 14
    for place, each in enumerate(found):
        end = shortest_ending(grammars[place // 2], each.text.rstrip("\ufffd"))
        assert end is not None
        assert (each.finish_reason == "stop") == (each.token_ids[-1] == 2)
        assert end == "" or each.finish_reason == "length"
    assert any(each.finish_reason == "stop" for each in found) or grammars[0] is grammars[1]


def test_no_control_token_stands_in_for_text(engine):
    any_text = Grammar({"start": Series((Text("a"), Repeated(Characters("^,"), "+")))})
    hot = Decoding(150, temperature=5.0, num_candidates=3, grammars=(any_text,) * 7)
    for each in sorted_by_prompt(engine.generate(PROMPTS, hot)):
        assert not {0, 1} & set(each.token_ids)
        assert 2 not in each.token_ids[:-1]


def test_resumed_run_gives_the_open_prompts_of_a_whole_one(engine, monkeypatch):
    grammars = tuple(general(steps) for steps in range(1, len(PROMPTS) + 1))
    decoding = Decoding(2, grammars=grammars)
    whole = {result.prompt_index: result for result in engine.generate(PROMPTS, decoding)}
    asked, post = [], LlamaCppEngine._post

    def spied(self, connection, route, body):
        if route == "/completion":
            asked.append(body["grammar"])
        return post(self, connection, route, body)

    monkeypatch.setattr(LlamaCppEngine, "_post", spied)
    done = {0, 2}
    resumed = {result.prompt_index: result for result in engine.generate(PROMPTS, decoding, done)}
    assert resumed.keys() == whole.keys() - done
    for index, result in resumed.items():
        assert [each.token_ids for each in result.completions] == [each.token_ids for each in whole[index].completions]
    asked.clear()
    assert list(engine.generate(PROMPTS, decoding, set(whole))) == []
    assert asked == []
