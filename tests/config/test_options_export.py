"""Combinations of merge, export and replay that cannot be, each refused in a line."""

from __future__ import annotations

from pathlib import Path

import pytest

from fintune.config.load import load
from fintune.errors import ConfigError

WITHOUT_MERGED = "predict.models=[adapter, F16]"


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (
            ["merge.into=quantized_base"],
            "merge.into: quantized_base needs 4-bit training; set model.quantization: nf4",
        ),
        (["merge.into=4bit"], "merge.into: got"),
        (["export.source=adapter"], "writes no merged folder, which predict.models asks for; remove merged there"),
        (
            ["export.source=adapter", WITHOUT_MERGED, "adapter.kind=full"],
            "export.source: adapter needs an adapter, which adapter.kind: full lacks; use merged",
        ),
        (["export.source=base"], "export.source: got"),
        (
            ["export.types=[F16, BF16]", WITHOUT_MERGED, "export.imatrix=compute"],
            "export.imatrix weights quantized types, and export.types has only F16, BF16",
        ),
        (["replay.num_examples=0"], "replay.num_examples: got 0"),
        (["replay.max_tokens=none"], "replay.max_tokens: got"),
        (["replay.min_same_share=98"], "replay.min_same_share: got 98"),
    ],
)
def test_load_refuses_export_options(overrides: list[str], told: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(None, overrides)
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "overrides",
    [
        ["merge.into=quantized_base", "model.quantization=nf4"],
        ["export.source=adapter", WITHOUT_MERGED],
        ["export.source=adapter", "data.source=chat", "data.sources=[{path: x.jsonl}]"],
        ["export.imatrix=compute"],
    ],
)
def test_load_accepts_export_options(overrides: list[str]) -> None:
    load(None, overrides)


def test_imatrix_is_computed_or_read() -> None:
    computed, read, none = (
        load(None, each).config.export for each in (["export.imatrix=compute"], ["export.imatrix=m.gguf"], [])
    )
    assert (computed.computes_imatrix, computed.imatrix_file) == (True, None)
    assert (read.computes_imatrix, read.imatrix_file) == (False, Path("m.gguf"))
    assert (none.computes_imatrix, none.imatrix_file) == (False, None)
