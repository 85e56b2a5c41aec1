"""Train the model; stopped at any time, the same command goes on from the last checkpoint.

    python train.py DATA RUN --steps 1400     # a first model, its learning rate gone all the way down
    python train.py DATA RUN --steps 5600     # goes on from there, with the rate back up: the model in this repository

DATA is prepare.py's output folder. RUN receives checkpoint.pt and log.csv. Everything random depends on the seed and
the step alone, so a run that was interrupted draws the batches that an uninterrupted one would have drawn.
"""

import argparse
import csv
import math
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from model import GPT2, Config
from torch import Tensor

CONFIG = Config(n_vocab=2048, n_ctx=256, n_embd=192, n_layer=6, n_head=6, dropout=0.1)
BATCH = 16
LEARNING_RATE, WARMUP, DECAY = 2e-3, 200, 0.5  # DECAY: the part of the steps over which the rate falls to (almost) 0
WEIGHT_DECAY = 0.1
STORIES_FIRST, STORIES_LAST = 0.4, 0.9  # the part of a batch that is TinyStories, at the first and at the last step
EVERY = 200  # steps between two validations, each with a checkpoint
SEED = 1
COLUMNS = ["step", "tokens", "seconds", "rate", "train", "stories_val", "tales_val"]


def rate(step: int, steps: int) -> float:
    """Linear warm-up, a plateau, then a cosine down to 1 %: a run may be drawn out while it is on the plateau."""
    left = (steps - step) / (DECAY * steps)
    falling = 1.0 if left >= 1 else 0.01 + 0.99 * 0.5 * (1 - math.cos(math.pi * left))
    return LEARNING_RATE * min((step + 1) / WARMUP, falling)


class Texts:
    """Windows of n_ctx + 1 tokens from a stream of texts, each of which begins with <|endoftext|> (id 0)."""

    def __init__(self, path: Path) -> None:
        self.ids = np.load(path)
        last = len(self.ids) - CONFIG.n_ctx - 1
        starts = np.flatnonzero(self.ids == 0)
        self.starts, self.last = starts[starts < last], last

    def draw(self, n: int, rng: np.random.Generator) -> np.ndarray:
        """(n, n_ctx + 1): half of the windows begin where a text begins (or at its first word), half anywhere."""
        begin = rng.choice(self.starts, n) + rng.integers(0, 2, n)
        begin = np.where(rng.random(n) < 0.5, begin, rng.integers(0, self.last, n))
        return self.ids[begin[:, None] + np.arange(CONFIG.n_ctx + 1)].astype(np.int64)

    def all(self) -> Tensor:
        """(n, n_ctx + 1): the first 40,000 tokens, each predicted once."""
        n = min(40_000, self.last) // CONFIG.n_ctx
        begin = np.arange(n) * CONFIG.n_ctx
        return torch.from_numpy(self.ids[begin[:, None] + np.arange(CONFIG.n_ctx + 1)].astype(np.int64))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("run", type=Path)
    parser.add_argument("--steps", type=int, required=True)
    options = parser.parse_args()
    steps, checkpoint = options.steps, options.run / "checkpoint.pt"
    options.run.mkdir(parents=True, exist_ok=True)

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(SEED)
    model = GPT2(CONFIG).to(device).train()
    matrices = [p for p in model.parameters() if p.dim() == 2]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": vectors, "weight_decay": 0.0}],
        betas=(0.9, 0.98),
        fused=True,
    )
    step, seconds, rows = 0, 0.0, []
    if checkpoint.exists():
        state = torch.load(checkpoint, map_location=device, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step, seconds, rows = state["step"], state["seconds"], state["rows"]

    loss_of = torch.compile(model.loss)
    stories, tales = Texts(options.data / "stories_train.npy"), Texts(options.data / "tales_train.npy")
    held_out = {name: Texts(options.data / f"{name}_val.npy").all() for name in ("stories", "tales")}

    def mean_loss(windows: Tensor) -> float:
        model.eval()
        with torch.no_grad(), torch.autocast(device, torch.bfloat16):
            # whole batches only: another shape would be compiled anew
            batches = [b.to(device) for b in windows.split(BATCH) if len(b) == BATCH]
            mean = float(np.mean([loss_of(b[:, :-1], b[:, 1:]).item() for b in batches]))
        model.train()
        return mean

    def save(recent: list[float]) -> None:
        val = [mean_loss(held_out[name]) for name in ("stories", "tales")]
        used = rate(step - 1, steps)
        measured = [round(v, 6) for v in (used, float(np.mean(recent)), *val)]
        rows.append([step, step * BATCH * CONFIG.n_ctx, round(seconds), *measured])
        print(*(f"{name} {value}" for name, value in zip(COLUMNS, rows[-1], strict=True)), flush=True)
        with open(options.run / "log.csv", "w", newline="") as f:
            csv.writer(f).writerows([COLUMNS, *rows])
        state = {"config": asdict(CONFIG), "step": step, "steps": steps, "seconds": seconds, "rows": rows}
        unfinished = checkpoint.with_suffix(".new")
        torch.save({**state, "model": model.state_dict(), "optimizer": optimizer.state_dict()}, unfinished)
        unfinished.replace(checkpoint)

    recent: list[float] = []
    while step < steps:
        began = time.perf_counter()
        rng = np.random.default_rng([SEED, step])
        torch.manual_seed(SEED + step)  # for dropout
        n = rng.binomial(BATCH, STORIES_FIRST + (STORIES_LAST - STORIES_FIRST) * step / steps)
        windows = torch.from_numpy(np.concatenate([stories.draw(n, rng), tales.draw(BATCH - n, rng)])).to(device)
        with torch.autocast(device, torch.bfloat16):
            loss = loss_of(windows[:, :-1], windows[:, 1:])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = rate(step, steps)
        optimizer.step()
        optimizer.zero_grad()
        recent.append(loss.item())
        step += 1
        seconds += time.perf_counter() - began
        if step % EVERY == 0 or step == steps:
            save(recent)
            recent = []


if __name__ == "__main__":
    main()
