"""The whole chain on a tiny model: every stage on what the stage before it really wrote."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import pytest

from fintune.config.load import load
from fintune.evaluation.agreement import compare_predictions
from fintune.manifest import Manifest
from fintune.records import Prediction
from support.command import Done, fintune, fintune_killed, fintune_process
from support.pair_rows import pair_rows, write_rows
from support.paths import ROOT

REPO = ROOT
FINQA = REPO.parent / "shared" / "finqa"
KINDS = ("base", "adapter", "merged", "F16", "Q4_K_M")
STEPS = (
    *("preflight", "prepare", "predict/base", "score/base", "train", "predict/adapter", "score/adapter"),
    *("merge", "predict/merged", "score/merged"),
    *("export", "replay", "predict/F16", "score/F16", "predict/Q4_K_M", "score/Q4_K_M", "report"),
)
NUM_STEPS, NUM_EVAL = 30, 12

CONFIG = f"""\
model: {{name: MODEL}}
data:
  source: builtin:statements
  statements: {{train_companies: 8, eval_companies: 3, pages_per_company: 1, questions_per_page: 4, size: small}}
  group_questions: 4
prompt: {{max_length: 512}}
adapter: {{r: 32, lora_alpha: 64}}
train:
  max_steps: {NUM_STEPS}
  per_device_train_batch_size: 8
  learning_rate: 1e-2
  save_steps: 5
  dtype: float32  # the same steps on every processor
  threads: 1
