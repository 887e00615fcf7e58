"""The guard: what it measures, what it says of a model that got worse, and when it stops a run."""

from __future__ import annotations

import json
import shutil

import pytest

from fintune.config.load import load
from fintune.data.synthetic import generate
from fintune.errors import FintuneError, ResourceError
from fintune.evaluation import questions as regression_set
from fintune.finqa.execute import execute
from fintune.finqa.program import tokenize
from fintune.inference.likelihood import AnswerLoss
from fintune.inference.protocol import Completion, PromptResult
from fintune.models import chat_template as chat
from fintune.models import load as models
from fintune.pipeline.stages import guard as stage
from fintune.pipeline.stages.guard import GuardReport, guard
from support.command import fintune
from support.pair_rows import pair_rows, write_rows

torch = pytest.importorskip("torch")


@pytest.fixture(scope="module")
def trained(tiny_model, tmp_path_factory):
    """An adapter that spoils the model: large random numbers."""
    from peft import LoraConfig, get_peft_model

    from fintune.util.console import quiet_libraries

    folder = tmp_path_factory.mktemp("train")
    base = models.load_model(models.fetch(str(tiny_model)), dtype="float32", device="cpu")
    with quiet_libraries():
        adapted = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"))
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            for name, weight in adapted.named_parameters():
                if "lora_B" in name:
                    weight.normal_(0, 3)
        adapted.save_pretrained(str(folder / "adapter"), save_embedding_layers=False)
    return folder


def config(model, *more):
    return load(None, [f"model.name={model}", "predict.threads=1", "train.dtype=float32", *more]).config


def test_the_set_is_whole_and_its_programs_give_their_results():
    prompts = regression_set.regression_prompts()
    groups = [prompt.group for prompt in prompts]
    assert (groups.count("finance"), groups.count("statements")) == (20, 12)
    assert len({prompt.id for prompt in prompts}) == 32
    for prompt in prompts[20:]:
        execution = execute(tokenize(prompt.answer), prompt.record.table)
        assert execution.result == prompt.record.qa.exe_ans
        assert prompt.messages[-1].content.startswith(regression_set.TASK)
        assert prompt.record.qa.question in prompt.messages[-1].content


def test_the_pages_are_those_of_the_generator():
    made = generate(4, pages_per_company=1, questions_per_page=3, seed=4096, size="small")
    assert [prompt.record for prompt in regression_set.regression_prompts() if prompt.record is not None] == list(made)


def test_guard_losses_equal_forward_pass(tiny_model, trained, tmp_path):
    guard(config(tiny_model), {"train": trained}, tmp_path)
    report = GuardReport.model_validate_json((tmp_path / "guard.json").read_bytes())
    ref = models.fetch(str(tiny_model))
    tokenizer, base = models.load_tokenizer(ref), models.load_model(ref, dtype="float32", device="cpu")
    for at in (0, 19, 20, 21, 31):
        prompt = regression_set.regression_prompts()[at]
        encoded = chat.encode_example(tokenizer, prompt.messages, prompt.answer)
        with torch.no_grad():
            scores = base(torch.tensor([encoded.input_ids])).logits[0, :-1].log_softmax(-1)
        mask = torch.tensor(encoded.completion_mask[1:]) == 1
        taken = scores.gather(1, torch.tensor(encoded.input_ids[1:])[:, None])[:, 0][mask]
        assert report.prompts[at].before == pytest.approx(-float(taken.mean()), rel=1e-4)


