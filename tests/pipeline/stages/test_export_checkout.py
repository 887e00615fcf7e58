"""The export by a llama.cpp checkout: with stand-ins of its tools, and with the tools themselves where they are."""

from __future__ import annotations

import json
import math
import os
import platform
import shutil
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest

from fintune.config import Config
from fintune.errors import ConfigError, ModelError, ResourceError
from fintune.export.gguf.llama_cpp_checkout import check_checkout
from fintune.export.merge.merge import merge_folders
from fintune.pipeline import disk_estimate
from fintune.pipeline.stages.export import export
from fintune.pipeline.stages.preflight import preflight
from support.checkout_stand_in import QUANTIZER, calls, make_checkout
from support.command import fintune
from support.gguf_cases import write_case
from support.paths import ROOT
from support.synthetic import lora_of
from support.tiny import patch_json

pytest.importorskip("xllamacpp")

GGUF_TESTS = ROOT / "tests/export/gguf"
UPSTREAM = json.loads((GGUF_TESTS / "upstream_sha256.json").read_text())


@pytest.fixture
def checkout(tmp_path) -> Path:
    return make_checkout(tmp_path / "llama.cpp")


@pytest.fixture
def other(tiny_model, tmp_path) -> Path:
    """A model of a family that is in no table."""
    folder = Path(shutil.copytree(tiny_model, tmp_path / "other"))
    patch_json(folder / "config.json", model_type="granite")
    return folder


def config(checkout: Path | None, *types: str, **more: object) -> Config:
    options = {"types": types, **({"llama_cpp_path": checkout} if checkout else {})} | more
    return Config.model_validate({"run": {"name": "t"}, "export": options, "predict": {"models": ["base"]}})


def test_unknown_architecture_needs_a_checkout(other, checkout, tmp_path):
    out = tmp_path / "export"
    out.mkdir()
    with pytest.raises(ModelError, match=r"'granite' cannot be exported .*export\.llama_cpp_path=FOLDER"):
        export(config(None, "F16"), {"merge": other}, out)
    facts = export(config(checkout, "F16", "Q4_K_M"), {"merge": other}, out)
    assert facts["file_bytes"] == {kind: (out / f"t-{kind}.gguf").stat().st_size for kind in ("F16", "Q4_K_M")}
    assert "checkout" in facts["source"]
    assert "t-Q4_K_M.gguf" in (out / "Modelfile").read_text()
    assert sorted(path.name for path in out.iterdir()) == ["Modelfile", "t-F16.gguf", "t-Q4_K_M.gguf"]


@pytest.mark.parametrize(
    ("dtype", "types", "expected"),
    [
        ("float16", ("F16", "Q4_K_M"), ["convert F16", "quantise Q4_K_M"]),
        ("bfloat16", ("Q4_K_M", "Q8_0"), ["convert BF16", "quantise Q4_K_M", "quantise Q8_0"]),
        ("float32", ("F16", "Q4_K_M"), ["convert F16", "convert F32", "quantise Q4_K_M"]),
        ("bfloat16", ("F32", "F16"), ["convert F32", "convert F16"]),
    ],
)
def test_checkout_quantises_from_an_exact_file(other, checkout, tmp_path, dtype, types, expected):
    patch_json(other / "config.json", dtype=dtype)
    out = tmp_path / "export"
    out.mkdir()
    export(config(checkout, *types), {"merge": other}, out)
    assert calls(checkout) == expected
    assert {path.name for path in out.iterdir()} == {"Modelfile", *(f"t-{kind}.gguf" for kind in types)}


def test_an_importance_matrix_goes_to_the_quantiser(other, checkout, tmp_path):
    out = tmp_path / "export"
    out.mkdir()
    export(config(checkout, "Q4_K_M", imatrix=tmp_path / "i.gguf"), {"merge": other}, out)
    assert calls(checkout)[-1] == "quantise Q4_K_M weighed"


def test_a_tool_that_fails_leaves_no_file_in_between(other, checkout, tmp_path):
    out = tmp_path / "export"
    out.mkdir()
    with pytest.raises(ResourceError, match=r"llama-quantize failed .*invalid ftype Q9"):
        export(config(checkout, "Q9"), {"merge": other}, out)
    assert list(out.iterdir()) == []


def test_the_tokenizer_is_checked_as_the_checkout_writes_it(other, checkout, tmp_path):
    out = tmp_path / "preflight"
    out.mkdir()
    # The tiny model's own configuration, which transformers can read.
    patch_json(other / "config.json", model_type="llama")
    asked = Config.model_validate({"model": {"name": str(other)}, "export": {"llama_cpp_path": checkout}})
    facts = preflight(asked, {}, out)
    assert calls(checkout) == ["convert F16 vocabulary"]
    without = preflight(Config.model_validate({"model": {"name": str(other)}}), {}, out)
    assert facts == without and facts["num_strings"] > 2000