predict: {{max_new_tokens: 24, threads: 1}}
export: {{threads: 1}}
"""


@dataclass(frozen=True)
class Run:
    """A run's folder and how to go on with it.

    Attributes:
        config: The configuration's file.
        folder: The run's folder.
        first: What the command that made it printed.
    """

    config: Path
    folder: Path
    first: Done

    def __call__(self, *arguments: object) -> Done:
        """``fintune run`` on this folder, in this process."""
        return fintune(*self.command, *arguments)

    @property
    def command(self) -> list[object]:
        return ["run", self.config, f"run.dir={self.folder.parent}"]

    def manifests(self) -> dict[str, Manifest]:
        return {
            step: Manifest.model_validate_json((self.folder / step / "manifest.json").read_bytes()) for step in STEPS
        }

    def snapshot(self) -> dict[str, tuple[int, int]]:
        """Time of change and size of every file but the lock."""
        files = (path for path in self.folder.rglob("*") if path.is_file() and path.name != ".lock")
        return {str(path.relative_to(self.folder)): (path.stat().st_mtime_ns, path.stat().st_size) for path in files}

    def predictions(self, kind: str) -> list[Prediction]:
        lines = (self.folder / "predict" / kind / "predictions.jsonl").read_text().splitlines()
        return [Prediction.model_validate_json(line) for line in lines]

    def said(self, kind: str) -> list[tuple[str, str, tuple[int, ...]]]:
        """Predictions without what differs from run to run."""
        return [(each.id, each.text, each.token_ids) for each in self.predictions(kind)]


@pytest.fixture(scope="module", autouse=True)
def _cache(_session_cache: Path) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FINTUNE_CACHE", str(_session_cache))
        yield


@pytest.fixture(scope="module")
def able_model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with weights large enough to learn something in a few steps."""
    from safetensors.torch import load_file, save_file

    folder = tmp_path_factory.mktemp("able") / "model"
    shutil.copytree(tiny_model, folder)
    weights = load_file(folder / "model.safetensors")
    larger = {
        name: weight * (10 if "embed" in name else 4 if "proj" in name else 1) for name, weight in weights.items()
    }
    save_file(larger, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def finished(able_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A finished run; look, do not touch."""
    folder = tmp_path_factory.mktemp("chain")
    config = folder / "small.yaml"
    config.write_text(CONFIG.replace("MODEL", str(able_model)))
    first = fintune_process("run", config, f"run.dir={folder / 'runs'}")
    assert first.status == 0, first.err
    return Run(config, folder / "runs" / "small", first)


@pytest.fixture
def run(finished: Run, tmp_path: Path) -> Run:
    """A copy of the finished run, to do with as one likes."""
    folder = tmp_path / "runs" / "small"
    shutil.copytree(finished.folder, folder)
    return Run(finished.config, folder, finished.first)


def test_every_artifact_of_every_stage_is_there(finished):
    expected = [
        *(f"{step}/manifest.json" for step in STEPS),
        *("preflight/preflight.json", "replay/replay.json"),
        *(f"prepare/{name}" for name in ("train.jsonl", "eval.jsonl", "gold.json", "report.json")),
        *(f"prepare/tokens/{split}/dataset_info.json" for split in ("train", "eval")),
        *("train/adapter/adapter_model.safetensors", "train/adapter/adapter_config.json", "train/metrics.jsonl"),
        *(f"merge/{name}" for name in ("config.json", "model.safetensors", "tokenizer.json", "generation_config.json")),
        *("export/small-F16.gguf", "export/small-Q4_K_M.gguf", "export/Modelfile"),
        *(f"predict/{kind}/{name}" for kind in KINDS for name in ("predictions.jsonl", "official.json")),
        *(f"score/{kind}/{name}" for kind in KINDS for name in ("score.json", "score.csv")),
        "report/index.html",
    ]
    assert [path for path in expected if not (finished.folder / path).is_file()] == []


def test_nothing_but_results_is_left(finished):
    stray = {path.name for path in finished.folder.iterdir()} - {step.partition("/")[0] for step in STEPS}
    assert stray <= {".lock", ".work"}
    assert list((finished.folder / ".work").iterdir()) == []
    assert not (finished.folder / "train" / "checkpoints").exists()
    assert [path for path in finished.folder.rglob("*") if path.name.endswith((".tmp", ".part"))] == []


def test_a_run_says_one_line_a_stage_and_no_library_a_word(finished):
    head, *lines = finished.first.err.splitlines()
    assert head == f"{finished.folder}: 17 of 17 stages to do"
    remarks = [line for line in lines if line.startswith("  ")]
    assert [line.split()[0] for line in lines if line not in remarks] == list(STEPS)
    # Beside the precision only bars, which a slow machine shows of more stages.
    own = "  (precision float32|train |predict |proof, |replay of |export |merge )"
    assert [line for line in remarks if not re.match(own, line)] == []


def test_run_ends_with_scores_and_the_page(finished):
    lines = [line for line in finished.first.out.splitlines() if line]
    header, *rows, last = lines
    assert " ".join(header.split()) == "model n execution accuracy 95 % interval program accuracy invalid"
    assert [row.split()[:2] for row in rows] == [[kind, str(NUM_EVAL)] for kind in KINDS]
    for row, kind in zip(rows, KINDS, strict=True):
        score = json.loads((finished.folder / "score" / kind / "score.json").read_text())
        assert f"{score['execution_accuracy']:.2%}" in row
        assert row.endswith(f"{score['invalid_rate']:.2%}")
    assert last == f"The run's page: {finished.folder / 'report' / 'index.html'}"


def test_manifests_say_what_a_result_was_made_from(finished):
    manifests = finished.manifests()
    assert {manifest.seed for manifest in manifests.values()} == {17}
    assert manifests["train"].key.options["train.learning_rate"] == 1e-2
    assert manifests["train"].key.inputs == {"prepare": manifests["prepare"].digest}
    assert manifests["predict/F16"].key.inputs["export"] == manifests["export"].digest
    assert all(manifest.versions["torch"] and manifest.peak_memory_bytes for manifest in manifests.values())


def test_the_model_learns_the_form_of_a_program(finished):
    lines = [json.loads(line) for line in (finished.folder / "train" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, NUM_STEPS + 1))
    assert lines[-1]["loss"] < lines[0]["loss"] / 2
    assert all("(" in each.program for each in finished.predictions("adapter"))
    assert not any("(" in each.program for each in finished.predictions("base"))


@pytest.mark.parametrize(("one", "other"), [("adapter", "merged"), ("merged", "F16"), ("adapter", "F16")])
def test_copies_of_a_model_part_at_near_ties_at_most(finished, one, other):
    agreement = compare_predictions(finished.predictions(one), finished.predictions(other))
    assert agreement.num_common == NUM_EVAL
    assert agreement.faithful
    assert [each for each in agreement.differences if not each.near_tie] == []


def test_predictions_have_the_ids_of_the_gold_file_in_its_order(finished):
    gold = json.loads((finished.folder / "prepare" / "gold.json").read_text())
    for kind in KINDS:
        official = json.loads((finished.folder / "predict" / kind / "official.json").read_text())
        assert [row["id"] for row in official] == [row["id"] for row in gold]
        assert [row["id"] for row in official] == [each.id for each in finished.predictions(kind)]


def test_score_of_official_file_equals_the_runs(finished):
    done = fintune(
        *("score", "--predictions", finished.folder / "predict/adapter/official.json"),
        *("--gold", finished.folder / "prepare/gold.json", "--strict"),
    )
    assert done.status == 0
    run_row = next(line for line in finished.first.out.splitlines() if line.startswith("adapter")).split()
    told = {line.strip().split("  ")[0]: line.split() for line in done.out.splitlines() if line.strip()}
    number, execution, program, invalid = run_row[1], run_row[2], run_row[-2], run_row[-1]
    assert told["n"][1] == number
    assert told["execution accuracy"][2] == execution
    assert told["program accuracy"][2] == program
    assert told["invalid"][1] == invalid


@pytest.mark.parametrize("kind", ["F16", "Q4_K_M"])
def test_an_exported_file_answers_in_llama_cpp(finished, able_model, kind):
    from fintune.inference.llama_cpp import LlamaCppEngine
    from fintune.inference.protocol import Decoding, sorted_by_prompt
    from fintune.models import chat_template as chat
    from fintune.models import load as models
    from fintune.records import Message

    tokenizer = models.load_tokenizer(models.fetch(str(able_model)))
    prompt = chat.render(tokenizer, [Message(role="user", content="what was net income in 2019?")])
    with closing(
        LlamaCppEngine(finished.folder / "export" / f"small-{kind}.gguf", context_tokens=256, threads=1)
    ) as engine:
        (answer,) = sorted_by_prompt(engine.generate([prompt], Decoding(8)))
    assert 1 <= len(answer.token_ids) <= 8
    assert answer.num_prompt_tokens == len(tokenizer(prompt)["input_ids"])


def test_modelfile_names_smallest_file_and_end_of_turn(finished):
    lines = (finished.folder / "export" / "Modelfile").read_text().splitlines()
    assert lines[0] == "FROM ./small-Q4_K_M.gguf"
    assert 'PARAMETER stop "<|im_end|>"' in lines
    assert "PARAMETER num_ctx 512" in lines


def test_page_is_self_contained_and_shows_every_model(finished):
    html = (finished.folder / "report" / "index.html").read_text(encoding="utf-8")
    assert re.findall(r"<link\b|<iframe\b|<script[^>]*\bsrc=|@import", html) == []
    loads = re.findall(
        r"""(?:src|srcset|poster|data|xlink:href)=["']?(?!data:|#)([^"'\s>]+)|url\((?!["']?(?:data:|#))""", html
    )
    assert loads == []
    for name in ("base", "adapter", "merged", "GGUF F16", "GGUF Q4_K_M"):
        assert name in html


def test_a_second_run_does_nothing(run):
    before = run.snapshot()
    done = run()
    assert done.status == 0
    assert done.err.startswith(f"{run.folder}: 0 of 17 stages to do\n")
    assert [line.endswith("up to date") for line in done.err.splitlines()[1:]] == [True] * len(STEPS)
    assert done.out.replace(str(run.folder), "") == run.first.out.replace(str(run.first.err.partition(":")[0]), "")
    assert run.snapshot() == before


def test_options_that_change_no_result_leave_all_up_to_date(run):
    done = run("train.threads=2", "predict.threads=2", "export.threads=2", "train.logging_steps=10")
    assert done.status == 0
    assert "0 of 17 stages" in done.err


def test_a_changed_option_stops_the_run_with_its_name(run):
    before = run.snapshot()
    done = run("train.learning_rate=1e-3")
    assert done.status == 2
    (line,) = done.err.splitlines()
    assert line.startswith("fintune: ")
    assert "train.learning_rate was 0.01 and is now 0.001" in line
    assert "--redo train" in line
    assert done.out == ""
    assert run.snapshot() == before


def test_redo_makes_a_stage_and_what_follows_anew(run):
    before = run.manifests()
    done = run("train.learning_rate=1e-3", "train.max_steps=5", "--redo", "train")
    assert done.status == 0, done.err
    after = run.manifests()
    kept = [step for step in STEPS if after[step] == before[step]]
    assert kept == ["preflight", "prepare", "predict/base", "score/base"]
    assert after["train"].key.options["train.learning_rate"] == 1e-3
    assert after["merge"].key.inputs["train"] == after["train"].digest
    assert "0 of 17 stages" in run("train.learning_rate=1e-3", "train.max_steps=5").err


def test_only_makes_one_stage(run):
    shutil.rmtree(run.folder / "predict" / "merged")
    shutil.rmtree(run.folder / "report")
    before = run.snapshot()
    done = run("--only", "predict/merged")
    assert done.status == 0, done.err
    assert done.out == ""
    made = run.snapshot()
    assert {path.rpartition("/")[0] for path in made.keys() - before.keys()} == {"predict/merged"}
    assert {path: made[path] for path in before} == before


def test_from_leaves_what_comes_before_as_it_lies(run):
    done = run("train.learning_rate=1e-3", "--from", "merge")
    assert done.status == 0, done.err
    assert "0 of 17 stages" in done.err
    assert "train " not in done.err


def test_skip_leaves_a_verb_out_and_what_needs_it_says_so(run):
    shutil.rmtree(run.folder / "score")
    assert run("--skip", "score", "--skip", "report").status == 0
    assert not (run.folder / "score").exists()
    shutil.rmtree(run.folder / "export")
    done = run("--skip", "export")
    assert done.status == 2
    assert f"nothing is exported in {run.folder}: fintune export" in done.err


def test_the_report_shows_what_there_is(run):
    for step in ("report", "export", "replay", "predict/F16", "predict/Q4_K_M", "score/F16", "score/Q4_K_M"):
        shutil.rmtree(run.folder / step)
    done = run("--only", "report")
    assert done.status == 0, done.err
    html = (run.folder / "report" / "index.html").read_text(encoding="utf-8")
    assert "merged" in html
    assert "GGUF F16" not in html


def test_dry_run_tells_and_touches_nothing(run):
    shutil.rmtree(run.folder / "export")
    before = run.snapshot()
    done = run("--dry-run")
    assert done.status == 0
    words = {line.split()[0]: line for line in done.out.splitlines()[1:]}
    assert set(words) == set(STEPS)
    assert "up to date" in words["merge"]
    assert "run" in words["export"].split()[1:]
    assert run.snapshot() == before


def test_export_from_adapter_equals_export_from_merged(finished, tmp_path):
    folder = tmp_path / "runs" / "small"
    for step in ("preflight", "prepare", "train"):
        shutil.copytree(finished.folder / step, folder / step)
    models = "predict.models=[adapter, Q4_K_M]"
    done = fintune(
        *("run", finished.config, f"run.dir={folder.parent}", "export.source=adapter", models),
        *("--skip", "predict", "--skip", "score", "--skip", "report"),
    )
    assert done.status == 0, done.err
    assert {path.name for path in folder.iterdir()} == {
        *(".lock", ".work", "preflight", "prepare", "train", "export", "replay")
    }
    for name in ("small-F16.gguf", "small-Q4_K_M.gguf", "Modelfile"):
        assert (folder / "export" / name).read_bytes() == (finished.folder / "export" / name).read_bytes()
    replayed = json.loads((folder / "replay" / "replay.json").read_text())["replayed"]
    assert list(replayed) == ["base", "adapter", "F16", "Q4_K_M"]


def test_every_export_answers_as_the_adapter(finished):
    facts = finished.manifests()["replay"].facts
    assert list(facts["replayed"]) == ["base", "adapter", "merged", "F16", "Q4_K_M"]
    assert all(facts["replayed"][kind]["same_best_token_share"] >= 0.98 for kind in ("adapter", "merged", "F16"))
    html = (finished.folder / "report" / "index.html").read_text(encoding="utf-8")
    assert 'id="replay-h"' in html


KILLS = [
    pytest.param("preflight", "fintune.pipeline.stages.preflight:write_vocabulary_file", 1, id="preflight"),
    pytest.param("replay", "fintune.pipeline.stages.replay:write_atomically", 1, id="replay"),
    pytest.param("prepare", "datasets:Dataset.save_to_disk", 1, id="prepare"),
    pytest.param("predict/base", "fintune.inference.generate:PredictionLog.append", 5, id="predict-base"),
    pytest.param("score/base", "fintune.util.files:write_output", 1, id="score"),
    pytest.param("train", "fintune.training.metrics:append", 13, id="train"),
    pytest.param("merge", "fintune.util.console:_LineBar.advance", 3, id="merge"),
    pytest.param("export", "fintune.util.console:_LineBar.advance", 8, id="export"),
    pytest.param("predict/F16", "fintune.inference.generate:PredictionLog.append", 5, id="predict-F16"),
    pytest.param("report", "fintune.pipeline.stages.report:write_atomically", 1, id="report"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("step", "where", "number"), KILLS)
def test_killed_stage_is_completed_by_the_next_run(run, finished, step, where, number):
    shutil.rmtree(run.folder / step)
    killed = fintune_killed(where, number, *run.command, "--only", step)
    assert killed.status == -9, killed.err
    assert not (run.folder / step).exists()
    work = run.folder / ".work" / step.replace("/", "-")
    assert not (work / "manifest.json").exists()
    assert {path.name for path in work.iterdir()} > {"key.json"}, "killed before it wrote anything"

    done = run()
    assert done.status == 0, done.err
    resumes = step.startswith(("train", "predict"))
    assert any(line.startswith(f"  {step}: resume") for line in done.err.splitlines()) == resumes
    assert list((run.folder / ".work").iterdir()) == []
    assert all((run.folder / each / "manifest.json").is_file() for each in STEPS)
    assert {kind: run.said(kind) for kind in KINDS} == {kind: finished.said(kind) for kind in KINDS}
    steps = [json.loads(line)["step"] for line in (run.folder / "train" / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, NUM_STEPS + 1))


@pytest.mark.parametrize("path", sorted((REPO / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_configuration_loads_and_can_be_planned(finished, path, tmp_path):
    gold = finished.folder / "prepare" / "gold.json"
    data = [f"data.train={gold}", f"data.eval={gold}"] if "finqa" in path.stem else []
    steps = STEPS
    if path.stem in ("preference", "chat"):
        data = [f"data.sources={write_rows(tmp_path / 'pairs.jsonl', pair_rows(12))}"]
        steps = ("preflight", "prepare", "train", "guard", "merge", "export", "replay", "report")
    assert load(path, data).config.run.name == path.stem
    done = fintune("run", path, *data, f"run.dir={tmp_path / 'runs'}", "--dry-run")
    assert done.status == 0, done.err
    assert [line.split()[:2] for line in done.out.splitlines()[1:]] == [[step, "run"] for step in steps]
    assert not (tmp_path / "runs").exists()


def test_preference_pairs_go_through_every_stage(able_model, tmp_path):
    pairs = write_rows(tmp_path / "trader_dpo_data.jsonl", pair_rows(24))
    done = fintune(
        *("run", REPO / "configs" / "preference.yaml", f"model.name={able_model}", f"run.dir={tmp_path}"),
        *(f"data.sources={pairs}", "data.eval_share=0.2", "train.max_steps=3", "train.eval_steps=3"),
        *("prompt.max_length=128", "train.threads=1", "predict.threads=1", "export.threads=1"),
    )
    assert done.status == 0, done.err
    told = {line.split()[0]: line for line in done.err.splitlines() if not line.startswith(" ")}
    assert "dpo reward margin 0.00 to" in told["train"]
    assert "nats a token" in told["guard"]
    html = (tmp_path / "preference" / "report" / "index.html").read_text(encoding="utf-8")
    assert "ranked correctly, held-out pairs" in html
    assert (tmp_path / "preference" / "export" / "preference-Q4_K_M.gguf").is_file()


def test_rows_of_ones_own_become_a_model_file(able_model, tmp_path):
    row = {"instruction": "What did sales do in 2019?", "output": "They rose by 4 % to 1,250."}
    rows = write_rows(tmp_path / "mine.jsonl", [{**row, "input": f"Page {n} of the report."} for n in range(24)])
    done = fintune(
        *("run", REPO / "configs" / "chat.yaml", f"model.name={able_model}", f"run.dir={tmp_path}"),
        *(f"data.sources={rows}", "data.duplicates=off", "data.eval_share=0.2", "train.max_steps=2"),
        *("prompt.max_length=128", "guard.enabled=false", "train.threads=1", "export.threads=1"),
    )
    assert done.status == 0, done.err
    file = tmp_path / "chat" / "export" / "chat-Q4_K_M.gguf"
    assert file.is_file()
    assert f"GGUF: {file}\nTo serve it: fintune serve {tmp_path / 'chat'}\n" in done.out


@pytest.mark.skipif(not (FINQA / "train.json.gz").is_file(), reason="../shared/finqa holds the official files")
def test_the_official_files_go_through_every_stage(able_model, tmp_path):
    done = fintune(
        *("run", REPO / "configs" / "finqa.yaml", f"model.name={able_model}", f"run.dir={tmp_path}"),
        *(f"data.train={FINQA / 'train.json.gz'}", f"data.eval={FINQA / 'dev.json.gz'}"),
        *("data.max_train_samples=12", "data.max_eval_samples=3", "prompt.max_length=1024", "train.max_steps=3"),
        *("predict.max_new_tokens=16", "train.threads=1", "predict.threads=1", "export.threads=1"),
    )
    assert done.status == 0, done.err
    report = json.loads((tmp_path / "finqa" / "prepare" / "report.json").read_text())
    assert report["train"]["num_examples"] == 12
    assert report["eval"]["num_examples"] == 3
    assert [line.split()[:2] for line in done.out.splitlines() if line][1:-1] == [[kind, "3"] for kind in KINDS]
    assert (tmp_path / "finqa" / "report" / "index.html").is_file()
