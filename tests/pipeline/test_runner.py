from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from itertools import permutations
from pathlib import Path
from types import SimpleNamespace

import pytest

from fintune.errors import ArtifactError, DataError, ResourceError
from fintune.manifest import MANIFEST, Slot
from fintune.pipeline.run_folder import lock_run
from fintune.pipeline.runner import Pipeline
from fintune.pipeline.step import Selection
from support.fake_steps import Chain

ALL = ["prepare", "train", "predict/base", "predict/merged", "report"]


@pytest.fixture
def chain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Chain:
    # Asking git and the installed packages takes longer than all these steps.
    monkeypatch.setattr("fintune.pipeline.runner.checkout_commit", lambda: "0123456789ab")
    monkeypatch.setattr("fintune.pipeline.runner.installed_versions", lambda: {"python": "3"})
    return Chain(tmp_path / "runs")


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def refusal(chain: Chain, *overrides: str, **selection: object) -> str:
    with pytest.raises(ArtifactError) as caught:
        chain.run(*overrides, **selection)
    assert chain.ran == [], "nothing may run before the refusal"
    with pytest.raises(ArtifactError):
        chain.preview(*overrides, **selection)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_first_run_makes_everything_and_the_second_nothing(chain: Chain) -> None:
    assert chain.run() == ALL
    before = chain.snapshot()
    assert chain.run() == []
    assert set(chain.preview().values()) == {"up to date"}
    assert chain.snapshot() == before


def test_the_outcome_says_what_became_of_each_step(chain: Chain) -> None:
    chain.run()
    shutil.rmtree(chain.folder / "report")
    outcomes = chain.pipeline(skip=("predict",)).run()
    assert [(o.step, o.what) for o in outcomes] == [
        ("prepare", "up to date"),
        ("train", "up to date"),
        ("predict/base", "skipped"),
        ("predict/merged", "skipped"),
        ("report", "done"),
    ]
    assert outcomes[0].facts == {"summary": "prepare made"}


def test_a_manifest_says_what_the_result_was_made_from(chain: Chain) -> None:
    chain.run()
    written = json.loads((chain.folder / "train" / MANIFEST).read_text())
    prepare = Slot(chain.folder, "prepare").manifest()
    assert prepare is not None
    assert written["key"]["inputs"] == {"prepare": prepare.digest}
    assert written["key"]["options"]["train.num_train_epochs"] == 3.0
    assert "train.threads" not in written["key"]["options"]
    assert written["seed"] == 17
    assert written["outputs"].keys() == {"out.json"}
    assert (written["versions"], written["commit"]) == ({"python": "3"}, "0123456789ab")
    assert "\n" not in written["machine"]["processor"]


def test_a_changed_option_is_named_and_nothing_is_touched(chain: Chain) -> None:
    chain.run()
    before = chain.snapshot()
    told = refusal(chain, "train.num_train_epochs=5")
    assert (
        f"{chain.folder / 'train'}: settings changed since it was made: train.num_train_epochs was 3.0 and is now 5.0"
        in told
    )
    assert "--redo train" in told
    assert "run.name=" in told
    assert chain.snapshot() == before


def test_an_option_that_cannot_change_a_result_may_change(chain: Chain) -> None:
    chain.run()
    assert chain.run("train.threads=1", "train.logging_steps=7") == []


def test_a_changed_file_of_the_users_is_named(chain: Chain) -> None:
    chain.run()
    chain.source = "other data"
    assert "the content of data.train changed" in refusal(chain)


def test_change_downstream_is_refused_before_upstream_runs(chain: Chain) -> None:
    chain.run()
    shutil.rmtree(chain.folder / "prepare")
    assert "train.num_train_epochs was 3.0 and is now 5.0" in refusal(chain, "train.num_train_epochs=5")


def test_redo_makes_the_step_and_what_reads_it_anew(chain: Chain) -> None:
    chain.run()
    assert chain.run("train.num_train_epochs=5", redo=("train",)) == ["train", "predict/merged", "report"]
    assert chain.run("train.num_train_epochs=5") == []


