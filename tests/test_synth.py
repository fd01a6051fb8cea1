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
from spotter.synth.manipulations import METHODS, STRENGTHS, draw_recipe
from spotter.synth.plan import clip_path, job_files, make_settings, plan_jobs, plan_manifest, proof_path, split_crfs
from spotter.synth.clips import Job, make_clips
from spotter.synth.dataset import check_set, choose_jobs, read_settings, synthesise

DATA = find_root(Path(__file__).parent)/"data"
bundled = pytest.mark.skipif(not (DATA/"manifest.csv").exists(),
                             reason=f"{DATA} holds no data set: `dvc pull data` fetches it, `spotter synth` renders it")
TINY = dict(pairs=(1, 1, 1), frames=2, size=64, samples=1, seed=7)


def frames(path, pixels="rgb24"):
    "All frames of a video as one array."
    with av.open(str(path)) as video: return np.stack([f.to_ndarray(format=pixels) for f in video.decode(video=0)])

def probe(path):
    "What a file says about itself."
    with av.open(str(path)) as video:
        s = video.streams.video[0]
        return {"codec": s.codec_context.name, "pixels": s.codec_context.pix_fmt, "width": s.width, "height": s.height,
                "rate": float(s.average_rate), "frames": s.frames, "seconds": float(s.duration*s.time_base),
                "streams": len(video.streams), "profile": s.profile}

def paths(root, row):
    "Fake, original and mask of a row of the manifest."
    return [Path(root)/clip_path(*clip) for clip in ((row.method, row.name), ("youtube", row.name[:3]), (row.method, row.name, True))]

def manifest_of(root): return pd.read_csv(Path(root)/"manifest.csv", dtype={"name": str}, keep_default_na=False)

def fakes_of(root): return list(manifest_of(root).set_index("method", drop=False).drop("youtube").itertuples(index=False))

def jobs_of(settings):
    "The files of each job: it is finished when all of them are there."
    return [job_files(target, source, recipes, split_crfs(settings, split)) for split, target, source, recipes in plan_jobs(settings)]

def listed(table):
    "Every video that a manifest promises."
    clips = list(zip(table.method, table.name, table.split))
    return ({clip_path(m, n) for m, n, _ in clips} | {clip_path(m, n, crf=40) for m, n, split in clips if split == "test"}
            | {clip_path(m, n, mask=True) for m, n, _ in clips if m != "youtube"})

def videos(root): return {p.relative_to(root).as_posix(): p for p in sorted(Path(root).rglob("*.mp4"))}


# ---- the bundled data set ----------------------------------------------------------------------------------------------------

PAIRS = {"train": 48, "val": 8, "test": 24}

@bundled
def test_splits_are_pair_closed_and_share_no_identity():
    splits = {s: json.loads((DATA/f"splits/{s}.json").read_text()) for s in PAIRS}
    assert {s: len(p) for s, p in splits.items()} == PAIRS
    identities = [n for pairs in splits.values() for pair in pairs for n in pair]
    assert len(set(identities)) == len(identities) == 160
    pairs = {frozenset(p) for listed in splits.values() for p in listed}
    assert all(frozenset(r.name.split("_")) in pairs for r in fakes_of(DATA))

@bundled
def test_counts_per_split_method_and_strength():
    table = manifest_of(DATA)
    counts = table.groupby(["split", "method"]).size().unstack()
    for split, pairs in PAIRS.items(): assert counts.loc[split].to_dict() == {"youtube": 2*pairs} | {m: pairs for m in METHODS}
    fakes = table[table.method != "youtube"].assign(forward=lambda d: d.name.str[:3] < d.name.str[4:])
    assert set(fakes.strength) == set(STRENGTHS)
    for by in (["split", "method"], ["split", "method", "forward"]):          # strengths tell neither the method nor the direction
        counts = pd.crosstab([fakes[c] for c in by], fakes.strength)
        assert (counts.max(axis=1) - counts.min(axis=1)).max() <= 1, counts
    assert set(videos(DATA)) == listed(table)                                 # no file missing, none too many
    assert {p.name for p in (DATA/"checks").iterdir()} == {Path(proof_path(n)).name for n in table.name[table.method == "youtube"]}

