"""Draw the curves of trainings, a row of plots for each.

python examples/plot_training.py semantic-encoder codec ar -o curves.png

Reads `trainer_state.json` in each folder, which all recipes write.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure


NOT_DRAWN = ("step", "epoch", "grad_norm", "learning_rate", "codebook")

Curves = dict[str, dict[str, list[tuple[int, float]]]]


def read_curves(folder: Path) -> Curves:
    """Steps and values, by measure and by group (`train`, `validation`)."""
    curves: Curves = {}
    for row in json.loads((folder / "trainer_state.json").read_text())["log_history"]:
        for key, value in row.items():
            name, group = key.removeprefix("eval_"), "validation" if key.startswith("eval_") else "train"
            drawn = not name.startswith("tokens_per_second") and not name.endswith(("runtime", "_per_second"))
            if name not in NOT_DRAWN and drawn and "train_runtime" not in row:  # the row of times at the end
                curves.setdefault(name, {}).setdefault(group, []).append((row["step"], value))
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
