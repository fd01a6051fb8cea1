"""Feed the readers of strangers' files with damaged ones: `python benchmarks/fuzz.py SECONDS [checkpoint params split manifest video]`.
Each reader has so many seconds; what a reader fails at is printed by hypothesis, and becomes a test in tests/test_fuzz.py."""
import sys
import time
from pathlib import Path

from hypothesis import Phase, seed

sys.path.insert(0, str(Path(__file__).parents[1]/"tests"))
from test_fuzz import READERS, fuzzed

EXAMPLES = 100   # between two looks at the clock


def fuzz(name: str, seconds: float) -> int:
    "Number of files that a reader was fed with in this time. What it raises is raised."
    since, rounds = time.monotonic(), 0
    first = time.time_ns()   # others than last time
    while time.monotonic() - since < seconds:
        seed(first + rounds)(fuzzed(name, EXAMPLES, phases=[Phase.generate, Phase.shrink]))()
        rounds += 1
    return rounds*EXAMPLES


if __name__ == "__main__":
    if len(sys.argv) < 2: sys.exit(__doc__)
    seconds, *names = sys.argv[1:]
    for name in names or READERS: print(f"{name}: {fuzz(name, float(seconds))} files in {seconds} seconds, nothing unexpected", flush=True)
