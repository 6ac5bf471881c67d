"""Draw the curves of trainings, a row of plots for each.

python examples/plot_training.py semantic-encoder codec ar -o curves.png

Reads `metrics.jsonl` (train_semantic_encoder.py, train_codec.py, train_vocoder.py) or `trainer_state.json` (train_ar.py,
train_voicebox.py) in each folder.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure


NOT_DRAWN = ("step", "group", "epoch", "grad_norm", "gradient_norm", "learning_rate", "codebook")

Curves = dict[str, dict[str, list[tuple[int, float]]]]


def read_curves(folder: Path) -> Curves:
    """By measure, and by group (`train`, `validation`): steps and values."""
    if (folder / "metrics.jsonl").exists():
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    else:
        history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
        rows = [row | {"group": "validation" if "eval_loss" in row else "train"} for row in history]
        rows = [
            {name.removeprefix("eval_"): value for name, value in row.items()}
            for row in rows
            if "train_runtime" not in row
        ]
    curves: Curves = {}
    for row in rows:
        for name, value in row.items():
            drawn = not name.startswith("tokens_per_second") and not name.endswith(("runtime", "_per_second"))
            if name not in NOT_DRAWN and drawn:
                curves.setdefault(name, {}).setdefault(row["group"], []).append((row["step"], value))
    return curves


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Draw the curves of trainings.")
    parser.add_argument("folders", type=Path, nargs="+", help="output directories of trainings")
    parser.add_argument("-o", "--output", type=Path, required=True, help="picture")
    args = parser.parse_args(argv)

    runs = {folder.name: read_curves(folder) for folder in args.folders}
    num_columns = max(map(len, runs.values()))
    figure = Figure(figsize=(2.6 * num_columns, 2.4 * len(runs)), layout="constrained")
    for axes, (run, curves) in zip(figure.subplots(len(runs), num_columns, squeeze=False), runs.items(), strict=True):
        for axis in axes[len(curves) :]:
            axis.axis("off")
        for axis, (measure, groups) in zip(axes, curves.items(), strict=False):
            for group, points in groups.items():
                axis.plot(*zip(*points, strict=True), label=group, marker="." if group == "validation" else None)
            axis.set_title(f"{run}: {measure}", fontsize="small")
            axis.tick_params(labelsize="x-small")
            axis.grid(alpha=0.3)
            if len(groups) > 1:
                axis.legend(fontsize="x-small")
    figure.savefig(args.output, dpi=100)


if __name__ == "__main__":
    main()
