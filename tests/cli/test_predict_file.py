from __future__ import annotations

import json
import re
import runpy
import signal

import pytest

from data.test_few_shot import TRAIN
from fintune.cli.predict_file import FileJob, predict_file
from fintune.config import Config
from fintune.errors import ArtifactError
from fintune.inference.open_model import ModelSpec
from fintune.inference.transformers_engine import TransformersEngine
from fintune.util import console as progress
from support.command import fintune, fintune_killed
from support.example_run import records
from support.paths import ROOT
from support.served import Scripted, said

torch = pytest.importorskip("torch")

SCRIPT = ROOT / "scripts" / "inference_fixed.py"


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "FinQA_test.json"
    path.write_text(json.dumps([record.model_dump(mode="json") for record in records(4)]))
    (tmp_path / "FinQA_train.json").write_text(json.dumps([record.model_dump(mode="json") for record in TRAIN]))
    return path


def script(*words):
    """The script in this process, as `python scripts/inference_fixed.py` runs it."""
    loaded = runpy.run_path(str(SCRIPT))
    return fintune(*words, command=loaded["inference_fixed"])


def job(data, model, name="out.json", **options):
    return FileJob(ModelSpec(str(model)), data, data.parent / name, **options)


def config(**options):
    return Config.model_validate({"predict": {"max_new_tokens": 4, "batch_size": 2, **options}})


def test_predict_file_is_read_by_score(data, tiny_model):
    out = data.parent / "out.json"
    done = fintune("predict", "--model", tiny_model, "--data", data, "--out", out, "predict.max_new_tokens=4")
    assert (done.status, done.err) == (0, "")
    assert done.out.startswith(f"{out}: 4 predictions, execution accuracy 0.00% of 4")
    rows = json.loads(out.read_text())
    assert [row["id"] for row in rows] == [record.id for record in records(4)]
    assert all(row["predicted"][-1] == "EOF" and row["question"] for row in rows)
    assert fintune("score", "--predictions", out, "--gold", data).status == 0
    assert sorted(path.name for path in data.parent.iterdir()) == [
        *("FinQA_test.json", "FinQA_train.json", "out.json", "out.manifest.json")
    ]


def test_predict_file_accuracy_equals_the_score(data):
    programs = {record.qa.question: record.qa.program for record in records(4)}
    with Scripted((200, said(programs[records(4)[0].qa.question]))) as served:
        facts = predict_file(job(data, f"{served.url}#m"), config()).facts
    rows = json.loads((data.parent / "out.json").read_text())
    assert len({row["program"] for row in rows}) == 1
    scored = fintune("score", "--predictions", data.parent / "out.json", "--gold", data)
    assert f"{facts['execution_accuracy']:.2%}" in scored.out
    assert facts["execution_accuracy"] >= 0.25


@pytest.mark.parametrize(
    ("names", "stems"),
    [
        (("run.free", "run.tight"), ("run.free", "run.tight")),
        (("run.1.json", "run.2.json"), ("run.1", "run.2")),
        (("run", "run.txt"), ("run", "run.txt")),
    ],
)
def test_predict_file_one_manifest_per_output(data, names, stems):
    with Scripted((200, said())) as served:
        jobs = [job(data, f"{served.url}#{name}", name) for name in names]
        assert jobs[0].partial != jobs[1].partial
        for each in jobs:
            predict_file(each, config())
    for name, stem in zip(names, stems, strict=True):
        manifest = json.loads((data.parent / f"{stem}.manifest.json").read_text())
        assert manifest["model"]["name"].endswith(f"#{name}")


def test_predict_file_asks_questions_without_gold(data, tiny_model):
    rows = json.loads(data.read_text())
    for row in rows[:3]:
        row["qa"] = {"question": row["qa"]["question"]}
    rows[3]["qa"] = {}
    data.write_text(json.dumps(rows))
    done = predict_file(job(data, tiny_model), config())
    assert (done.facts["num_predictions"], done.facts["num_gold"], done.facts["execution_accuracy"]) == (3, 0, None)
    assert done.facts["num_dropped"] == {"no question": 1}
    assert "row 4" in done.problems[0]


