"""What the commands share that can work by several processes: options, progress, and a summary."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import InputError
from ._terminal import console, note, progress

if TYPE_CHECKING:
    from ..cluster.engine import Engine
    from ..cluster.store import Shard, Store

WorkersOption = Annotated[
    int | None, typer.Option(metavar="N", min=1, help="Work by N processes on this machine (needs gpt2np[cluster]).")
]
ClusterOption = Annotated[
    str | None, typer.Option(metavar="ADDRESS", help="Work by the workers of a Dask scheduler: tcp://host:8786.")
]
ResultsOption = Annotated[
    Path | None,
    typer.Option(
        metavar="FOLDER",
        help="Where results of --workers and --cluster are kept, each under the hash of what it depends on; what is "
        "there is not computed again. All machines must see it. [default: gpt2np-results]",
    ),
]


@dataclass
class Shards:
    """Computes shards with progress for people, and counts."""

    engine: Engine
    store: Store
    began: float = field(default_factory=time.perf_counter)
    shards: int = 0
    computed: int = 0
    size: int = 0  # of what was computed last
    unit: str = ""

    def compute(self, shards: Sequence[Shard], what: str, unit: str) -> None:
        """Compute those shards whose results are not there yet; their sizes are counted in `unit`."""
        from ..cluster.engine import compute

        try:
            with console(stderr=True).status("looking for results"):
                missing = self.store.missing(shards)
            total, left = (sum(shard.size for shard in some) for some in (shards, missing))
            with progress(f"{what}, {len(shards):,} shards", total, unit, total - left) as advance:
                compute(missing, self.store, self.engine, advance)
            self.store.tidy(shards)
        except KeyboardInterrupt:
            note(f"stopped; the same command goes on from what is in {self.store.folder}")
            raise typer.Exit(130) from None
        self.shards += len(shards)
        self.computed += len(missing)
        self.size, self.unit = left, unit

    def tell(self) -> None:
        """The summary for people."""
        s = self.summary()
        note(
            f"{s['shards']:,} shards, {s['computed']:,} computed and {s['found']:,} found in {s['results']}; "
            f"{s['seconds']:,.1f} s, {s['per_second']:,.0f} {s['unit']}/s"
        )

    def summary(self) -> dict[str, Any]:
        """What was done, for --json."""
        seconds = time.perf_counter() - self.began
        return {
            "shards": self.shards,
            "computed": self.computed,
            "found": self.shards - self.computed,
            "workers": self.engine.workers,
            "seconds": round(seconds, 3),
            "unit": self.unit,
            "per_second": round(self.size / seconds, 1),
            "results": str(self.store.folder),
            "dashboard": self.engine.dashboard or None,
        }


def wanted(workers: int | None, cluster: str | None, results: Path | None) -> bool:
    """Whether the work is to be cut into shards; InputError if the options are no choice."""
    if workers is not None and cluster is not None:
        raise InputError("give --workers for this machine or --cluster for a scheduler's workers, not both")
    return workers is not None or cluster is not None or results is not None


@contextmanager
def open_shards(workers: int | None, cluster: str | None, results: Path | None) -> Iterator[Shards]:
    """The processes and the folder of --workers, --cluster and --results.

    Raises
    ------
    InputError, MissingPackageError
        If these cannot be had.
    """
    from ..cluster.engine import open_engine
    from ..cluster.store import Store

    with ExitStack() as stack:
        if wanted(workers, cluster, results):
            folder = (results or Path("gpt2np-results")).resolve()
            place = next(place for place in (folder, *folder.parents) if place.exists())
            if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
                raise InputError(f"cannot keep results in {folder}: {place} is no folder that can be written to")
        else:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        engine = stack.enter_context(open_engine(workers, cluster))
        folder.mkdir(parents=True, exist_ok=True)
        if engine.address is not None:
            pages = engine.dashboard or "none (pip install bokeh)"
            note(f"{engine.workers or 'no'} workers; dashboard: {pages}; results: {folder}")
        yield Shards(engine, Store(folder))
