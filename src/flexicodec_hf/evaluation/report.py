"""What a run found: totals, tables, JSON and pictures."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .common import EvaluationError, require


# One clip by one system: its name, what was measured, and what that comes from.
Row = dict[str, Any]

# Averaged over clips. The rates of errors, tokens, bits and time are sums over sums.
_AVERAGED = (
    "pesq_nb",
    "pesq_wb",
    "stoi",
    "mcd",
    "mel_distance",
    "speaker_similarity",
    "dnsmos_signal",
    "dnsmos_background",
    "dnsmos_overall",
    "dnsmos_p808",
)

# Header, value and format of the columns of the tables; empty ones are left out.
_COLUMNS = (
    ("WER %", "wer", "{:.1%}"),
    ("CER %", "cer", "{:.1%}"),
    ("PESQ nb", "pesq_nb", "{:.2f}"),
    ("PESQ wb", "pesq_wb", "{:.2f}"),
    ("STOI", "stoi", "{:.3f}"),
    ("MCD dB", "mcd", "{:.2f}"),
    ("mel distance", "mel_distance", "{:.3f}"),
    ("speaker", "speaker_similarity", "{:.3f}"),
    ("DNSMOS", "dnsmos_overall", "{:.2f}"),
    ("DNSMOS P.808", "dnsmos_p808", "{:.2f}"),
    ("tokens/s", "tokens_per_second", "{:.2f}"),
    ("spread", "tokens_per_second_std", "{:.2f}"),
    ("bits/s", "bits_per_second", "{:.0f}"),
    ("RTF", "real_time_factor", "{:.3f}"),
)


@dataclass(frozen=True)
class Report:
    """
    The results of a run.

    Args:
        rows: One for each clip and system, in their orders.
        systems: The settings of each system, by its label.
        settings: Of the run.
        failed: A message for each clip that could not be read, or that a system refused.
    """

    rows: list[Row]
    systems: Mapping[str, Mapping[str, Any]]
    settings: Mapping[str, Any] = field(default_factory=dict)
    failed: list[str] = field(default_factory=list)

    def totals(self) -> dict[str, dict[str, Any]]:
        """
        What each system gives over all clips, by its label:

        - `wer`, `cer`: fractions; the errors of all clips over their words or characters, with these counts;
        - `tokens_per_second`, `bits_per_second`, `real_time_factor`: over all seconds of audio; with
          `tokens_per_second_std`, the standard deviation between clips;
        - the other measures: means over the clips that have them (`..._count`), and standard deviations (`..._std`).
        """
        totals = {label: _total([row for row in self.rows if row["system"] == label]) for label in self.systems}
        return {label: total for label, total in totals.items() if total["clips"]}

    def table(self) -> str:
        """The totals as a Markdown table, a line for each system."""
        return _markdown(("system", "clips"), [(label, str(t["clips"]), t) for label, t in self.totals().items()])

    def table_of_clips(self) -> str:
        """The results as a Markdown table, a line for each clip and system."""
        return _markdown(("clip", "system"), [(row["clip"], row["system"], _total([row])) for row in self.rows])

    def as_dict(self) -> dict[str, Any]:
        """All of it, for JSON."""
        return {
            "settings": dict(self.settings),
            "systems": {label: dict(settings) for label, settings in self.systems.items()},
            "totals": self.totals(),
            "failed": self.failed,
            "clips": self.rows,
        }

    def save(self, path: str | Path) -> None:
        """Write `as_dict` to a JSON file."""
        Path(path).write_text(json.dumps(self.as_dict(), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

    def plot(self, path: str | Path) -> None:
        """
        Draw error rate and quality against the rate of tokens, a curve for each way of merging and number of rows.

        Args:
            path: The picture to write: `.png`, `.svg` or `.pdf`.

        Raises:
            EvaluationError: matplotlib is missing, or no system has both a rate and WER or PESQ.
        """
        require("matplotlib", "the plot")
        from matplotlib.figure import Figure

        totals = self.totals()
        panels = [
            ("word error rate (%)", {"": "wer"}, 100.0),
            ("PESQ", {"narrow band": "pesq_nb", "wide band": "pesq_wb"}, 1.0),
        ]
        panels = [panel for panel in panels if self._curves(totals, panel[1])]
        if not panels:
            raise EvaluationError("there is nothing to draw: measure wer or pesq of the codec.")
        figure = Figure(figsize=(5.5 * len(panels), 4), layout="constrained")
        all_axes = figure.subplots(1, len(panels), squeeze=False)[0]
        for axes, (title, keys, scale) in zip(all_axes, panels, strict=True):
            for (curve, measure), labels in self._curves(totals, keys).items():
                points = [
                    (totals[label]["tokens_per_second"], totals[label][keys[measure]] * scale) for label in labels
                ]
                name = ", ".join(filter(None, (curve, measure)))
                axes.plot(*zip(*sorted(points), strict=True), marker="o", label=name)
            for key in keys.values():
                if key in totals.get("original", {}):
                    axes.axhline(totals["original"][key] * scale, color="gray", linestyle="--", label="original")
            axes.set(xlabel="tokens per second", ylabel=title)
            axes.grid(alpha=0.3)
            axes.legend(fontsize="small")
        figure.savefig(path, dpi=150)

    def _curves(self, totals: Mapping[str, Any], keys: Mapping[str, str]) -> dict[tuple[str, str], list[str]]:
        curves: dict[tuple[str, str], list[str]] = {}
        for label, total in totals.items():
            if "tokens_per_second" not in total:
                continue
            rows = self.systems[label].get("num_quantizers")
            merged = "fixed" if "fixed_frame_rate" in self.systems[label] else "merged by similarity"
            for measure, key in keys.items():
                if key in total:
                    curves.setdefault((f"{merged}, {rows} row{'s' if rows != 1 else ''}", measure), []).append(label)
        return curves


def _total(rows: Sequence[Row]) -> dict[str, Any]:
    total: dict[str, Any] = {"clips": len(rows), "seconds": sum(row["seconds"] for row in rows)}
    for rate, errors, length in (("wer", "word_errors", "words"), ("cer", "character_errors", "characters")):
        scored = _having(rows, length)
        if scored:
            total[errors], total[length] = (sum(row[name] for row in scored) for name in (errors, length))
            total[rate] = total[errors] / total[length]
    for name in _AVERAGED:
        values = [row[name] for row in _having(rows, name)]
        if values:
            total |= {
                name: statistics.fmean(values),
                f"{name}_std": statistics.pstdev(values),
                f"{name}_count": len(values),
            }
    for rate, name in (
        ("tokens_per_second", "num_tokens"),
        ("bits_per_second", "bits"),
        ("real_time_factor", "processing_seconds"),
    ):
        having = _having(rows, name)
        if having:
            total[rate] = sum(row[name] for row in having) / sum(row["seconds"] for row in having)
    counted = _having(rows, "num_tokens")
    if len(counted) > 1:
        total["tokens_per_second_std"] = statistics.pstdev(row["num_tokens"] / row["seconds"] for row in counted)
    return total


def _having(rows: Iterable[Row], name: str) -> list[Row]:
    return [row for row in rows if row.get(name) is not None]


def _markdown(names: tuple[str, str], lines: Iterable[tuple[str, str, Mapping[str, Any]]]) -> str:
    """A table padded to be read as it is."""
    lines = list(lines)
    columns = [column for column in _COLUMNS if any(column[1] in values for *_, values in lines)]
    cells = [[*names, *(header for header, *_ in columns)]]
    for first, second, values in lines:
        cells.append([first, second])
        for _, key, form in columns:
            cells[-1].append(form.format(values[key]).rstrip("%") if key in values else "")
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    cells.insert(1, ["-" * width for width in widths])
    return "\n".join(
        f"| {' | '.join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))} |" for row in cells
    )
