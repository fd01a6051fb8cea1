"""The bundled data set, and the program that makes it."""
import json, os, signal, subprocess, sys, time
from pathlib import Path

import av
import cv2
import numpy as np
import pandas as pd
import pytest

from spotter.core import find_root
from spotter.heads import load_template, sample_identity, shape_head
from spotter.manipulations import METHODS, draw_recipe
from spotter.synth import Job, Settings, clip_path, job_files, make_clips, make_settings, plan_fakes, plan_manifest, plan_splits, synthesise

DATA = find_root(Path(__file__).parent)/"data"
bundled = pytest.mark.skipif(not (DATA/"manifest.csv").exists(), reason=f"{DATA} holds no data set: `dvc pull data` fetches it, `spotter synth` renders it")
TINY = dict(pairs=(1, 1, 1), frames=3, size=96, samples=2, seed=7)


def frames(path, pixels="rgb24"):
    "All frames of a video as one array."
    with av.open(str(path)) as video: return np.stack([f.to_ndarray(format=pixels) for f in video.decode(video=0)])

def probe(path):
    "What a file says about itself."
    with av.open(str(path)) as video:
        s = video.streams.video[0]
        return {"codec": s.codec_context.name, "pixels": s.codec_context.pix_fmt, "width": s.width, "height": s.height, "rate": float(s.average_rate),
                "frames": s.frames, "seconds": float(s.duration*s.time_base), "streams": len(video.streams), "profile": s.profile}

def paths(root, row):
    "Fake, original and mask of a row of the manifest."
    return [Path(root)/p for p in (clip_path(row.method, row.name), clip_path("youtube", row.name[:3]), clip_path(row.method, row.name, True))]

def fakes_of(root):
    table = pd.read_csv(Path(root)/"manifest.csv", dtype={"name": str}, keep_default_na=False)
    return list(table.set_index("method", drop=False).drop("youtube").itertuples(index=False))

def jobs_of(settings):
    "The files of each job: they are finished together."
    fakes = plan_fakes(settings)
    return [job_files(t, s, [r for target, _, r in fakes if target == t]) for pair in sum(plan_splits(settings).values(), []) for t, s in (pair, pair[::-1])]

def videos(root): return {str(p.relative_to(root)): p for p in sorted(Path(root).rglob("*.mp4"))}


# ---- the bundled data set ---------------------------------------------------------------------------------------------------------------------------------

@bundled
def test_splits_are_pair_closed_and_share_no_identity():
    splits = {s: json.loads((DATA/f"splits/{s}.json").read_text()) for s in ("train", "val", "test")}
    assert {s: len(p) for s, p in splits.items()} == {"train": 18, "val": 5, "test": 9}
    people = [n for pairs in splits.values() for pair in pairs for n in pair]
    assert len(set(people)) == len(people) == 64
    pairs = {frozenset(p) for listed in splits.values() for p in listed}
    assert all(frozenset(r.name.split("_")) in pairs for r in fakes_of(DATA))

@bundled
def test_counts_per_split_method_and_grade():
    table = pd.read_csv(DATA/"manifest.csv", dtype={"name": str}, keep_default_na=False)
    counts = table.groupby(["split", "method"]).size().unstack()
    for split, pairs in (("train", 18), ("val", 5), ("test", 9)):
        assert counts.loc[split].to_dict() == {"youtube": 2*pairs} | {m: pairs for m in METHODS}
    grades = table[table.method != "youtube"].groupby(["split", "method"]).strength.value_counts().unstack()
    assert ((grades.obvious - grades.medium).abs() <= 1).all()
    listed = {clip_path(m, n) for m, n in zip(table.method, table.name)} | {clip_path(r.method, r.name, True) for r in fakes_of(DATA)}
    assert set(videos(DATA)) == listed                       # no file missing, none too many

@bundled
def test_the_manifest_is_what_the_settings_plan():
    recorded = json.loads((DATA/"synth.json").read_text())
    settings = Settings(**recorded | {"pairs": tuple(recorded["pairs"]), "grades": tuple(recorded["grades"])})
    assert (DATA/"manifest.csv").read_text() == plan_manifest(settings).to_csv(index=False)

@bundled
def test_nothing_but_the_pixels_tells_fake_from_real():
    found = {json.dumps(probe(p)) for n, p in videos(DATA).items() if "/masks/" not in n}
    assert len(found) == 1, found
    format = json.loads(found.pop())
    assert format["streams"] == 1 and format["pixels"] == "yuv420p" and format["codec"] == "h264"
    assert (format["width"], format["height"], format["frames"], format["rate"]) == (256, 256, 16, 25)
    same = ("pixels", "width", "height", "rate", "frames", "seconds", "codec")
    for n, p in videos(DATA).items():
        if "/masks/" in n: assert {k: probe(p)[k] for k in same} == {k: format[k] for k in same}, n

