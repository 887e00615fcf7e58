from __future__ import annotations

import json
import time

import pytest
from pydantic import ValidationError

from fintune.config import Config
from fintune.errors import ArtifactError, ModelError, ResourceError
from fintune.finqa.parse import parse
from fintune.inference.transformers_engine import TransformersEngine
from fintune.models import chat_template as chat
from fintune.models import load as models
from fintune.pipeline.stages.predict import predict
from fintune.records import Example, Prediction
from support.prepared_rows import prepared

torch = pytest.importorskip("torch")


def config(model, **options):
    return Config.model_validate(
        {"model": {"name": str(model)}, "predict": {"max_new_tokens": 6, "batch_size": 2, **options}}
    )


@pytest.fixture
def inputs(tmp_path, tiny_model):
    return {"prepare": prepared(tmp_path / "prepare", tiny_model, 5)}


def tokenizer_of(tiny_model):
    return models.load_tokenizer(models.fetch(str(tiny_model)))


def run(tiny_model, inputs, folder, **options):
    folder.mkdir(exist_ok=True)
    facts = predict(config(tiny_model, **options), inputs, folder, kind="base")
    lines = (folder / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
    return facts, [Prediction.model_validate_json(line) for line in lines]


def without_seconds(predictions):
    rounded = {"seconds": 0.0, "margins": (), "logprob": None, "confidence": None}
    return [each.model_copy(update=rounded) for each in predictions]


def test_every_question_is_predicted_in_order(tiny_model, inputs, tmp_path):
    facts, predictions = run(tiny_model, inputs, tmp_path / "p")
    assert [each.id for each in predictions] == ["x0", "x1", "x2", "x3", "x4"]
    official = json.loads((tmp_path / "p/official.json").read_text())
    assert [each["id"] for each in official] == ["x0", "x1", "x2", "x3", "x4"]
    assert all(each["predicted"][-1] == "EOF" for each in official)
    assert facts["num_predictions"] == 5
    assert facts["num_tokens"] == sum(len(each.token_ids) for each in predictions)
    assert sorted(path.name for path in (tmp_path / "p").iterdir()) == [
        "official.json",
        "predictions.jsonl",
        "predictions.key.json",
    ]


def test_predict_groups_pages_and_keeps_file_order(tiny_model, inputs, tmp_path, monkeypatch):
    gold = json.loads((inputs["prepare"] / "gold.json").read_text())
    for number, row in enumerate(gold):
        row["pre_text"] = [f"page {number % 2}"]
    (inputs["prepare"] / "gold.json").write_text(json.dumps(gold))
    lines = (inputs["prepare"] / "eval.jsonl").read_text().splitlines()
    first = [chat.render(tokenizer_of(tiny_model), Example.model_validate_json(line).messages) for line in lines]
    generate, seen = TransformersEngine.generate, []

    def spied(self, prompts, *others):
        seen.extend(prompts)
        return generate(self, prompts, *others)

    monkeypatch.setattr(TransformersEngine, "generate", spied)
    _, predictions = run(tiny_model, inputs, tmp_path / "p")
    assert seen == [first[at] for at in (0, 2, 4, 1, 3)]
    assert [each.id for each in predictions] == ["x0", "x1", "x2", "x3", "x4"]
    counts = [len(tokenizer_of(tiny_model)(prompt, add_special_tokens=False)["input_ids"]) for prompt in first]
    assert [each.num_prompt_tokens for each in predictions] == counts


def test_an_interrupted_run_goes_on_behind_a_torn_line(tiny_model, inputs, tmp_path, monkeypatch):
    _, whole = run(tiny_model, inputs, tmp_path / "whole")
    generate, seen = TransformersEngine.generate, []

    def short(self, prompts, decoding, done):
        seen.append(len(prompts) - len(done))
        for number, answer in enumerate(generate(self, prompts, decoding, done)):
            if number == 3 and len(seen) == 1:
                raise KeyboardInterrupt
            yield answer

    monkeypatch.setattr(TransformersEngine, "generate", short)
    with pytest.raises(KeyboardInterrupt):
        run(tiny_model, inputs, tmp_path / "cut")
    with (tmp_path / "cut/predictions.jsonl").open("a") as file:
        file.write('{"id": "x3", "te')
    _, resumed = run(tiny_model, inputs, tmp_path / "cut")
    assert seen == [5, 2]
    assert without_seconds(resumed) == without_seconds(whole)


def test_predict_resumes_after_kill(tiny_model, inputs, tmp_path, monkeypatch):
    inputs["prepare"] = prepared(tmp_path / "eleven", tiny_model, 11)
    _, whole = run(tiny_model, inputs, tmp_path / "whole")
    file, begun, prefill = tmp_path / "cut/predictions.jsonl", [], TransformersEngine._prefill

    def killed(self, rows):
        begun.append(len(rows))
        if len(begun) == 3:
            # Nothing is closed yet: this is what a process leaves that is killed here.
            assert len(file.read_text(encoding="utf-8").splitlines()) == sum(begun[:2]) == 4
            raise KeyboardInterrupt
        return prefill(self, rows)

    monkeypatch.setattr(TransformersEngine, "_prefill", killed)
    with pytest.raises(KeyboardInterrupt):
        run(tiny_model, inputs, tmp_path / "cut")
    _, resumed = run(tiny_model, inputs, tmp_path / "cut")
    assert sum(begun[3:]) == 11 - 4
    assert [each.id for each in resumed] == [f"x{number}" for number in range(11)]
    assert [each.model_copy(update={"seconds": 0.0}) for each in resumed] == [
        each.model_copy(update={"seconds": 0.0}) for each in whole
    ]


@pytest.mark.parametrize(
    ("kind", "four_bit"),
    [("base", ""), ("merged", "or measure merged_4bit instead of merged (predict.models), ")],
)
def test_predict_resumes_with_smaller_batch_after_oom(tiny_model, inputs, tmp_path, monkeypatch, kind, four_bit):
    inputs["merge"] = tiny_model
    begun, prefill = [], TransformersEngine._prefill

    def full(self, rows):
        begun.append(len(rows))
        if len(begun) == 2:
            torch.empty(10**15)
        return prefill(self, rows)

    monkeypatch.setattr(TransformersEngine, "_prefill", full)
    (tmp_path / "p").mkdir()
    with pytest.raises(ResourceError) as caught:
        predict(config(tiny_model), inputs, tmp_path / "p", kind=kind)
    told = str(caught.value)
    assert told.startswith(f"out of memory while asking the {kind} model (DefaultCPUAllocator: can't allocate memory")
    assert told.endswith(f": set predict.batch_size=1, {four_bit}or lower prompt.max_length (now 2048)")
    facts = predict(config(tiny_model, batch_size=1), inputs, tmp_path / "p", kind=kind)
    assert facts["num_predictions"] == 5
    assert begun == [2, 2, 1, 1, 1]


def test_another_decoding_does_not_mix(tiny_model, inputs, tmp_path, monkeypatch):
    def stop(self, prompts, *_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(TransformersEngine, "generate", stop)
        with pytest.raises(KeyboardInterrupt):
            run(tiny_model, inputs, tmp_path / "p")
    with pytest.raises(ArtifactError, match="another decoding"):
        run(tiny_model, inputs, tmp_path / "p", max_new_tokens=7)


def test_a_tokenizer_that_counts_otherwise_is_refused(tiny_model, inputs, tmp_path, monkeypatch):
    generate = TransformersEngine.generate

    def longer(self, prompts, *others):
        return generate(self, [prompt + "x" for prompt in prompts], *others)

    monkeypatch.setattr(TransformersEngine, "generate", longer)
    with pytest.raises(ModelError, match=r"base model reads the prompt of x\d as \d+ tokens, the tokenizer as \d+"):
        run(tiny_model, inputs, tmp_path / "p")


def test_predict_adapter_equals_merged(tiny_model, inputs, tmp_path):
    from fintune.pipeline.stages.merge import merge
    from fintune.pipeline.stages.train import train

    trained = Config.model_validate(
        {
            "model": {"name": str(tiny_model)},
            "adapter": {"r": 4},
            "train": {"dtype": "float32", "per_device_train_batch_size": 4, "max_steps": 10, "learning_rate": 3e-2},
            "predict": {"max_new_tokens": 6, "batch_size": 2},
        }
    )
    found = {}
    for step in ("train", "merge", "base", "adapter", "merged"):
        inputs[step] = tmp_path / step
        inputs[step].mkdir()
    train(trained, inputs, inputs["train"])
    merge(trained, inputs, inputs["merge"])
    for kind in ("base", "adapter", "merged"):
        predict(trained, inputs, inputs[kind], kind=kind)
        lines = (inputs[kind] / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
        found[kind] = [Prediction.model_validate_json(line).token_ids for line in lines]
    assert found["adapter"] == found["merged"] != found["base"]


def test_predict_four_bit_kinds(tiny_model, inputs, tmp_path):
    from fintune.pipeline.stages.merge import merge
    from inference.test_vllm_engine import make_adapter

    inputs["train"] = tmp_path / "train"
    make_adapter(tiny_model, inputs["train"] / "adapter")
    inputs["merge"] = tmp_path / "merge"
    inputs["merge"].mkdir()
    merge(config(tiny_model), inputs, inputs["merge"])
    logprobs, keys = {}, {}
    for kind in ("adapter", "adapter_4bit", "merged", "merged_4bit"):
        (tmp_path / kind).mkdir()
        predict(config(tiny_model), inputs, tmp_path / kind, kind=kind)
        lines = (tmp_path / kind / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
        logprobs[kind] = [Prediction.model_validate_json(line).logprob for line in lines]
        keys[kind] = json.loads((tmp_path / kind / "predictions.key.json").read_text())["model"]
    assert logprobs["adapter"] == pytest.approx(logprobs["merged"], abs=1e-2)
    for one, other in ("adapter", "adapter_4bit"), ("merged", "merged_4bit"), ("adapter_4bit", "merged_4bit"):
        assert logprobs[one] != pytest.approx(logprobs[other], abs=1e-2)
    assert len(set(keys.values())) == 4


@pytest.mark.parametrize("strategy", [{}, {"strategy": "vote", "num_candidates": 3, "temperature": 1.0}])
@pytest.mark.parametrize("constrain", ["general", "page"])
def test_predict_with_grammar_is_always_parsable(tiny_model, inputs, tmp_path, constrain, strategy):
    free, _ = run(tiny_model, inputs, tmp_path / "free", **strategy)
    facts, predictions = run(tiny_model, inputs, tmp_path / "p", constrain=constrain, **strategy)
    assert free["num_unparsable"] == 5
    assert facts["num_unparsable"] == 0
    assert all(parse(each.program) for each in predictions)
    assert facts["length_share"] == 1


def test_a_vote_leaves_all_candidates_and_their_agreement(tiny_model, inputs, tmp_path):
    several = {"constrain": "page", "strategy": "vote", "num_candidates": 4, "max_new_tokens": 30}
    facts, predictions = run(tiny_model, inputs, tmp_path / "p", **several)
    for each in predictions:
        results = [candidate.result for candidate in each.candidates]
        (own,) = {candidate.result for candidate in each.candidates if candidate.program == each.program}
        assert len(results) == 4
        assert each.confidence == (results.count(own) / 4 if own is not None else 0)
    assert facts["num_tokens"] == sum(c.num_tokens for each in predictions for c in each.candidates)
    _, again = run(tiny_model, inputs, tmp_path / "again", **several)
    assert [each.candidates for each in again] == [each.candidates for each in predictions]


@pytest.mark.parametrize(
    "changed",
    [
        {"constrain": "general"},
        {"strategy": "sample"},
        {"strategy": "execution_guided", "num_candidates": 2},
        {"seed": 5},
    ],
)
def test_other_ways_of_decoding_do_not_mix(tiny_model, inputs, tmp_path, monkeypatch, changed):
    with monkeypatch.context() as patch:
        patch.setattr(TransformersEngine, "generate", lambda *_: iter(()))
        with pytest.raises(KeyError):
            run(tiny_model, inputs, tmp_path / "p")
    with pytest.raises(ArtifactError, match="another decoding"):
        run(tiny_model, inputs, tmp_path / "p", **changed)


def test_a_page_that_gold_json_lacks_is_named(tiny_model, inputs, tmp_path):
    (inputs["prepare"] / "gold.json").write_text("[]")
    with pytest.raises(ArtifactError, match=r"gold\.json has no page x0"):
        run(tiny_model, inputs, tmp_path / "p")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"strategy": "vote"}, "needs several candidates"),
        ({"num_candidates": 3}, "is not read with predict.strategy: greedy"),
        ({"temperature": 0}, "greater than or equal to 0.01"),
    ],
)
def test_options_that_contradict_each_other_are_refused(options, words):
    with pytest.raises(ValidationError, match=words):
        config("m", **options)


