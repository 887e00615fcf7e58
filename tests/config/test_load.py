from __future__ import annotations

import json
from pathlib import Path

import pytest

from fintune.config import Config, is_neutral, other_names
from fintune.config.export import GGUF_TYPES
from fintune.config.load import OVERRIDE, display_values, effective, fields, flat, load
from fintune.errors import ConfigError


@pytest.fixture
def write(tmp_path: Path):
    def write_file(text: str, name: str = "trial.yaml") -> Path:
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        return path

    return write_file


def refusal(path: Path | None, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load(path, overrides)
    return str(caught.value)


def test_load_overrides_win_over_the_file(write) -> None:
    path = write("train:\n  num_train_epochs: 2\n  learning_rate: 1e-5\n")
    loaded = load(path, ["train.learning_rate=3e-4", "adapter.kind=dora"])
    assert loaded.config.train.num_train_epochs == 2
    assert loaded.config.train.learning_rate == 3e-4
    assert loaded.config.adapter.kind == "dora"
    assert loaded.config.adapter.r == Config().adapter.r
    assert loaded.origin["train.num_train_epochs"] == f"{path}:2"
    assert loaded.origin["train.learning_rate"] == OVERRIDE
    assert "adapter.r" not in loaded.origin


@pytest.mark.parametrize(
    ("override", "place"),
    [
        ("export.types=[Q5_K]", f"{OVERRIDE}: export.types: unknown GGUF type 'Q5_K'"),
        ("export.types=[F16]", ":5: export.imatrix weights"),
        ("export.source=adapter", f"{OVERRIDE}: export.source: adapter writes no merged folder"),
        ("merge.into=quantized_base", f"{OVERRIDE}: merge.into: quantized_base needs 4-bit training"),
        ("data.sources=rows.jsonl", f"{OVERRIDE}: data.sources is not read"),
    ],
)
def test_load_check_of_several_options_names_a_location(write, override, place) -> None:
    path = write("model:\n  name: m\nexport:\n  threads: 1\n  imatrix: m.gguf\n")
    assert refusal(path, override).startswith(f"{path}{place}" if place.startswith(":") else place)


def test_load_last_override_wins() -> None:
    assert load(None, ["train.num_train_epochs=2", "train.num_train_epochs=5"]).config.train.num_train_epochs == 5


def test_load_reads_yaml_1_2(write) -> None:
    path = write("train:\n  learning_rate: 1e-5\nprompt:\n  system: no\n")
    config = load(path).config
    assert config.train.learning_rate == 1e-5
    assert config.prompt.system == "no"


def test_load_override_of_a_section_keeps_the_rest(write) -> None:
    loaded = load(
        write("train:\n  num_train_epochs: 2\n  per_device_train_batch_size: 3\n"), ["train={num_train_epochs: 7}"]
    )
    assert (loaded.config.train.num_train_epochs, loaded.config.train.per_device_train_batch_size) == (7, 3)
    assert loaded.origin["train.num_train_epochs"] == OVERRIDE
    assert loaded.origin["train.per_device_train_batch_size"].endswith(":3")


def test_load_empty_section_has_its_defaults(write) -> None:
    path = write("train:\n  # num_train_epochs: 2\ndata:\n  statements:\n")
    assert load(path).config.train == Config().train
    assert load(path, ["train.num_train_epochs=9", "data.statements.size=small"]).config.data.statements.size == "small"


def test_load_reads_names_with_commas_as_a_list(write) -> None:
    path = write("export:\n  types: q4_k_m, f16\ntrain:\n  report_to: tensorboard\n")
    config = load(path, ["predict.models=base", "adapter.target_modules=[q_proj]"]).config
    assert config.export.types == ("Q4_K_M", "F16")
    assert config.train.report_to == ("tensorboard",)
    assert config.predict.models == ("base",)
    assert config.adapter.target_modules == ("q_proj",)


@pytest.mark.parametrize(
    ("targets", "told"),
    [
        ("[]", "name at least one layer, or all-linear"),
        ("[all-linear, q_proj]", "all-linear already means every layer.*"),
    ],
)
def test_load_target_modules_are_names_or_all(write, targets, told) -> None:
    with pytest.raises(ConfigError, match=rf"adapter\.target_modules: {told}$"):
        load(write("train:\n  num_train_epochs: 2\n"), [f"adapter.target_modules={targets}"])


def test_gguf_types_equal_the_writers() -> None:
    from fintune.export.gguf.ggml import QUANT_TYPES

    assert set(GGUF_TYPES) == set(QUANT_TYPES)


def test_load_accepts_a_yaml_named_after_data(write) -> None:
    assert load(write("train: {num_train_epochs: 2}\n", "my.csv.yaml")).config.train.num_train_epochs == 2


def test_load_recognizes_data_files(tmp_path: Path) -> None:
    for name, text in (("chat.jsonl", "{}\n"), ("chat.csv", "a,b\n"), ("chat.json", '[{"messages": []}]')):
        path = tmp_path / name
        path.write_text(text)
        assert f"{name}: this is data, not a configuration: " in refusal(path)
        assert refusal(path).endswith(f"data.sources={path}")


@pytest.mark.parametrize("text", ["", " \n", "# nothing\n", "---\n"])
def test_load_refuses_an_empty_file(write, text: str) -> None:
    assert "trial.yaml is empty: write at least model and data" in refusal(write(text))
    assert (
        load(write(text), ["train.num_train_epochs=1"]).config.train.per_device_train_batch_size
        == Config().train.per_device_train_batch_size
    )


def test_load_merge_keys_keep_a_location(write) -> None:
    path = write("export: &a\n  threads: 4\npredict:\n  <<: *a\n  max_new_tokens: 5\n")
    loaded = load(path)
    assert (loaded.config.predict.threads, loaded.config.predict.max_new_tokens) == (4, 5)
    assert loaded.origin["predict.threads"].startswith(f"{path}:")


def test_load_names_the_run_after_its_file(write) -> None:
    path = write("run:\n  dir: out\n", "first-try.yaml")
    assert load(path).config.folder == Path("out/first-try")
    assert load(path, ["run.name=second"]).config.folder == Path("out/second")
    assert load(None).config.run.name == "run"


@pytest.mark.parametrize("name", ["a/b", "..", ".", ".work", "/abs"])
def test_load_refuses_a_run_name_with_a_path(name: str) -> None:
    assert "is not a folder name" in refusal(None, f"run.name={name}")


def test_load_expands_the_home_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load(None, ["run.dir=~/runs"]).config.run.dir == tmp_path / "runs"
    assert "no such home folder" in refusal(None, "run.dir=~nobody-of-that-name/runs")


def test_load_missing_file_lists_others(write, tmp_path: Path) -> None:
    write("", "demo.yaml")
    told = refusal(tmp_path / "dmeo.yaml")
    assert "dmeo.yaml: no such configuration file" in told
    assert str(tmp_path / "demo.yaml") in told


def test_load_refuses_a_folder_and_a_binary_file(tmp_path: Path) -> None:
    assert "is a folder, not a configuration file" in refusal(tmp_path)
    (tmp_path / "model.yaml").write_bytes(b"\x80\x81\x00")
    assert "not UTF-8 text (byte 0)" in refusal(tmp_path / "model.yaml")


@pytest.mark.parametrize("made", ["train/manifest.json", ".work/train/key.json"])
def test_load_recognizes_a_run_folder(tmp_path: Path, made: str) -> None:
    file = tmp_path / "chat" / made
    file.parent.mkdir(parents=True)
    file.write_text("{}")
    told = refusal(tmp_path / "chat")
    assert "chat is a run's folder, not a configuration file: " in told
    assert told.endswith("chat.yaml")
    assert "is a folder, not a configuration file" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("train:\n  num_train_epochs: [1\nmodel: x\n", ":3: not valid YAML"),
        ("train:\n  num_train_epochs: 1\n  num_train_epochs: 2\n", ":3: not valid YAML"),
        (
            "train:\n  num_train_epochs: 1\n    per_device_train_batch_size: 2\n",
            ":3: not valid YAML (the indentation does not match a line above)",
        ),
        (
            "train:\n  num_train_epochs: 1\n per_device_train_batch_size: 2\n",
            ":3: not valid YAML (the indentation does not match a line above)",
        ),
        ("train:\n\tnum_train_epochs: 1\n", ":2: not valid YAML (a tab stands before it): use spaces, not a tab"),
        ("- a\n- b\n", "it has no sections"),
        ("just words\n", "it has no sections"),
    ],
)
def test_load_invalid_yaml_names_its_line(write, text: str, told: str) -> None:
    assert told in refusal(write(text))


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("train.learning_rat", "train.learning_rate"),
        ("trian.epochs", "train"),
        ("learning_rate", "train.learning_rate"),
        ("train.lr", "train.learning_rate"),
        ("train.zzz", None),
        ("data.statements.train_company", "data.statements.train_companies"),
        ("lr", "train.learning_rate"),
        ("lora_r", "adapter.r"),
        ("adapter.alpha", "adapter.lora_alpha"),
        ("per_device_train_batch_size", "train.per_device_train_batch_size"),
        ("num_train_epochs", "train.num_train_epochs"),
        ("load_in_4bit", "model.quantization=nf4"),
    ],
)
def test_load_unknown_option_hints_at_a_known_one(key: str, meant: str | None) -> None:
    told = refusal(None, f"{key}=1")
    assert "unknown option" in told
    assert (f"did you mean {meant}?" if meant else "known here: objective,") in told