def test_check_before_a_step_is_rerun_with_the_step(chain: Chain, monkeypatch) -> None:
    check = replace(chain.step("check", (), ("train.num_train_epochs",)), about="train")
    steps = [check, *chain.steps()]
    monkeypatch.setattr(chain, "steps", lambda: steps)
    chain.run()
    told = refusal(chain, "train.num_train_epochs=5")
    assert f"{chain.folder / 'check'}: settings changed since it was made" in told and "--redo train" in told
    assert chain.run("train.num_train_epochs=5", redo=("train",)) == ["check", "train", "predict/merged", "report"]
    assert chain.run("train.num_train_epochs=5", redo=("train",)) == ["train"]


def test_redo_with_the_same_bytes_keeps_later_steps(chain: Chain) -> None:
    chain.run()
    assert chain.preview(redo=("prepare",)) == {
        "prepare": "rerun, as asked",
        **dict.fromkeys(ALL[1:], "run, if its inputs change"),
    }
    assert chain.run(redo=("prepare",)) == ["prepare"]


def test_inputs_that_changed_are_followed_without_asking(chain: Chain) -> None:
    chain.run()
    chain.source = "other data"
    assert chain.run(redo=("prepare",), only=("prepare",)) == ["prepare"]
    assert chain.preview()["train"] == "rerun, its inputs changed"
    assert chain.run() == ["train", "predict/base", "predict/merged", "report"]


def test_skip_from_and_only_leave_the_others_as_they_lie(chain: Chain) -> None:
    chain.run()
    for step in ALL:
        shutil.rmtree(chain.folder / step)
    assert chain.run(only=("prepare",)) == ["prepare"]
    assert chain.run(skip=("train", "predict/merged", "report")) == ["predict/base"]
    assert chain.run(start="train") == ["train", "predict/merged", "report"]
    shutil.rmtree(chain.folder / "predict")
    assert chain.run(only=("predict",)) == ["predict/base", "predict/merged"]


def test_missing_input_names_the_step_to_run_first(chain: Chain) -> None:
    told = refusal(chain, only=("train",))
    assert told.startswith(
        f"nothing is prepared in {chain.folder}: fintune prepare CONFIG first, or fintune run CONFIG"
    )


def test_the_report_takes_what_there_is(chain: Chain) -> None:
    chain.run(only=("prepare",))
    chain.run(only=("report",))
    assert Slot(chain.folder, "report").manifest().key.inputs.keys() == {"prepare"}  # type: ignore[union-attr]
    chain.run(only=("train",))
    assert chain.preview(only=("report",))["report"] == "rerun, its inputs changed"


@pytest.mark.parametrize("where", ["skip", "only", "redo", "start"])
def test_unknown_stage_gets_a_suggestion(chain: Chain, where: str) -> None:
    selection = {where: "predct" if where == "start" else ("predct",)}
    with pytest.raises(ArtifactError, match=r"'predct' is no stage of this run: did you mean predict\?"):
        chain.run(**selection)


def test_a_name_like_no_stage_is_answered_with_all_of_them(chain: Chain) -> None:
    with pytest.raises(ArtifactError, match="the stages are prepare, train, predict/base, predict/merged, report"):
        chain.run(skip=("zzz",))


def test_redo_of_a_step_that_is_left_out_is_refused(chain: Chain) -> None:
    with pytest.raises(ArtifactError, match="--redo asks for prepare, which --skip, --from or --only leaves out"):
        chain.run(only=("train",), redo=("prepare",))


def test_a_dry_run_touches_nothing(chain: Chain) -> None:
    assert chain.preview() == dict.fromkeys(ALL, "run")
    assert not chain.runs.exists()
    chain.run()
    before = chain.snapshot()
    chain.preview("train.num_train_epochs=5", redo=("train",))
    assert chain.snapshot() == before


