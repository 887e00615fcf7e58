"""What peers get wrong (masks, end tokens, packing), held here; accumulation and resuming are in test_sft."""

from __future__ import annotations

import pytest

from fintune.config import AdapterOptions, TrainOptions
from fintune.data.tokenize_chat import ConversationEncoder
from fintune.models import chat_template as chat
from fintune.models import load as models
from fintune.records import Message
from fintune.training import lora, metrics, sft
from fintune.training.batches import IGNORED, CompletionCollator
from support.prepared_rows import examples, prepared

torch = pytest.importorskip("torch")

TURNS = (
    Message(role="user", content="net revenue 12"),
    Message(role="assistant", content="add(1, 2)"),
    Message(role="user", content="cash 34"),
    Message(role="assistant", content="exp(2, const_3)"),
    Message(role="user", content="total assets"),
    Message(role="assistant", content="multiply(5, 6)"),
)


@pytest.fixture(scope="module")
def tokenizer(tiny_model):
    return models.load_tokenizer(models.fetch(str(tiny_model)))


@pytest.fixture(scope="module")
def rows(tmp_path_factory, tiny_model):
    from datasets import load_from_disk

    folder = prepared(tmp_path_factory.mktemp("rows") / "prepare", tiny_model)
    return load_from_disk(str(folder / "tokens" / "train"))


def trained_text(tokenizer, row):
    labels = CompletionCollator(tokenizer.pad_token_id)([row])["labels"][0]
    return tokenizer.decode(labels[labels != IGNORED])


@pytest.mark.parametrize(
    ("train_on", "untrained", "expected"),
    [
        ("all", (), "add(1, 2)<|im_end|>exp(2, const_3)<|im_end|>multiply(5, 6)<|im_end|>"),
        ("last", (), "multiply(5, 6)<|im_end|>"),
        ("all", (1, 5), "exp(2, const_3)<|im_end|>"),
        ("all", (3,), "add(1, 2)<|im_end|>multiply(5, 6)<|im_end|>"),
    ],
)
def test_loss_covers_selected_turns_and_their_ends(tokenizer, train_on, untrained, expected):
    encoder = ConversationEncoder(tokenizer, system="", train_on=train_on, max_length=400)
    (row,) = encoder.encode("x", TURNS, untrained=untrained).rows
    assert (
        trained_text(
            tokenizer, {"id": row.id, "input_ids": row.input_ids, "completion_mask": list(row.completion_mask)}
        )
        == expected
    )


@pytest.mark.parametrize("packed", [False, True])
def test_rows_train_the_end_of_turn_and_no_padding(tokenizer, rows, packed):
    end = chat.end_of_turn_ids(tokenizer)[0]
    batch = list(rows)
    if packed:
        from fintune.training.fused.batch import PackedCollator

        out = PackedCollator()(batch)
        counted = int((out["targets"] == end).sum())
        assert tokenizer.pad_token_id not in out["targets"]
    else:
        out = CompletionCollator(tokenizer.pad_token_id, multiple=32)(batch)
        padded = out["attention_mask"] == 0
        assert bool(padded.any())
        assert bool((out["labels"][padded] == IGNORED).all())
        assert bool((out["input_ids"][padded] == tokenizer.pad_token_id).all())
        counted = int((out["labels"] == end).sum())
    assert tokenizer.pad_token_id not in (*chat.end_of_turn_ids(tokenizer), tokenizer.eos_token_id)
    assert counted == len(batch)


def test_the_prompts_end_of_turn_tokens_are_not_trained(tokenizer, rows):
    end = chat.end_of_turn_ids(tokenizer)[0]
    for row in rows:
        prompt = [token for token, kept in zip(row["input_ids"], row["completion_mask"], strict=True) if not kept]
        assert end in prompt
    out = CompletionCollator(tokenizer.pad_token_id)(list(rows))
    assert int((out["labels"] == end).sum()) < int((out["input_ids"] == end).sum())


def test_template_with_bos_gives_one_bos(tokenizer):
    import copy

    own = copy.deepcopy(tokenizer)
    own.add_bos_token = True
    own.chat_template = "{{ bos_token }}" + tokenizer.chat_template
    # The tiny tokenizer begins its turns with its BOS; take one that occurs nowhere else.
    own.bos_token = "<|endoftext|>"
    own.pad_token = "<|im_start|>"
    for each in examples(6):
        ids = chat.encode_example(own, each.messages, each.completion).input_ids
        assert ids[0] == own.bos_token_id
        assert ids.count(own.bos_token_id) == 1
        assert chat.encode_prompt(own, each.messages) == ids[: len(chat.encode_prompt(own, each.messages))]


def step_losses(tiny_model, rows, folder, fused_layers, batch_size, **options):
    from transformers import set_seed

    folder.mkdir()
    set_seed(5)
    ref = models.fetch(str(tiny_model))
    model = lora.attach_adapter(
        models.load_model(ref, dtype="float32", device="cpu"), AdapterOptions(r=4, lora_alpha=8, **options)
    )
    asked = TrainOptions(
        per_device_train_batch_size=batch_size, max_steps=3, learning_rate=1e-2, fused_layers=fused_layers
    )
    sft.train_model(model, models.load_tokenizer(ref), rows, asked, compute="float32", seed=5, folder=folder)
    return [(line["loss"], line["grad_norm"]) for line in metrics.read(folder / "metrics.jsonl")]


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_packed_rows_give_the_loss_and_gradient_of_padded_ones(tiny_model, rows, tmp_path, kind):
    assert len({len(row["input_ids"]) for row in rows.select(range(6))}) > 1  # else nothing is padded
    packed = step_losses(tiny_model, rows, tmp_path / "packed", "always", 6, kind=kind)
    padded = step_losses(tiny_model, rows, tmp_path / "padded", "never", 6, kind=kind)
    for a, b in zip(packed, padded, strict=True):
        assert a == pytest.approx(b, rel=1e-4)


def test_packed_rows_do_not_attend_to_each_other(tiny_model, rows):
    """A row's losses in a pack are those that it has alone."""
    from fintune.training.fused.batch import PackedCollator, SequenceBounds
    from fintune.training.fused.model import FusedModel

    ref = models.fetch(str(tiny_model))
    model = lora.attach_adapter(models.load_model(ref, dtype="float32", device="cpu"), AdapterOptions(r=4))
    fused = FusedModel(model, dtype=torch.float32)

    def losses(part):
        batch = PackedCollator()(part)
        with torch.no_grad():
            return fused.loss(
                batch["input_ids"][0],
                batch["position_ids"][0],
                SequenceBounds(batch["lengths"], batch["offsets"]),
                batch["rows"],
                batch["targets"],
                1.0,
            ).losses

    together = losses(list(rows)[:4])
    alone = torch.cat([losses([row]) for row in list(rows)[:4]])
    assert torch.allclose(together, alone, atol=1e-5)
    other = [list(rows)[4], *list(rows)[1:4]]
    tail = len(alone) - len(losses([next(iter(rows))]))
    assert torch.allclose(losses(other)[-tail:], together[-tail:], atol=1e-5)