@pytest.mark.parametrize("old", other_names.RENAMED)
def test_load_hints_at_the_new_name(old: str) -> None:
    new = other_names.RENAMED[old]
    assert new in dict(fields())
    assert f"did you mean {new}?" in refusal(None, f"{old}=1")


@pytest.mark.parametrize(("old", "new"), [("shape", "format"), ("licence", "license")])
def test_load_hints_at_the_new_name_in_a_source(old, new: str) -> None:
    sources = f"data.sources=[{{path: a.csv, {old}: x}}]"
    assert f"did you mean {new}?" in refusal(None, "data.source=chat", sources)


def test_load_of_a_file_as_data_source_hints_at_sources() -> None:
    assert "write data.source=chat data.sources=rows.jsonl" in refusal(None, "data.source=rows.jsonl")


def test_load_unknown_option_names_its_line(write) -> None:
    path = write("train:\n  num_train_epochs: 1\n  leaning_rate: 1\n")
    assert refusal(path).startswith(f"{path}:3: unknown option train.leaning_rate: did you mean train.learning_rate?")


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("train.num_train_epochs=three", 'train.num_train_epochs: got "three": input should be a valid number'),
        ("train.per_device_train_batch_size=2.5", "train.per_device_train_batch_size: got 2.5: "),
        (
            'train.per_device_train_batch_size="2"',
            'train.per_device_train_batch_size: got "2": input should be a valid integer',
        ),
        ("train.gradient_checkpointing=1", "train.gradient_checkpointing: got 1: input should be a valid boolean"),
        ("train.num_train_epochs=", "train.num_train_epochs: got null"),
        ("train.num_train_epochs=0", "train.num_train_epochs: got 0: input should be greater than 0"),
        ("train.num_train_epochs=.inf", "train.num_train_epochs: got Infinity: input should be a finite number"),
        ("train.learning_rate=.nan", "train.learning_rate: got NaN: input should be a finite number"),
        (
            "adapter.kind=qlora",
            "input should be 'lora', 'dora' or 'full'; QLoRA is adapter.kind=lora model.quantization=nf4",
        ),
        ("packing=true", "unknown option packing: rows are never packed into one"),
        ("export.types=[Q9_K]", "export.types: unknown GGUF type 'Q9_K': did you mean Q6_K?"),
        ("export.types=zip", "export.types: unknown GGUF type 'ZIP': known types are F32, F16,"),
        ("predict.models=[base, f16]", 'predict.models: got "f16": input should be'),
        ("predict.models=[]", "predict.models: got []: "),
        ("run.seed=-1", "run.seed: got -1: input should be greater than or equal to 0"),
        ("run.seed=4294967296", "run.seed: got 4294967296: input should be less than 4294967296"),
        ("train=5", "train is a section, not a value: set for example train.objective"),
        ("train.num_train_epochs.more=1", 'train.num_train_epochs: got {"more": 1}: input should be a valid number'),
        ("data.source=finqa", "data.source: finqa needs data.train and data.eval"),
        ("export.types=[F16]", "predict.models asks for Q4_K_M, which export.types does not write"),
    ],
)
def test_load_invalid_value_names_its_option(override: str, told: str) -> None:
    assert told in refusal(None, override)