def test_a_preview_says_what_is_skipped(chain: Chain) -> None:
    chain.run(only=("prepare",))
    found = chain.preview(skip=("prepare", "report"))
    assert found["prepare"] == "skipped, its result is kept"
    assert found["report"] == "skipped"


@pytest.mark.parametrize("step", ALL)
def test_an_interrupted_step_leaves_nothing_that_looks_finished(chain: Chain, step: str) -> None:
    chain.acts[step] = interrupt
    with pytest.raises(KeyboardInterrupt):
        chain.run()
    assert not (chain.folder / step).exists()
    assert Slot(chain.folder, step).manifest() is None
    assert chain.ran[-1] == step
    del chain.acts[step]
    assert chain.run() == ALL[ALL.index(step) :]
    assert not any((chain.folder / ".work").iterdir())


@pytest.mark.parametrize("step", ALL)
def test_an_interrupted_redo_leaves_the_older_result(chain: Chain, step: str) -> None:
    chain.run()
    before = (chain.folder / step / "out.json").read_text()
    chain.acts[step] = interrupt
    with pytest.raises(KeyboardInterrupt):
        chain.run(redo=(step,))
    assert (chain.folder / step / "out.json").read_text() == before
    assert chain.run() == []


def test_only_a_step_that_resumes_finds_its_earlier_work(chain: Chain) -> None:
    found: dict[str, bool] = {}

    def note_then_stop(config: object, inputs: object, folder: Path) -> None:
        found[folder.name] = (folder / "checkpoint").exists()
        (folder / "checkpoint").write_text("x")
        raise KeyboardInterrupt

    for step in ("prepare", "train"):
        chain.acts[step] = note_then_stop
        for _ in range(2):
            with pytest.raises(KeyboardInterrupt):
                chain.run()
        del chain.acts[step]
    assert found == {"prepare": False, "train": True}
    assert chain.preview()["train"] == "resume"
    assert chain.preview(redo=("train",))["train"] == "rerun, as asked"


def test_redo_resumes_only_an_interrupted_redo(chain: Chain) -> None:
    found: list[bool] = []

    def checkpoint(config: object, inputs: object, folder: Path) -> None:
        found.append((folder / "checkpoint").exists())
        (folder / "checkpoint").write_text("x")
        if len(found) in {1, 3}:
            raise KeyboardInterrupt

    chain.acts["train"] = checkpoint
    with pytest.raises(KeyboardInterrupt):
        chain.run()
    chain.run(redo=("train",))
    with pytest.raises(KeyboardInterrupt):
        chain.run(redo=("train",))
    chain.run(redo=("train",))
    assert found == [False, False, False, True]


def test_unfinished_work_for_other_settings_stops_the_run(chain: Chain) -> None:
    chain.acts["train"] = interrupt
    with pytest.raises(KeyboardInterrupt):
        chain.run()
    told = refusal(chain, "train.num_train_epochs=5")
    assert "settings changed since it was interrupted: train.num_train_epochs was 3.0 and is now 5.0" in told
    assert (chain.folder / ".work" / "train" / "out.json").exists()
    del chain.acts["train"]
    assert chain.run("train.num_train_epochs=5", redo=("train",))[0] == "train"


def test_smaller_batch_resumes_and_keeps_finished_steps(chain: Chain) -> None:
    found: list[bool] = []

    def note_then_stop(config: object, inputs: object, folder: Path) -> None:
        found.append((folder / "journal").exists())
        (folder / "journal").write_text("x")
        raise KeyboardInterrupt

    chain.acts["predict/merged"] = note_then_stop
    for overrides in ((), ("predict.batch_size=8",)):
        with pytest.raises(KeyboardInterrupt):
            chain.run(*overrides)
    assert chain.ran == ["predict/merged"]
    smaller = chain.preview("predict.batch_size=4")
    assert (smaller["predict/base"], smaller["predict/merged"]) == ("up to date", "resume")
    told = refusal(chain, "predict.batch_size=4", "predict.max_new_tokens=9", only=("predict/merged",))
    assert "settings changed since it was interrupted: predict.max_new_tokens was 96 and is now 9: --redo" in told
    del chain.acts["predict/merged"]
    assert chain.run("predict.batch_size=4") == ["predict/merged", "report"]
    assert found == [False, True]
    made = [chain.pipeline().manifest(f"predict/{kind}").key.options for kind in ("base", "merged")]
    assert [options["predict.batch_size"] for options in made] == [16, 4]


