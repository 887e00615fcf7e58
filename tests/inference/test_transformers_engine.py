from __future__ import annotations

from dataclasses import replace

import pytest

from fintune.errors import ModelError
from fintune.finqa.grammar import general, restricted, shortest_ending, vocabulary
from fintune.inference import kv_cache, transformers_engine
from fintune.inference.kv_cache import SlotBatch, has_slots
from fintune.inference.prefix_cache import PrefixSplit
from fintune.inference.protocol import Decoding, sorted_by_prompt
from fintune.inference.transformers_engine import TransformersEngine, _Running
from fintune.models import chat_template as chat
from fintune.models import load as models
from fintune.records import Message
from fintune.util.console import quiet_libraries

torch = pytest.importorskip("torch")


@pytest.fixture(scope="module")
def model(tiny_model):
    return models.load_model(models.fetch(str(tiny_model)), dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def tokenizer(tiny_model):
    return models.load_tokenizer(models.fetch(str(tiny_model)))


@pytest.fixture(scope="module")
def prompts(tokenizer):
    questions = ["what is the average revenue ? " * (1 + (i * 3) % 5) + str(i) for i in range(11)]
    return [chat.render(tokenizer, [Message(role="user", content=question)]) for question in questions]


def test_the_batch_size_changes_no_token(model, tokenizer, prompts):
    one = sorted_by_prompt(TransformersEngine(model, tokenizer, 1).generate(prompts, Decoding(10)))
    four = sorted_by_prompt(TransformersEngine(model, tokenizer, 4).generate(prompts, Decoding(10)))
    assert [each.token_ids for each in one] == [each.token_ids for each in four]
    for a, b in zip(one, four, strict=True):
        assert a.margins == pytest.approx(b.margins, abs=1e-4)


def test_tokens_and_margins_are_those_of_one_forward_pass(model, tokenizer, prompts):
    for prompt, found in zip(
        prompts, sorted_by_prompt(TransformersEngine(model, tokenizer, 4).generate(prompts, Decoding(6))), strict=True
    ):
        ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        assert found.num_prompt_tokens == len(ids)
        logits = model(torch.tensor([ids + list(found.token_ids)])).logits[0, len(ids) - 1 : -1]
        best = logits.log_softmax(-1).topk(2)
        assert best.indices[:, 0].tolist() == list(found.token_ids)
        assert found.margins == pytest.approx((best.values[:, 0] - best.values[:, 1]).tolist(), abs=1e-4)
        assert found.logprobs == pytest.approx(best.values[:, 0].tolist(), abs=1e-4)


def test_a_row_ends_at_the_stop_token_while_others_go_on(model, tokenizer, prompts):
    free = sorted_by_prompt(TransformersEngine(model, tokenizer, 4).generate(prompts, Decoding(8)))
    engine = TransformersEngine(model, tokenizer, 4)
    stop = free[0].token_ids[2]
    engine._stop_ids = frozenset({stop})
    cut = sorted_by_prompt(engine.generate(prompts, Decoding(8)))
    for a, b in zip(free, cut, strict=True):
        expected = a.token_ids[: a.token_ids.index(stop) + 1] if stop in a.token_ids else a.token_ids
        assert b.token_ids == expected
        assert b.finish_reason == ("stop" if stop in a.token_ids else "length")
        assert len(b.margins) == len(b.token_ids)


@pytest.fixture
def prefilled(monkeypatch):
    """Prompts of each batch that was begun, as it is begun."""
    begun, prefill = [], TransformersEngine._prefill

    def counted(self, rows):
        begun.append([row.index for row in rows])
        return prefill(self, rows)

    monkeypatch.setattr(TransformersEngine, "_prefill", counted)
    return begun


@pytest.mark.parametrize("num_candidates", [1, 2])
def test_a_batch_is_handed_out_before_the_next_one_begins(model, tokenizer, prompts, prefilled, num_candidates):
    decoding = Decoding(4, temperature=1.0, num_candidates=num_candidates)
    num_given = 0
    for answer in TransformersEngine(model, tokenizer, 4).generate(prompts, decoding):
        num_given += 1
        assert answer.prompt_index in {place for batch in prefilled for place in batch}
        assert num_candidates * num_given > sum(map(len, prefilled[:-1]))
        assert len(answer.completions) == num_candidates
        assert not torch.is_inference_mode_enabled()
    assert num_given == len(prompts)
    assert len(prefilled) > 2


def test_a_row_that_ends_is_handed_out_while_its_batch_goes_on(model, tokenizer, prompts, monkeypatch):
    engine, steps, step = TransformersEngine(model, tokenizer, 11), [], SlotBatch.step
    drawn = Decoding(8, temperature=2.0)
    free = sorted_by_prompt(engine.generate(prompts, drawn))
    engine._stop_ids = frozenset({free[0].token_ids[2]})
    monkeypatch.setattr(SlotBatch, "step", lambda *given: steps.append(1) or step(*given))
    num_steps = {answer.prompt_index: len(steps) for answer in engine.generate(prompts, drawn)}
    assert min(num_steps.values()) < max(num_steps.values()) == 7


def test_resumed_completions_are_bit_identical(model, tokenizer, prompts, prefilled):
    def answered(done):
        prefilled.clear()
        engine = TransformersEngine(model, tokenizer, 4)
        return {each.prompt_index: each.completions[0] for each in engine.generate(prompts, Decoding(10), done)}

    whole = answered(())
    first, second, *_ = batches = [*prefilled]
    # The second batch was interrupted behind its first row.
    done = {*first, second[0]}
    rest = answered(done)
    assert prefilled == batches[1:]
    assert rest.keys() == whole.keys() - done
    for place, each in rest.items():
        assert replace(each, seconds=0) == replace(whole[place], seconds=0)


def test_special_tokens_are_not_in_the_text(model, tokenizer, prompts):
    engine = TransformersEngine(model, tokenizer, 1)
    for each in sorted_by_prompt(engine.generate(prompts[:3], Decoding(4))):
        assert "<|" not in each.text


def test_prompt_longer_than_context_is_refused(model, tokenizer, prompts):
    with pytest.raises(ModelError, match=r"prompt 2 has \d+ tokens, but .* reads at most 4096"):
        TransformersEngine(model, tokenizer, 4).generate([prompts[0], "revenue " * 5000], Decoding(4))


def test_no_more_tokens_than_the_context_has_room_for(model, tokenizer):
    prompt = "1" * 4094
    (found,) = sorted_by_prompt(TransformersEngine(model, tokenizer, 1).generate([prompt], Decoding(50)))
    assert found.num_prompt_tokens == 4094
    assert len(found.token_ids) <= 2


def _unshared(prompts):
    return PrefixSplit(1, [prompt[:-1] for prompt in prompts], [*range(len(prompts))])


PAGE = "net revenue of $ 5829 million in 2019 compared with $ 5735 million in 2018 . "
SETS = {
    "pages of questions": [PAGE * (2 + p) + f"{p}\n{q} {'what was it ? ' * q}" for q in range(4) for p in range(3)],
    "one question each": [PAGE * (2 + p) + f"{p} what ?" for p in range(4)] + [PAGE * 3 + "0 what", PAGE * 3 + "1 who"],
    "very different lengths": ["1"] + [PAGE * 9 + f"{q} ?" for q in range(3)] + ["what was it ? " * 30],
    "one begins the others": [PAGE * n for n in (1, 2, 4, 8)],
    "duplicates": [PAGE * 3] * 5 + [PAGE * 2] * 2,
}


@pytest.mark.parametrize("name", SETS)
def test_sharing_beginnings_changes_no_token(model, tokenizer, monkeypatch, name):
    prompts = [chat.render(tokenizer, [Message(role="user", content=text)]) for text in SETS[name]]
    passes = []
    hook = model.register_forward_pre_hook(
        lambda _, __, given: passes.append(given["input_ids"].numel()), with_kwargs=True
    )
    shared = sorted_by_prompt(TransformersEngine(model, tokenizer, 7).generate(prompts, Decoding(12)))
    num_shared, passes[:] = sum(passes), []
    monkeypatch.setattr(kv_cache, "split_prefixes", _unshared)
    alone = sorted_by_prompt(TransformersEngine(model, tokenizer, 7).generate(prompts, Decoding(12)))
    hook.remove()
    assert num_shared < sum(passes)
    for a, b in zip(shared, alone, strict=True):
        assert a.token_ids == b.token_ids
        assert a.num_prompt_tokens == b.num_prompt_tokens
        assert a.margins == pytest.approx(b.margins, abs=1e-4)


class Recorded:
    """In place of a CUDA graph, which needs a GPU: computes the step again and writes into the same logits."""

    def __init__(self, batch, width):
        self.batch, self.width = batch, width
        self.logits = batch._step_all(width).clone()

    def replay(self):
        self.logits.copy_(self.batch._step_all(self.width))


@pytest.fixture
def gpu_loop(monkeypatch):
    """Let engines decode as on a GPU: all slots in each step, a step ahead of the tokens, rows replaced."""
    monkeypatch.setattr(SlotBatch, "_record", lambda *given: (recorded := Recorded(*given), recorded.logits))
    init = TransformersEngine.__init__

    def fixed(self, *given):
        init(self, *given)
        self._has_fixed_shape = True

    def switch(is_on):
        monkeypatch.setattr(TransformersEngine, "__init__", fixed if is_on else init)
        monkeypatch.setattr(kv_cache, "_COLUMNS_STEP", 32)
        monkeypatch.setattr(transformers_engine, "_PREFILL_TOKENS", 150)

    return switch


@pytest.mark.parametrize("decoding", ["greedy", "sampled", "general", "pages", "sampled pages"])
def test_the_loop_of_a_gpu_writes_the_same(model, tokenizer, prompts, gpu_loop, decoding):
    grammars = {"general": (general(),) * 22, "pages": tuple(PAGES * 2)}.get(decoding.split()[-1])
    is_sampled = decoding.startswith("sampled")
    options = Decoding(24, temperature=1.0 * is_sampled, num_candidates=1 + is_sampled, grammars=grammars)
    found = []
    for is_on in (False, True):
        gpu_loop(is_on)
        engine = TransformersEngine(model, tokenizer, 4)
        # Some completions end early, so that others take their slots.
        engine._stop_ids |= {*range(100, 180)} if grammars is None else set()
        found.append(sorted_by_prompt(engine.generate(prompts * 2, options)))
    for one, other in zip(*found, strict=True):
        assert one.token_ids == other.token_ids
        assert one.finish_reason == other.finish_reason
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)
        assert one.margins == pytest.approx(other.margins, abs=1e-4)
    assert len({len(each.token_ids) for each in found[0]}) > 2 or decoding in ("greedy", "general")


