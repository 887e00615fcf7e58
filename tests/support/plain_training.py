"""A training loop in plain torch, one answer a forward pass without padding: what the package has to agree with."""

from __future__ import annotations

import copy
from contextlib import nullcontext

import torch
from torch.nn.functional import logsigmoid

BETA = 0.1


def answers_of(row):
    """Prompt, answer and label of each answer of a row."""
    start = row["completion_mask"].index(1)
    prompt = row["input_ids"][:start]
    own = (prompt, row["input_ids"][start:], row.get("label", True))
    rejected = row.get("rejected_ids")
    return [own, (prompt, rejected, False)] if rejected else [own]


def log_prob(model, prompt, answer):
    """Log-probability of an answer, from the logits of the model itself."""
    scores = model(input_ids=torch.tensor([prompt + answer])).logits[0].float().log_softmax(-1)
    return scores[len(prompt) - 1 : -1].gather(1, torch.tensor(answer)[:, None]).sum()


def reference_log_prob(model, reference, prompt, answer):
    """The same of the reference, which is the model with its adapter switched off if None."""
    with torch.no_grad(), model.disable_adapter() if reference is None else nullcontext():
        return log_prob(reference or model, prompt, answer)


def step_loss(model, rows, objective, *, alpha=0.0, weights=(1.0, 1.0), reference=None):
    """Loss of a step: a mean over tokens (SFT), pairs (DPO, ORPO) or answers (KTO)."""
    if objective == "sft":
        answers = [answers_of(row)[0] for row in rows]
        total = sum(log_prob(model, prompt, answer) for prompt, answer, _ in answers)
        return -total / sum(len(answer) for _, answer, _ in answers)
    if objective == "kto":
        return _kto(model, rows, weights, reference)
    losses = []
    for row in rows:
        (prompt, chosen, _), (_, rejected, _) = answers_of(row)
        logps = log_prob(model, prompt, chosen), log_prob(model, prompt, rejected)
        means = logps[0] / len(chosen), logps[1] / len(rejected)
        if objective == "orpo":
            odds = [mean - torch.log(1 - torch.exp(mean)) for mean in means]
            losses.append(-means[0] - BETA * logsigmoid(odds[0] - odds[1]))
            continue
        gains = [
            logp - reference_log_prob(model, reference, prompt, answer)
            for logp, answer in zip(logps, (chosen, rejected), strict=True)
        ]
        losses.append(-logsigmoid(BETA * (gains[0] - gains[1])) - alpha * means[0])
    return sum(losses) / len(losses)


def _kto(model, rows, weights, reference):
    both = [answers_of(row) for row in rows]
    answers = [each[0] for each in both] + [each[1] for each in both if len(each) > 1]
    gains = []
    with torch.no_grad():  # every prompt with the answer before it; the prompts of the tests differ
        for at, (prompt, _, _) in enumerate(answers):
            other = answers[at - 1][1]
            gains.append(log_prob(model, prompt, other) - reference_log_prob(model, reference, prompt, other))
    kl = (sum(gains) / len(gains)).clamp(min=0)
    losses = []
    for prompt, answer, label in answers:
        gain = log_prob(model, prompt, answer) - reference_log_prob(model, reference, prompt, answer)
        sign, weight = (1, weights[0]) if label else (-1, weights[1])
        losses.append(weight * (1 - torch.sigmoid(sign * BETA * (gain - kl))))
    return sum(losses) / len(losses)


def train_plainly(model, steps, objective, *, learning_rate, max_grad_norm=1.0, **options):
    """Train a copy of the model on lists of rows, a list a step; gives (loss, gradient norm) of each, and the copy."""
    model = copy.deepcopy(model).train()
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=learning_rate, weight_decay=0.0)
    figures = []
    for rows in steps:
        optimizer.zero_grad()
        loss = step_loss(model, rows, objective, **options)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(trained, max_grad_norm)
        optimizer.step()
        figures.append((loss.item(), norm.item()))
    return figures, model.eval()
