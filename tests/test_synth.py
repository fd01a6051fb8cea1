"""The bundled data set, and the program that makes it."""
import json, os, shutil, signal, subprocess, sys, time
from pathlib import Path

import av
import cv2
import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

from spotter.cli import app
from spotter.core import find_root
from spotter.data.corpora import index_dataset
from spotter.synth.heads import load_template, sample_identity, shape_head
from spotter.synth.manipulations import STRENGTHS, METHODS, draw_recipe
from spotter.synth.dataset import Job, check_set, choose_jobs, clip_path, job_files, levels, make_clips, make_settings, plan_jobs, plan_manifest, proof_path, read_settings, synthesise

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

def manifest_of(root): return pd.read_csv(Path(root)/"manifest.csv", dtype={"name": str}, keep_default_na=False)

def fakes_of(root): return list(manifest_of(root).set_index("method", drop=False).drop("youtube").itertuples(index=False))

def jobs_of(settings):
    "The files of each job: it is finished when the last of them, its proof, is there."
    return [job_files(target, source, recipes, levels(settings, split)) for split, target, source, recipes in plan_jobs(settings)]

def listed(table):
    "Every video that a manifest promises."
    clips = list(zip(table.method, table.name, table.split))
    return ({clip_path(m, n) for m, n, _ in clips} | {clip_path(m, n, crf=40) for m, n, split in clips if split == "test"}
            | {clip_path(m, n, mask=True) for m, n, _ in clips if m != "youtube"})

def videos(root): return {p.relative_to(root).as_posix(): p for p in sorted(Path(root).rglob("*.mp4"))}


# ---- the bundled data set ---------------------------------------------------------------------------------------------------------------------------------

PAIRS = {"train": 48, "val": 8, "test": 24}

@bundled
def test_splits_are_pair_closed_and_share_no_identity():
    splits = {s: json.loads((DATA/f"splits/{s}.json").read_text()) for s in PAIRS}
    assert {s: len(p) for s, p in splits.items()} == PAIRS
    people = [n for pairs in splits.values() for pair in pairs for n in pair]
    assert len(set(people)) == len(people) == 160
    pairs = {frozenset(p) for listed in splits.values() for p in listed}
    assert all(frozenset(r.name.split("_")) in pairs for r in fakes_of(DATA))

@bundled
def test_counts_per_split_method_and_grade():
    table = manifest_of(DATA)
    counts = table.groupby(["split", "method"]).size().unstack()
    for split, pairs in PAIRS.items(): assert counts.loc[split].to_dict() == {"youtube": 2*pairs} | {m: pairs for m in METHODS}
    fakes = table[table.method != "youtube"].assign(forward=lambda d: d.name.str[:3] < d.name.str[4:])
    assert set(fakes.strength) == set(STRENGTHS)
    for by in (["split", "method"], ["split", "method", "forward"]):          # grades tell neither the method nor the direction
        grades = pd.crosstab([fakes[c] for c in by], fakes.strength)
        assert (grades.max(axis=1) - grades.min(axis=1)).max() <= 1, grades
    assert set(videos(DATA)) == listed(table)                                 # no file missing, none too many
    assert {p.name for p in (DATA/"checks").iterdir()} == {Path(proof_path(n)).name for n in table.name[table.method == "youtube"]}

@bundled
def test_the_manifest_is_what_the_settings_plan():
    assert (DATA/"manifest.csv").read_text() == plan_manifest(read_settings(DATA)).to_csv(index=False)

@bundled
@pytest.mark.parametrize("level, clips", [("c23", 160 + 320), ("c40", 48 + 96)])
def test_nothing_but_the_pixels_tells_fake_from_real(level, clips):
    found = [json.dumps(probe(p)) for n, p in videos(DATA).items() if f"/{level}/" in n]
    assert len(found) == clips and len(set(found)) == 1, set(found)
    format, settings = json.loads(found[0]), read_settings(DATA)
    assert format["streams"] == 1 and format["pixels"] == "yuv420p" and format["codec"] == "h264"
    assert (format["width"], format["height"], format["frames"], format["rate"]) == (settings.size, settings.size, 24, 25)
    same = ("pixels", "width", "height", "rate", "frames", "seconds", "codec")
    for n, p in videos(DATA).items():
        if "/masks/" in n: assert {k: probe(p)[k] for k in same} == {k: format[k] for k in same}, n