def test_rows_that_end_are_replaced(model, tokenizer, prompts, gpu_loop, monkeypatch):
    step, num_steps = _Running.step, []
    for is_on in (False, True):
        gpu_loop(is_on)
        engine, running = TransformersEngine(model, tokenizer, 4), []
        engine._stop_ids |= {*range(100, 180)}
        monkeypatch.setattr(_Running, "step", lambda self, steps=running: steps.append(len(self.rows)) or step(self))
        completions = sorted_by_prompt(engine.generate(prompts * 2, Decoding(24, temperature=1.0)))
        num_steps.append(len(running))
    assert sum(running) == sum(len(each.token_ids) for each in completions)
    assert num_steps[1] < 0.8 * num_steps[0]


def test_a_resumed_window_is_decoded_again_as_a_whole(model, tokenizer, prompts, gpu_loop):
    gpu_loop(True)
    whole = {each.prompt_index: each for each in TransformersEngine(model, tokenizer, 4).generate(prompts, Decoding(8))}
    rest = [*TransformersEngine(model, tokenizer, 4).generate(prompts, Decoding(8), {1, 5})]
    assert {each.prompt_index for each in rest} == whole.keys() - {1, 5}
    for each in rest:
        assert replace(each.completions[0], seconds=0) == replace(whole[each.prompt_index].completions[0], seconds=0)