def test_predict_file_shots_are_not_from_scored_pages(data, tiny_model):
    scored = json.loads(data.read_text())
    train = json.loads((data.parent / "FinQA_train.json").read_text())
    train[1]["id"] = scored[0]["id"]
    (data.parent / "FinQA_train.json").write_text(json.dumps(train))
    words = ["--model", tiny_model, "--data", data, "--out", data.parent / "out.json"]
    done = fintune("predict", *words, "predict.num_fewshot=3", "predict.max_new_tokens=2")
    assert (done.status, done.err) == (0, "")
    manifest = json.loads((data.parent / "out.manifest.json").read_text())
    shown = {shot for shots in manifest["shots"].values() for shot in shots}
    assert shown == set(manifest["facts"]["shot_ids"]) <= {each.id for each in TRAIN}
    assert scored[0]["id"] not in shown
    assert manifest["facts"]["num_excluded"] == 1
    assert manifest["shots_from"]["path"].endswith("FinQA_train.json")
    assert manifest["model"]["engine"] == "transformers"
    assert manifest["num_shots"] == 3


def test_predict_file_resumes_only_with_the_same_model(data, tiny_model, monkeypatch):
    whole = predict_file(job(data, tiny_model, "whole.json"), config()).facts
    generate, asked = TransformersEngine.generate, []

    def short(self, prompts, decoding, done):
        asked.append(len(prompts) - len(done))
        for number, answer in enumerate(generate(self, prompts, decoding, done)):
            if number == 2 and len(asked) == 1:
                raise KeyboardInterrupt
            yield answer

    monkeypatch.setattr(TransformersEngine, "generate", short)
    with pytest.raises(KeyboardInterrupt):
        predict_file(job(data, tiny_model), config())
    assert not (data.parent / "out.json").exists()
    with pytest.raises(ArtifactError, match=r"another decoding: remove .*out\.partial\.jsonl"):
        predict_file(job(data, tiny_model), config(max_new_tokens=5))
    resumed = predict_file(job(data, tiny_model), config()).facts
    assert asked == [4, 2]
    texts = [
        [row["text"] for row in json.loads((data.parent / name).read_text())] for name in ("whole.json", "out.json")
    ]
    assert texts[0] == texts[1]
    assert resumed["num_tokens"] == whole["num_tokens"]
    assert not list(data.parent.glob("*.partial*"))


def test_predict_file_refuses_other_served_weights(data):
    busy = (400, {"error": {"message": "no more"}})
    same = (200, said("add(1, 2)"))
    out = data.parent / "out.json"
    weights = {"id": "m", "owned_by": "llamacpp", "meta": {"size": 1000, "n_ctx": 512}}
    with Scripted(same, same, busy, models=[weights]) as served:
        words = ("predict", "--model", f"{served.url}#m", "--data", data, "--out", out, "predict.batch_size=1")
        assert fintune(*words).status == 2
        served.script, served.models = [same], [weights | {"meta": {"size": 1002}}]
        message = fintune(*words).err
        assert "out.partial.jsonl" in message and "another model" in message
        served.models, served.seen = [weights | {"created": 5}], []
        assert fintune(*words, "predict.timeout_seconds=1200").status == 0
        assert len(served.seen) == 2
    assert {row["text"] for row in json.loads(out.read_text())} == {"add(1, 2)"}


