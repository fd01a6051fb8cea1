"""`prepare_corpus` against decoding and detection alone, on the same videos with as many processes: `python benchmarks/preparing.py`.

Both sides run in turn from nothing, the start of the processes included, so the ratio holds while the machine's speed drifts.
1.0 would mean that mask videos, tracking, cropping, coding and writing cost nothing.
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
from spotter.data.video import iter_frames, video_length
from spotter.runtime import in_processes, resolve_threads


def write_sample(params: Params, root: Path, out: Path, clips: int) -> Params:  # settings that name the sample
    "Some clips of a corpus, evenly over its index, as a corpus that a table describes."
    index = index_corpus(params.data, root).query("split != ''")
    chosen = index.iloc[np.linspace(0, len(index) - 1, min(clips, len(index))).astype(int)].drop_duplicates("clip_id")
    for name in filter(None, (*chosen.path, *chosen.mask_path)):
        (out/name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(root/name, out/name)
    table = pd.DataFrame(dict(path=chosen.path, label=chosen.label, mask=chosen.mask_path, identity=chosen.path, split="train"))
    table.to_csv(out/"manifest.csv", index=False)
    return params.model_copy(update=dict(data=params.data.model_copy(update=dict(root=str(out), layout="manifest"))))


detector_of = lru_cache(make_detector)   # one for each process


def look(path: Path, faces: FaceParams) -> int:  # faces that were found
    "Decode a video and look for faces where preparing does."
    detect, n = detector_of(faces.detector, faces.min_score), video_length(path).frames
    return sum(len(detect(frame)) for _, _, frame in iter_frames(path, probe_positions(n, faces.every)))


def main(clips: int = 24, rounds: int = typer.Option(3, help="how often both sides are timed")):
    "Print the time of preparing as a ratio to that of decoding and detection."
    settings, workers = load_params(), resolve_threads()
    with tempfile.TemporaryDirectory() as folder:
        params = write_sample(settings, find_root()/settings.data.root, Path(folder)/"corpus", clips)
        videos, number = [Path(folder)/"corpus"/p for p in pd.read_csv(Path(folder)/"corpus"/"manifest.csv").path], count()
        def prepared(): prepare_corpus(params, Path(folder)/str(next(number)), params.data.root, workers)
        def looked(): list(in_processes(partial(look, faces=params.faces), videos, workers))
        found = []
        for _ in range(rounds):
            found.append((seconds(prepared), seconds(looked)))
            print("  prepared in {:.1f} s, decoded and looked at in {:.1f} s".format(*found[-1]), flush=True)
    print(f"{len(videos)} clips, {params.faces.frames} crops of {params.faces.size} pixels each, {workers} processes")
    say("time of preparing / decoding and detection", [ours/bare for ours, bare in found])


if __name__ == "__main__": typer.run(main)