def test_load_invalid_value_names_its_line(write) -> None:
    path = write("train:\n  per_device_train_batch_size: many\n")
    assert refusal(path).startswith(f'{path}:2: train.per_device_train_batch_size: got "many"')


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("train.num_train_epochs", "write dotted.key=value"),
        ("--train.epochs", "write dotted.key=value"),
        ("=3", "write dotted.key=value"),
        ("train.num_train_epochs=[1", "the value is not valid YAML"),
        ("run.name=a: b: c", "the value is not valid YAML"),
    ],
)
def test_load_quotes_an_invalid_override(override: str, told: str) -> None:
    message = refusal(None, override)
    assert repr(override) in message
    assert told in message


def test_load_refuses_an_override_below_a_value(write) -> None:
    told = refusal(write("train:\n  num_train_epochs: 1\n"), "train.num_train_epochs.more=2")
    assert 'train.num_train_epochs: got {"more": 2}' in told


def test_load_errors_are_one_line(write) -> None:
    for text in (
        "train: [1\n",
        "a: b: c\n",
        "train:\n\tnum_train_epochs: 1\n",
        "x: !!python/object:os.system {}\n",
        "? [1]\n: 2\n",
    ):
        assert "\n" not in refusal(write(text))


def test_flat_has_every_option_as_json() -> None:
    values = flat(Config())
    assert list(values) == [key for key, _ in fields()]
    assert values["predict.models"] == ["base", "adapter", "merged", "F16", "Q4_K_M"]
    assert values["run.dir"] == "runs"


