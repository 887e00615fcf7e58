from __future__ import annotations

import json
from pathlib import Path

import pytest

from fintune.errors import ArtifactError
from fintune.manifest import KEY, MANIFEST, Key, Manifest, Slot, hash_files
from fintune.util.files import write_atomically


def key(step: str = "train", **options: object) -> Key:
    return Key(
        step=step,
        options=options or {"train.num_train_epochs": 3.0},
        sources={"model.name": "abc"},
        inputs={"prepare": "d"},
    )


def manifest(made_from: Key, folder: Path) -> Manifest:
    return Manifest(
        key=made_from,
        fingerprint=made_from.fingerprint,
        outputs=hash_files(folder),
        facts={"summary": "done"},
        versions={},
        commit=None,
        machine={},
        seed=17,
        finished="2026-01-01T00:00:00+00:00",
        seconds=1.0,
        peak_memory_bytes=1,
    )


def make(slot: Slot, content: str, made_from: Key | None = None) -> Path:
    """A finished result with one file."""
    made_from = made_from or key(slot.step)
    work = slot.start(made_from, resume=False)
    (work / "out.txt").write_text(content)
    slot.finish(manifest(made_from, work))
    return slot.folder


@pytest.fixture
def slot(tmp_path: Path) -> Slot:
    return Slot(tmp_path / "run", "train")


def test_a_finished_folder_is_complete_and_nothing_else_is_left(slot: Slot) -> None:
    folder = make(slot, "a")
    assert sorted(path.name for path in folder.iterdir()) == [MANIFEST, "out.txt"]
    assert not slot.work.exists()
    found = slot.manifest()
    assert found is not None
    assert found.outputs.keys() == {"out.txt"}
    assert slot.state(key()) == ("up to date", [])


def test_work_has_no_final_name_until_it_is_finished(slot: Slot) -> None:
    work = slot.start(key(), resume=True)
    (work / "out.txt").write_text("half")
    assert not slot.folder.exists()
    assert slot.manifest() is None
    assert slot.state(key()) == ("unfinished", [])
    assert slot.unfinished() == key()


def test_start_keeps_work_only_for_the_same_key(slot: Slot) -> None:
    (slot.start(key(), resume=True) / "checkpoint").write_text("x")
    assert (slot.start(key(), resume=True) / "checkpoint").exists()
    assert not (slot.start(key(), resume=False) / "checkpoint").exists()
    (slot.start(key(), resume=True) / "checkpoint").write_text("x")
    other = key(**{"train.num_train_epochs": 4.0})
    assert not (slot.start(other, resume=True) / "checkpoint").exists()
    assert slot.unfinished() == other


def test_work_without_a_readable_key_is_not_taken_for_anything(slot: Slot) -> None:
    work = slot.start(key(), resume=True)
    (work / "checkpoint").write_text("x")
    (work / KEY).write_text('{"step": "tr')
    assert slot.unfinished() is None
    assert not (slot.start(key(), resume=True) / "checkpoint").exists()


def test_the_older_result_stays_until_the_new_one_is_complete(slot: Slot) -> None:
    make(slot, "old")
    work = slot.start(key(**{"train.num_train_epochs": 9.0}), resume=False)
    (work / "out.txt").write_text("new")
    assert (slot.folder / "out.txt").read_text() == "old"
    assert slot.state(key()) == ("up to date", [])
    slot.finish(manifest(key(**{"train.num_train_epochs": 9.0}), work))
    assert (slot.folder / "out.txt").read_text() == "new"
    assert [path.name for path in slot.work.parent.iterdir()] == []


