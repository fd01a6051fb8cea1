"""`prepare_corpus` against decoding and detection alone, on the same videos with as many processes: `python benchmarks/preparing.py`.

Both sides run in turn from nothing, the start of the processes included, so the ratio holds while the machine's speed drifts.
1.0 would mean that mask videos, tracking, cropping, coding and writing cost nothing. A clip gives as many crops whatever its length,
so the bundled clips, of a second, are measured as they are and at the length of a video of FaceForensics++.
"""
import shutil
import tempfile
from functools import lru_cache, partial
from itertools import count
from pathlib import Path

import numpy as np
import pandas as pd
import typer
from timing import say, seconds

from spotter.core import FaceParams, Params, find_root, load_params
from spotter.data.corpora import index_corpus
from spotter.data.faces import make_detector
from spotter.data.prepare import prepare_corpus
from spotter.data.sampling import probe_positions
from spotter.data.video import iter_frames, read_frames, video_length, write_video
from spotter.runtime import in_processes, resolve_threads


def lengthen(source: Path, target: Path, frames: int):
    "Write a video of that many frames, the source's forwards and backwards in turn."
    images, _ = read_frames(source)
    order = np.abs((np.arange(frames) + len(images) - 1) % (2*len(images) - 2) - (len(images) - 1))
    write_video(target, [images[i] for i in order], 25)


def write_sample(
    params: Params,
    root: Path,       # corpus
    out: Path,        # folder of the sample, which a table describes; made
    clips: int,       # evenly over the index of the corpus
    frames: int = 0,  # of each clip; 0: as it is
) -> Params:          # settings that name the sample
    "Copy some clips of a corpus, or write them at another length."
    index = index_corpus(params.data, root).query("split != ''")
    chosen = index.iloc[np.linspace(0, len(index) - 1, min(clips, len(index))).astype(int)].drop_duplicates("clip_id")
    for name in filter(None, (*chosen.path, *chosen.mask_path)):
        (out/name).parent.mkdir(parents=True, exist_ok=True)
        if frames: lengthen(root/name, out/name, frames)
        else: shutil.copy(root/name, out/name)
    table = pd.DataFrame(dict(path=chosen.path, label=chosen.label, mask=chosen.mask_path, identity=chosen.path, split="train"))
    table.to_csv(out/"manifest.csv", index=False)
    return params.model_copy(update=dict(data=params.data.model_copy(update=dict(root=str(out), layout="manifest"))))


detector_of = lru_cache(make_detector)   # one for each process


def look(path: Path, faces: FaceParams) -> int:  # faces that were found
    "Decode a video and look for faces where preparing does."
    detect, n = detector_of(faces.detector, faces.min_score), video_length(path).frames
    return sum(len(detect(frame)) for _, _, frame in iter_frames(path, probe_positions(n, faces.every)))


def measure(clips: int, frames: int, rounds: int, folder: Path):
    "Time both sides in turn and print the ratio."
    settings, workers, corpus = load_params(), resolve_threads(), folder/"corpus"
    params, number = write_sample(settings, find_root()/settings.data.root, corpus, clips, frames), count()
    videos, found = [corpus/p for p in pd.read_csv(corpus/"manifest.csv").path], []
    def prepared(): prepare_corpus(params, folder/str(next(number)), corpus, workers)
    def looked(): list(in_processes(partial(look, faces=params.faces), videos, workers))
    for _ in range(rounds):
        found.append((seconds(prepared), seconds(looked)))
        print("  prepared in {:.1f} s, decoded and looked at in {:.1f} s".format(*found[-1]), flush=True)
    print(f"{len(videos)} clips of {video_length(videos[0]).frames} frames, {params.faces.frames} crops of {params.faces.size} pixels "
          f"each, {workers} processes")
    say("time of preparing / decoding and detection", [ours/bare for ours, bare in found])


def main(clips: int = 24, rounds: int = typer.Option(3, help="how often both sides are timed"),
         lengths: list[int] = typer.Option([0, 300], help="frames of the clips; 0: as they are")):
    "Print the time of preparing as a ratio to that of decoding and detection."
    for frames in lengths:
        with tempfile.TemporaryDirectory() as folder: measure(clips, frames, rounds, Path(folder))


if __name__ == "__main__": typer.run(main)