def test_an_adapter_that_changes_nothing_makes_nothing_worse(tiny_model, trained, tmp_path):
    from safetensors.torch import load_file, save_file

    shutil.copytree(trained / "adapter", tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file({name: weight * ("lora_A" in name) for name, weight in load_file(path).items()}, path)
    facts = guard(config(tiny_model, "guard.max_rise=0"), {"train": tmp_path}, tmp_path)
    assert (facts["worse"], facts["lost"]) == ([], [])
    assert all(group["before"] == pytest.approx(group["after"], rel=1e-5) for group in facts["groups"])
    assert facts["summary"].endswith("; no prompt got worse by more than 0.1")


@pytest.fixture
def rises(monkeypatch):
    """What the losses of the first prompts rise by, from 2 nats a token; all others stay."""
    by_place: dict[int, float] = {}
    passes = []

    def losses(_model, rows):
        passes.append(1)
        after = len(passes) % 2 == 0
        return [
            AnswerLoss(total=10 * (2.0 + (by_place.get(place, 0.0) if after else 0.0)), num_tokens=10)
            for place, _ in enumerate(rows)
        ]

    monkeypatch.setattr(stage, "answer_losses", losses)
    return by_place


def test_what_got_worse_is_named_the_most_first(tiny_model, trained, tmp_path, rises):
    rises |= {0: 0.2, 3: 0.05, 4: 1.0, 25: 0.11}
    ids = [prompt.id for prompt in regression_set.regression_prompts()]
    facts = guard(config(tiny_model), {"train": trained}, tmp_path)
    assert facts["worse"] == [ids[4], ids[0], ids[25]]
    finance, statements = facts["groups"]
    assert (finance["before"], finance["after"]) == (pytest.approx(2.0), pytest.approx(2.0 + 1.25 / 20))
    assert (finance["right_before"], statements["right_before"]) == (None, 0)
    assert facts["summary"] == (
        "finance 2.00 to 2.06 nats a token; statements 2.00 to 2.01 nats a token, 0 of 12 right before, 0 after; "
        f"3 of 32 prompts worse by more than 0.1 ({ids[4]}, {ids[0]}, {ids[25]})"
    )
    assert guard(config(tiny_model, "guard.threshold=0.5"), {"train": trained}, tmp_path)["worse"] == [ids[4]]


@pytest.mark.parametrize("rise", [0.1, float("nan")])
def test_guard_max_rise_stops_the_run(tiny_model, trained, tmp_path, rises, rise):
    rises |= dict.fromkeys(range(20), rise)
    assert len(guard(config(tiny_model, "guard.threshold=0.05"), {"train": trained}, tmp_path)["worse"]) == 20
    with pytest.raises(
        FintuneError, match=r"the finance prompts lost \S+ nats .* guard\.max_rise allows 0\.05"
    ) as raised:
        guard(config(tiny_model, "guard.max_rise=0.05"), {"train": trained}, tmp_path)
    assert "\n" not in str(raised.value)
    assert (tmp_path / "guard.json").is_file()


def test_an_answer_that_is_no_longer_right_is_named(tiny_model, trained, tmp_path, monkeypatch):
    """The model before training is made to say every program, the one after it none."""
    said = {"texts": [prompt.answer for prompt in regression_set.regression_prompts() if prompt.record is not None]}

    class Engine:
        def __init__(self, *_):
            self.texts = said.pop("texts", [""] * 12)

        def generate(self, prompts, *_):
            assert all(regression_set.TASK in prompt for prompt in prompts)
            return (
                PromptResult(place, (Completion((), text, "stop", (), 1, 0.0),))
                for place, text in enumerate(self.texts)
            )

        def close(self):
            pass

    monkeypatch.setattr("fintune.inference.transformers_engine.TransformersEngine", Engine)
    facts = guard(config(tiny_model), {"train": trained}, tmp_path)
    assert facts["groups"][1]["right_before"] == 12
    assert facts["groups"][1]["right_after"] == 0
    assert len(facts["lost"]) == 12
    assert "12 of 12 right before, 0 after" in facts["summary"]
    assert "no longer right: " in facts["summary"]


def test_out_of_memory_names_a_smaller_batch_and_the_way_without(tiny_model, trained, tmp_path, monkeypatch):
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(
        "fintune.inference.transformers_engine.TransformersEngine._prefill", lambda *_: torch.empty(10**15)
    )
    with pytest.raises(
        ResourceError,
        match=r"^out of memory while asking the guard's prompts \(.*\): set predict\.batch_size=\d+, or ",
    ):
        guard(config(tiny_model), {"train": trained}, tmp_path)
    assert not list(tmp_path.glob("guard*"))


def test_a_chat_run_guards_itself_and_its_page_shows_it(tiny_model, tmp_path):
    data = write_rows(tmp_path / "d.jsonl", pair_rows(12))
    (tmp_path / "c.yaml").write_text(
        "train: {max_steps: 1, per_device_train_batch_size: 2, objective: dpo}\n", encoding="utf-8"
    )
    words = ["data.source=chat", f"data.sources={data}", f"model.name={tiny_model}", f"run.dir={tmp_path}"]
    words += ["predict.threads=1", "guard.threshold=1e-9"]
    steps = ["prepare", "train", "guard", "report"]
    done = fintune("run", tmp_path / "c.yaml", *words, *(word for step in steps for word in ("--only", step)))
    assert done.status == 0, done.err
    assert "nats a token" in next(line for line in done.err.splitlines() if line.startswith("guard"))
    html = (tmp_path / "c" / "report" / "index.html").read_text(encoding="utf-8")
    report = json.loads((tmp_path / "c" / "guard" / "guard.json").read_text())
    assert f"{report['groups'][0]['before']:.3f}" in html
    assert "got worse" in html
    assert 'href="#guard"' in html
    again = fintune("guard", tmp_path / "c.yaml", *words)
    assert "up to date" in again.err
    off = fintune("run", tmp_path / "c.yaml", *words, "guard.enabled=false", "--dry-run")
    assert not [line for line in off.out.splitlines() if line.startswith("guard")]
