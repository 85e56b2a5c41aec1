"""Draw training and validation loss over the steps.

    python plot.py OUT.svg LOG.csv QUARTER.csv
"""

import csv
import sys

import matplotlib

matplotlib.use("svg")
matplotlib.rcParams["svg.hashsalt"] = "mini"  # the same file from the same numbers
from matplotlib import pyplot  # noqa: E402


def main(out: str, full: str, quarter: str) -> None:
    figure, axes = pyplot.subplots(figsize=(7, 4.2), layout="constrained")
    for path, style, run in ((full, "-", ""), (quarter, "--", ", quarter run")):
        with open(path, newline="") as f:
            rows = list(csv.DictReader(f))
        for column, colour, label in (
            ("train", "0.6", "training batches, with dropout"),
            ("tales_val", "tab:orange", "held-out fairy tales"),
            ("stories_val", "tab:blue", "held-out TinyStories"),
        ):
            if column != "train" or path == full:
                x, y = [int(r["step"]) for r in rows], [float(r[column]) for r in rows]
                axes.plot(x, y, style, color=colour, label=label + run)
    axes.set(xlabel="step (4,096 tokens each)", ylabel="loss, nats per token", xlim=(0, None), ylim=(1.5, 5))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(out, metadata={"Date": None})


if __name__ == "__main__":
    main(*sys.argv[1:])