TINY = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 4096,
    "pad_token_id": 0,
}
FAMILIES = {
    "mistral": (True, {"sliding_window": 16}),
    "qwen2": (True, {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1}),
    "qwen3": (True, {}),
    "gemma3_text": (True, {"sliding_window": 16, "sliding_window_pattern": 2}),
    "phi3": (True, {}),
    "gemma2": (False, {"sliding_window": 16}),
    "gpt2": (True, {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 4096}),
    "bloom": (False, {"n_layer": 2, "n_head": 2}),
    "llama4_text": (False, {"attention_chunk_size": 16, "num_local_experts": 2}),
}
"""Model type -> whether its rows have slots, and its options."""


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_writes_what_one_forward_pass_says(tokenizer, family, gpu_loop):
    from transformers import AutoConfig, AutoModelForCausalLM

    expected, options = FAMILIES[family]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = AutoConfig.for_model(family, vocab_size=len(tokenizer), **(TINY | options))
        model = AutoModelForCausalLM.from_config(config).eval()
    assert has_slots(model) is expected
    texts = [chat.render(tokenizer, [Message(role="user", content=PAGE * 3 + "1" * q)]) for q in (1, 9, 40)]
    for is_on in (False, True):
        gpu_loop(is_on)
        found = sorted_by_prompt(TransformersEngine(model, tokenizer, 3).generate(texts, Decoding(5)))
        for text, each in zip(texts, found, strict=True):
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            logits = model(torch.tensor([ids + list(each.token_ids)])).logits[0, len(ids) - 1 : -1]
            assert logits.argmax(-1).tolist() == list(each.token_ids)