def test_display_values_omits_defaults_of_a_source() -> None:
    loaded = load(None, ["data.source=chat", "data.sources=[a.csv, {path: b.csv, columns: {question: Frage}}]"])
    shown = display_values(loaded.config)
    assert shown["data.sources"] == ["a.csv", {"path": "b.csv", "columns": {"question": "Frage"}}]
    assert shown | {"data.sources": 0} == flat(loaded.config) | {"data.sources": 0}


def test_effective_omits_neutral_options() -> None:
    found = effective(Config(), ["train", "data.max_eval_samples", "run"])
    assert "train.num_train_epochs" in found
    assert "train.threads" not in found
    assert "run.dir" not in found
    assert "data.max_eval_samples" in found
    assert "data.max_train_samples" not in found
    neutral = {key for key, field in fields() if is_neutral(field)}
    assert not neutral & effective(Config(), list(Config.model_fields)).keys()


def test_effective_prefixes_are_whole_names() -> None:
    assert effective(Config(), ["data.max"]) == {}


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("a: " + "[" * 3000, "nested more than 50 levels deep"),
        ("a: " + "{b: " * 3000, "nested more than 50 levels deep"),
        ("".join(" " * depth + "a:\n" for depth in range(300)), "nested more than 50 levels deep"),
        (
            "a0: &a0 [x]\n" + "".join(f"a{n}: &a{n} [{','.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 10)),
            "aliases",
        ),
        ("#" * 300_000, "more than 200,000 letters"),
        ("train: {seed: %s}" % ("9" * 5000), "4300 digits"),
        ("train: {seed: 0x%s}" % ("f" * 6000), "4300 digits"),
        ("run: {name: [{[a]: 1}]}", "keys must be"),
        ("run: {name: 2020-99-99}", "month must be"),
    ],
)
def test_yaml_work_is_bounded(tmp_path, text, reason):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=rf"not valid YAML \(.*{reason}"):
        load(path)
    key, _, value = text.partition(": ")
    if reason != "aliases" and "\n" not in text and not text.startswith("#"):
        with pytest.raises(ConfigError, match="not valid YAML"):
            load(None, [f"{key}={value}"])


@pytest.mark.parametrize("name", ["a\0b", "a\nb", "a\x1b[31mb", "a\u202eb", "x" * 300, "..", "a/b"])
def test_run_name_is_a_folder_name(name):
    with pytest.raises(ConfigError, match="is not a folder name"):
        load(None, [f"run.name={json.dumps(name)}"])
