"""Kinds of model on the page."""

from __future__ import annotations

from fintune.config import GGUF_KINDS
from fintune.report.formatting import KIND_LABELS, kind_colour


def test_every_gguf_kind_has_a_label_and_a_colour():
    assert {f"GGUF {kind}" for kind in GGUF_KINDS} <= set(KIND_LABELS.values())
    assert {kind_colour(kind) for kind in KIND_LABELS} == set(range(8))


def test_common_kinds_have_different_colours():
    usual = ("base", "adapter", "adapter_4bit", "merged", "merged_4bit", "F16", "Q4_K_M", "endpoint")
    assert len({kind_colour(kind) for kind in usual}) == len(usual)
