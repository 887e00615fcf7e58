from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from pydantic import BaseModel, ValidationError

from fintune.errors import FintuneError
from fintune.util.files import atomic_folder, check_outputs, make_folder, parse_json, sha256_file, write_output
from fintune.util.text import MAX_REMARKS, abridge_line, abridge_remarks, first_line


def test_a_file_that_is_read_is_no_target_by_whatever_name(tmp_path: Path) -> None:
    (tmp_path / "gold.json").write_text("[]")
    (tmp_path / "link.json").symlink_to(tmp_path / "gold.json")
    for name in ("gold.json", "x/../gold.json", "link.json"):
        (tmp_path / "x").mkdir(exist_ok=True)
        with pytest.raises(FintuneError, match="is read, and would be overwritten"):
            check_outputs([tmp_path / name], inputs=[tmp_path / "gold.json"])


def test_check_outputs_refuses_twice_and_folders(tmp_path: Path) -> None:
    with pytest.raises(FintuneError, match=r"a\.csv: would be written twice"):
        check_outputs([tmp_path / "a.csv", None, tmp_path / "a.csv"], inputs=[])
    with pytest.raises(FintuneError, match="is a folder, so no file"):
        check_outputs([tmp_path], inputs=[])
    with pytest.raises(FintuneError, match="its folder does not exist"):
        check_outputs([tmp_path / "no" / "a.csv"], inputs=[])
    check_outputs([tmp_path / "a.csv", tmp_path / "b.csv"], inputs=[tmp_path / "c"])


def test_a_file_that_cannot_be_written_leaves_nothing_beside(tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    with pytest.raises(FintuneError, match="taken: cannot be written"):
        write_output(tmp_path / "taken", "text")
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]
    with pytest.raises(FintuneError, match="cannot be made"):
        (tmp_path / "file").write_text("")
        make_folder(tmp_path / "file" / "below")


