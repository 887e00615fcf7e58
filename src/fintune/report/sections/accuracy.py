"""The headline of a run, the accuracy of every form of the model, decoding modes compared, and confidence."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from fintune.config import Config, DecodingMode
from fintune.evaluation.statistics import accuracy_at, accuracy_by_coverage, compare_paired
from fintune.report.formatting import (
    KIND_LABELS,
    MODE_LABELS,
    Cell,
    HtmlTable,
    format_interval,
    format_invalid,
    format_percent,
    format_seconds,
    kind_colour,
    kind_label,
)
from fintune.report.plots import Curve, Dot, coverage_plot, dot_plot
from fintune.report.run_data import MeasuredKind, ModeResults, RunData
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
    by_kind = {measured.kind: measured for measured in run.measured}
    after = by_kind.get("adapter") or next((m for m in run.measured if m.kind != "base"), None)
    before = by_kind.get("base")
    words = f"execution accuracy on {common_n(run.measured) or 'the'} evaluation questions"
    if after is not None and before is not None:
        return {
            "before": format_percent(before.score.execution_accuracy),
            "after": format_percent(after.score.execution_accuracy),
            "words": f"{words}, before and after training{_shipped_file(by_kind, after)}",
        }
    only = after or before
    if only is not None:
        accuracy = format_percent(only.score.execution_accuracy)
        return {"before": accuracy, "after": "", "words": f"{words} ({KIND_LABELS[only.kind]})"}
    return _unscored_headline(run)


def _shipped_file(by_kind: Mapping[str, MeasuredKind], after: MeasuredKind) -> str:
    quantized = [kind for kind in reversed(list(KIND_LABELS)) if kind.startswith("Q") and kind in by_kind]
    smallest = by_kind.get("Q4_K_M") or (by_kind[quantized[0]] if quantized else None)
    if smallest is None or smallest is after:
        return ""
    size = f" in {smallest.weights_bytes / 1e6:.0f} MB" if smallest.weights_bytes else ""
    return f"; {format_percent(smallest.score.execution_accuracy)} as the {smallest.kind} file that ships{size}"


def _unscored_headline(run: RunData) -> dict[str, str]:
    sentence = regression_sentence(run.guard)
    tail = f"; regression check: {sentence[0].lower()}{sentence[1:]}" if sentence else ""
    replayed = run.replay.get("replayed") or {}
    after = next((replayed[kind] for kind in ("adapter", "trained") if kind in replayed), None)
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
    return {"before": run.name, "after": "", "words": sentence or "This run has no measurements yet."}


def accuracy_section(run: RunData) -> dict[str, Any]:
    """Variables of the template; nothing if nothing was scored."""
    measured = measured_in_all_modes(run)
    if not measured:
        return {}
    unended = [f"{kind_label(m.kind, mode)} {m.num_unended}" for m, mode in measured if m.num_unended]
    return {
        "n": common_n(run.measured),
        "decoding": decoding_sentence(run.config),
        "modes": _modes(run),
        "table": _accuracy_table(run.measured),
        "plot": _accuracy_plot(measured),
        "unended": f"Completions cut off at the token limit: {', '.join(unended)}." if unended else "",
        "breakdowns": list(_breakdowns(measured)),
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


def measured_in_all_modes(run: RunData) -> list[tuple[MeasuredKind, str]]:
    """Every measurement with its decoding mode ("" for the first one), kinds in the order of the chain."""
    modes = [("", run.measured), *((other.mode, other.measured) for other in run.other_modes)]
    results = [(measured, mode) for mode, group in modes for measured in group]
    return sorted(results, key=lambda result: list(KIND_LABELS).index(result[0].kind))


def common_n(measured: Sequence[MeasuredKind]) -> str:
    """The number of questions if it is the same for all, else ""."""
    numbers = {m.score.num_predictions for m in measured}
    return f"{numbers.pop():,}" if len(numbers) == 1 else ""


def _label_cell(kind: str) -> Cell:
    return Cell(KIND_LABELS[kind], swatch=kind_colour(kind), style="nowrap")


def _figures(measured: MeasuredKind) -> list[str | Cell]:
    score = measured.score
    return [
        Cell(format_percent(score.execution_accuracy), style="strong"),
        format_interval(score.execution_accuracy_interval),
        format_percent(score.program_accuracy),
        format_invalid(score),
        format_seconds(measured.predict_seconds),
    ]


_FIGURE_NAMES = ("execution\naccuracy", "95 %\ninterval", "program\naccuracy", "invalid", "seconds")


def _megabytes(measured: MeasuredKind) -> str:
    return "" if measured.weights_bytes is None else f"{measured.weights_bytes / 1e6:,.1f}"


def _accuracy_table(measured: Sequence[MeasuredKind]) -> HtmlTable:
    rows = [[_label_cell(m.kind), f"{m.score.num_predictions:,}", *_figures(m), _megabytes(m)] for m in measured]
    return HtmlTable("Accuracy", ("model", "n", *_FIGURE_NAMES, "MB"), rows, numeric=range(1, 8))


def _accuracy_plot(measured: Sequence[tuple[MeasuredKind, str]]) -> str:
    rows = [
        Dot(
            kind_label(m.kind, mode).replace("GGUF ", ""),
            m.score.execution_accuracy,
            *m.score.execution_accuracy_interval,
            m.score.program_accuracy,
            kind_colour(m.kind),
        )
        for m, mode in measured
    ]
    number = common_n([m for m, _ in measured])
    words = "; ".join(f"{row.label} {format_percent(row.value)}" for row in rows)
    axis = f"execution accuracy, %{f' (n = {number})' if number else ''}"
    return dot_plot("accuracy-plot", f"Execution accuracy: {words}", rows, axis)


def _breakdowns(measured: Sequence[tuple[MeasuredKind, str]]) -> Iterator[HtmlTable]:
    """Execution accuracy by group of questions: groups in rows, kinds of model and modes in columns."""
    for name, attribute in GROUPS:
        groups = [getattr(m.score, attribute) for m, _ in measured]
        rows = []
        for key in sorted({key for group in groups for key in group}):
            number = max(group[key].num_predictions for group in groups if key in group)
            shares = [format_percent(group[key].execution_accuracy) if key in group else "" for group in groups]
            rows.append([group_label(key), f"{number:,}", *shares])
        columns = (name, "n", *(kind_label(m.kind, mode) for m, mode in measured))
        yield HtmlTable(f"By {name}", columns, rows, numeric=range(1, len(columns)))


def group_label(key: int | str) -> str:
    """Label of a group of questions."""
    return str(key).replace("yes_no", "yes or no")


def _modes(run: RunData) -> dict[str, Any]:
    """Decoding modes side by side; nothing if there is only one."""
    if not run.other_modes:
        return {}
    first = ModeResults(run.config.predict.decoding_modes[0], run.measured, run.predictions, run.verdicts)
    modes = [first, *run.other_modes]
    names: list[DecodingMode] = [results.mode for results in modes]
    by_mode = [{measured.kind: measured for measured in results.measured} for results in modes]
    rows = []
    for kind in KIND_LABELS:
        known = [measured[kind] for measured in by_mode if kind in measured]
        if known:
            cells = [
                cell
                for measured in by_mode
                for cell in (_figures(measured[kind]) if kind in measured else ["not measured", "", "", "", ""])
            ]
            rows.append([_label_cell(kind), f"{known[0].score.num_predictions:,}", *cells, _megabytes(known[0])])
    width = len(_FIGURE_NAMES)
    differences = [row for other in run.other_modes for row in _differences(first, other)]
    return {
        "names": [(mode, MODE_LABELS[mode]) for mode in names],
        "table": HtmlTable(
            "Accuracy by decoding mode",
            ("model", "n", *(_FIGURE_NAMES * len(modes)), "MB"),
            rows,
            numeric=range(1, 3 + width * len(modes)),
            groups=[("", 2), *((mode, width) for mode in names), ("", 1)],
        ),
        "differences": HtmlTable(
            "What the constraint changes",
            (
                "model",
                "mode",
                "n",
                "difference,\npoints",
                "95 % interval",
                "answers\ngained",
                "answers\nlost",
                "times the\nseconds",
            ),
            differences,
            numeric=range(2, 8),
        )
        if differences
        else "",
    }


def _differences(first: ModeResults, other: ModeResults) -> Iterator[list[str | Cell]]:
    """The effect of the other mode on each kind of model that was scored in both."""
    before = {measured.kind: measured for measured in first.measured}
    for after in other.measured:
        if after.kind not in before:
            continue
        sides = [{id_: v.exe_correct for id_, v in mode.verdicts[after.kind].items()} for mode in (first, other)]
        compared = compare_paired(*sides)
        low, high = compared.interval
        seconds = before[after.kind].predict_seconds
        yield [
            _label_cell(after.kind),
            Cell(other.mode, is_code=True),
            f"{compared.num_common:,}",
            Cell(compared.points, style="strong"),
            f"{100 * low:+.1f} to {100 * high:+.1f}",
            f"{compared.num_gained:,}",
            f"{compared.num_lost:,}",
            f"{after.predict_seconds / seconds:.2f}" if seconds else "",
        ]


def confidence_section(run: RunData) -> dict[str, Any]:
    """Accuracy if the least certain answers are withheld; nothing unless a kind has a confidence for every answer."""
    curves = {}
    for kind, verdicts in run.verdicts.items():
        predictions = run.predictions.get(kind, {})
        answers = [
            (confidence, verdict.exe_correct)
            for id_, verdict in verdicts.items()
            if id_ in predictions and (confidence := predictions[id_].confidence) is not None
        ]
        if answers and len(answers) == len(verdicts):
            curves[kind] = accuracy_by_coverage(answers)
    if not curves:
        return {}
    rows: list[list[str | Cell]] = [
        [
            _label_cell(kind),
            f"{len(curve):,}",
            *(format_percent(accuracy_at(curve, coverage)) for coverage in COVERAGES),
        ]
        for kind, curve in curves.items()
    ]
    columns = ("answered", "n", *(f"{100 * coverage:.0f} %" for coverage in COVERAGES))
    words = "; ".join(
        f"{KIND_LABELS[kind]} {format_percent(accuracy_at(curve, 0.5))}" for kind, curve in curves.items()
    )
    drawn = [
        (kind_colour(kind), Curve([(index + 1) / len(curve) for index in range(len(curve))], curve))
        for kind, curve in curves.items()
    ]
    return {
        "table": HtmlTable("Accuracy by coverage", columns, rows, numeric=range(1, len(columns))),
        "plot": coverage_plot("confidence-plot", f"Accuracy of the more confident half of the answers: {words}", drawn),
        "is_vote": run.config.predict.strategy == "vote",
        "num_candidates": run.config.predict.num_candidates,
    }
