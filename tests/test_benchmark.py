"""Detectors that are not Spotter's, from files and tables to scores: `spotter benchmark` and `spotter score` on a toy corpus.

Two detectors are written here: one calls OpenCV and gives heatmaps, the other looks at the size of the file."""
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from sklearn.metrics import average_precision_score, roc_auc_score
from typer.testing import CliRunner

from spotter.cli import app
from spotter.core import find_root, load_params
from spotter.data.corpora import index_dataset
from spotter.data.faces import DETECTORS
from spotter.data.prepare import prepare_corpus
from spotter.data.store import ClipStore
from spotter.data.toy import TOY_SQUARES, toy_detector, toy_video, write_toy_corpus
from spotter.evaluate.foreign_maps import scored_frames, write_maps
from spotter.evaluate.leaderboard import leaderboard_row
from spotter.metrics.localisation import on_common_grid

ROOT = find_root(Path(__file__).parent)
OPENCV = '''
import cv2, numpy as np

def predict(path):
    "Fine detail, and where it is."
    video, maps = cv2.VideoCapture(path), []
    while True:
        there, frame = video.read()
        if not there: break
        maps.append(cv2.blur(np.abs(cv2.Laplacian(cv2.cvtColor(frame, cv2.COLOR_BGR2GRAY), cv2.CV_32F)), (9, 9)))
    highest = np.stack(maps).max((1, 2)).mean()
    return highest/(highest + 50), np.stack(maps)
'''
SIZE = '''
import os, time

def predict(path):
    "Noise costs bytes."
    if os.environ.get("SLOW"): time.sleep(.3)
    if path.endswith("/007.mp4"): raise OSError("the disk is asleep")
    return min(1, os.path.getsize(path)/200_000)
'''


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    "A project whose corpus is a toy, prepared; the detectors lie in its folder."
    folder = tmp_path_factory.mktemp("project")
    settings = yaml.safe_load((ROOT/"params.yaml").read_text())
    settings["faces"].update(detector="toy", size=112)
    settings["clips"]["eval_frames"], settings["evaluate"]["resamples"] = 2, 40
    (folder/"params.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))
    write_toy_corpus(folder/"data")
    with pytest.MonkeyPatch.context() as m, contextlib.chdir(folder):
        m.setitem(DETECTORS, "toy", toy_detector)
        prepare_corpus(load_params(), "faces", workers=1)
    (folder/"detail.py").write_text(OPENCV); (folder/"size.py").write_text(SIZE)
    return folder


def spotter(folder: Path, *arguments):
    with contextlib.chdir(folder): return CliRunner().invoke(app, [*map(str, arguments)])


def side_of(clip_id: str) -> int: return TOY_SQUARES.get(clip_id.split("/")[0], 0)


# ---------------------------------------------------------------- two detectors

def test_a_detector_that_calls_opencv_only(made):
    done = spotter(made, "benchmark", "detail.py", "--json", "detail.json", "--csv", "board.csv")
    assert done.exit_code == 0, done.output
    for word in ("6 of 6 real and 12 of 12 fake test clips", "mean mask × p_fake", "seconds a video"): assert word in done.stdout
    found = json.loads((made/"detail.json").read_text())
    assert found["threshold_from"] == "validation" and found["auc"]["value"] == found["accuracy"]["value"] == 1
    shown, pooled = found["localisation"]["maps"]["shown"], found["localisation"]["pooled"]
    assert shown["pointing"]["value"] > .95 and set(shown["per_method"]) == set(TOY_SQUARES)
    assert set(shown["per_extent"]) == set(pooled) - {"all fakes"}
    assert pooled["all fakes"]["differences"]["mean mask"]["significance"] == "higher"
    table = pd.read_csv(made/"benchmark_detail"/"predictions.csv")
    index = index_dataset(made/"data").set_index("clip_id").loc[table.clip_id[table.split == "test"]]
    assert found["auc"]["value"] == pytest.approx(roc_auc_score(index.label, table.p_fake[table.split == "test"]))
    row = pd.read_csv(made/"board.csv").iloc[0]
    assert row.detector == "detail" and row.pooled_ap == pytest.approx(pooled["all fakes"]["scores"]["shown"]["value"], abs=1e-6)


def test_a_detector_that_gives_a_number_and_fails_once(made):
    done = spotter(made, "benchmark", "size.py", "--csv", "board.csv", "--json", "size.json")
    assert done.exit_code == 3 and "youtube/c23/007: OSError: the disk is asleep" in done.stdout
    assert "5 of 6 real and 12 of 12 fake" in done.stdout and "pooled" not in done.stdout
    found = json.loads((made/"size.json").read_text())
    assert found["coverage"]["real"] == dict(scored=5, total=6) and found["n"]["clips"] == 17 and "localisation" not in found
    table = pd.read_csv(made/"benchmark_size"/"predictions.csv").set_index("clip_id")
    assert np.isnan(table.p_fake["youtube/c23/007"]) and table.p_fake.notna().sum() == 23
    assert "size" in pd.read_csv(made/"board.csv").detector.tolist()


def test_a_killed_run_goes_on(made, tmp_path):
    env = os.environ | dict(SLOW="1", PYTHONPATH=os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    command = [sys.executable, "-c", "from spotter.cli import app; app()", "benchmark", "size.py", "--out", str(tmp_path/"out")]
    table, limit = tmp_path/"out"/"predictions.csv", time.monotonic() + 300
    running = subprocess.Popen(command, cwd=made, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not table.is_file() or table.read_text().count("\n") < 4:
        assert running.poll() is None and time.monotonic() < limit
        time.sleep(.05)
    running.send_signal(signal.SIGKILL); running.wait()
    before = table.read_text().splitlines()
    with open(table, "a") as f: f.write("youtube/c23/0")                      # a line that was being written
    assert spotter(made, "benchmark", "size.py", "--out", tmp_path/"out").exit_code == 3
    after = table.read_text().splitlines()
    assert after[:len(before)] == before and len(after) == 25
    (made/"size2.py").write_text(SIZE + "\n")
    other = spotter(made, "benchmark", "size2.py", "--out", tmp_path/"out")
    assert other.exit_code == 2 and "another detector or corpus (detector, sha256 differ)" in other.output


# ---------------------------------------------------------------- results made elsewhere

@pytest.fixture
def results(made, tmp_path):
    "A table and heatmaps made elsewhere: right verdicts, and the true masks at half the resolution, of every second frame."
    clips = index_dataset(made/"data").query("split != 'train'")
    clips.assign(p_fake=.2 + .6*clips.label)[["clip_id", "p_fake"]].to_csv(tmp_path/"mine.csv", index=False)
    for c in clips.clip_id:
        masks = toy_video(c.split("/")[-1], side_of(c))[1]
        write_maps(tmp_path/"maps", c, masks[::2, ::2, ::2]*1., np.arange(0, 8, 2))
    return tmp_path


def test_tables_and_heatmaps_made_elsewhere(made, results):
    done = spotter(made, "score", results/"mine.csv", "--heatmaps", results/"maps", "--json", results/"mine.json")
    assert done.exit_code == 0, done.output
    found = json.loads((results/"mine.json").read_text())
    assert found["localisation"]["pooled"]["all fakes"]["scores"]["shown"]["value"] > .9
    assert found["localisation"]["furthest"] == 0 and found["localisation"]["maps"]["shown"]["iou"]["value"] > .8
    assert spotter(made, "score", results/"mine.csv", "--heatmaps", results/"none").exit_code == 2


def test_a_map_of_the_frame_is_scored_like_the_same_map_of_the_crop(made, results):
    "Pooled AP against scikit-learn, on maps that are given on the frame and, by arithmetic, on the crop."
    spotter(made, "score", results/"mine.csv", "--heatmaps", results/"maps", "--json", results/"mine.json")
    store, values, hits = ClipStore(made/"faces"), [], []
    for c in store.clips.clip_id[store.clips.split == "test"]:
        places, rows = scored_frames(store, c, 2)
        (y, x), masks = np.mgrid[:112, :112], store.read(c, places)[1]
        on_frame = toy_video(c.split("/")[-1], side_of(c))[1][rows["index"]].astype(float).reshape(2, 32, 2, 48, 2)[:, :, 0, :, 0]
        cut = []
        for m, box in zip(on_frame, rows[["x0", "y0", "x1", "y1"]].to_numpy()):
            place = [np.abs(lo + (at + .5)*(hi - lo)/112 - .5) for lo, hi, at in ((box[1], box[3], y), (box[0], box[2], x))]
            place = [np.where(p > n - 1, 2*(n - 1) - p, p) for p, n in zip(place, (64, 96))]
            cell = [np.clip((p + .5)/2 - .5, 0, n - 1) for p, n in zip(place, (32, 48))]
            low = [np.floor(p).astype(int) for p in cell]
            high = [np.minimum(p + 1, n - 1) for p, n in zip(low, (32, 48))]
            dy, dx = (p - f for p, f in zip(cell, low))
            left, right = (m[low[0], x]*(1 - dy) + m[high[0], x]*dy for x in (low[1], high[1]))
            cut.append(left*(1 - dx) + right*dx)
        v, h = on_common_grid(np.stack(cut), masks)
        values.append(v); hits.append(h)
    expected = average_precision_score(np.concatenate(hits).ravel(), np.round(np.concatenate(values).ravel(), 5))
    found = json.loads((results/"mine.json").read_text())["localisation"]["pooled"]["all fakes"]["scores"]["shown"]["value"]
    assert found == pytest.approx(expected, abs=2e-3)


def test_frames_without_a_map_take_the_nearest(made, results):
    for path in sorted((results/"maps").rglob("*.npz")):
        with np.load(path) as held: maps, frames = held["heatmaps"][1:2], held["frames"][1:2]
        np.savez(path, heatmaps=maps, frames=frames)
    done = spotter(made, "score", results/"mine.csv", "--heatmaps", results/"maps")
    assert done.exit_code == 0 and "taken from frames at most 4 away" in done.stdout


@pytest.mark.parametrize("line, word", [
    ("Deepfakes/c23/006_007,0.9", "is in the lines"), ("Deepfakes/c23/000_001,0.9", "is a training clip; remove its row"),
    ("Deepfakes/c23/099_098,0.9", "the corpus has no clip 'Deepfakes/c23/099_098'")])
def test_rows_that_do_not_belong_are_named(made, results, line, word):
    with open(results/"mine.csv", "a") as f: f.write(line + "\n")
    done = spotter(made, "score", results/"mine.csv")
    assert done.exit_code == 2 and "mine.csv" in done.output and word in done.output


def test_a_probability_is_one_and_no_clip_is_forgotten(made, results):
    text = (results/"mine.csv").read_text()
    for wrong in ("1.2", "-0.1", "nan", "fake"):
        (results/"mine.csv").write_text(re.sub(r",0\.[28]\n$", f",{wrong}\n", text))
        done = spotter(made, "score", results/"mine.csv")
        assert done.exit_code == 2 and f"line 25: p_fake is '{wrong}'" in done.output, done.output
    (results/"mine.csv").write_text("".join(text.splitlines(keepends=True)[:-1]))
    done = spotter(made, "score", results/"mine.csv")
    assert done.exit_code == 2 and "lacks 1 of 18 test clips, among them youtube/c23/011" in done.output


def test_wrong_heatmaps_are_named(made, results):
    path = results/"maps"/"youtube/c23/006.npz"
    score = lambda: spotter(made, "score", results/"mine.csv", "--heatmaps", results/"maps")
    good = np.zeros((2, 7, 7))
    for maps, frames, word in ((good[0], [0], "shape (7, 7)"), (good, [0, 8], "from 0 to 7"), (good - 1, [0, 1], "at least 0"),
                               (good*np.nan, [0, 1], "finite"), (good, None, "the video has 8 frames")):
        np.savez(path, heatmaps=maps, **({} if frames is None else dict(frames=frames)))
        done = score()
        assert done.exit_code == 2 and "006.npz" in done.output and word in done.output, done.output
    path.unlink()
    assert "no heatmaps of 1 of 18 clips that have a p_fake, among them youtube/c23/006" in score().output
    np.save(path.with_suffix(".npy"), np.array([{}]))                          # a pickle: not loaded
    assert "no arrays of NumPy" in score().output


def test_heatmaps_need_face_crops_and_say_so(made, results, tmp_path):
    for name in ("params.yaml", "detail.py"): (tmp_path/name).write_bytes((made/name).read_bytes())
    (tmp_path/"data").symlink_to(made/"data")
    for arguments in (["score", results/"mine.csv", "--heatmaps", results/"maps"], ["benchmark", "detail.py"]):
        done = spotter(tmp_path, *arguments)
        assert done.exit_code == 2 and "dvc repro prepare" in done.output
    assert spotter(tmp_path, "score", results/"mine.csv").exit_code == 0       # verdicts need none


def test_scores_need_no_pytorch(made, results):
    code = (f"import sys; from spotter.cli import app; app(['score', {str(results/'mine.csv')!r}, '--heatmaps', {str(results/'maps')!r}], "
            "standalone_mode=False); sys.exit(' '.join(sorted({'torch', 'timm', 'matplotlib'} & set(sys.modules))) or 0)")
    env = os.environ | dict(PYTHONPATH=os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    done = subprocess.run([sys.executable, "-c", code], cwd=made, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_spotter_models_have_a_row_too():
    for path in sorted((ROOT/"metrics"/"models").glob("*/metrics.json")):
        row = leaderboard_row(path.parent.name, json.loads(path.read_text()))
        assert row["threshold_from"] == "validation" and 0 < row["auc"] <= 1 and row["scored"] <= row["clips"]
        assert row["pooled_ap"] is None or 0 < row["pooled_ap"] < 1            # None: metrics that are older than the score


def test_help_warns_of_what_is_run():
    text = " ".join(CliRunner().invoke(app, ["benchmark", "--help"], env=dict(COLUMNS="200")).output.split())
    assert "is run here, with all your rights" in text