def test_predict_file_resumes_after_a_kill(data, tiny_model, monkeypatch):
    rows = [record.model_dump(mode="json") for record in records(7)]
    data.write_text(json.dumps(rows))
    words = ["--model", tiny_model, "--data", data, "predict.max_new_tokens=3", "predict.batch_size=2"]
    place = "fintune.inference.transformers_engine:TransformersEngine._prefill"
    done = fintune_killed(place, 3, "predict", *words, "--out", data.parent / "out.json")
    assert done.status == -signal.SIGKILL
    partial = (data.parent / "out.partial.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(partial) == 4
    asked, generate = [], TransformersEngine.generate

    def spied(self, prompts, decoding, done):
        asked.append(len(prompts) - len(done))
        return generate(self, prompts, decoding, done)

    monkeypatch.setattr(TransformersEngine, "generate", spied)
    for name in ("out.json", "whole.json"):
        assert fintune("predict", *words, "--out", data.parent / name).status == 0
    assert asked == [3, 7]
    resumed, whole = (json.loads((data.parent / name).read_text()) for name in ("out.json", "whole.json"))
    assert [row["id"] for row in resumed] == [row["id"] for row in rows]
    assert [row | {"seconds": 0} for row in resumed] == [row | {"seconds": 0} for row in whole]


def test_predict_file_bar_shows_speed_and_accuracy(data, tiny_model, monkeypatch):
    notes = []
    monkeypatch.setattr(progress._LineBar, "note", lambda _, text: notes.append(text))
    facts = predict_file(job(data, tiny_model), config()).facts
    assert len(notes) == 4
    assert all(re.fullmatch(r"[1-9]\d* tok/s, \d+\.\d% right", note) for note in notes)
    assert notes[-1].endswith(f", {facts['execution_accuracy']:.1%} right")


def test_predict_file_out_of_memory_is_one_line(data, tiny_model, monkeypatch):
    def full(self, rows):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nSee the documentation")

    monkeypatch.setattr(TransformersEngine, "_prefill", full)
    out = data.parent / "out.json"
    done = fintune("predict", "--model", tiny_model, "--data", data, "--out", out, "predict.batch_size=6")
    assert (done.status, done.err.count("\n")) == (2, 1)
    assert f"out of memory while asking {tiny_model} (CUDA out of memory. Tried to allocate 2.00 GiB.): " in done.err
    assert "): set predict.batch_size=3, or add --load-in-4bit (older script: --load_in_4bit), or lower" in done.err
    done = script("--model_path", tiny_model, "--test_json", data, "--out_json", out, "--batch_size", 6)
    assert (done.status, done.err.count("\n")) == (2, 1)
    assert "batch_size" in done.err.partition("): set ")[2]


@pytest.mark.parametrize(
    ("words", "strategy"),
    [
        ([], ("greedy", 1)),
        (["--eg_k", 1, "--do_sample", "false", "--load_in_4bit", "false"], ("greedy", 1)),
        (["--do_sample", "--temperature", 0.9, "--top_p", 0.8], ("sample", 1)),
        (["--eg_k", 3, "--do_sample", "true", "--seed", 5], ("execution_guided", 3)),
    ],
)
def test_older_script_flags(data, tiny_model, words, strategy):
    out = data.parent / "out.json"
    done = script("--model_path", tiny_model, "--test_json", data, "--out_json", out, "--max_new_tokens", 3, *words)
    assert (done.status, done.err) == (0, "")
    options = json.loads((data.parent / "out.manifest.json").read_text())["options"]["predict"]
    assert (options["strategy"], options["num_candidates"]) == strategy
    assert options["max_new_tokens"] == 3
    if words[:1] == ["--do_sample"]:
        assert (options["temperature"], options["top_p"]) == (0.9, 0.8)
    first = json.loads(out.read_text())
    again = script("--model_path", tiny_model, "--test_json", data, "--out_json", out, "--max_new_tokens", 3, *words)
    assert again.status == 0
    assert [row["text"] for row in json.loads(out.read_text())] == [row["text"] for row in first]


@pytest.mark.parametrize("dora", [False, True])
def test_older_script_runs_an_adapter_with_shots(data, tiny_model, tmp_path, dora):
    from inference.test_vllm_engine import make_adapter

    adapter = make_adapter(tiny_model, tmp_path / "adapter", use_dora=dora)
    words = ["--test_json", data, "--max_new_tokens", 3, "--num_shots", 1]
    done = script("--base_model", tiny_model, "--adapter_path", adapter, "--out_json", tmp_path / "a.json", *words)
    assert (done.status, done.err) == (0, "")
    plain = script("--model_path", tiny_model, "--out_json", tmp_path / "b.json", *words)
    assert plain.status == 0
    rows = [json.loads((tmp_path / name).read_text()) for name in ("a.json", "b.json")]
    assert [row["logprob"] for row in rows[0]] != pytest.approx([row["logprob"] for row in rows[1]], abs=1e-3)
    assert json.loads((tmp_path / "a.manifest.json").read_text())["facts"]["num_shots_used"] == 4


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model_path", "MODEL", "--test_json", "no.json"], "no.json: no such file"),
        (["--test_json", "DATA"], "give either --model_path alone, or --base_model"),
        (["--base_model", "MODEL", "--test_json", "DATA"], "give either --model_path alone, or --base_model"),
        (["--model_path", "m.gguf", "--test_json", "DATA"], "m.gguf: no such file"),
        (["--model_path", "MODEL", "--test_json", "COPY", "--num_shots", "2"], "does not say which training file"),
        (["--model_path", "MODEL", "--test_json", "DATA", "--temperature", "-1"], "fintune: --temperature: got -1.0"),
        (["--model_path", "MODEL", "--test_json", "DATA", "--eg_k", "0"], "--eg_k"),
    ],
)
def test_predict_file_error_is_one_line(data, tiny_model, tmp_path, words, message):
    copy = tmp_path / "questions.json"
    copy.write_bytes(data.read_bytes())
    places = {"MODEL": str(tiny_model), "DATA": str(data), "COPY": str(copy)}
    done = script(*(places.get(word, word) for word in words), "--out_json", tmp_path / "out.json")
    assert done.status == 2
    assert message in done.err
    assert done.err.count("\n") == 1
    assert not (tmp_path / "out.json").exists()


