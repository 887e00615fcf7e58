"""The replay stage: what is compared, what fails it."""

from __future__ import annotations

import json
import math

import pytest

from fintune.config import AdapterOptions, Config, ReplayOptions
from fintune.errors import ArtifactError
from fintune.export.verify import TokenAgreement
from fintune.models import load as models
from fintune.pipeline.stages import replay as module
from fintune.pipeline.stages.export import export
from fintune.pipeline.stages.merge import merge
from fintune.pipeline.stages.replay import replay
from fintune.training import lora
from support.prepared_rows import prepared

torch = pytest.importorskip("torch")
pytest.importorskip("xllamacpp")


@pytest.fixture(scope="module")
def run(tiny_model, tmp_path_factory):
    """A finished chain with a random adapter."""
    folder = tmp_path_factory.mktemp("run")
    options = {"run": {"name": "t"}, "model": {"name": str(tiny_model)}, "export": {"types": ("F16", "Q4_K_M")}}
    config = Config.model_validate(options | {"predict": {"models": ["base"]}})
    base = models.load_model(models.fetch(str(tiny_model)), dtype="float32", device="cpu")
    torch.manual_seed(1)  # for both matrices: a share of ten positions is asked for below
    adapted = lora.attach_adapter(base, AdapterOptions(r=4))
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            weight.data = torch.randn_like(weight) * 0.05
    inputs = {name: folder / name for name in ("train", "merge", "export")}
    for path in inputs.values():
        path.mkdir()
    lora.save_adapter(adapted, str(tiny_model), None, inputs["train"] / "adapter")
    inputs["prepare"] = prepared(folder / "prepare", tiny_model, 6)
    merge(config, inputs, inputs["merge"])
    export(config, inputs, inputs["export"])
    return config, inputs


def test_every_form_is_compared_with_what_was_trained(run, tmp_path):
    config, inputs = run
    facts = replay(config, inputs, tmp_path)
    assert list(facts["replayed"]) == ["base", "adapter", "merged", "F16", "Q4_K_M"]
    assert facts["num_positions"] > 60
    _, adapter_kl, merged_kl, f16_kl, q4_kl = (each["mean_kl"] for each in facts["replayed"].values())
    assert adapter_kl == pytest.approx(0, abs=1e-9) and merged_kl < 1e-8 and f16_kl < 1e-6 < q4_kl
    assert facts["replayed"]["merged"]["same_best_token_share"] == 1
    assert json.loads((tmp_path / "replay.json").read_text()) == facts


def test_replay_compares_the_base_without_failing(run, tiny_model, tmp_path):
    config, inputs = run
    facts = replay(config, inputs, tmp_path)
    base, trained = (facts["replayed"][kind] for kind in ("base", "adapter"))
    rows = module._rows(config, models.load_tokenizer(models.fetch(str(tiny_model))), inputs["prepare"] / "eval.jsonl")
    plain = models.load_model(models.fetch(str(tiny_model)), dtype=config.predict.dtype, device="cpu")
    with torch.inference_mode():
        losses = [
            -plain(torch.tensor([row.ids])).logits[0, position - 1].log_softmax(-1)[row.ids[position]].item()
            for row in rows
            for position in row.positions
        ]
    assert base["perplexity"] == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-4)
    assert base["same_best_token_share"] < 0.9  # which no file could have
    assert list(facts["min_same_share"]) == ["merged", "F16", "Q4_K_M"]
    assert facts["summary"].startswith(
        f"held-out perplexity {base['perplexity']:.4g} before training, {trained['perplexity']:.4g} after; "
        "same best token: merged 100.0% (KL "
    )


def test_a_base_without_finite_figures_is_left_out(run, tmp_path):
    config, _ = run
    facts = judged(
        config, tmp_path, base=TokenAgreement(360, math.nan, 0.0, math.nan), merged=TokenAgreement(360, 0.0, 1.0, 5.0)
    )
    assert list(facts["replayed"]) == ["adapter", "merged"]
    assert facts["summary"] == "same best token: merged 100.0% (KL 0)"


def test_another_model_in_the_file_fails_the_stage(run, tiny_model, tmp_path):
    config, inputs = run
    (tmp_path / "export").mkdir()
    export(config, {"merge": tiny_model}, tmp_path / "export")
    with pytest.raises(ArtifactError, match=r"t-F16\.gguf gives the trained model's best token at \d+\.\d% of \d+ pos"):
        replay(config, inputs | {"export": tmp_path / "export"}, tmp_path)
    assert not (tmp_path / "replay.json").exists()


def test_another_model_in_quantised_files_alone_fails_the_stage(run, tiny_model, tmp_path):
    config, inputs = run
    (tmp_path / "export").mkdir()
    config = config.model_copy(
        update={
            "export": config.export.model_copy(update={"types": ("Q4_K_M",)}),
            "replay": ReplayOptions(num_examples=2, max_tokens=20),
        }
    )
    export(config, {"merge": tiny_model}, tmp_path / "export")
    with pytest.raises(ArtifactError, match=r"t-Q4_K_M\.gguf .* replay\.min_same_share_quantised requires 50%"):
        replay(
            config, {name: inputs[name] for name in ("prepare", "train")} | {"export": tmp_path / "export"}, tmp_path
        )