@bundled
def test_the_second_coding_is_of_the_test_split_alone():
    coarse, fine = index_dataset(DATA, compression="c40"), index_dataset(DATA, compression="c23")
    assert set(coarse.split) == {"test"} and len(fine) == 160 + 320
    key = ["method", "target_id", "source_id", "label", "strength", "mask_path"]
    assert coarse[key].values.tolist() == fine[fine.split == "test"][key].values.tolist()
    assert all((DATA/p).is_file() for p in coarse.mask_path[coarse.label == 1])
    size = lambda table: sum((DATA/p).stat().st_size for p in table.path)
    assert size(coarse) < .5*size(fine[fine.split == "test"])

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
    sizes = {p.relative_to(DATA).as_posix(): p.stat().st_size for p in DATA.rglob("*.*") if p.is_file()}
    assert sum(sizes.values()) < 20e6
    assert sum(n for p, n in sizes.items() if p.startswith("checks/")) < 3e5


# ---- the program that makes it ----------------------------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    "A tiny data set, rendered in this process without a break."
    root = tmp_path_factory.mktemp("reference")
    synthesise(root, **TINY, workers=0)
    return root

@pytest.fixture(scope="module")
def settings(reference): return read_settings(reference)

def test_the_tiny_set_is_complete(reference, settings):
    made = plan_manifest(settings)
    assert settings == make_settings(fps=25, grades=STRENGTHS, **TINY) and settings.version == 4
    assert set(videos(reference)) == listed(made) == {f for files in jobs_of(settings) for f in files if f.endswith(".mp4")}
    for row in fakes_of(reference):
        fake, original, mask = paths(reference, row)
        assert frames(fake).shape == frames(original).shape == frames(mask).shape == (3, 96, 96, 3)

def test_both_codings_show_the_same_frames(reference):
    table = manifest_of(reference).query("split == 'test'")
    for method, name in zip(table.method, table.name):
        fine, coarse = (reference/clip_path(method, name, crf=crf) for crf in (23, 40))
        assert coarse.stat().st_size < fine.stat().st_size and probe(coarse) == probe(fine)
        assert np.abs(frames(fine).astype(int) - frames(coarse)).mean() < 16
    assert len(index_dataset(reference, compression="c40")) == 2 + 4 and len(index_dataset(reference, compression="c23")) == 6 + 12

def test_the_same_seed_gives_the_same_frames():
    settings = make_settings((1, 1, 1), 2, 25, 64, 2, ("hard",), 0)
    a, b = (shape_head(sample_identity(n)) for n in ("000", "001"))
    job = Job(settings, a, b, tuple(draw_recipe(m, "hard", "000_001") for m in METHODS))
    (_, once), (_, twice) = make_clips(load_template(), job), make_clips(load_template(), job)
    assert once.keys() == twice.keys() and len(once) == 9
    for path in once:   # before coding; a mask is a threshold on rendered values, so a pixel on its border may tip over, and with it the pixel of the fake
        assert (np.abs(once[path].astype(np.float32)-twice[path]) > 1e-5).mean() < 1e-3, path

def run_until_killed(root, enough, workers):
    "A run in a process of its own, killed as soon as `enough()` is true; whether it was still at work."
    code = f"from spotter.synth import synthesise; synthesise({str(root)!r}, **{TINY!r}, workers={workers})"
    run = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL, env=os.environ | {"PYTHONPATH": str(find_root(Path(__file__).parent))})
    deadline = time.time() + 240
    while not enough() and run.poll() is None and time.time() < deadline: time.sleep(.02)
    at_work = run.poll() is None
    run.send_signal(signal.SIGKILL); run.wait()
    time.sleep(1.5)                                                          # the workers notice that their parent is gone
    return at_work