def test_a_fifo_is_written_into_and_stays(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    with ThreadPoolExecutor(1) as pool:
        read = pool.submit(fifo.read_text)
        write_output(fifo, "figures")
        assert read.result(timeout=60) == "figures"
    assert fifo.is_fifo() and list(tmp_path.iterdir()) == [fifo]


def test_a_pipe_of_the_shell_is_written_into() -> None:
    reader, writer = os.pipe()
    write_output(Path(f"/dev/fd/{writer}"), "figures")
    os.close(writer)
    with os.fdopen(reader) as file:
        assert file.read() == "figures"


@pytest.mark.parametrize("exists", [True, False])
def test_a_link_is_followed_and_stays(tmp_path: Path, exists: bool) -> None:
    (tmp_path / "there").mkdir()
    target, link = tmp_path / "there" / "score.json", tmp_path / "link"
    if exists:
        target.write_text("old")
    link.symlink_to(target)
    write_output(link, "new")
    assert link.is_symlink() and target.read_text() == "new"
    assert [path.name for path in target.parent.iterdir()] == ["score.json"]


def test_a_killed_process_leaves_only_what_the_next_one_removes(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys; from pathlib import Path; from fintune.util.files import atomic_folder\n"
        "with atomic_folder(Path(sys.argv[1])) as folder:\n"
        "    (folder / 'half').write_text(''); os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "out"], check=False)
    assert done.returncode == -signal.SIGKILL and any(tmp_path.glob(".out.*.part"))
    with atomic_folder(tmp_path / "out") as folder:
        assert list(tmp_path.glob(".out.*.part")) == [folder]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_folder_that_another_process_writes_is_refused(tmp_path: Path) -> None:
    with atomic_folder(tmp_path / "out") as folder:
        (folder / "half").write_text("")
        with pytest.raises(FintuneError, match="out: another process is writing it"), atomic_folder(tmp_path / "out"):
            pass
        assert (folder / "half").exists()
    assert (tmp_path / "out" / "half").exists()


@pytest.mark.skipif(shutil.which("strace") is None, reason="strace reads the order of the calls")
def test_results_are_flushed_before_they_get_their_name(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from fintune.manifest import Key, Manifest, Slot\n"
        "from fintune.util.files import atomic_folder, write_output\n"
        "here = Path(sys.argv[1])\n"
        "with atomic_folder(here / 'out') as folder:\n"
        "    (folder / 'below').mkdir(); (folder / 'below' / 'weights').write_text('x')\n"
        "slot, key = Slot(here / 'run', 'train'), Key(step='train', options={}, sources={}, inputs={})\n"
        "(slot.start(key, resume=False) / 'adapter').write_text('x')\n"
        "slot.finish(Manifest(key=key, fingerprint='', outputs={}, facts={}, versions={}, commit=None, machine={},\n"
        "    seed=1, finished='', seconds=1, peak_memory_bytes=1))\n"
        "write_output(here / 'score.json', '{}')\n"
    )
    calls = ["strace", "-y", "-e", "trace=fsync,rename,renameat,renameat2", "-o", tmp_path / "calls"]
    done = subprocess.run([*calls, sys.executable, "-c", code, tmp_path], capture_output=True, text=True, check=False)
    if "ptrace" in done.stderr:
        pytest.skip("strace may not trace here")
    assert done.returncode == 0, done.stderr
    lines = (tmp_path / "calls").read_text().splitlines()

    def number(call: str, end: str) -> int:
        return next(k for k, line in enumerate(lines) if line.startswith(call) and end in line)

    root = str(tmp_path)
    for flushed, renamed, parent in (
        ("/below/weights>", f'"{root}/out")', f"<{root}>"),
        ("/.work/train/adapter>", f'"{root}/run/train")', f"<{root}/run>"),
        (f"{root}/.score.json.tmp>", f'"{root}/score.json")', f"<{root}>"),
    ):
        after = number("rename", renamed)
        assert number("fsync", flushed) < after
        assert any(line.startswith("fsync") and parent in line for line in lines[after:])


def test_sha256_file_sees_a_change_of_the_same_size(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    path.write_bytes(b"1")
    before, stat = sha256_file(path), path.stat()
    path.write_bytes(b"2")
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert sha256_file(path) != before


def test_abridge_remarks_counts_the_others() -> None:
    lines = [f"row {k}" for k in range(MAX_REMARKS + 5)]
    shown = abridge_remarks(lines, "--json writes all of them")
    assert shown == [*lines[:MAX_REMARKS], "and 5 more remarks; --json writes all of them"]
    assert abridge_remarks(lines[:-4]) == lines[:-4]


def test_a_remark_about_the_data_does_not_steer_the_terminal() -> None:
    assert abridge_remarks(["id a\x1b[2J\tb"]) == ["id a\\x1b[2J\tb"]
    assert abridge_remarks(["\x7f"] * 30)[0] == "\\x7f"


def test_atomic_folder_replaces_an_empty_folder(
    tmp_path: Path,
) -> None:
    place, link = tmp_path / "there", tmp_path / "link"
    place.mkdir()
    link.symlink_to(place)
    with pytest.raises(ZeroDivisionError), atomic_folder(link):
        assert 1 / 0
    assert list(place.iterdir()) == []
    with atomic_folder(link) as folder:
        (folder / "file").write_text("text")
    assert link.is_symlink() and (place / "file").read_text() == "text"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "there"]


def test_atomic_folder_refuses_before_the_work(tmp_path: Path, monkeypatch) -> None:
    here = tmp_path / "here"
    here.mkdir()

    def busy(path: Path) -> None:
        raise OSError(errno.EBUSY, "Device or resource busy", str(path))

    def refused(name: Path, why: str) -> None:
        worked = False
        with pytest.raises(FintuneError, match=rf"{why}\).*name a folder in it"), atomic_folder(name):
            worked = True
        assert not worked and list(tmp_path.iterdir()) == [here] and list(here.iterdir()) == []

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rmdir", busy)  # as for a mount point
        refused(here, r"here: cannot be replaced \(Device or resource busy")
    monkeypatch.chdir(here)
    refused(Path(), r"\.: cannot be replaced \(the current folder")
    refused(here, "the current folder")


def test_a_stopped_process_leaves_nothing_of_the_folder(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys; from pathlib import Path; from fintune.util.files import atomic_folder\n"
        "with atomic_folder(Path(sys.argv[1])) as folder:\n"
        "    (folder / 'half').write_text(''); os.kill(os.getpid(), signal.SIGTERM)"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "out"], capture_output=True, text=True, check=False)
    assert "fintune.util.signals.Terminated" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_an_error_names_the_folder_that_was_named(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(FintuneError) as raised, atomic_folder(tmp_path / "out") as folder:
        raise FintuneError(f"{folder}: full, {folder.name}", hint=f"look at {folder}")
    assert str(raised.value) == f"{tmp_path}/out: full, out: look at {tmp_path}/out"
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize("text", ["[" * 250 + "]" * 250, '{"a":' * 250 + "1" + "}" * 250, "[" * 100_000])
def test_parse_json_bounds_nesting_by_a_number(text):
    with pytest.raises(ValueError, match="nested more than 200 levels deep"):
        parse_json(text)


def test_parse_json_is_pythons_parser_else():
    text = '{"a": [1, -0.5, 1e400, NaN, "\\ud800", null], "b": 12345678901234567890123}'
    assert repr(parse_json(text)) == repr(json.loads(text))
    assert parse_json("[" * 199 + "]" * 199) == json.loads("[" * 199 + "]" * 199)
    with pytest.raises(json.JSONDecodeError, match="column 3"):
        parse_json("[1x]")


def test_first_line_is_plain_words(tmp_path: Path) -> None:
    class Fields(BaseModel):
        num: int

    with pytest.raises(ValidationError) as wrong:
        Fields.model_validate({"num": "x"})
    with pytest.raises(UnicodeDecodeError) as binary:
        b"ab\xff".decode()
    with pytest.raises(OSError) as folder:
        tmp_path.read_bytes()
    found = [first_line(each.value) for each in (wrong, binary, folder)]
    assert found[0].startswith("num: Input should be a valid integer")
    assert found[1:] == ["not UTF-8 text, byte 2", "is a directory"]


def test_abridge_line_keeps_both_ends() -> None:
    line = "what happened" + "x" * 2_000_000 + "the way out"
    assert len(abridge_line(line)) <= 500 and abridge_line("short") == "short"
    assert abridge_line(line).startswith("what happened") and abridge_line(line).endswith("the way out")