def test_changed_inputs_rerun_with_a_smaller_batch(chain: Chain) -> None:
    chain.run()
    chain.source = "other data"
    chain.run(only=("prepare",), redo=("prepare",))
    assert chain.preview("predict.batch_size=4")["predict/base"] == "rerun, its inputs changed"


def test_unfinished_work_whose_inputs_changed_starts_over(chain: Chain) -> None:
    chain.acts["train"] = interrupt
    with pytest.raises(KeyboardInterrupt):
        chain.run()
    chain.source = "other data"
    chain.run(redo=("prepare",), only=("prepare",))
    assert chain.preview()["train"] == "run"


def test_interrupted_rename_is_completed_by_the_next_run(chain: Chain, monkeypatch: pytest.MonkeyPatch) -> None:
    chain.run()
    real = Path.replace

    def stop_at_second(path: Path, target: Path) -> Path:
        if path == chain.folder / ".work" / "train":
            raise KeyboardInterrupt
        return real(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", stop_at_second)
        with pytest.raises(KeyboardInterrupt):
            chain.run("train.num_train_epochs=5", redo=("train",))
    assert not (chain.folder / "train").exists()
    before = chain.snapshot()
    assert chain.preview("train.num_train_epochs=5")["train"] == "up to date"
    assert chain.snapshot() == before
    assert chain.run("train.num_train_epochs=5") == ["predict/merged", "report"]
    assert '"train.num_train_epochs": 5.0' in (chain.folder / "train" / "out.json").read_text()


def test_a_broken_manifest_is_made_good_by_redo(chain: Chain) -> None:
    chain.run()
    (chain.folder / "train" / MANIFEST).write_text("{")
    assert "--redo train" in refusal(chain)
    assert chain.run(redo=("train",)) == ["train"]
    assert chain.run() == []


@pytest.mark.parametrize("content", [None, "short"])
def test_a_damaged_result_is_named_or_made_again(chain: Chain, monkeypatch, content: str | None) -> None:
    steps = [replace(step, is_cheap=step.name == "predict/base") for step in chain.steps()]
    monkeypatch.setattr(chain, "steps", lambda: steps)
    chain.run()
    for name in ("train", "predict/base"):
        file = chain.folder / name / "out.json"
        file.unlink()
        if content is not None:
            file.write_text(content)
        said = "is missing" if content is None else "has 5 bytes instead of"
        if name == "train":
            told = refusal(chain)
            assert f"{file} {said}" in told and "--redo train" in told
            assert chain.run(redo=("train",)) == ["train"]
        else:
            assert f"rerun, as {file} {said}" in chain.preview()["predict/base"]
            assert chain.run() == ["predict/base"]
    assert chain.run() == []


def test_a_changed_byte_is_found_before_it_is_read(chain: Chain) -> None:
    chain.run()
    file = chain.folder / "train" / "out.json"
    file.write_text(file.read_text().replace("3.0", "3.1"))
    assert chain.run() == []  # the same size, and nothing reads it
    with pytest.raises(ArtifactError, match=r"out\.json was changed after train wrote it: .* --redo train"):
        chain.run(redo=("predict/merged",))
    assert (chain.folder / "predict" / "merged" / "out.json").exists() and chain.ran == []
    assert chain.run(redo=("train", "predict/merged")) == ["train", "predict/merged"]


def test_a_folder_that_no_stage_made_is_not_replaced(chain: Chain) -> None:
    mine = chain.folder / "train"
    mine.mkdir(parents=True)
    (mine / "thesis.txt").write_text("years of work")
    told = refusal(chain)
    assert f"{mine} already exists and holds no manifest.json" in told
    assert (mine / "thesis.txt").read_text() == "years of work"
    assert chain.run(redo=("train",)) == ALL


def test_a_file_in_place_of_the_runs_folder_is_named(chain: Chain) -> None:
    chain.runs.write_text("")
    with pytest.raises(ArtifactError, match="a file is in its place"):
        chain.run()


def test_run_in_use_is_refused_and_unchanged(chain: Chain) -> None:
    chain.run()
    before = chain.snapshot()
    code = "import sys; from filelock import FileLock\nwith FileLock(sys.argv[1]): print('held', flush=True); input()"
    words = [sys.executable, "-c", code, str(chain.folder / ".lock")]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with pytest.raises(ArtifactError, match=r"trial is in use by another process: wait for it, or set run\.name"):
            chain.run(redo=("train",))
        assert set(chain.preview().values()) == {"up to date"}, "looking needs no lock"
        other.communicate("\n")
    assert chain.snapshot().keys() == before.keys()
    assert chain.run(redo=("train",)) == ["train"]


def test_the_lock_is_free_again_after_a_failure(chain: Chain) -> None:
    with pytest.raises(KeyError), lock_run(chain.folder):
        raise KeyError
    with lock_run(chain.folder):
        pass


def test_run_too_large_for_the_disk_does_not_start(chain: Chain, monkeypatch: pytest.MonkeyPatch) -> None:
    chain.needed = {"prepare": 3_000, "train": 5_000, "report": 1_000}
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=8_500))
    with pytest.raises(ResourceError, match=r"the run's 5 stages: it needs about 9 kB in .*trial, 8 kB is free"):
        chain.run()
    assert chain.ran == []
    assert chain.run(skip=("report",)) == ALL[:-1]