def test_a_run_killed_three_times_leaves_whole_videos_and_goes_on_to_the_same_result(reference, settings, tmp_path):
    root, jobs = tmp_path/"killed", jobs_of(settings)
    there = lambda: {n for n in videos(root) if not n.startswith(".partial")}
    finished = lambda: [files for files in jobs if all((root/f).exists() for f in files)]
    stamps = {}
    for workers in (2, 0, 0):
        before = len(finished())
        assert run_until_killed(root, lambda: len(finished()) > before, workers) and before < len(finished()) < len(jobs), "the run was to be killed on its way"
        for name in there(): assert len(frames(root/name)) == 3, f"{name} is half written"
        stamps |= {n: (root/n).stat().st_mtime_ns for files in finished() for n in files if n not in stamps}
    synthesise(root, **TINY, workers=0)
    assert stamps == {n: (root/n).stat().st_mtime_ns for n in stamps}        # finished jobs were not rendered again
    assert there() == set(videos(root)) == set(videos(reference))
    for name in there():
        # Rendered values may differ in their last digits, which coding turns into differences of the size of its own loss; another clip is far away.
        apart = lambda other: np.abs(frames(root/name).astype(int) - frames(reference/other)).mean()
        assert apart(name) < {"masks": .3, "c23": 6, "c40": 16}[name.split("/")[2]], (name, apart(name))
        if "youtube/c23" in name: assert all(apart(other) > 15 for other in there() if "youtube/c23" in other and other != name), name
    for proof in (root/"checks").iterdir():                                  # before coding
        assert np.abs(cv2.imread(str(proof)).astype(int) - cv2.imread(str(reference/"checks"/proof.name))).mean() < .25, proof

def test_the_check_passes_on_what_was_made_and_finds_what_was_not(reference, settings, tmp_path):
    check = lambda root, *more: CliRunner().invoke(app, ["synth", str(root), "--check", "--workers", "0", *more])
    sound = check(reference, "--identities", "1")
    assert sound.exit_code == 0 and "3 of 3 clips agree" in sound.stdout
    forged = tmp_path/"forged"
    shutil.copytree(reference, forged)
    (_, real, _, _), (_, target, source, recipes), (_, last, other, _) = choose_jobs(settings, 3)
    shutil.copy(forged/clip_path("youtube", target), forged/clip_path("youtube", real))                              # somebody else
    fakes = [(r.method, f"{target}_{source}") for r in recipes]
    shutil.copy(forged/clip_path("youtube", target), forged/clip_path(*fakes[0]))                                    # the fake is its original
    shutil.copy(forged/clip_path(*fakes[0], mask=True), forged/clip_path(*fakes[1], mask=True))                      # the mask of another fake
    proof = cv2.imread(str(forged/proof_path(last)))
    cv2.imwrite(str(forged/proof_path(last)), np.vstack([proof[:16] + 5, proof[16:]]))                               # lighter before coding than it was
    table = check_set(forged, identities=3, workers=0)
    assert table.clip_id[~table.agrees].tolist() == [f"youtube/{real}", *("/".join(f) for f in fakes), f"youtube/{last}"]
    assert check(forged, "--identities", "1").exit_code == 1
    (forged/clip_path("youtube", real)).unlink()
    incomplete = check(forged)
    assert incomplete.exit_code == 2 and "1 files are missing" in incomplete.output

def test_other_settings_are_refused(reference):
    with pytest.raises(ValueError, match="synth.json records other settings .size is 96, asked for 128."): synthesise(reference, **TINY | {"size": 128}, workers=0)
    with pytest.raises(ValueError, match="seed is 7, asked for 8"): synthesise(reference, **TINY | {"seed": 8}, workers=0)

def test_a_set_of_another_version_is_refused(tmp_path):
    old = dict(pairs=[18, 5, 9], frames=16, fps=25, size=256, samples=16, grades=["obvious", "medium"], seed=0, crf=23, version=1)
    (tmp_path/"synth.json").write_text(json.dumps(old))
    with pytest.raises(ValueError, match="version is 1, asked for 4"): synthesise(tmp_path)
    with pytest.raises(ValueError, match="records version 1 of the procedure, this is version 4"): check_set(tmp_path)

def test_a_foreign_folder_is_refused(tmp_path):
    (tmp_path/"holiday.txt").touch()
    with pytest.raises(ValueError, match="is not empty and has no synth.json"): synthesise(tmp_path, **TINY)
