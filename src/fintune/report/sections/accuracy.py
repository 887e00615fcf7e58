"""The headline of a run, the accuracy of every form of the model, decoding modes compared, and confidence."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from fintune.config import Config
from fintune.evaluation.metrics import Rates
from fintune.evaluation.statistics import accuracy_at, accuracy_by_coverage, compare_paired
from fintune.report.formatting import (
    KIND_LABELS,
    MODE_LABELS,
    Cell,
    HtmlTable,
    Row,
    format_interval,
    format_invalid,
    format_percent,
    format_seconds,
    kind_cell,
    kind_colour,
    kind_label,
    paired_cells,
)
from fintune.report.plots import Curve, Dot, coverage_plot, dot_plot
from fintune.report.run_data import ModelResults, RunData
from fintune.report.sections.training import regression_sentence

GROUPS = (
    ("steps of the gold program", "by_num_steps"),
    ("operation in the gold program", "by_operation"),
    ("source of the evidence", "by_evidence"),
    ("type of question", "by_question_type"),
)
"""Groupings of the questions by name, each with the attribute of a score that has its figures."""
COVERAGES = (1.0, 0.8, 0.5, 0.2)
"""Shares of the questions that are answered, as columns of the confidence table."""
_FIGURES = ("execution\naccuracy", "95 %\ninterval", "program\naccuracy", "invalid", "seconds")
_MODE_SENTENCES = {
    "none": "",
    "general": "Completions were restricted to programs.",
    "page": "Completions were restricted to programs of the numbers and rows on their page.",
}


def headline(run: RunData) -> dict[str, str]:
    """The figures at the top of the page: ``before``, ``after`` and ``words``.

    Accuracy if predictions were scored; else perplexity before and after training; else the held-out loss; else the
    result of the regression check.
    """
    by_kind = {results.kind: results for results in run.scored}
    before = by_kind.pop("base", None)
    after = by_kind.get("adapter") or next(iter(by_kind.values()), None)
    only = before or after
    if only is None:
        return _unscored_headline(run)
    words = f"execution accuracy on {_common_n(run.scored) or 'the'} evaluation questions"
    first = format_percent(only.figures.execution_accuracy)
    if before is None or after is None:
        return {"before": first, "after": "", "words": f"{words} ({KIND_LABELS[only.kind]})"}
    words += ", before and after training"
    quantized = [results for kind, results in by_kind.items() if kind.startswith("Q")]
    shipped = by_kind.get("Q4_K_M", quantized[-1] if quantized else after)
    if shipped is not after:
        size = f" in {shipped.weights_bytes / 1e6:.0f} MB" if shipped.weights_bytes else ""
        accuracy = format_percent(shipped.figures.execution_accuracy)
        words += f"; {accuracy} as the {shipped.kind} file that ships{size}"
    return {"before": first, "after": format_percent(after.figures.execution_accuracy), "words": words}


def _unscored_headline(run: RunData) -> dict[str, str]:
    sentence = regression_sentence(run.guard)
    tail = f"; regression check: {sentence[0].lower()}{sentence[1:]}" if sentence else ""
    replayed = run.replay.get("replayed") or {}
    after = replayed.get("adapter") or replayed.get("trained")
    evaluated = [line for line in run.metrics if "eval_loss" in line]
    if after is not None:
        completions = f"perplexity of {run.replay['num_examples']:,} held-out completions"
        perplexity = f"{after['perplexity']:.2f}"
        if "base" in replayed:
            words = f"{completions} before and after training, lower is better{tail}"
            return {"before": f"{replayed['base']['perplexity']:.2f}", "after": perplexity, "words": words}
        if not evaluated:
            return {"before": perplexity, "after": "", "words": f"{completions} after training{tail}"}
    if evaluated:
        is_best_kept = run.config.train.select_checkpoint == "best_loss"
        line = min(evaluated, key=lambda line: line["eval_loss"]) if is_best_kept else evaluated[-1]
        words = f"loss on held-out examples after step {line['step']:,}{tail}"
        return {"before": f"{line['eval_loss']:.3f}", "after": "", "words": words}
    return {"before": run.config.run.name, "after": "", "words": sentence or "This run has no measurements yet."}


def accuracy_section(run: RunData) -> dict[str, Any]:
    """Variables of the template; nothing if nothing was scored."""
    scored = [results for results in run.results if results.score is not None]
    scored.sort(key=lambda results: list(KIND_LABELS).index(results.kind))
    if not scored:
        return {}
    cut_off = ", ".join(f"{results.label} {results.num_cut_off}" for results in scored if results.num_cut_off)
    number, names = _common_n(scored), run.config.predict.decoding_modes
    has_modes = any(results.mode for results in scored)
    changes = ("difference,\npoints", "95 % interval", "answers\ngained", "answers\nlost", "times the\nseconds")
    return {
        "n": _common_n(run.scored),
        "decoding": decoding_sentence(run.config),
        "modes": [(mode, MODE_LABELS[mode]) for mode in names] if has_modes else [],
        "table": HtmlTable(
            "Accuracy",
            ("model", *(["decoding"] if has_modes else []), "n", *_FIGURES, "MB"),
            [_figures(results, (results.mode or names[0]) if has_modes else "") for results in scored],
            left=(0, 1) if has_modes else (0,),
        ),
        "differences": HtmlTable(
            "What the constraint changes", ("model", "mode", "n", *changes), list(_differences(run)), left=(0, 1)
        ),
        "plot": accuracy_plot(
            "accuracy-plot",
            "",
            [(results.label.replace("GGUF ", ""), results.figures, kind_colour(results.kind)) for results in scored],
            f"execution accuracy, %{f' (n = {number})' if number else ''}",
        ),
        "cut_off": f"Completions cut off at the token limit: {cut_off}." if cut_off else "",
        "breakdowns": list(_breakdowns(scored)),
    }


def decoding_sentence(config: Config) -> str:
    """Describe how tokens were chosen, "" for free greedy decoding; figures of other methods are not comparable."""
    options = config.predict
    strategy = {
        "greedy": "",
        "sample": "Tokens were sampled.",
        "execution_guided": f"The most probable of {options.num_candidates} candidates that runs is the answer.",
        "vote": f"{options.num_candidates} sampled programs voted on the result.",
    }[options.strategy]
    return f"{_MODE_SENTENCES[options.decoding_modes[0]]} {strategy}".strip()


def _common_n(scored: Sequence[ModelResults]) -> str:
    """The number of questions if it is the same for all, else ""."""
    numbers = {results.figures.num_predictions for results in scored}
    return f"{numbers.pop():,}" if len(numbers) == 1 else ""


def accuracy_plot(name: str, what: str, rows: Sequence[tuple[str, Rates, int]], axis: str) -> str:
    """Draw the execution accuracy of named sets of answers in numbered colours, with the accuracies in its title."""
    words = "; ".join(f"{label} {format_percent(rates.execution_accuracy)}" for label, rates, _ in rows)
    dots = [
        Dot(label, rates.execution_accuracy, *rates.execution_accuracy_interval, rates.program_accuracy, colour)
        for label, rates, colour in rows
    ]
    return dot_plot(name, f"Execution accuracy{what}: {words}", dots, axis)


def _figures(results: ModelResults, mode: str) -> Row:
    score, size = results.figures, results.weights_bytes
    return [
        kind_cell(results.kind),
        *([Cell(mode, style="code")] if mode else []),
        f"{score.num_predictions:,}",
        Cell(format_percent(score.execution_accuracy), style="strong"),
        format_interval(score.execution_accuracy_interval),
        format_percent(score.program_accuracy),
        format_invalid(score),
        format_seconds(results.seconds),
        "" if size is None else f"{size / 1e6:,.1f}",
    ]


def _breakdowns(scored: Sequence[ModelResults]) -> Iterator[HtmlTable]:
    """Execution accuracy by group of questions: groups in rows, kinds of model and modes in columns."""
    for name, attribute in GROUPS:
        groups = [getattr(results.figures, attribute) for results in scored]
        rows = []
        for key in sorted({key for group in groups for key in group}):
            number = max(group[key].num_predictions for group in groups if key in group)
            shares = [format_percent(group[key].execution_accuracy) if key in group else "" for group in groups]
            rows.append([group_label(key), f"{number:,}", *shares])
        yield HtmlTable(f"By {name}", (name, "n", *(results.label for results in scored)), rows)


def group_label(key: int | str) -> str:
    """Label of a group of questions."""
    return str(key).replace("yes_no", "yes or no")


def _differences(run: RunData) -> Iterator[Row]:
    """The effect of each other mode on the kinds of model that were scored in both."""
    first = {results.kind: results for results in run.scored}
    for after in run.results:
        if after.mode and after.score is not None and after.kind in first:
            before = first[after.kind]
            number, points, *others = paired_cells(compare_paired(before.correct, after.correct))
            ratio = f"{after.seconds / before.seconds:.2f}" if before.seconds else ""
            head = (kind_cell(after.kind), Cell(after.mode, style="code"), number, Cell(points, style="strong"))
            yield [*head, *others, ratio]


def confidence_section(run: RunData) -> dict[str, Any]:
    """Accuracy if the least certain answers are withheld; nothing unless a kind has a confidence for every answer."""
    curves = {}
    for results in run.first_mode:
        answers = [(results.predictions[id_].confidence, right) for id_, right in results.correct.items()]
        known = [(confidence, right) for confidence, right in answers if confidence is not None]
        if known and len(known) == len(answers):
            curves[results.kind] = accuracy_by_coverage(known)
    if not curves:
        return {}
    rows: list[Row] = [
        [kind_cell(kind), f"{len(curve):,}", *(format_percent(accuracy_at(curve, share)) for share in COVERAGES)]
        for kind, curve in curves.items()
    ]
    words = "; ".join(f"{kind_label(kind)} {format_percent(accuracy_at(curve, 0.5))}" for kind, curve in curves.items())
    drawn = [
        (kind_colour(kind), Curve([(index + 1) / len(curve) for index in range(len(curve))], curve))
        for kind, curve in curves.items()
    ]
    return {
        "table": HtmlTable(
            "Accuracy by coverage", ("answered", "n", *(f"{100 * share:.0f} %" for share in COVERAGES)), rows
        ),
        "plot": coverage_plot("confidence-plot", f"Accuracy of the more confident half of the answers: {words}", drawn),
        "is_vote": run.config.predict.strategy == "vote",
        "num_candidates": run.config.predict.num_candidates,
    }