@bundled
def test_masks_are_binary_and_mark_something_in_every_clip():
    for row in fakes_of(DATA):
        mask = frames(paths(DATA, row)[2], "gray")
        assert np.isin(mask, (0, 255)).all(), row
        share = (mask > 0).mean((1, 2))
        assert .002 < share.mean() < .35, (row.method, row.name, share.mean())

@bundled
@pytest.mark.parametrize("method", METHODS)
def test_a_fake_differs_from_its_original_inside_the_mask_only(method):
    rows = [r for r in fakes_of(DATA) if r.method == method][::6]
    for row in rows:
        fake, original, mask = (frames(p, f).astype(int) for p, f in zip(paths(DATA, row), ("rgb24", "rgb24", "gray")))
        inside, difference = mask > 0, np.abs(fake-original).mean(-1)
        outside = ~np.stack([cv2.dilate(m.astype(np.uint8), np.ones((17, 17))) > 0 for m in inside])
        assert difference[outside].mean() < 3, (row.name, difference[outside].mean())            # two codings of the same pixels
        assert difference[inside].mean() > 3*difference[outside].mean(), (row.name, difference[inside].mean(), difference[outside].mean())

@bundled
def test_the_set_is_small():
    assert sum(p.stat().st_size for p in DATA.rglob("*.*")) < 12e6


# ---- the program that makes it ----------------------------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    "A tiny data set, rendered in this process without a break."
    root = tmp_path_factory.mktemp("reference")
    synthesise(root, **TINY, workers=0)
    return root

def test_the_tiny_set_is_complete(reference):
    made = plan_manifest(make_settings(fps=25, grades=("obvious", "medium"), **TINY))
    assert set(videos(reference)) == {clip_path(r.method, r.name, m) for r in made.itertuples() for m in ((False,) if r.method == "youtube" else (False, True))}
    for row in fakes_of(reference):
        fake, original, mask = paths(reference, row)
        assert frames(fake).shape == frames(original).shape == frames(mask).shape == (3, 96, 96, 3)

def test_the_same_seed_gives_the_same_frames(reference):
    settings = make_settings((1, 1, 1), 2, 25, 64, 2, ("hard",), 0)
    a, b = (shape_head(sample_identity(n)) for n in ("000", "001"))
    job = Job(settings, a, b, tuple(draw_recipe(m, "hard", "000_001") for m in METHODS))
    (_, once), (_, twice) = make_clips(load_template(), job), make_clips(load_template(), job)
    assert once.keys() == twice.keys() and len(once) == 9
    for path in once:   # before coding; a mask is a threshold on rendered values, so a pixel on its border may tip over, and with it the pixel of the fake
        assert (np.abs(once[path].astype(np.float32)-twice[path]) > 1e-5).mean() < 1e-3, path

def test_a_killed_run_leaves_whole_videos_and_goes_on_to_the_same_result(reference, tmp_path):
    root = tmp_path/"killed"
    code = f"from spotter.synth import synthesise; synthesise({str(root)!r}, **{TINY!r}, workers=2)"
    run = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL, env=os.environ | {"PYTHONPATH": str(find_root(Path(__file__).parent))})
    jobs = jobs_of(make_settings(fps=25, grades=("obvious", "medium"), **TINY))
    there = lambda: {n for n in videos(root) if not n.startswith(".partial")}
    finished = lambda: [files for files in jobs if set(files) <= there()]
    deadline = time.time() + 240
    while not finished() and run.poll() is None and time.time() < deadline: time.sleep(.02)
    run.send_signal(signal.SIGKILL); run.wait()
    time.sleep(1.5)                                                          # the workers notice that their parent is gone
    assert 0 < len(finished()) < len(jobs), "the run was to be killed on its way"
    for name in there(): assert len(frames(root/name)) == 3, f"{name} is half written"
    stamps = {n: (root/n).stat().st_mtime_ns for files in finished() for n in files}
    synthesise(root, **TINY, workers=0)
    assert stamps == {n: (root/n).stat().st_mtime_ns for n in stamps}        # finished jobs were not rendered again
    assert there() == set(videos(root)) == set(videos(reference))
    for name in there():
        # Rendered values may differ in their last digits, which coding turns into differences of the size of its own noise; another clip is far away.
        apart = lambda other: np.abs(frames(root/name).astype(int) - frames(reference/other)).mean()
        assert apart(name) < (.3 if "/masks/" in name else 4), (name, apart(name))
        if "youtube" in name: assert all(apart(other) > 15 for other in there() if "youtube" in other and other != name), name

def test_other_settings_are_refused(reference):
    with pytest.raises(ValueError, match="synth.json records other settings .size is 96, asked for 128."): synthesise(reference, **TINY | {"size": 128}, workers=0)
    with pytest.raises(ValueError, match="seed is 7, asked for 8"): synthesise(reference, **TINY | {"seed": 8}, workers=0)

def test_a_foreign_folder_is_refused(tmp_path):
    (tmp_path/"holiday.txt").touch()
    with pytest.raises(ValueError, match="is not empty and has no synth.json"): synthesise(tmp_path, **TINY)