def test_predict_few_shot_prompts_and_manifest(tmp_path, tiny_model):
    from fintune.pipeline.stages.prepare import prepare

    options = {
        "model": {"name": str(tiny_model)},
        "data": {"statements": {"train_companies": 3, "eval_companies": 1, "size": "small"}},
        "prompt": {"max_length": 1500},
        "predict": {"max_new_tokens": 3},
    }
    plain = Config.model_validate(options)
    inputs = {"prepare": tmp_path / "prepare"}
    inputs["prepare"].mkdir()
    prepare(plain, {}, inputs["prepare"])
    shown = Config.model_validate({**options, "predict": {"max_new_tokens": 3, "num_fewshot": 2}})
    counts = {}
    for name, each in (("plain", plain), ("shown", shown)):
        (tmp_path / name).mkdir()
        facts = predict(each, inputs, tmp_path / name, kind="base")
        lines = (tmp_path / name / "predictions.jsonl").read_text().splitlines()
        counts[name] = [Prediction.model_validate_json(line).num_prompt_tokens for line in lines]
    assert all(one < other for one, other in zip(counts["plain"], counts["shown"], strict=True))
    used = json.loads((tmp_path / "shown/shots.json").read_text())
    assert facts["num_shots_used"] == 2 * len(used) == 2 * len(counts["shown"])
    assert facts["shot_ids"] == sorted({shot for shots in used.values() for shot in shots})
    trained = {json.loads(line)["id"] for line in (inputs["prepare"] / "train.jsonl").read_text().splitlines()}
    assert set(facts["shot_ids"]) <= trained
    assert not (tmp_path / "plain/shots.json").exists()
    other = shown.model_copy(update={"run": shown.run.model_copy(update={"seed": 3})})
    with pytest.raises(ArtifactError, match="was made from other training data"):
        predict(other, inputs, tmp_path / "shown", kind="base")


