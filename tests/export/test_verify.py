"""Distributions of a GGUF file against those of transformers, and how two sets are compared."""

from __future__ import annotations

import math

import gguf
import numpy as np
import pytest

from fintune.export import verify as module
from fintune.export.gguf.writer import write_gguf
from fintune.export.verify import GgufReplay, compare_distributions, distribution_from_logits

ROW = list(range(5, 45))
POSITIONS = list(range(1, 40))


@pytest.fixture(scope="module")
def logits(tiny_model):
    torch = pytest.importorskip("torch")
    from fintune.models.load import fetch, load_model

    model = load_model(fetch(str(tiny_model)), dtype="float32", device="cpu")
    with torch.inference_mode():
        rows = model(input_ids=torch.tensor([ROW])).logits[0].numpy()
    return [rows[position - 1] for position in POSITIONS]


@pytest.fixture(scope="module")
def files(tiny_model, tmp_path_factory):
    pytest.importorskip("xllamacpp")
    folder = tmp_path_factory.mktemp("replay")
    outputs = {kind: folder / f"{kind}.gguf" for kind in ("F32", "Q4_K_M")}
    write_gguf(tiny_model, outputs)
    return outputs


def test_an_exact_file_answers_as_transformers_does(files, logits):
    with GgufReplay(files["F32"], context_tokens=64, threads=1) as file:
        found = file.distributions(ROW, POSITIONS)
    for row, target, own in zip(logits, ROW[1:], found, strict=True):
        exact = distribution_from_logits(row, target)
        # llama.cpp keeps keys and values of the past in half precision.
        assert own.target_log_prob == pytest.approx(exact.target_log_prob, abs=2e-3)
        assert len(own.ids) == len(set(own.ids.tolist())) == 400
    agreement = compare_distributions(logits, found)
    assert agreement.num_positions == 39
    assert agreement.mean_kl < 1e-5 and agreement.same_best_token_share >= 38 / 39


def test_a_quantised_file_is_farther_away(files, logits):
    divergences = {}
    for kind, path in files.items():
        with GgufReplay(path, context_tokens=64, threads=1) as file:
            divergences[kind] = compare_distributions(logits, file.distributions(ROW, POSITIONS)).mean_kl
    assert divergences["Q4_K_M"] > 10 * divergences["F32"]


def test_a_token_outside_the_list_still_has_its_probability(files, logits, monkeypatch):
    monkeypatch.setattr(module, "NUM_LISTED", 3)
    with GgufReplay(files["F32"], context_tokens=64, threads=1) as file:
        found = file.distributions(ROW, POSITIONS)
    assert all(len(each.ids) == 3 for each in found)
    exact = [distribution_from_logits(row, target).target_log_prob for row, target in zip(logits, ROW[1:], strict=True)]
    assert [each.target_log_prob for each in found] == pytest.approx(exact, abs=2e-3)
    # Taking tokens together can only bring two distributions nearer.
    assert compare_distributions(logits, found).mean_kl < 1e-5


def test_divergence_agreement_and_perplexity_are_the_textbooks():
    reference = np.log(np.array([0.7, 0.2, 0.1], np.float32))
    other = np.log(np.array([0.3, 0.6, 0.1], np.float32))
    found = compare_distributions(
        [reference, reference], [distribution_from_logits(other, 0), distribution_from_logits(reference, 0)]
    )
    divergence = 0.7 * math.log(0.7 / 0.3) + 0.2 * math.log(0.2 / 0.6)
    assert found.mean_kl == pytest.approx(divergence / 2, rel=1e-5)
    assert found.same_best_token_share == 0.5
    assert found.perplexity == pytest.approx(1 / math.sqrt(0.3 * 0.7), rel=1e-5)
    short = compare_distributions([reference], [distribution_from_logits(other, 0, num_listed=1)])
    assert short.mean_kl == pytest.approx(0.2 * math.log(0.2 / 0.6) + 0.8 * math.log(0.8 / 0.4), rel=1e-5)


def test_what_is_not_a_number_stays_so():
    reference = np.array([0.7, 0.2, 0.1], np.float32)
    found = compare_distributions([reference], [distribution_from_logits(np.full(3, np.nan, np.float32), 0)])
    assert math.isnan(found.mean_kl) and math.isnan(found.perplexity)
    impossible = compare_distributions([reference], [distribution_from_logits(np.array([0, 2000, 0], np.float32), 0)])
    assert impossible.perplexity == math.inf


def test_a_file_of_ruined_weights_answers_what_is_not_a_number(files, logits, tmp_path):
    path = tmp_path / "ruined.gguf"
    path.write_bytes(files["F32"].read_bytes())
    reader = gguf.GGUFReader(path, "r+")
    next(each for each in reader.tensors if each.name == "blk.0.ffn_down.weight").data[:] = np.nan
    reader.data.flush()
    with GgufReplay(path, context_tokens=64, threads=1) as file:
        found = compare_distributions(logits[:2], file.distributions(ROW, POSITIONS[:2]))
    assert math.isnan(found.mean_kl) and math.isnan(found.perplexity)
