"""How often Spotter's intervals hold the truth on made-up test sets: `python benchmarks/coverage.py`.

Writes results/coverage.csv, which nbs/4_metrics/32_coverage.ipynb shows. Minutes on one core.
"""
import pandas as pd
import typer

from spotter.core import find_root
from spotter.metrics.coverage import EFFECTS, GRAPHS, coverage_table

SIZES = (10, 30, 100)
USUAL, EASY = 1.5, 4.5            # distance between the classes: an AUC of 0.81 and of 0.996
NO_EFFECTS = (0., 0.)             # every clip on its own


def cases() -> list[tuple]:
    "Graph, identities, skill and effects of each simulation."
    usual = [(graph, n, USUAL, EFFECTS) for graph in GRAPHS for n in SIZES]
    others = [(graph, n, *case) for case in ((EASY, EFFECTS), (USUAL, NO_EFFECTS)) for graph in ("pairs", "dense") for n in SIZES[:2]]
    return usual + others


def main(trials: int = typer.Option(1000, help="test sets of each graph and size"), resamples: int = 300):
    "Simulate and write the table."
    found = []
    for graph, identities, skill, effects in cases():
        found.append(coverage_table(graph, identities, trials, skill, effects, resamples))
        print(f"{graph}, {identities} identities, skill {skill}, effects {effects}", flush=True)
    pd.concat(found).to_csv(find_root()/"results"/"coverage.csv", index=False, float_format="%.4f", lineterminator="\n")


if __name__ == "__main__": typer.run(main)
