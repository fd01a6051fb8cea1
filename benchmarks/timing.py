"Times of several sides that take turns, so that their ratios hold while the machine's speed drifts."
import statistics
import time


def seconds(step, *args) -> float:
    start = time.perf_counter(); step(*args)
    return time.perf_counter() - start


def in_turn(sides: dict, rounds: int) -> list[dict[str, float]]:
    "Seconds of each side, a name -> (step, *arguments), in each round. Each runs once untimed first, to fill caches and allocator."
    def second(step, *args):
        step(*args)
        return seconds(step, *args)
    return [{name: second(*side) for name, side in sides.items()} for _ in range(rounds)]


def say(text: str, ratios: list[float]):
    print(f"  {text}: {statistics.median(ratios):.2f} (from {min(ratios):.2f} to {max(ratios):.2f})", flush=True)
