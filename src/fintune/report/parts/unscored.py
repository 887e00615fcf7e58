"""The headline of a run without scored predictions, as one on conversations: what else was measured of its model."""

from __future__ import annotations

from fintune.report.parts import guard
from fintune.report.run_page import RunPage

_NOTHING = "Nothing was measured in this run yet."


def hero(page: RunPage) -> dict[str, str]:
    """The perplexity before and after training; else the loss on what is held out; else the guard's verdict."""
    guarded = guard.context(page.guard)
    tail = f"; guard: {guarded['words'][0].lower()}{guarded['words'][1:]}" if guarded else ""
    replayed = page.replay.get("replayed") or {}
    after = next((replayed[kind] for kind in ("adapter", "trained") if kind in replayed), None)
    evaluated = [line for line in page.metrics if "eval_loss" in line]
    if after is not None and "base" in replayed:
        number = page.replay["num_examples"]
        return {
            "before": f"{replayed['base']['perplexity']:.2f}",
            "after": f"{after['perplexity']:.2f}",
            "words": f"perplexity of {number:,} held-out completions before and after training, lower is better{tail}",
        }
    if evaluated:
        best = page.config.train.select_checkpoint == "best_loss"
        line = min(evaluated, key=lambda each: each["eval_loss"]) if best else evaluated[-1]
        words = f"loss on held-out examples behind step {line['step']:,}{tail}"
        return {"before": f"{line['eval_loss']:.3f}", "after": "", "words": words}
    if after is not None:
        words = f"perplexity of {page.replay['num_examples']:,} held-out completions after training{tail}"
        return {"before": f"{after['perplexity']:.2f}", "after": "", "words": words}
    return {"before": page.name, "after": "", "words": guarded["words"] if guarded else _NOTHING}