@bundled
def test_the_manifest_is_what_the_settings_plan():
    assert (DATA/"manifest.csv").read_text() == plan_manifest(read_settings(DATA)).to_csv(index=False)

@pytest.fixture(scope="session")
def headers():
    "What the files of the bundled data set say about themselves."
    return {name: probe(path) for name, path in videos(DATA).items()}

@bundled
@pytest.mark.parametrize("level, clips", [("c23", 160 + 320), ("c40", 48 + 96)])
def test_nothing_but_the_pixels_tells_fake_from_real(headers, level, clips):
    found = [header for name, header in headers.items() if f"/{level}/" in name]
    assert len(found) == clips and all(header == found[0] for header in found)
    format, settings = found[0], read_settings(DATA)
    assert format["streams"] == 1 and format["pixels"] == "yuv420p" and format["codec"] == "h264"
    assert (format["width"], format["height"], format["frames"], format["rate"]) == (settings.size, settings.size, 24, 25)

@bundled
def test_masks_have_the_format_of_their_clips(headers):
    format = headers[clip_path("youtube", "000")]
    same = ("pixels", "width", "height", "rate", "frames", "seconds", "codec")
    for name, header in headers.items(): assert {k: header[k] for k in same} == {k: format[k] for k in same}, name

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
@pytest.mark.parametrize("step", [20, pytest.param(1, marks=pytest.mark.slow)])   # a sample of the clips, or all of them
def test_masks_are_binary_and_mark_something_in_every_clip(step):
    for row in fakes_of(DATA)[::step]:
        mask = frames(paths(DATA, row)[2], "gray")
        assert np.isin(mask, (0, 255)).all(), row
        share = (mask > 0).mean((1, 2))
        assert .002 < share.mean() < .35, (row.method, row.name, share.mean())

# Not all clips: some hard re-enactments alter the face little more than coding does. The audit looks at every clip, with bounds for each.
@bundled
@pytest.mark.parametrize("step", [20, pytest.param(6, marks=pytest.mark.slow)])
@pytest.mark.parametrize("method", METHODS)
def test_a_fake_differs_from_its_original_inside_the_mask_only(method, step):
    for row in [r for r in fakes_of(DATA) if r.method == method][::step]:
        fake, original, mask = (frames(p, f).astype(int) for p, f in zip(paths(DATA, row), ("rgb24", "rgb24", "gray")))
        inside, change = mask > 0, np.abs(fake-original).mean(-1)
        outside = ~np.stack([cv2.dilate(m.astype(np.uint8), np.ones((17, 17))) > 0 for m in inside])
        assert change[outside].mean() < 3, (row.name, change[outside].mean())                     # two encodings of the same pixels
        assert change[inside].mean() > 3*change[outside].mean(), (row.name, change[inside].mean(), change[outside].mean())

@bundled
def test_the_set_is_small():
    sizes = {p.relative_to(DATA).as_posix(): p.stat().st_size for p in DATA.rglob("*.*") if p.is_file()}
    assert sum(sizes.values()) < 24e6
    assert sum(n for p, n in sizes.items() if p.startswith("checks/")) < 3e5


# ---- the program that makes it ------------------------------------------------------------------------------------------------

@pytest.fixture(scope="session")
def reference(tmp_path_factory):
    "A tiny data set, rendered in this process without a break."
    root = tmp_path_factory.mktemp("reference")
    synthesise(root, **TINY, workers=0)
    return root

@pytest.fixture(scope="session")
def settings(reference): return read_settings(reference)

def test_the_tiny_set_is_complete(reference, settings):
    made = plan_manifest(settings)
    assert settings == make_settings(fps=25, strengths=STRENGTHS, **TINY) and settings.version == 5
    assert set(videos(reference)) == listed(made) == {f for files in jobs_of(settings) for f in files if f.endswith(".mp4")}
    for row in fakes_of(reference):
        fake, original, mask = paths(reference, row)
        assert frames(fake).shape == frames(original).shape == frames(mask).shape == (2, 64, 64, 3)