def test_what_is_served_is_asked_the_conversations(tiny_model, inputs, tmp_path):
    from support.served import Scripted, said

    with Scripted((200, said("add(1, 2)"))) as served:
        options = config(tiny_model, models=["endpoint"], endpoint=f"{served.url}#m", batch_size=1)
        (tmp_path / "p").mkdir()
        facts = predict(options, inputs, tmp_path / "p", kind="endpoint")
    assert facts["num_predictions"] == len(served.seen) == 5
    assert served.seen[0][1]["messages"][-1]["role"] == "user"
    official = json.loads((tmp_path / "p/official.json").read_text())
    assert official[4] == {"id": "x4", "predicted": ["add(", "1", "2", ")", "EOF"]}


def test_predict_resumes_with_longer_timeout(tiny_model, inputs, tmp_path):
    from support.served import Scripted, said

    with Scripted((200, said("add(1, 2)"))) as served:
        options = {"models": ["endpoint"], "endpoint": f"{served.url}#m", "batch_size": 1}
        served.before_answering = lambda _: time.sleep(0.8 if len(served.seen) in (3, 4) else 0)
        (tmp_path / "p").mkdir()
        with pytest.raises(ResourceError, match=r"gave no answer in 0\.4 seconds"):
            predict(config(tiny_model, **options, timeout_seconds=0.4), inputs, tmp_path / "p", kind="endpoint")
        assert len((tmp_path / "p/predictions.jsonl").read_text().splitlines()) == 2
        assert predict(config(tiny_model, **options), inputs, tmp_path / "p", kind="endpoint")["num_predictions"] == 5


