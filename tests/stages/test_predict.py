from __future__ import annotations

import json

import pytest
from pydantic import ValidationError

from fintune.engines.transformers_engine import TransformersEngine
from fintune.errors import ArtifactError, ModelError
from fintune.finqa.parse import parse
from fintune.options import Config
from fintune.records import Prediction
from fintune.stages.predict import predict
from prepared_rows import prepared

pytest.importorskip("torch")


def config(model, **options):
    return Config.model_validate(
        {"model": {"name": str(model)}, "predict": {"max_new_tokens": 6, "batch_size": 2, **options}}
    )


@pytest.fixture
def inputs(tmp_path, tiny_model):
    return {"prepare": prepared(tmp_path / "prepare", tiny_model, 5)}


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


def test_an_interrupted_run_goes_on_behind_a_torn_line(tiny_model, inputs, tmp_path, monkeypatch):
    _, whole = run(tiny_model, inputs, tmp_path / "whole")
    generate, seen = TransformersEngine.generate, []

    def short(self, prompts, decoding):
        seen.append(len(prompts))
        for number, completion in enumerate(generate(self, prompts, decoding)):
            if number == 3 and len(seen) == 1:
                raise KeyboardInterrupt
            yield completion

    monkeypatch.setattr(TransformersEngine, "generate", short)
    with pytest.raises(KeyboardInterrupt):
        run(tiny_model, inputs, tmp_path / "cut")
    with (tmp_path / "cut/predictions.jsonl").open("a") as file:
        file.write('{"id": "x3", "te')
    _, resumed = run(tiny_model, inputs, tmp_path / "cut")
    assert seen == [5, 2]
    assert without_seconds(resumed) == without_seconds(whole)


def test_another_decoding_does_not_mix(tiny_model, inputs, tmp_path, monkeypatch):
    def stop(self, prompts, decoding):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(TransformersEngine, "generate", stop)
        with pytest.raises(KeyboardInterrupt):
            run(tiny_model, inputs, tmp_path / "p")
    with pytest.raises(ArtifactError, match="begun with another decoding"):
        run(tiny_model, inputs, tmp_path / "p", max_new_tokens=7)


def test_a_tokenizer_that_counts_otherwise_is_refused(tiny_model, inputs, tmp_path, monkeypatch):
    generate = TransformersEngine.generate

    def longer(self, prompts, decoding):
        return generate(self, [prompt + "x" for prompt in prompts], decoding)

    monkeypatch.setattr(TransformersEngine, "generate", longer)
    with pytest.raises(ModelError, match=r"base model reads the prompt of x0 as \d+ tokens, the tokenizer as \d+"):
        run(tiny_model, inputs, tmp_path / "p")


def test_adapter_and_merged_folder_predict_the_same_and_not_as_the_base(tiny_model, inputs, tmp_path):
    from fintune.stages.merge import merge
    from fintune.stages.train import train

    trained = Config.model_validate(
        {
            "model": {"name": str(tiny_model)},
            "adapter": {"r": 4},
            "train": {"precision": "float32", "batch_size": 4, "max_steps": 10, "learning_rate": 3e-2},
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


@pytest.mark.parametrize("strategy", [{}, {"strategy": "vote", "num_candidates": 3, "temperature": 1.0}])
@pytest.mark.parametrize("constrain", ["general", "example"])
def test_under_a_grammar_every_program_is_one_even_where_the_limit_cuts(
    tiny_model, inputs, tmp_path, constrain, strategy
):
    free, _ = run(tiny_model, inputs, tmp_path / "free", **strategy)
    facts, predictions = run(tiny_model, inputs, tmp_path / "p", constrain=constrain, **strategy)
    assert free["num_unparsable"] == 5
    assert facts["num_unparsable"] == 0
    assert all(parse(each.program) for each in predictions)
    assert facts["length_share"] == 1


def test_a_vote_leaves_all_candidates_and_their_agreement(tiny_model, inputs, tmp_path):
    several = {"constrain": "example", "strategy": "vote", "num_candidates": 4, "max_new_tokens": 30}
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
        patch.setattr(TransformersEngine, "generate", lambda self, prompts, decoding: iter(()))
        with pytest.raises(IndexError):
            run(tiny_model, inputs, tmp_path / "p")
    with pytest.raises(ArtifactError, match="begun with another decoding"):
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