def test_stage_too_large_for_the_disk_does_not_start(chain: Chain, monkeypatch: pytest.MonkeyPatch) -> None:
    chain.needed = dict.fromkeys(ALL, 1_000)
    free = iter([10_000, 10_000, 500])
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=next(free)))
    with pytest.raises(ResourceError, match="no space for train"):
        chain.run()
    assert chain.ran == ["prepare"]


def test_what_is_sure_to_fail_is_refused_even_by_a_dry_run(chain: Chain) -> None:
    from dataclasses import replace

    def refuse(_: object) -> None:
        raise DataError("no such file", path="train.json")

    steps = [replace(step, check=refuse) if step.name == "train" else step for step in chain.steps()]
    pipeline = Pipeline(chain.config(), steps, Selection())
    for attempt in (pipeline.preview, pipeline.run):
        with pytest.raises(DataError, match=r"train\.json: no such file"):
            attempt()
    assert chain.ran == []
    assert Pipeline(chain.config(), steps, Selection(skip=("train", "predict/merged"))).preview()


def test_any_order_of_single_stages_equals_the_whole_run(chain: Chain, tmp_path: Path) -> None:
    chain.run()
    orders = [
        order
        for order in permutations(["prepare", "train", "predict/base", "predict/merged"])
        if order[0] == "prepare" and order.index("train") < order.index("predict/merged")
    ]
    assert len(orders) == 3
    for order in orders:
        other = Chain(tmp_path / "-".join(order).replace("/", "."))
        for step in (*order, "report"):
            assert other.run(only=(step,)) == [step]
        for step in ALL:
            whole, single = Slot(chain.folder, step).manifest(), Slot(other.folder, step).manifest()
            assert whole is not None
            assert single is not None
            assert (whole.key, whole.outputs) == (single.key, single.outputs)


def test_runs_of_other_names_do_not_touch_each_other(chain: Chain) -> None:
    chain.run()
    before = chain.snapshot()
    assert chain.run("run.name=second", "train.num_train_epochs=5") == ALL
    after = chain.snapshot()
    assert {name: after[name] for name in before if name != "."} == before
