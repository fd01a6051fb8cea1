"""Preparing by processes of this machine and by Dask: `python benchmarks/cluster.py`.

Throughput against the number of processes, and what a scheduler costs: both sides run in turn with as many processes, and the start of
the processes is part of neither. Then hours and cost of large corpora, an estimate from the measured rate; it assumes clips like those
that were measured, cores like this machine's, and storage that keeps up. The bundled clips have a second; longer ones take longer.
"""
import tempfile
from contextlib import contextmanager
from functools import partial
from itertools import count
from pathlib import Path

import pandas as pd
import typer
from preparing import write_sample
from timing import in_turn, say

from spotter.core import Params, find_root, load_params
from spotter.data.prepare import prepare_corpus
from spotter.executors import Processes, cluster

CORPORA = {"FaceForensics++": 6_000, "DFDC": 120_000, "a million": 1_000_000}   # videos


def estimate(
    rate: float,         # clips a second of one core
    cores: list[int],
    price: float,        # of an hour of one core
    share: float = 1.0,  # of that rate which each of several cores reaches
) -> pd.DataFrame:  # hours with each number of cores, and the cost, which is the same for all of them
    "Hours that corpora would take, and what they would cost: an estimate, which a run on a part of the corpus replaces."
    seconds = {name: videos/(rate*share) for name, videos in CORPORA.items()}   # of one core
    table = pd.DataFrame({f"{n} cores, h": {name: s/n/3600 for name, s in seconds.items()} for n in cores})
    return table.assign(videos=CORPORA, cost={name: s/3600*price for name, s in seconds.items()})[["videos", *table.columns, "cost"]]


@contextmanager
def dask(workers: int):
    "Workers of a scheduler on this machine, each a process of one thread."
    from distributed import LocalCluster
    with LocalCluster(n_workers=workers, threads_per_worker=1, processes=True, dashboard_address=None) as there:
        with cluster(there.scheduler_address) as executor: yield executor


def sides(params: Params, corpus: Path, folder: Path, executors: dict) -> dict:
    "What is timed: preparing the whole corpus, into a new folder each time."
    number = count()
    def prepared(executor): prepare_corpus(params, folder/str(next(number)), corpus, executor=executor)
    return {name: (partial(prepared, executor),) for name, executor in executors.items()}


def measure(clips: int, rounds: int, most: int, folder: Path) -> tuple[dict[int, float], int]:
    "Seconds with each number of processes, the fastest of the rounds, and the number of clips; the overhead of the scheduler is printed."
    settings = load_params()
    params = write_sample(settings, find_root()/settings.data.root, folder/"corpus", clips)
    n, fastest = len(pd.read_csv(folder/"corpus"/"manifest.csv")), {}
    import cv2
    for workers in range(1, most + 1):
        with Processes(workers, cv2.setNumThreads, (1,)) as here, dask(workers) as there:
            found = in_turn(sides(params, folder/"corpus", folder/str(workers), dict(here=here, dask=there)), rounds)
        fastest[workers] = min(round["here"] for round in found)
        print(f"{workers} processes: {n/fastest[workers]:.2f} clips/s", flush=True)
        say("time with Dask / processes of this machine", [round["dask"]/round["here"] for round in found])
    return fastest, n


def main(clips: int = typer.Option(24, help="of the bundled corpus"), rounds: int = typer.Option(3, help="how often both sides are timed"),
         processes: int = typer.Option(2, help="up to how many"), cores: list[int] = typer.Option([16, 64, 256], help="of the estimates"),
         price: float = typer.Option(0.05, help="of an hour of one core, in whatever currency")):
    "Print throughput, the overhead of the scheduler, and estimated hours of large corpora."
    with tempfile.TemporaryDirectory() as folder: fastest, n = measure(clips, rounds, processes, Path(folder))
    share = fastest[1]/fastest[processes]/processes
    print(f"{processes} processes do {share*processes:.2f} times the work of one")
    print(f"estimate, from {n/fastest[1]:.2f} clips/s of one core, of which each of several keeps {share:.0%}; a core hour: {price:g}")
    print(estimate(n/fastest[1], cores, price, share).round(1).to_string())


if __name__ == "__main__": typer.run(main)