def test_predict_file_refuses_to_overwrite_an_input(data, tiny_model):
    done = fintune("predict", "--model", tiny_model, "--data", data, "--out", data)
    assert done.status == 2
    assert "is read, and would be overwritten" in done.err


def test_predict_needs_model_data_and_out(data):
    done = fintune("predict", "--data", data)
    assert "give a CONFIG, or --model, --data and --out together" in done.err
    assert done.status == 2


def test_predict_file_names_a_prompt_that_is_too_long(data, tiny_model):
    rows = json.loads(data.read_text())
    rows[2]["post_text"] = ["the revenue grew by 9999 ."] * 700
    data.write_text(json.dumps(rows))
    words = ["--model", tiny_model, "--data", data, "--out", data.parent / "out.json", "prompt.max_length=9000"]
    done = fintune("predict", *words)
    assert (done.status, done.err.count("\n")) == (2, 1)
    assert f"the prompt of {rows[2]['id']} has " in done.err
    assert "reads at most 4096: lower prompt.max_length" in done.err


def predicted(model, data, *words, name="out.json"):
    out = data.parent / name
    done = fintune("predict", "--model", model, "--data", data, "--out", out, "predict.max_new_tokens=4", *words)
    return done, [row["id"] for row in json.loads(out.read_text())] if done.status == 0 else []


def test_predict_file_num_limits_the_questions(data, tiny_model):
    done, ids = predicted(tiny_model, data, "data.max_eval_samples=2")
    assert (done.out.split(": ")[1].split(",")[0], len(ids)) == ("2 predictions", 2)
    assert predicted(tiny_model, data, "--num", "2")[1] == ids
    manifest = json.loads((data.parent / "out.manifest.json").read_text())
    assert (manifest["max_questions"], manifest["facts"]["num_predictions"]) == (2, 2)


@pytest.mark.parametrize("override", ["data.max_train_samples=5", "train.num_train_epochs=2", "run.name=x"])
def test_predict_refuses_overrides_without_effect(data, override):
    done = fintune("predict", "--model", "acme/m", "--data", data, "--out", data.parent / "out.json", override)
    assert done.status == 2
    assert done.err.count("\n") == 1
    assert f"{override.partition('=')[0]} has no effect with predict --model: it reads prompt." in done.err