def test_both_codings_show_the_same_frames(reference):
    table = manifest_of(reference).query("split == 'test'")
    originals = {n: frames(reference/clip_path("youtube", n)).astype(int) for n in table.name[table.method == "youtube"]}
    for method, name in zip(table.method, table.name):
        fine, coarse = (reference/clip_path(method, name, crf=crf) for crf in (23, 40))
        assert coarse.stat().st_size < fine.stat().st_size and probe(coarse) == probe(fine)
        apart = {n: np.abs(original - frames(coarse)).mean() for n, original in originals.items()}
        assert min(apart, key=apart.get) == name[:3], apart       # at this size strong compression changes a lot, but no clip into another
    assert len(index_dataset(reference, compression="c40")) == 2 + 4 and len(index_dataset(reference, compression="c23")) == 6 + 12

def test_the_same_seed_gives_the_same_frames():
    settings = make_settings((1, 1, 1), 1, 25, 64, 2, ("hard",), 0)
    a, b = (shape_head(sample_identity(n)) for n in ("000", "001"))
    job = Job(settings, a, b, tuple(draw_recipe(m, "hard", "000_001") for m in ("FaceSwap", "Face2Face")))      # one of each kind of donor
    (_, once), (_, twice) = make_clips(load_template(), job), make_clips(load_template(), job)
    assert once.keys() == twice.keys() and len(once) == 5
    # Compared before coding. A mask is a threshold on rendered values, so a pixel on its border may change, and with it that of the fake.
    for path in once: assert (np.abs(once[path].astype(np.float32)-twice[path]) > 1e-5).mean() < 1e-3, path

def finished(root, jobs): return [files for files in jobs if all((root/f).exists() for f in files)]

def there(root): return {n for n in videos(root) if not n.startswith(".partial")}

def same_clips(root, reference):
    "Whether two renderings of a data set agree as far as coding allows."
    assert there(root) == set(videos(root)) == set(videos(reference))
    for name in there(root):
        # Rendered values may differ in their last digits, which coding turns into differences of the size of its own loss.
        apart = lambda other: np.abs(frames(root/name).astype(int) - frames(reference/other)).mean()
        assert apart(name) < {"masks": .3, "c23": 6, "c40": 16}[name.split("/")[2]], (name, apart(name))
        others = [other for other in there(root) if "youtube/c23" in other and other != name]
        if "youtube/c23" in name: assert all(apart(other) > 15 for other in others), name              # another clip is far away
    for proof in (root/"checks").iterdir():                                  # before coding
        assert np.abs(cv2.imread(str(proof)).astype(int) - cv2.imread(str(reference/"checks"/proof.name))).mean() < .25, proof

def test_a_run_that_stops_between_two_files_goes_on_to_the_same_result(reference, settings, tmp_path, monkeypatch):
    root, jobs, written = tmp_path/"stopped", jobs_of(settings), 4
    shutil.copytree(reference, root)
    for name in jobs[-1]: (root/name).unlink()
    kept, moved, replace = {n: (root/n).stat().st_mtime_ns for n in there(root)}, [], os.replace
    def stop(part, path):
        if "videos" in str(path):
            if len(moved) == written: raise KeyboardInterrupt
            moved.append(path)
        replace(part, path)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "replace", stop)
        synthesise(root, **TINY, workers=0)
    assert len(there(root)) == len(kept) + written and len(finished(root, jobs)) == len(jobs) - 1
    for path in moved: assert len(frames(path)) == 2, f"{path} is half written"
    synthesise(root, **TINY, workers=0)
    assert {n: (root/n).stat().st_mtime_ns for n in kept} == kept            # finished jobs were not rendered again
    same_clips(root, reference)

