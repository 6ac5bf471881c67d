"""The results of a run: totals, tables, JSON and plots."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..data.files import DataError, atomic_file, require
from .metrics import totals


# One clip by one method: their names, the values of all measures, and the counts that rates are computed from.
Row = dict[str, Any]

# Header, value and format of the columns of the tables; empty columns are left out.
_COLUMNS = (
    ("WER %", "wer", "{:.1%}"),
    ("CER %", "cer", "{:.1%}"),
    ("PESQ nb", "pesq_nb", "{:.2f}"),
    ("PESQ wb", "pesq_wb", "{:.2f}"),
    ("STOI", "stoi", "{:.3f}"),
    ("MCD dB", "mcd", "{:.2f}"),
    ("speaker", "speaker_similarity", "{:.3f}"),
    ("MOS", "mos", "{:.2f}"),
    ("tokens/s", "tokens_per_second", "{:.2f}"),
    ("spread", "tokens_per_second_std", "{:.2f}"),
    ("bits/s", "bits_per_second", "{:.0f}"),
    ("RTF", "real_time_factor", "{:.3f}"),
    ("noise %", "changed_by_noise", "{:.1%}"),
    ("gain %", "changed_by_gain", "{:.1%}"),
    ("resampling %", "changed_by_resampling", "{:.1%}"),
    ("shift %", "changed_by_shift", "{:.1%}"),
)
# What the plot shows: its panel, its name in it, and the factor of its values.
_PLOTTED = {
    "wer": ("word error rate (%)", "", 100.0),
    "pesq_nb": ("PESQ", "narrow band", 1.0),
    "pesq_wb": ("PESQ", "wide band", 1.0),
}


@dataclass(frozen=True)
class Report:
    """
    The results of a run.

    Args:
        rows: One for each clip and method, in their orders.
        methods: The settings of each method, by its label.
        settings: The settings of the run.
        failed: A message for each clip that could not be read, or that a method rejected.
    """

    rows: list[Row]
    methods: Mapping[str, Mapping[str, Any]]
    settings: Mapping[str, Any] = field(default_factory=dict)
    failed: list[str] = field(default_factory=list)

    def totals(self) -> dict[str, dict[str, Any]]:
        """
        The results of each method over all clips, by its label:

        - `wer`, `cer`: fractions; the errors of all clips over their words or characters, with these counts;
        - `tokens_per_second`, `bits_per_second`, `real_time_factor`: over all seconds of audio; with
          `tokens_per_second_std`, the standard deviation between clips;
        - the other measures: means over the clips that have them (`..._count`), and standard deviations (`..._std`).
        """
        rows = {label: [row for row in self.rows if row["method"] == label] for label in self.methods}
        return {label: _total(own) for label, own in rows.items() if own}

    def table(self, per_clip: bool = False) -> str:
        """The results as a Markdown table: a line for each method or, if asked for, for each clip and method."""
        lines = [((label, str(total["clips"])), total) for label, total in self.totals().items()]
        if per_clip:
            lines = [((row["clip"], row["method"]), _total([row])) for row in self.rows]
        columns = [column for column in _COLUMNS if any(column[1] in values for _, values in lines)]
        names = ("clip", "method") if per_clip else ("method", "clips")
        cells = [[*names, *(header for header, *_ in columns)]]
        for names, values in lines:
            shown = [form.format(values[key]).rstrip("%") if key in values else "" for _, key, form in columns]
            cells.append([*names, *shown])
        # Padded, so that it is readable as text.
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        cells.insert(1, ["-" * width for width in widths])
        rows = (" | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in cells)
        return "\n".join(f"| {row} |" for row in rows)

    def save(self, path: str | Path) -> None:
        """Write everything to a JSON file: `settings`, `methods`, `totals`, `failed`, and the rows as `clips`."""
        contents: dict[str, Any] = {"settings": self.settings, "methods": self.methods, "totals": self.totals()}
        contents |= {"failed": self.failed, "clips": self.rows}
        with atomic_file(path) as temporary:
            temporary.write_text(json.dumps(contents, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

    def plot(self, path: str | Path) -> None:
        """
        Plot error rate and quality against the token rate, one curve for each way of merging and number of codebooks.

        Args:
            path: The picture to write: `.png`, `.svg` or `.pdf`.

        Raises:
            DataError: matplotlib is missing, or no method has both a rate and WER or PESQ.
        """
        require("matplotlib", "the plot", "eval")
        from matplotlib.figure import Figure

        totals = self.totals()
        # The points of each curve of each panel.
        panels: dict[str, dict[str, list[tuple[float, float]]]] = {}
        for label, total in totals.items():
            merging = "fixed" if "fixed_frame_rate" in self.methods[label] else "merged by similarity"
            number = self.methods[label].get("num_quantizers")
            codebooks = "" if number is None else f"{number} codebook{'s' if number > 1 else ''}"
            for key in _PLOTTED.keys() & total.keys() if "tokens_per_second" in total else ():
                title, measure, scale = _PLOTTED[key]
                name = ", ".join(filter(None, (merging, codebooks, measure)))
                points = panels.setdefault(title, {}).setdefault(name, [])
                points.append((total["tokens_per_second"], total[key] * scale))
        if not panels:
            raise DataError("there is nothing to draw: measure wer or pesq of the codec.")
        figure = Figure(figsize=(5.5 * len(panels), 4), layout="constrained")
        all_axes = figure.subplots(1, len(panels), squeeze=False)[0]
        for axes, (panel, curves) in zip(all_axes, sorted(panels.items(), reverse=True), strict=True):
            for name, points in sorted(curves.items()):
                axes.plot(*zip(*sorted(points), strict=True), marker="o", label=name)
            for key, (title, _, scale) in _PLOTTED.items():
                if title == panel and key in totals.get("original", {}):
                    axes.axhline(totals["original"][key] * scale, color="gray", linestyle="--", label="original")
            axes.set(xlabel="tokens per second", ylabel=panel)
            axes.grid(alpha=0.3)
            axes.legend(fontsize="small")
        figure.savefig(path, dpi=150)


def _total(rows: list[Row]) -> dict[str, Any]:
    return {"clips": len(rows), "seconds": sum(row["seconds"] for row in rows), **totals(rows)}
