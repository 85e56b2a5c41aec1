"""Draw training and validation loss over the steps.

python plot.py LOG.csv OUT.svg
"""

import csv
import sys

import matplotlib

matplotlib.use("svg")
matplotlib.rcParams["svg.hashsalt"] = "mini"  # the same file from the same numbers
from matplotlib import pyplot  # noqa: E402

FIRST_RUN = 1400  # steps


def main(log: str, out: str) -> None:
    with open(log, newline="") as f:
        rows = list(csv.DictReader(f))
    steps = [int(row["step"]) for row in rows]
    figure, axes = pyplot.subplots(figsize=(7, 4.2), layout="constrained")
    for column, colour, label in (
        ("train", "0.6", "training batches, with dropout"),
        ("tales_val", "tab:orange", "held-out fairy tales"),
        ("stories_val", "tab:blue", "held-out TinyStories"),
    ):
        axes.plot(steps, [float(row[column]) for row in rows], color=colour, label=label)
    axes.axvline(FIRST_RUN, color="0.3", linestyle=":", label="end of the first run, a quarter of the steps")
    axes.set(xlabel="step (4,096 tokens each)", ylabel="loss, nats per token", xlim=(0, None), ylim=(1.5, 5))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(out, metadata={"Date": None})


if __name__ == "__main__":
    main(*sys.argv[1:])
