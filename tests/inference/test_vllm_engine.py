from __future__ import annotations

import json

import pytest

from fintune.errors import ModelError, ResourceError
from fintune.finqa.grammar import general
from fintune.inference.protocol import Decoding, sorted_by_prompt
from fintune.inference.transformers_engine import TransformersEngine
from fintune.inference.vllm_engine import VllmEngine
from fintune.models import adapter as adapters
from fintune.models import load as models
from support import fake_vllm
from support.tiny import patch_json

pytest.importorskip("torch")

PROMPTS = [f"<|im_start|>user\n{'revenue ' * (n % 3)}in 20{n:02}<|im_end|>\n<|im_start|>assistant\n" for n in range(5)]


@pytest.fixture
def vllm(monkeypatch):
    return fake_vllm.install(monkeypatch)


@pytest.fixture(scope="module")
def tokenizer(tiny_model):
    return models.load_tokenizer(models.fetch(str(tiny_model)))


@pytest.fixture(scope="module")
def adapter(tiny_model, tmp_path_factory):
    return make_adapter(tiny_model, tmp_path_factory.mktemp("adapter"))


def make_adapter(tiny_model, folder, **options):
    import torch
    from peft import LoraConfig, get_peft_model

    base = models.load_model(models.fetch(str(tiny_model)), dtype="float32")
    with adapters.quiet_peft():
        model = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", **options))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.5, generator=torch.Generator().manual_seed(1))
    model.save_pretrained(folder)
    return folder


def test_completions_are_those_of_transformers(vllm, tiny_model, tokenizer):
    model = models.load_model(models.fetch(str(tiny_model)), dtype="float32")
    wanted = sorted_by_prompt(TransformersEngine(model, tokenizer, 2).generate(PROMPTS, Decoding(8)))
    found = sorted_by_prompt(VllmEngine(tiny_model, tokenizer).generate(PROMPTS, Decoding(8)))
    for ours, theirs in zip(found, wanted, strict=True):
        assert (ours.token_ids, ours.text, ours.finish_reason) == (theirs.token_ids, theirs.text, theirs.finish_reason)
        assert ours.num_prompt_tokens == theirs.num_prompt_tokens
        assert ours.margins == pytest.approx(theirs.margins, abs=1e-4)
        assert len(ours.logprobs) == len(ours.token_ids)


def test_vllm_lora_rank_is_rounded_up(vllm, tiny_model, tokenizer, adapter):
    base = sorted_by_prompt(VllmEngine(tiny_model, tokenizer).generate(PROMPTS, Decoding(8)))
    engine = VllmEngine(tiny_model, tokenizer, adapter=adapter)
    adapted = sorted_by_prompt(engine.generate(PROMPTS, Decoding(8)))
    assert engine._llm.max_lora_rank == 8
    assert [each.token_ids for each in adapted] != [each.token_ids for each in base]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"use_dora": True}, "it is a DoRA adapter"),
        ({"modules_to_save": ["lm_head"]}, "whole trained layers"),
        ({"r": 1024}, "its rank is above 512"),
        ({"rank_pattern": {"q_proj": 600}}, "its rank is above 512"),
    ],
)
def test_vllm_refuses_unsupported_adapter(vllm, tokenizer, adapter, tmp_path, changes, reason):
    (tmp_path / "adapter_config.json").write_bytes((adapter / "adapter_config.json").read_bytes())
    patch_json(tmp_path / "adapter_config.json", **changes)
    with pytest.raises(ModelError, match=rf"cannot use this adapter: .*{reason}.*: merge it"):
        VllmEngine(tmp_path / "no model", tokenizer, adapter=tmp_path)


def test_a_folder_without_an_adapter_is_refused(vllm, tokenizer, tmp_path):
    with pytest.raises(ModelError, match="holds no adapter"):
        VllmEngine(tmp_path, tokenizer, adapter=tmp_path)


def test_draws_repeat_and_candidates_stand_together(vllm, tiny_model, tokenizer):
    def draw(seed):
        decoding = Decoding(5, temperature=1.5, seed=seed, num_candidates=3, greedy_first=True)
        return [
            each.token_ids for each in sorted_by_prompt(VllmEngine(tiny_model, tokenizer).generate(PROMPTS, decoding))
        ]

    first = draw(1)
    greedy = [
        each.token_ids for each in sorted_by_prompt(VllmEngine(tiny_model, tokenizer).generate(PROMPTS, Decoding(5)))
    ]
    assert first == draw(1) != draw(2)
    assert first[::3] == greedy
    assert first[1::3] != first[2::3]


