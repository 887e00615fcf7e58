from __future__ import annotations

import gzip
import json
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest

from fintune.config import Config, ModelKind
from fintune.config.export import GGUF_TYPES
from fintune.config.load import effective, fields, load
from fintune.errors import ConfigError, DataError, ModelError, ResourceError
from fintune.pipeline.step import Step
from fintune.pipeline.steps import SOURCE_STEPS, build_steps

ENDPOINT = "predict.endpoint=http://127.0.0.1:8080/v1"
ALL_TYPES = f"export.types={json.dumps(GGUF_TYPES)}"


def names(config: Config) -> list[str]:
    return [step.name for step in build_steps(config)]


def prepare_of(config: Config) -> Step:
    return next(step for step in build_steps(config) if step.name == "prepare")


def test_the_whole_chain_in_its_order() -> None:
    assert names(Config()) == [
        *("preflight", "prepare"),
        *("predict/base", "score/base", "train", "predict/adapter", "score/adapter"),
        *("merge", "predict/merged", "score/merged", "export", "replay"),
        *("predict/F16", "score/F16", "predict/Q4_K_M", "score/Q4_K_M", "report"),
    ]


def test_only_what_is_asked_for_is_measured() -> None:
    assert names(load(None, ["predict.models=[merged]"]).config) == [
        *("preflight", "prepare", "train", "merge", "predict/merged", "score/merged", "export", "replay", "report")
    ]


def test_publish_is_the_last_step_with_a_repository() -> None:
    published = build_steps(load(None, ["publish.repo_id=ann/demo"]).config)
    assert [step.name for step in published] == [*names(Config()), "publish"]
    assert {"prepare", "train", "merge", "export", "replay", "score/Q4_K_M"} <= set(published[-1].inputs)
    assert "report" not in published[-1].inputs


@pytest.mark.parametrize(
    ("options", "guarded"),
    [
        ([], False),
        (["guard.enabled=true"], True),
        (["data.source=chat", "data.sources=[rows.jsonl]"], True),
        (["data.source=chat", "data.sources=[rows.jsonl]", "guard.enabled=false"], False),
    ],
)
def test_conversations_are_guarded_and_pages_where_asked(options: list[str], guarded: bool) -> None:
    steps = {step.name: step for step in build_steps(load(None, options).config)}
    assert ("guard" in steps) == guarded
    assert not guarded or steps["guard"].inputs == ("train",)


def test_every_input_comes_before_what_reads_it() -> None:
    for models in (["base"], ["Q4_K_M"], list(get_args(ModelKind))):
        seen: set[str] = set()
        for step in build_steps(load(None, [f"predict.models={json.dumps(models)}", ENDPOINT, ALL_TYPES]).config):
            assert set(step.inputs) <= seen, step.name
            seen.add(step.name)


def test_each_kind_of_model_is_read_from_the_step_that_makes_it() -> None:
    assert set(SOURCE_STEPS) == set(get_args(ModelKind)) - {"base", "endpoint"}
    inputs = {step.name: step.inputs for step in build_steps(Config())}
    assert inputs["predict/base"] == ("prepare",)
    assert inputs["predict/Q4_K_M"] == ("prepare", "export")
    assert inputs["score/Q4_K_M"] == ("prepare", "predict/Q4_K_M")
    assert set(inputs["report"]) == set(inputs) - {"report"}


def test_options_of_a_step_name_options_that_there_are() -> None:
    for step in build_steps(Config()):
        for prefix in step.options:
            assert effective(Config(), [prefix]) or prefix == "merge", f"{step.name}: {prefix}"


def test_every_option_that_can_change_a_result_belongs_to_a_step() -> None:
    models = f"predict.models={json.dumps(get_args(ModelKind))}"
    measured = load(None, [models, ENDPOINT, ALL_TYPES, "publish.repo_id=ann/demo", "guard.enabled=true"]).config
    owned = {key for step in build_steps(measured) for key in effective(measured, step.options)}
    # Which models are measured decides which steps there are, not what any of them gives.
    assert effective(Config(), list(Config.model_fields)).keys() - owned == {"predict.models"}