def run_until_killed(root, enough, workers):
    "A run in a process of its own, killed as soon as `enough()` is true; whether it was still at work."
    code = f"from spotter.synth import synthesise; synthesise({str(root)!r}, **{TINY!r}, workers={workers})"
    env = os.environ | {"PYTHONPATH": str(find_root(Path(__file__).parent))}
    run = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL, env=env)
    deadline = time.time() + 240
    while not enough() and run.poll() is None and time.time() < deadline: time.sleep(.02)
    at_work = run.poll() is None
    run.send_signal(signal.SIGKILL); run.wait()
    time.sleep(1.5)                                                          # the workers notice that their parent is gone
    return at_work

@pytest.mark.slow
def test_a_run_killed_three_times_leaves_whole_videos_and_goes_on_to_the_same_result(reference, settings, tmp_path):
    root, jobs, stamps = tmp_path/"killed", jobs_of(settings), {}
    for workers in (2, 0, 0):
        before = len(finished(root, jobs))
        at_work = run_until_killed(root, lambda: len(finished(root, jobs)) > before, workers)
        assert at_work and before < len(finished(root, jobs)) < len(jobs), "the run was to be killed on its way"
        for name in there(root): assert len(frames(root/name)) == 2, f"{name} is half written"
        stamps |= {n: (root/n).stat().st_mtime_ns for files in finished(root, jobs) for n in files if n not in stamps}
    synthesise(root, **TINY, workers=0)
    assert stamps == {n: (root/n).stat().st_mtime_ns for n in stamps}        # finished jobs were not rendered again
    same_clips(root, reference)

def check(root, *more): return CliRunner().invoke(app, ["synth", str(root), "--check", "--workers", "0", *more])

def test_the_check_passes_on_what_was_made(reference):
    sound = check(reference, "--identities", "1")
    assert sound.exit_code == 0 and "3 of 3 clips agree" in sound.stdout

def test_the_check_finds_what_was_not_made(reference, settings, tmp_path):
    forged = tmp_path/"forged"
    shutil.copytree(reference, forged)
    (_, real, _, _), (_, target, source, recipes), (_, last, _, _) = choose_jobs(settings, 3)
    fake = f"{target}_{source}"
    first, (first_mask, second_mask) = forged/clip_path(recipes[0].method, fake), (forged/clip_path(r.method, fake, True) for r in recipes)
    shutil.copy(forged/clip_path("youtube", target), forged/clip_path("youtube", real))             # another identity
    shutil.copy(forged/clip_path("youtube", target), first)                                         # the fake is its original
    shutil.copy(first_mask, second_mask)                                                            # the mask of another fake
    proof = cv2.imread(str(forged/proof_path(last)))
    cv2.imwrite(str(forged/proof_path(last)), np.vstack([proof[:16] + 5, proof[16:]]))              # lighter before coding than it was
    found = check(forged, "--identities", "3")
    wrong = [f"youtube/{real}", *(f"{r.method}/{fake}" for r in recipes), f"youtube/{last}"]
    assert found.exit_code == 1 and [line.split()[1] for line in found.stdout.splitlines() if line.endswith("False")] == wrong
    (forged/clip_path("youtube", real)).unlink()
    incomplete = check(forged)
    assert incomplete.exit_code == 2 and "1 files are missing" in incomplete.output

def test_other_settings_are_refused(reference):
    refused = ({"size": 128}, "synth.json records other settings .size is 64, asked for 128."), ({"seed": 8}, "seed is 7, asked for 8")
    for other, said in refused:
        with pytest.raises(ValueError, match=said): synthesise(reference, **TINY | other, workers=0)

def test_a_set_of_another_version_is_refused(tmp_path):
    old = dict(pairs=[18, 5, 9], frames=16, fps=25, size=256, samples=16, strengths=["obvious", "medium"], seed=0, crf=23, version=1)
    (tmp_path/"synth.json").write_text(json.dumps(old))
    with pytest.raises(ValueError, match="version is 1, asked for 5"): synthesise(tmp_path)
    with pytest.raises(ValueError, match="records version 1 of the procedure, this is version 5"): check_set(tmp_path)

def test_a_foreign_folder_is_refused(tmp_path):
    (tmp_path/"holiday.txt").touch()
    with pytest.raises(ValueError, match="is not empty and has no synth.json"): synthesise(tmp_path, **TINY)
