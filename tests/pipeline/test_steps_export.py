"""Which steps there are, and what they read, according to where GGUF files come from."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from fintune.config import GGUF_KINDS, Config
from fintune.config.load import effective, load
from fintune.errors import ConfigError, ModelError
from fintune.pipeline import disk_estimate
from fintune.pipeline.step import Step
from fintune.pipeline.steps import build_steps
from support.tiny import patch_json

ADAPTER = ("export.source=adapter", "predict.models=[adapter, F16]")


def steps(*overrides: str) -> tuple[Config, dict[str, Step]]:
    config = load(None, overrides).config
    return config, {step.name: step for step in build_steps(config)}


def test_export_from_adapter_reads_the_adapter() -> None:
    _, found = steps(*ADAPTER)
    assert "merge" not in found
    assert found["export"].inputs == ("train",)
    assert found["replay"].inputs == ("prepare", "train", "export")


def test_export_from_merged_reads_the_merged_folder() -> None:
    _, found = steps()
    assert found["export"].inputs == ("merge",)
    assert found["replay"].inputs == ("prepare", "train", "merge", "export")


@pytest.mark.parametrize("more", [(), ADAPTER])
def test_a_computed_matrix_reads_the_training_texts(more: tuple[str, ...]) -> None:
    config, found = steps("export.imatrix=compute", *more)
    assert found["export"].inputs == ("prepare", "train" if more else "merge")
    assert "predict.dtype" in effective(config, found["export"].options)


def test_merge_options_belong_to_the_direct_export() -> None:
    for overrides, belongs in ((ADAPTER, True), ((), False)):
        config, found = steps(*overrides)
        assert ("merge.dtype" in effective(config, found["export"].options)) == belongs


def test_the_fingerprint_of_a_matrix_is_that_of_its_content(tiny_model: Path, tmp_path: Path) -> None:
    matrix = tmp_path / "imatrix.dat"
    matrix.write_bytes(b"1")
    config, found = steps(f"export.imatrix={matrix}", f"model.name={tiny_model}")
    before = found["export"].sources(config)
    assert before.keys() == {"export.imatrix"}
    matrix.write_bytes(b"2")
    assert found["export"].sources(config) != before
    direct, found = steps(f"export.imatrix={matrix}", f"model.name={tiny_model}", *ADAPTER)
    assert found["export"].sources(direct).keys() == {"export.imatrix", "model.name"}


def test_unreadable_imatrix_is_refused_first(tiny_model: Path, tmp_path: Path) -> None:
    matrix = tmp_path / "imatrix.dat"
    config, found = steps(f"export.imatrix={matrix}", f"model.name={tiny_model}")
    with pytest.raises(ModelError, match=r"imatrix\.dat: no such file: export\.imatrix must name an importance"):
        found["export"].check(config)
    matrix.mkdir()
    with pytest.raises(ModelError, match=r"imatrix\.dat: is a folder, not a file"):
        found["export"].check(config)
    matrix.rmdir()
    matrix.write_bytes(b"GGUF")
    found["export"].check(config)
    with pytest.raises(ModelError, match=r"imatrix\.dat: no readable importance matrix"):
        disk_estimate.export_bytes(config)


def test_imatrix_of_another_model_is_refused_first(tiny_model: Path, tmp_path: Path) -> None:
    np = pytest.importorskip("numpy")
    from fintune.export.gguf.imatrix import write_imatrix

    matrix = tmp_path / "other.gguf"
    name = "blk.0.attn_q.weight"
    write_imatrix(matrix, {name: np.ones(128, np.float32)}, {name: 8}, datasets=["x"], chunk_size=8)
    config, _ = steps(f"export.imatrix={matrix}", f"model.name={tiny_model}")
    with pytest.raises(ModelError, match=r"128 values for blk\.0\.attn_q\.weight, which has 64 columns"):
        disk_estimate.export_bytes(config)


def test_a_computed_matrix_counts_in_the_prediction_of_disk(tiny_model: Path) -> None:
    plain, weighed = (
        disk_estimate.export_bytes(load(None, [f"model.name={tiny_model}", *more]).config)
        for more in ([], ["export.imatrix=compute"])
    )
    assert 1000 < weighed - plain < 100_000


@pytest.mark.parametrize("verb", ["train", "merge", "export"])
def test_quantised_base_is_refused_but_can_be_measured(tiny_model: Path, tmp_path: Path, verb: str) -> None:
    base = Path(shutil.copytree(tiny_model, tmp_path / "base"))
    patch_json(base / "config.json", quantization_config={"quant_method": "gptq", "bits": 4})
    config, found = steps(f"model.name={base}", "predict.models=[base, F16]")
    with pytest.raises(ModelError, match=r"base is quantised \(gptq\): it can neither be trained nor") as refused:
        found[verb].check(config)
    assert "16-bit model" in str(refused.value.hint)
    found["predict/base"].check(config)
    patch_json(base / "config.json", quantization_config=None)
    found[verb].check(config)


def test_every_exported_type_can_be_measured() -> None:
    kinds = ", ".join(GGUF_KINDS)
    _, found = steps(f"predict.models=[{kinds}]", f"export.types=[{kinds}]")
    _, usual = steps("predict.models=[F16, Q4_K_M]")
    for kind in GGUF_KINDS:
        assert found[f"predict/{kind}"].inputs == ("prepare", "export")
        assert found[f"predict/{kind}"].options == usual["predict/F16"].options
        assert f"score/{kind}" in found["report"].inputs
    with pytest.raises(ConfigError, match=r"predict\.models asks for Q8_0, which export\.types does not write"):
        steps("predict.models=[F16, Q8_0]")