def test_predict_refuses_other_served_weights(tiny_model, inputs, tmp_path):
    from support.served import Scripted, said

    same, stop = (200, said("add(1, 2)")), (400, {"error": {"message": "no more"}})
    entry = {"id": "m", "owned_by": "vllm", "root": "/models/a"}
    (tmp_path / "p").mkdir()
    with Scripted(same, same, stop, models=[entry]) as served:
        options = config(tiny_model, models=["endpoint"], endpoint=served.url, batch_size=1)
        with pytest.raises(ModelError, match="no more"):
            predict(options, inputs, tmp_path / "p", kind="endpoint")
        served.script, served.models = [same], [entry | {"root": "/models/b"}]
        with pytest.raises(ArtifactError, match="another model"):
            predict(options, inputs, tmp_path / "p", kind="endpoint")
        served.seen, served.models = [], [entry]
        facts = predict(options, inputs, tmp_path / "p", kind="endpoint")
    assert (facts["num_predictions"], len(served.seen)) == (5, 3)


def test_vllm_runs_the_folder_where_it_is_asked_for(tiny_model, inputs, tmp_path, monkeypatch):
    from support import fake_vllm

    fake_vllm.install(monkeypatch)
    _, wanted = run(tiny_model, inputs, tmp_path / "a")
    _, found = run(tiny_model, inputs, tmp_path / "b", engine="vllm")
    assert [each.token_ids for each in found] == [each.token_ids for each in wanted]
