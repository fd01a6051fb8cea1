"""One process that loads training clips against one that only decodes their crops: `python benchmarks/loading.py`.

Both sides take the same crops in turn, so the ratio holds while the machine's speed drifts. 1.0 would mean that finding and reading the
bytes, augmentation, scaling and normalisation cost nothing. Needs the prepared crops (`dvc repro prepare`).
"""
import statistics

import cv2
import numpy as np
import torch
import typer
from timing import say, seconds

from spotter.core import find_root, load_params
from spotter.data.loader import ClipDataset
from spotter.data.sampling import sample_positions
from spotter.data.store import PLACE, ClipStore, shard_path


def encoded(store: ClipStore, clip_id: str, positions) -> list[tuple[np.ndarray, int]]:
    "Bytes of crops, and of their masks where there are some, with OpenCV's flag for each."
    rows, found = store.index[store.index.clip_id == clip_id][PLACE].to_numpy()[list(positions)], []
    with open(shard_path(store.folder, rows[0, 0]), "rb") as file:
        for _, *places in rows.tolist():
            for (start, length), flag in zip((places[:2], places[2:]), (cv2.IMREAD_COLOR_RGB, cv2.IMREAD_GRAYSCALE)):
                file.seek(start)
                if length: found.append((np.frombuffer(file.read(length), np.uint8), flag))
    return found


def main(key: str = typer.Option("b0", help="model of params.yaml"), clips: int = 100,
         rounds: int = typer.Option(5, help="how often both sides are timed")):
    "Print the images a second of a process that loads, and its speed as a ratio to decoding alone."
    torch.set_num_threads(1); cv2.setNumThreads(1)
    params, store = load_params(), ClipStore(find_root()/"faces")
    frames, chosen = params.clips.frames, store.clips[store.clips.split == "train"].sample(clips, replace=True, random_state=0)
    data = ClipDataset(store, chosen, frames, params.models[key].image_size, augment=params.recipe(key).augment)
    images = [encoded(store, row.clip_id, sample_positions(row.n_frames, frames)) for row in chosen.itertuples()]
    def load(): return [data[0, 0, i] for i in range(len(data))]
    def decode(): return [cv2.imdecode(image, flag) for group in images for image, flag in group]
    load(); decode()
    found = [(seconds(load), seconds(decode)) for _ in range(rounds)]
    print(f"{key}: {clips} clips of {frames} frames at {params.models[key].image_size} pixels, augmented; one process of one thread: "
          f"{clips*frames/statistics.median(ours for ours, _ in found):.0f} images/s")
    say("speed of loading / decoding alone", [bare/ours for ours, bare in found])


if __name__ == "__main__": typer.run(main)
