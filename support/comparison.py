"""Two evaluations of the same problems: which problems each of them solves, and what that can show."""

from collections import Counter

from scipy.stats import binomtest

SIGNIFICANCE = 0.05  # a difference with a larger p-value is not claimed

ROWS = {  # of a report's table, with their format
    "strict_accuracy": ".1%",
    "lenient_accuracy": ".1%",
    "format_rate": ".1%",
    "truncated_rate": ".1%",
    "mean_completion_tokens": ".1f",
    "reflection_rate": ".1%",
}
KINDS = {(True, False): "gained", (False, True): "lost", (True, True): "both", (False, False): "neither"}
SHOTS = {True: "with one worked example", False: "zero-shot"}  # by ONE_SHOT
IN_COLUMNS = (*ROWS, "strict_ci95", "n")  # what such a table is made of


def kinds(rows: list[dict], baseline: list[dict], key: str = "strict") -> list[str]:
    """Of each problem, which of the two gets it right: 'gained', 'lost', 'both' or 'neither'."""
    return [KINDS[row[key], other[key]] for row, other in zip(rows, baseline, strict=True)]


def compare(rows: list[dict], baseline: list[dict], key: str = "strict") -> dict:
    """Paired strict (or lenient) results: the four counts, the difference, exact p-value of McNemar's test (1947): were
    both equally good, each problem that one alone gets right would fall to either with probability 1/2."""
    counts = Counter(kinds(rows, baseline, key))
    gained, lost = counts["gained"], counts["lost"]
    return {
        "difference": (gained - lost) / len(rows),
        "both_right": counts["both"],
        "only_model_right": gained,
        "only_baseline_right": lost,
        "both_wrong": counts["neither"],
        "mcnemar_p": binomtest(gained, gained + lost).pvalue if gained + lost else 1.0,
        "n": len(rows),
    }


def in_words(comparison: dict) -> str:
    """The comparison as a sentence: a difference, or none that so many problems could show."""
    p, n, points = comparison["mcnemar_p"], comparison["n"], 100 * comparison["difference"]
    p_text = "p < 0.001" if p < 0.001 else f"p = {p:.3f}"
    if p >= SIGNIFICANCE:
        return f"no difference that n = {n:,} could show ({points:+.1f} points, {p_text})"
    return f"{'better' if points > 0 else 'worse'} by {abs(points):.1f} points, {p_text}, n = {n:,}"


def cells(reports: dict[str, dict]) -> list[list[str]]:
    """A column for each named report, the names on top; of two, also the second minus the first."""
    has_change = len(reports) == 2
    rows = [["", *reports, *["difference"] * has_change]]
    for key, unit in ROWS.items():
        values = [report[key] for report in reports.values()]
        rows.append([key.replace("_", " "), *("-" if value is None else f"{value:{unit}}" for value in values)])
        if has_change and None not in values:
            rows[-1].append(f"{(100 if unit == '.1%' else 1) * (values[1] - values[0]):+.1f}")
        if key == "strict_accuracy":
            intervals = (report["strict_ci95"] for report in reports.values())
            rows.append(["  95% interval", *("-" if ci is None else f"{ci[0]:.1%} - {ci[1]:.1%}" for ci in intervals)])
    return [*rows, ["problems (n)", *(f"{report['n']:,}" for report in reports.values())]]


def table(reports: dict[str, dict]) -> str:
    """`cells` in columns of text."""
    widths = [max(18, *(len(name) + 2 for name in reports))] * len(reports) + [12]
    lines = []
    for label, *values in cells(reports):
        columns = (f"{value:>{width}}" for value, width in zip(values, widths, strict=False))
        lines.append(f"{label:<24}{''.join(columns)}".rstrip())
    return "\n".join(lines)