def test_asking_for_one_more_kind_of_model_makes_no_other_stale() -> None:
    few, all_kinds = (load(None, [f"predict.models={models}"]).config for models in ("[base]", "[base, adapter]"))
    keys = [{step.name: effective(config, step.options) for step in build_steps(config)} for config in (few, all_kinds)]
    assert keys[0]["predict/base"] == keys[1]["predict/base"]


def test_endpoint_address_affects_only_the_endpoint() -> None:
    models = f"predict.models={json.dumps(get_args(ModelKind))}"
    configs = [load(None, [models, ALL_TYPES, address]).config for address in (ENDPOINT, f"{ENDPOINT}#other")]
    keys = [{step.name: effective(config, step.options) for step in build_steps(config)} for config in configs]
    assert [name for name in keys[0] if keys[0][name] != keys[1][name]] == ["predict/endpoint"]


def test_each_decoding_mode_has_its_own_step() -> None:
    config = load(None, ["predict.models=[base, merged]", "predict.constrain=[none, page]"]).config
    steps = {step.name: step for step in build_steps(config)}
    measured = [name for name in steps if name.startswith(("predict/", "score/"))]
    assert measured == [
        *("predict/base", "score/base", "predict/base+page", "score/base+page"),
        *("predict/merged", "score/merged", "predict/merged+page", "score/merged+page"),
    ]
    assert steps["predict/merged+page"].inputs == ("prepare", "merge")
    assert steps["score/merged+page"].inputs == ("prepare", "predict/merged+page")
    found = {name: step.view(config).predict.constrain for name, step in steps.items() if step.verb == "predict"}
    assert found == {
        "predict/base": "none",
        "predict/base+page": "page",
        "predict/merged": "none",
        "predict/merged+page": "page",
    }


def test_another_decoding_mode_makes_nothing_stale() -> None:
    keys = []
    for ways in ("none", "[none]", "[none, general]", "[none, page, general]"):
        config = load(None, [f"predict.constrain={ways}"]).config
        keys.append({step.name: effective(step.view(config), step.options) for step in build_steps(config)})
    assert keys[0] == keys[1]
    assert all(keys[0].items() <= more.items() for more in keys[2:])
    assert keys[2]["predict/base+general"] == keys[3]["predict/base+general"]


def test_what_is_served_is_measured_only_with_an_address() -> None:
    with pytest.raises(ConfigError, match=r"predict\.models asks for endpoint; set predict\.endpoint"):
        load(None, ["predict.models=[endpoint]"])


def test_only_stages_that_can_go_on_are_resumed() -> None:
    assert {step.verb for step in build_steps(Config()) if step.resumes} == {"train", "predict"}


def test_only_predict_batch_size_may_change() -> None:
    for step in build_steps(
        load(None, [f"predict.models={json.dumps(get_args(ModelKind))}", ENDPOINT, ALL_TYPES]).config
    ):
        assert step.may_change == (("predict.batch_size",) if step.verb == "predict" else ())
        assert effective(Config(), step.options).keys() >= set(step.may_change)  # the manifest says which it was


