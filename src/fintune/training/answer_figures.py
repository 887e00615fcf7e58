"""What held-out answers say of a model that was trained with KTO: rewards by label, each answer counting the same."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass
class AnswerFigures:
    """Adds batches up.

    A reward is beta times the log-probability that an answer has gained over the reference, so that zero is where the
    reference stands: desired answers belong above it, undesired ones below.
    """

    _rewards: dict[bool, list[float]] = field(default_factory=lambda: {True: [], False: []})
    _logps: dict[bool, list[float]] = field(default_factory=lambda: {True: [], False: []})
    _loss: float = 0.0
    _kl: float = 0.0

    def add(
        self, labels: Sequence[bool], rewards: Sequence[float], logps: Sequence[float], *, loss: float, kl: float
    ) -> None:
        """A batch.

        Args:
            labels: Of its answers.
            rewards: Likewise.
            logps: Log-probability of each answer.
            loss: Mean over the answers.
            kl: Estimate of the divergence from the reference, in nats an answer.
        """
        for label, reward, logp in zip(labels, rewards, logps, strict=True):
            self._rewards[label].append(reward)
            self._logps[label].append(logp)
        self._loss += loss * len(labels)
        self._kl += kl * len(labels)

    def figures(self) -> dict[str, float]:
        """Loss and what :data:`fintune.training.preference.FIGURES` names, but for a label that no answer has.

        ``rewards/chosen_right`` and ``rewards/rejected_right`` are the shares on the right side of zero.
        """
        num = sum(map(len, self._rewards.values()))
        found = {"loss": self._loss / num, "kl": self._kl / num}
        for label, name, sign in ((True, "chosen", 1), (False, "rejected", -1)):
            rewards = self._rewards[label]
            if rewards:
                found[f"rewards/{name}"] = sum(rewards) / len(rewards)
                found[f"rewards/{name}_right"] = sum(sign * reward > 0 for reward in rewards) / len(rewards)
                found[f"logps/{name}"] = sum(self._logps[label]) / len(rewards)
        if all(self._rewards.values()):
            found["rewards/margins"] = found["rewards/chosen"] - found["rewards/rejected"]
        return found


def right_sides(line: Mapping[str, Any]) -> dict[str, float]:
    """Of an evaluation, the shares of held-out answers on the right side of the reference, by label.

    Args:
        line: Of ``metrics.jsonl``.
    """
    names = (("desired", "eval_rewards/chosen_right"), ("undesired", "eval_rewards/rejected_right"))
    return {label: float(line[name]) for label, name in names if name in line}


def told_right_sides(shares: Mapping[str, float]) -> str:
    """``90.0% of the desired answers above, 80.0% of the undesired answers below the reference``, or either alone."""
    where = {"desired": "above", "undesired": "below"}
    told = ", ".join(f"{share:.1%} of the {label} answers {where[label]}" for label, share in shares.items())
    return f"{told} the reference"