def test_predict_has_the_flags_of_ask(data, tiny_model):
    words = ("--constrain", "general", "--strategy", "vote", "--num-candidates", "2")
    done, ids = predicted(tiny_model, data, *words, "--num", "1")
    assert (done.status, len(ids)) == (0, 1)
    used = json.loads((data.parent / "out.manifest.json").read_text())["options"]["predict"]
    assert (used["constrain"], used["strategy"], used["num_candidates"]) == ("general", "vote", 2)
    for flag in (("--num", "2"), ("--num-candidates", "2"), ("--strategy", "vote")):
        refused = fintune("predict", "any.yaml", *flag)
        assert f"{flag[0]} needs --model" in refused.err


@pytest.fixture
def shard(data, tiny_model):
    """Run a shard of seven questions about four pages, or all of them."""
    rows = [record.model_dump(mode="json") for record in records(7)]
    for number, row in enumerate(rows):
        row["pre_text"], row["table"] = [f"page {number % 4} ."], rows[number % 4]["table"]
        row["post_text"] = []
    data.write_text(json.dumps([*rows, {"id": "broken"}]))

    def run(part, *more):
        words = ["--model", tiny_model, "--data", data, "--out", data.parent / "out.json"]
        words += [] if part is None else ["--shard", part]
        return fintune("predict", *words, "predict.max_new_tokens=3", *more)

    return run


def test_predict_shards_merge_to_the_whole(data, shard):
    out = data.parent / "out.json"
    assert shard(None).status == 0
    whole, manifest = (json.loads(path.read_text()) for path in (out, data.parent / "out.manifest.json"))
    out.unlink()
    for part in ("3/3", "1/3", "2/3"):
        assert shard(part).status == 0
    pages = [
        {row["question"] for row in json.loads((data.parent / f"out.{number}-of-3.json").read_text())}
        for number in (1, 2, 3)
    ]
    assert sum(map(len, pages)) == len(set().union(*pages))
    done = fintune("predict", "--merge", "--out", out)
    assert done.status == 0
    assert "7 predictions, execution accuracy" in done.out
    merged = json.loads(out.read_text())
    unlike = ("seconds", "logprob", "confidence")
    assert [{k: v for k, v in row.items() if k not in unlike} for row in merged] == [
        {k: v for k, v in row.items() if k not in unlike} for row in whole
    ]
    facts = json.loads((data.parent / "out.manifest.json").read_text())["facts"]
    assert facts | {"predict_seconds": 0} == manifest["facts"] | {"predict_seconds": 0}
    assert facts["num_dropped"] == manifest["facts"]["num_dropped"] != {}


def test_predict_merge_refuses_what_is_not_one_run(data, shard):
    def refused(*words):
        done = fintune("predict", "--merge", "--out", data.parent / "out.json", *words)
        assert (done.status, done.err.count("\n")) == (2, 1) or "Usage" in done.err
        assert not (data.parent / "out.json").exists()
        return done.err

    assert "has no finished shards" in refused()
    assert shard("1/3").status == 0
    assert "lacks shards: 2/3, 3/3" in refused()
    assert shard("2/3").status == 0
    assert shard("3/3").status == 0
    (data.parent / "out.3-of-3.json").write_text("[]")
    assert "out.3-of-3.json does not hold the predictions of its manifest" in refused()
    assert shard("3/3", "predict.seed=8").status == 0
    assert "out.3-of-3.manifest.json and out.1-of-3.manifest.json differ in options" in refused()
    assert shard("1/2").status == 0
    assert "has shards of 2 and of 3" in refused()
    assert "--merge needs --out, and nothing else" in refused("--data", data)


@pytest.mark.parametrize("part", ["0/3", "4/3", "3", "-1/2", "1/0", "a/b"])
def test_predict_shard_out_of_range(shard, part):
    done = shard(part)
    assert done.status == 2
    assert f"{part} is no shard; write I/N with I from 1 to N, for example 2/8" in " ".join(done.err.split())


def test_predict_more_shards_than_pages(shard):
    assert "its questions are about 4 pages: use fewer shards" in shard("1/5").err