def test_building_the_steps_loads_no_heavy_library() -> None:
    code = (
        "import sys; from fintune.config import Config; from fintune.pipeline.steps import build_steps\n"
        "build_steps(Config())\n"
        "print(*{'torch', 'transformers', 'datasets', 'numpy', 'pyarrow', 'peft'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


@pytest.fixture
def finqa(tmp_path: Path, tiny_model: Path) -> Config:
    for name in ("train", "eval"):
        (tmp_path / f"{name}.json").write_text("[1]")
    files = [f"data.{name}={tmp_path / name}.json" for name in ("train", "eval")]
    return load(None, ["data.source=finqa", *files, f"model.name={tiny_model}"]).config


def test_the_fingerprint_of_data_is_that_of_its_content(finqa: Config, tmp_path: Path) -> None:
    prepare = prepare_of(finqa)
    before = prepare.sources(finqa)
    assert before.keys() == {"data.train", "data.eval", "model.name"}
    assert before["data.train"] == before["data.eval"]
    (tmp_path / "train.json").write_text("[1]")
    assert prepare.sources(finqa) == before
    (tmp_path / "train.json").write_text("[2]")
    after = prepare.sources(finqa)
    assert after["data.train"] != before["data.train"]
    assert after["data.eval"] == before["data.eval"]


def test_files_count_only_where_they_are_read(tmp_path: Path, tiny_model: Path) -> None:
    config = load(None, [f"data.train={tmp_path / 'no.json'}", f"model.name={tiny_model}"]).config
    prepare_of(config).check(config)
    assert prepare_of(config).sources(config).keys() == {"model.name"}


def test_missing_data_is_refused_before_the_model_is_read(finqa: Config, tmp_path: Path) -> None:
    nowhere = finqa.model_copy(update={"model": finqa.model.model_copy(update={"name": "/no/such/model"})})
    (tmp_path / "eval.json").unlink()
    for act in (prepare_of(finqa).check, prepare_of(finqa).sources):
        with pytest.raises(DataError, match=r"eval\.json: no such file: data\.eval must name a FinQA JSON file"):
            act(nowhere)
    (tmp_path / "eval.json").mkdir()
    with pytest.raises(DataError, match=r"eval\.json: is a folder, not a file"):
        prepare_of(finqa).check(finqa)


def test_incomplete_base_is_refused_by_every_step(finqa: Config, tmp_path: Path) -> None:
    broken = tmp_path / "model"
    broken.mkdir()
    (broken / "config.json").write_text("{}")
    config = finqa.model_copy(update={"model": finqa.model.model_copy(update={"name": str(broken)})})
    refused = set()
    for step in build_steps(config):
        try:
            step.check(config)
        except ModelError as error:
            assert "holds no safetensors weights" in str(error)
            refused.add(step.verb)
    assert refused == {"preflight", "prepare", "train", "merge", "export", "replay", "predict"}


def test_every_step_predicts_its_disk(finqa: Config) -> None:
    for step in build_steps(finqa):
        assert step.needed_bytes(finqa) > 0, step.name


def test_the_built_in_model_is_known_before_it_is_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: object) -> None:
        raise AssertionError("nothing may be fetched")

    monkeypatch.setattr("fintune.models.builtin.ensure", refuse)
    prepare = prepare_of(Config())
    prepare.check(Config())
    assert len(prepare.sources(Config())["model.name"]) == 64


def test_packed_data_has_the_fingerprint_of_its_file(finqa: Config, tmp_path: Path) -> None:
    path = tmp_path / "train.json.gz"
    path.write_bytes(gzip.compress(b"[1]"))
    config = finqa.model_copy(update={"data": finqa.data.model_copy(update={"train": path})})
    found = prepare_of(config).sources(config)
    assert found["data.train"] != found["data.eval"]


def test_options_are_all_reachable_by_name() -> None:
    assert {key.split(".")[0] for key, _ in fields()} == set(Config.model_fields)


def test_four_bit_kinds_check_their_package_first(monkeypatch) -> None:
    steps = {step.name: step for step in build_steps(load(None, ["predict.models=[adapter_4bit, merged_4bit]"]).config)}
    assert steps["predict/adapter_4bit"].inputs == ("prepare", "train")
    assert steps["predict/merged_4bit"].inputs == ("prepare", "merge")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for name in ("predict/adapter_4bit", "predict/merged_4bit"):
        with pytest.raises(ResourceError, match="4-bit loading needs bitsandbytes"):
            steps[name].check(Config())