def test_each_prompt_is_constrained_by_its_own_grammar(vllm, tiny_model, tokenizer):
    llguidance = pytest.importorskip("llguidance")
    grammars = tuple(general(steps) for steps in range(1, 6))
    engine = VllmEngine(tiny_model, tokenizer)
    sorted_by_prompt(engine.generate(PROMPTS, Decoding(2, grammars=grammars)))
    calls = engine._llm.llm_engine.calls
    rows = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in PROMPTS]
    assert len(calls) == len(PROMPTS)
    for prompt, each in calls:
        grammar = each.structured_outputs.grammar
        assert grammar == grammars[rows.index(prompt["prompt_token_ids"])].lark()
        assert not llguidance.LLMatcher.validate_grammar(llguidance.LLMatcher.grammar_from_lark(grammar))
    assert engine._llm.structured_outputs_config == {"backend": "guidance"}


def test_questions_on_a_page_follow_each_other(vllm, tiny_model, tokenizer):
    pages = [f"{'in the ' * (9 + page)}20{page}\n{'x ' * question}" for question in range(2) for page in range(3)]
    engine = VllmEngine(tiny_model, tokenizer)
    found = sorted_by_prompt(engine.generate(pages, Decoding(1)))
    calls = engine._llm.llm_engine.calls
    texts = [tokenizer.decode(prompt["prompt_token_ids"]).split("20")[1][0] for prompt, _ in calls]
    assert texts == sorted(texts)
    counts = [len(tokenizer(page, add_special_tokens=False)["input_ids"]) for page in pages]
    assert [each.num_prompt_tokens for each in found] == counts


def test_answers_come_as_they_end_and_what_is_done_is_not_asked(vllm, tiny_model, tokenizer):
    engine = VllmEngine(tiny_model, tokenizer)
    (whole, requests) = (sorted_by_prompt(engine.generate(PROMPTS, Decoding(4))), engine._llm.llm_engine)
    answers = engine.generate(PROMPTS, Decoding(4), done=(1, 3))
    first = next(answers)
    # The stand-in ends the second of two requests first, and has the third one left.
    assert len(requests._waiting) == 1
    found = {first.prompt_index: first.completions, **dict(answers)}
    assert sorted(found) == [0, 2, 4] and first.prompt_index != min(found)
    assert all(found[place][0].token_ids == whole[place].token_ids for place in found)
    assert len(requests.calls) == 5 + 3


def test_what_nobody_waits_for_any_more_is_aborted(vllm, tiny_model, tokenizer):
    engine = VllmEngine(tiny_model, tokenizer)
    answers = engine.generate(PROMPTS, Decoding(1))
    next(answers)
    answers.close()
    assert not engine._llm.llm_engine.has_unfinished_requests()
    assert len(engine._llm.llm_engine.aborted) == 4


def test_a_prompt_longer_than_the_context_is_named(vllm, tiny_model, tokenizer):
    with pytest.raises(ModelError, match=r"prompt 2 has \d+ tokens, with 4 new ones it does not fit the context of 64"):
        VllmEngine(tiny_model, tokenizer, context_tokens=64).generate([PROMPTS[0], "revenue " * 80], Decoding(4))


def test_a_model_that_vllm_refuses_is_one_line(vllm, tiny_model, tokenizer):
    with pytest.raises(ModelError, match=r"vLLM cannot load it \(max_model_len \(9999\) is greater.*\)$"):
        VllmEngine(tiny_model, tokenizer, context_tokens=9999)


def test_without_vllm_the_extra_is_named(tiny_model, tokenizer):
    with pytest.raises(ResourceError, match=r'vLLM is not installed: pip install "fintune\[vllm\]"'):
        VllmEngine(tiny_model, tokenizer)


def test_the_stand_in_refuses_what_vllm_does_not_know():
    with pytest.raises(TypeError):
        fake_vllm.SamplingParams(guided_grammar="x")
    with pytest.raises(ValueError, match="one kind"):
        fake_vllm.StructuredOutputsParams()


def test_vllm_margin_of_forced_token_is_finite(vllm, tiny_model, tokenizer, monkeypatch):
    def forced(self, prompt, params):
        steps = [{5: fake_vllm.Logprob(0.0), 6: fake_vllm.Logprob(float("-inf"))}]
        return fake_vllm.CompletionOutput(0, "x", [5], 0.0, steps, "stop")

    monkeypatch.setattr(fake_vllm.LLM, "_complete", forced)
    (found,) = sorted_by_prompt(VllmEngine(tiny_model, tokenizer).generate(PROMPTS[:1], Decoding(1)))
    assert found.margins[0] > 100
    assert json.loads(json.dumps(found.margins, allow_nan=False)) == list(found.margins)