@pytest.mark.parametrize(("with_older", "fails_at"), [(False, 1), (True, 1), (True, 2)])
def test_a_rename_that_was_interrupted_is_made_up_for(
    slot: Slot, monkeypatch: pytest.MonkeyPatch, with_older: bool, fails_at: int
) -> None:
    if with_older:
        make(slot, "old")
    work = slot.start(key(**{"train.num_train_epochs": 9.0}), resume=False)
    (work / "out.txt").write_text("new")
    (work / MANIFEST).write_text(manifest(key(**{"train.num_train_epochs": 9.0}), work).model_dump_json())

    real, calls = Path.replace, []

    def replace(path: Path, target: Path) -> Path:
        calls.append(path)
        if len(calls) == fails_at:
            raise KeyboardInterrupt
        return real(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", replace)
        with pytest.raises(KeyboardInterrupt):
            slot.finalize()

    before = sorted(str(path) for path in slot.run.rglob("*"))
    found = slot.manifest()
    assert found is not None
    assert found.key.options == {"train.num_train_epochs": 9.0}
    assert sorted(str(path) for path in slot.run.rglob("*")) == before, "looking must not rename"

    slot.finalize()
    assert (slot.folder / "out.txt").read_text() == "new"
    assert not (slot.folder / KEY).exists()
    assert [path.name for path in slot.work.parent.iterdir()] == []
    assert slot.state(key(**{"train.num_train_epochs": 9.0})) == ("up to date", [])


def test_settling_leaves_unfinished_work_alone(slot: Slot) -> None:
    (slot.start(key(), resume=True) / "checkpoint").write_text("x")
    slot.finalize()
    assert (slot.work / "checkpoint").exists()
    assert not slot.folder.exists()


@pytest.mark.parametrize("content", ["", '{"key": {"st', "[]", '{"key": 1}'])
def test_a_broken_manifest_is_named_with_the_way_out(slot: Slot, content: str) -> None:
    make(slot, "a")
    (slot.folder / MANIFEST).write_text(content)
    with pytest.raises(ArtifactError) as caught:
        slot.manifest()
    assert str(slot.folder / MANIFEST) in str(caught.value)
    assert "--redo train" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_differences_names_options_and_sources(slot: Slot) -> None:
    make(slot, "a")
    changed = Key(
        step="train", options={"train.num_train_epochs": 4.0, "train.new": None}, sources={"model.name": "z"}, inputs={}
    )
    state, changes = slot.state(changed)
    assert state == "changed"
    assert changes == ["train.num_train_epochs was 3.0 and is now 4.0", "the content of model.name changed"]
    moved = key().model_copy(update={"inputs": {"prepare": "other"}})
    assert slot.state(moved) == ("inputs changed", [])


def test_differences_names_changed_entries_of_a_list() -> None:
    def changes(was: object, now: object) -> list[str]:
        return key(**{"data.sources": now}).differences(key(**{"data.sources": was}))

    folder, hub = {"path": "data", "columns": {}}, {"path": "hub:a/b", "columns": {}, "max_rows": 22500}
    assert changes([folder, hub], [folder, hub | {"max_rows": 40, "columns": {"a": "b"}}]) == [
        'data.sources[1].columns.a was null and is now "b"',
        "data.sources[1].max_rows was 22500 and is now 40",
    ]
    assert changes([folder, hub], [folder]) == ["data.sources had 2 entries and now has 1"]
    assert changes([folder], [folder, hub]) == ["data.sources had 1 entry and now has 2"]
    assert changes(["q_proj"], ["q_proj", "v_proj"]) == ['data.sources was ["q_proj"] and is now ["q_proj", "v_proj"]']
    (cut,) = changes("short", "long" * 100)
    assert cut.startswith('data.sources was "short" and is now "longlong')
    assert cut.endswith(" ...")
    assert len(cut) < 200


def test_digest_depends_only_on_the_bytes(tmp_path: Path) -> None:
    one, two = Slot(tmp_path / "one", "train"), Slot(tmp_path / "two", "train")
    make(one, "same")
    make(two, "same", key(**{"train.num_train_epochs": 9.0}))
    first, second = one.manifest(), two.manifest()
    assert first is not None
    assert second is not None
    assert first.digest == second.digest
    make(two, "other")
    third = two.manifest()
    assert third is not None
    assert third.digest != first.digest


def test_only_the_manifest_itself_is_left_out_of_the_digests(tmp_path: Path) -> None:
    (tmp_path / "below").mkdir()
    for name in (MANIFEST, KEY, f"below/{MANIFEST}", "below/a.txt"):
        (tmp_path / name).write_text("x")
    assert hash_files(tmp_path).keys() == {f"below/{MANIFEST}", "below/a.txt"}


def test_steps_of_one_verb_have_folders_and_work_of_their_own(tmp_path: Path) -> None:
    base, merged = Slot(tmp_path, "predict/base"), Slot(tmp_path, "predict/merged")
    assert make(base, "b") == tmp_path / "predict" / "base"
    assert merged.work != base.work
    make(merged, "m")
    assert (base.folder / "out.txt").read_text() == "b"


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "report.json"
    write_atomically(path, "old")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(path, "new and longer")
    assert path.read_text() == "old"


def test_a_fingerprint_depends_on_values_and_not_on_their_order() -> None:
    one = Key(step="s", options={"a": 1, "b": 2}, sources={}, inputs={})
    two = Key(step="s", options=json.loads('{"b": 2, "a": 1}'), sources={}, inputs={})
    assert one.fingerprint == two.fingerprint
    assert one.fingerprint != Key(step="s", options={"a": 1, "b": 3}, sources={}, inputs={}).fingerprint