def test_a_run_looks_at_the_checkout_before_it_begins(tiny_model, checkout, tmp_path):
    words = [f"model.name={tiny_model}", f"run.dir={tmp_path}", "data.source=builtin:statements", "--dry-run"]
    path = tmp_path / "run.yaml"
    path.write_text("run:\n  name: t\n")
    assert fintune("run", path, *words, f"export.llama_cpp_path={checkout}").status == 0
    done = fintune("run", path, *words, f"export.llama_cpp_path={tmp_path}")
    assert done.status == 2 and f"export.llama_cpp_path {tmp_path}: there is no convert_hf_to_gguf.py" in done.err


def test_checkout_refuses_unlisted_type_before_the_run(tmp_path):
    listed = QUANTIZER.replace("usage: llama-quantize", "usage:   7  or  Q8_0  :  7.96G\n  15  or  Q4_K_M  :  4.58G")
    tools = make_checkout(tmp_path / "tools", quantizer=listed)
    check_checkout(tools, ("F16", "Q8_0", "q4_k_m"))
    with pytest.raises(
        ConfigError, match=r"^export\.types: the llama-quantize of .*tools has no type Q4_M: did you mean Q4_"
    ):
        check_checkout(tools, ("F16", "Q4_M"))
    check_checkout(make_checkout(tmp_path / "silent"), ("Q4_M",))  # lists none, so it is asked when it is run


@pytest.mark.parametrize("more", [{"source": "adapter"}, {"imatrix": "compute"}])
def test_options_that_do_not_go_with_a_checkout_are_refused(tmp_path, more):
    with pytest.raises(ValueError, match=r"export\.llama_cpp_path"):
        config(tmp_path, "Q4_K_M", **more)


def test_the_size_of_an_unknown_family_is_estimated(other, checkout):
    asked = config(checkout, "F16", "Q8_0").model_copy(
        update={"model": Config().model.model_copy(update={"name": str(other)})}
    )
    weights = sum(math.prod(tensor.shape) for tensor in disk_estimate.tensors(other).values())
    assert weights * (2 + 2 + 1.1) < disk_estimate.export_bytes(asked) < weights * 6 + 30_000_000


def routes(tmp_path: Path) -> tuple[Path, Path]:
    base = write_case("merged-lora", tmp_path / "model")
    return base, lora_of(base, tmp_path / "train" / "adapter")


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="the hashes were taken on x86-64")
def test_three_ways_to_gguf_give_the_same_bytes(tmp_path):
    (tmp_path / "train").mkdir()
    base, adapter = routes(tmp_path)
    kinds = tuple(UPSTREAM["merged-lora"])
    (tmp_path / "merge").mkdir()
    merge_folders(base, adapter, tmp_path / "merge", dtype="float16")
    options = {"run": {"name": "Tiny Model 1"}, "model": {"name": str(base)}, "merge": {"dtype": "float16"}}
    options |= {"predict": {"models": ["base"]}, "export": {"types": kinds}}
    asked = Config.model_validate(options)
    ways = {"streaming": {"train": tmp_path / "train"}, "merged": {"merge": tmp_path / "merge"}}
    for way, inputs in ways.items():
        (tmp_path / way).mkdir()
        export(asked, inputs, tmp_path / way)
        assert hashes(tmp_path / way, kinds) == UPSTREAM["merged-lora"], way


@pytest.mark.skipif("FINTUNE_UPSTREAM" not in os.environ, reason="llama.cpp's tools are not here, see gguf/upstream.py")
def test_the_option_runs_llama_cpps_tools_to_the_same_bytes(tmp_path):
    (tmp_path / "train").mkdir()
    base, adapter = routes(tmp_path)
    kinds = tuple(UPSTREAM["merged-lora"])
    (tmp_path / "merge").mkdir()
    merge_folders(base, adapter, tmp_path / "merge", dtype="float16")
    tools = upstream().checkout(Path(os.environ["FINTUNE_UPSTREAM"]).resolve(), tmp_path / "llama.cpp", "gpt-2")
    (tmp_path / "out").mkdir()
    asked = config(tools, *kinds).model_copy(update={"run": Config().run.model_copy(update={"name": "Tiny Model 1"})})
    export(asked, {"merge": tmp_path / "merge"}, tmp_path / "out")
    assert hashes(tmp_path / "out", kinds) == UPSTREAM["merged-lora"]


def upstream():
    spec = spec_from_file_location("upstream", GGUF_TESTS / "upstream.py")
    module = module_from_spec(spec)
    sys.modules["upstream"] = module
    spec.loader.exec_module(module)
    return module


def hashes(folder: Path, kinds: tuple[str, ...]) -> dict[str, str]:
    (name,) = {path.name.rpartition("-")[0] for path in folder.glob("*.gguf")}
    return {kind: upstream().sha256(folder / f"{name}-{kind}.gguf") for kind in kinds}
