"Films with two people, of which one is swapped: the crops show the altered face, and fake and original the same person."
import json
from collections import Counter
from pathlib import Path

import cv2
import numpy as np
import pytest

from spotter.core import load_params
from spotter.data import faces
from spotter.data.corpora import index_corpus
from spotter.data.faces import face_clip, make_detector
from spotter.data.prepare import prepare_corpus
from spotter.data.video import read_frames, write_video
from test_data import digests, fake_video, real_video, save, write_splits

ROOT = Path(__file__).parents[1]
LARGE, SMALL, FRAMES = 176, 128, 9   # sides of the two heads' pictures in pixels


def head(name: str, side: int, method: str = "", kind: str = "c23") -> np.ndarray:
    "A bundled head, or its mask, as a film of another size."
    path = fake_video(ROOT/"data", method, name, kind) if method else real_video(ROOT/"data", name)
    return np.stack([cv2.resize(f, (side, side), interpolation=cv2.INTER_AREA) for f in read_frames(path, range(FRAMES))[0]])


def beside(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    "Two films side by side, the lower one on black."
    height = max(left.shape[1], right.shape[1])
    return np.concatenate([np.pad(f, ((0, 0), (0, height - f.shape[1]), (0, 0), (0, 0))) for f in (left, right)], 2)


@pytest.fixture(scope="module")
def swapped() -> str:
    "Name of a bundled Deepfakes clip of the target 000."
    return next(p.stem for p in sorted(fake_video(ROOT/"data", "Deepfakes", "x").parent.glob("000_*.mp4")))


@pytest.fixture(scope="module")
def params():
    p = load_params(ROOT/"params.yaml")
    return p.model_copy(update=dict(faces=p.faces.model_copy(update=dict(every=4, size=64, frames=3))))


def blank(film): return np.zeros_like(film)


@pytest.fixture
def corpus(tmp_path, swapped):
    """In 000 the head on the right, the smaller one, is altered by Deepfakes with a mask and by FaceShifter without one.
    In 002 nothing is masked, and the fake is zoomed such that the other head is the larger one."""
    root = tmp_path/"corpus"
    write_splits(root, dict(train=[["000", "001"], ["002", "003"]], val=[], test=[]))
    a, b, mask = head("002", LARGE), head(swapped, SMALL, "Deepfakes"), head(swapped, SMALL, "Deepfakes", "masks")
    save(real_video(root, "000"), beside(a, head("000", SMALL)))
    for method in ("Deepfakes", "FaceShifter"): save(fake_video(root, method, "000_001"), beside(a, b))
    save(fake_video(root, "Deepfakes", "000_001", "masks"), beside(blank(a), mask), lossless=True)
    save(real_video(root, "002"), beside(head("002", LARGE), head("000", SMALL)))
    left = np.pad(head("002", SMALL), ((0, 0), (0, 0), (24, 24), (0, 0)))   # as wide as in the original
    save(fake_video(root, "FaceShifter", "002_003"), beside(left, head("000", LARGE)))
    return root


def places(store) -> dict[str, float]:
    "Centre of each clip's crops, in pixels from the left."
    return ((store.index["x0"] + store.index["x1"])/2).groupby(store.index["clip_id"]).mean().to_dict()


def test_the_largest_face_is_the_wrong_one(corpus, params):
    "What the other tests rest on: without a mask the large head is taken, in a film whose small one is altered."
    path, detect = fake_video(corpus, "Deepfakes", "000_001"), make_detector()
    assert face_clip(path, params.faces, detect).boxes[:, 2].max() < LARGE + 20
    found = face_clip(path, params.faces, detect, fake_video(corpus, "Deepfakes", "000_001", "masks"))
    assert found.boxes[:, 0].min() > LARGE - 20 and found.masks.mean() > .1


def test_fakes_and_originals_show_the_altered_person(corpus, params, tmp_path):
    store = prepare_corpus(params, tmp_path/"faces", root=corpus, workers=1)
    found = places(store)
    assert store.excluded.empty and len(found) == 5
    assert {clip for clip, x in found.items() if x > LARGE} == {"Deepfakes/c23/000_001", "FaceShifter/c23/000_001", "youtube/c23/000"}
    fake = store.clips.set_index("clip_id").loc["Deepfakes/c23/000_001"]
    assert fake.has_mask and store.read(fake.name, range(3))[1].mean() > .1
    a, b = (store.read(clip, range(3))[0] for clip in ("Deepfakes/c23/000_001", "FaceShifter/c23/000_001"))
    assert np.array_equal(a, b)


def test_processes_and_order_change_no_byte(corpus, params, tmp_path):
    "A fake's shard may be made before or after that of its original, by this process or another."
    one = prepare_corpus(params, tmp_path/"one", root=corpus, workers=1)
    two = prepare_corpus(params, tmp_path/"two", root=corpus, workers=2)
    assert digests(one.folder) == digests(two.folder)


def test_what_a_clip_is_guided_by_belongs_to_its_shard(corpus, params, tmp_path):
    "The larger head vanishes from the original: a fake without a mask is cropped where the other one is."
    before = places(prepare_corpus(params, tmp_path/"faces", root=corpus, workers=1))
    save(real_video(corpus, "002"), beside(blank(head("002", LARGE)), head("000", SMALL)))
    after = places(prepare_corpus(params, tmp_path/"faces", root=corpus, workers=1))
    changed = {clip for clip in after if abs(before[clip] - after[clip]) > 1}
    assert changed == {"FaceShifter/c23/002_003", "youtube/c23/002"} and min(after[clip] for clip in changed) > LARGE


def test_a_mask_that_touches_no_face_leaves_the_clip_out(corpus, params, tmp_path):
    path = fake_video(corpus, "Deepfakes", "000_001", "masks")
    mask = blank(read_frames(path)[0]); mask[:, -16:, -16:] = 255   # a corner below the small head
    write_video(path, mask, lossless=True)
    store = prepare_corpus(params, tmp_path/"faces", root=corpus, workers=1)
    assert store.excluded.clip_id.tolist() == ["Deepfakes/c23/000_001"]
    assert store.excluded.reason.tolist() == ["the mask touches no face that could be followed"]
    assert places(store)["youtube/c23/000"] < LARGE   # such a mask guides nobody


@pytest.mark.parametrize("kind", ["black", "gone", "small"])
def test_a_mask_that_says_nothing_is_none(corpus, params, tmp_path, kind):
    "Its fake is cropped like one without a mask, and a note says why; the training does not learn that nothing was altered."
    path = fake_video(corpus, "Deepfakes", "000_001", "masks")
    if kind == "gone": path.write_bytes(b"")
    else: write_video(path, blank(read_frames(path)[0])[:, :64 if kind == "small" else None], lossless=True)
    store = prepare_corpus(params, tmp_path/"faces", root=corpus, workers=1)
    row = store.clips.set_index("clip_id").loc["Deepfakes/c23/000_001"]
    why = dict(black="it is black in all crops of a fake", gone="the file is empty", small="pixels, the video has")[kind]
    assert not row.has_mask and row.note.startswith("mask unusable: manipulated_sequences/") and why in row.note
    found = places(store)
    assert abs(found["Deepfakes/c23/000_001"] - found["youtube/c23/000"]) < 10


def test_an_original_that_shows_no_face_guides_nobody(corpus, params, tmp_path):
    save(real_video(corpus, "002"), np.random.default_rng(0).integers(0, 255, (FRAMES, 64, 64, 3), dtype=np.uint8))
    store = prepare_corpus(params, tmp_path/"faces", root=corpus, workers=1)
    assert store.excluded.clip_id.tolist() == ["youtube/c23/002"] and places(store)["FaceShifter/c23/002_003"] > LARGE   # the largest


def test_no_video_is_decoded_twice_but_the_original_of_such_a_fake(corpus, params, tmp_path, monkeypatch):
    seen, iter_frames = Counter(), faces.iter_frames
    def counted(path, *more, **how):
        seen[Path(path).relative_to(corpus).as_posix()] += 1
        return iter_frames(path, *more, **how)
    monkeypatch.setattr(faces, "iter_frames", counted)
    for name in ("004_005", "005_004"): save(fake_video(corpus, "FaceShifter", name), head("004", LARGE))   # one face
    for name in ("004", "005"): save(real_video(corpus, name), head("004", LARGE))
    save(fake_video(corpus, "FaceSwap", "002_003"), read_frames(fake_video(corpus, "FaceShifter", "002_003"))[0])   # a second one of 002
    (corpus/"splits"/"val.json").write_text(json.dumps([["004", "005"]]))
    prepare_corpus(params, tmp_path/"faces", root=corpus, workers=1)
    twice = {f"original_sequences/youtube/c23/videos/{name}.mp4" for name in ("000", "002")}
    assert {name for name, n in seen.items() if n > 1} == twice and max(seen.values()) == 2
    seen.clear()
    prepare_corpus(params, tmp_path/"faces", root=corpus, workers=1)
    assert not seen, "what is finished is not done again"


def test_bundled_clips_show_one_person(params):
    "So nothing of this changes their crops: each guide is there, and none is asked."
    rows = index_corpus(params.data, ROOT/"data").to_dict("records")
    for row in rows[::97]:
        film = faces._watch(ROOT/"data"/row["path"], params.faces, make_detector(), faces.FOUND)
        assert len(film.tracks) == 1