def test_an_adapter_shares_beginnings_too(tiny_model, tokenizer, monkeypatch):
    from peft import LoraConfig, get_peft_model

    base = models.load_model(models.fetch(str(tiny_model)), dtype="float32", device="cpu")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False)
        with quiet_libraries():
            adapted = get_peft_model(base, lora).eval()
    prompts = [chat.render(tokenizer, [Message(role="user", content=text)]) for text in SETS["pages of questions"]]
    shared = sorted_by_prompt(TransformersEngine(adapted, tokenizer, 8).generate(prompts, Decoding(8)))
    monkeypatch.setattr(kv_cache, "split_prefixes", _unshared)
    alone = sorted_by_prompt(TransformersEngine(adapted, tokenizer, 8).generate(prompts, Decoding(8)))
    assert [each.token_ids for each in shared] == [each.token_ids for each in alone]


DRAWN = Decoding(8, temperature=1.0, top_p=0.95, seed=3, num_candidates=3)


def test_candidates_of_a_prompt_stand_together_and_differ(model, tokenizer, prompts):
    found = sorted_by_prompt(TransformersEngine(model, tokenizer, 4).generate(prompts, DRAWN))
    assert len(found) == 3 * len(prompts)
    counts = [len(tokenizer(prompt, add_special_tokens=False)["input_ids"]) for prompt in prompts]
    assert [each.num_prompt_tokens for each in found] == [count for count in counts for _ in range(3)]
    assert all(len({each.token_ids for each in found[at : at + 3]}) == 3 for at in range(0, len(found), 3))


def test_what_is_drawn_depends_on_the_prompt_and_the_seed_only(model, tokenizer, prompts):
    def tokens(prompts, batch_size, decoding=DRAWN):
        return [
            each.token_ids
            for each in sorted_by_prompt(TransformersEngine(model, tokenizer, batch_size).generate(prompts, decoding))
        ]

    whole = tokens(prompts, 4)
    assert whole == tokens(prompts, 7) == tokens(prompts[:4], 1) + tokens(prompts[4:], 16)
    assert whole != tokens(prompts, 4, replace(DRAWN, seed=4))
    (greedy,) = tokens(prompts[:1], 1, Decoding(8))
    assert tokens(prompts[:1], 1, replace(DRAWN, greedy_first=True)) == [greedy, *whole[1:3]]


PAGES = [restricted(vocabulary([["a", "x"], [f"net income {p}", f"{p}5", "12,345"]], ())) for p in range(11)]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("grammars", [(general(),) * 11, tuple(PAGES)], ids=["general", "pages"])
def test_a_grammar_is_kept_to_and_ended(model, tokenizer, prompts, grammars, temperature):
    decoding = Decoding(120, temperature=temperature, grammars=grammars)
    found = sorted_by_prompt(TransformersEngine(model, tokenizer, 4).generate(prompts, decoding))
    for grammar, each in zip(grammars, found, strict=True):
        end = shortest_ending(grammar, each.text.rstrip("\ufffd"))
        assert end is not None
        assert (each.finish_reason == "stop") == (each.token_ids[-1] == tokenizer.eos_token_id)
        assert end == "" or each.finish_reason == "length"
    # Random weights write digits for ever where they may; what a page may say has an end.
    assert any(each.finish_reason == "stop" for each in found) or grammars[0] is grammars[1]


def test_logits_wider_than_the_tokenizer_are_no_obstacle(tokenizer, prompts):
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        wide = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(tokenizer) + 50,
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=1,
                num_attention_heads=2,
            )
        ).eval()
    decoding = Decoding(40, temperature=1.0, grammars=(PAGES[0],) * 2)
    for each in sorted_by_prompt(TransformersEngine(wide, tokenizer, 2).generate(prompts[:2], decoding)):
        assert shortest_ending(PAGES[0], each.text) is not None
        assert max(each.token_ids) < len(tokenizer)