def judged(config, folder, **found):
    reference = TokenAgreement(360, 0.0, 1.0, 5.0)
    return module._verify({}, {"adapter": reference} | found, config, folder)


@pytest.mark.parametrize(
    ("kind", "share", "bound"),
    [
        ("merged", 0.97, "min_same_share"),
        ("BF16", 0.97, "min_same_share"),
        ("Q8_0", 0.89, "min_same_share"),
        ("Q6_K", 0.49, "min_same_share_quantised"),
        ("Q2_K", 0.01, "min_same_share_quantised"),
    ],
)
def test_every_form_has_a_share_below_which_it_fails(run, tmp_path, kind, share, bound):
    config, _ = run
    name = "the merged folder" if kind == "merged" else rf"t-{kind}\.gguf"
    told = rf"{name} gives .* {share:.1%} of 360 positions \(KL 9, perplexity 1e\+06\); replay\.{bound} requires \d\d%"
    with pytest.raises(ArtifactError, match=told):
        judged(config, tmp_path, **{kind: TokenAgreement(360, 9.0, share, 1e6)})
    enough = {"Q8_0": 0.9, "min_same_share": 0.98, "min_same_share_quantised": 0.5}
    least = enough.get(kind, enough[bound])
    facts = judged(config, tmp_path, **{kind: TokenAgreement(360, 0.1, least, 6.0)})
    assert facts["min_same_share"] == {kind: least}


def test_a_small_share_that_the_user_asks_for_holds_for_q8_0_too(run, tmp_path):
    config = run[0].model_copy(update={"replay": ReplayOptions(min_same_share=0.8)})
    assert judged(config, tmp_path, Q8_0=TokenAgreement(360, 0.1, 0.85, 6.0))["min_same_share"] == {"Q8_0": 0.8}


@pytest.mark.parametrize("kind", ["F16", "Q4_K_M"])
@pytest.mark.parametrize(
    ("figures", "told"),
    [
        ((360, math.nan, 0.99, math.nan), "KL nan, perplexity nan"),
        ((360, 0.1, 0.99, math.inf), "perplexity inf"),
    ],
)
def test_figures_that_are_not_finite_fail_the_stage(run, tmp_path, kind, figures, told):
    config, _ = run
    with pytest.raises(ArtifactError, match=rf"t-{kind}\.gguf gives .* not finite \({told}\)"):
        judged(config, tmp_path, **{kind: TokenAgreement(*figures)})
    assert not (tmp_path / "replay.json").exists()


def test_a_reference_that_is_not_finite_is_the_trainings_fault(run, tmp_path):
    config, _ = run
    with pytest.raises(ArtifactError, match="what was trained gives probabilities that are not finite"):
        judged(config, tmp_path, adapter=TokenAgreement(360, math.nan, 0.0, math.nan))


@pytest.mark.parametrize(
    ("least", "num_positions", "allowed"), [(0.98, 204, 4), (0.98, 50, 1), (0.98, 8, 1), (1.0, 204, 0), (0.0, 204, 204)]
)
def test_one_near_tie_of_few_positions_fails_no_stage(least, num_positions, allowed):
    assert module._num_allowed(least, num_positions) == allowed


def test_a_run_without_a_merged_folder_is_replayed_too(run, tmp_path):
    config, inputs = run
    facts = replay(config, {name: path for name, path in inputs.items() if name != "merge"}, tmp_path)
    assert list(facts["replayed"]) == ["base", "adapter", "F16", "Q4_K_M"]


def test_replay_of_quantized_base_uses_the_trained_model(run, tmp_path):
    pytest.importorskip("bitsandbytes")
    plain, inputs = run
    folders = {name: tmp_path / name for name in ("merge", "export", "direct", "replay", "plain")}
    for path in folders.values():
        path.mkdir()
    config = plain.model_copy(
        update={
            "model": plain.model.model_copy(update={"quantization": "nf4"}),
            "merge": plain.merge.model_copy(update={"into": "quantized_base"}),
        }
    )
    merge(config, inputs, folders["merge"])
    export(config, {"merge": folders["merge"]}, folders["export"])
    facts = export(config, {"train": inputs["train"]}, folders["direct"])
    assert facts["merged_into"] == "base dequantised from 4 bits"
    assert facts["base_difference"]["relative_rms"] > 0.05
    for name in ("t-F16.gguf", "t-Q4_K_M.gguf"):
        assert (folders["export"] / name).read_bytes() == (folders["direct"] / name).read_bytes()
    made = inputs | {"merge": folders["merge"], "export": folders["export"]}
    found = replay(config, made, folders["replay"])
    assert found["reference"] == "base + adapter in 4 bits"
    assert found["replayed"]["merged"]["mean_kl"] < 1e-6
    # The base's own weights under the adapter are another model.
    told = plain.model_copy(update={"replay": ReplayOptions(min_same_share=0)})
    assert replay(told, made, folders["plain"])["replayed"]["merged"]["mean_kl"] > 1e-5


def test_no_more_examples_and_tokens_than_asked_are_replayed(run, tmp_path):
    config, inputs = run
    asked = config.model_copy(update={"replay": ReplayOptions(num_examples=2, max_tokens=5)})
    assert replay(asked, inputs, tmp_path)["num_positions"] == 10
