"From video files to batches: what the modules of `spotter.data` promise to the rest."
import hashlib, json, warnings
from fractions import Fraction
from pathlib import Path

import accelerate
import av
import numpy as np
import pandas as pd
import pytest
import torch
from torch.utils.data import DataLoader

from spotter.core import AugmentParams, find_root, load_params
from spotter.data.corpora import CorpusError, index_dataset
from spotter.data.table import COLUMNS
from spotter.data.faces import BOX_STEP, DETECTORS, NoFaceError, crop_boxes, crop_face, face_clip, link_tracks, make_detector
from spotter.data.loader import MEAN, STD, ClipDataset, to_input
from spotter.data.prepare import prepare_corpus
from spotter.data.sampling import BalancedSampler, sample_positions
from spotter.data.store import ClipStore
from spotter.data.video import VideoError, probe, read_frames, video_length, write_video
from whole_frame import whole_frame

SIDE, FRAMES = 64, 12
PAIRS = {"train": [["000", "001"]], "val": [["002", "003"]], "test": [["004", "005"]]}
AUGMENT = AugmentParams(flip=0.5, shift=0.1, zoom=0.1, colour=0.3, blur=0.5, jpeg=0.5)


@pytest.fixture(autouse=True)
def registered(monkeypatch): monkeypatch.setitem(DETECTORS, "whole-frame", whole_frame)


@pytest.fixture(scope="module")
def params():
    p = load_params(find_root(Path(__file__).parent)/"params.yaml")
    faces = p.faces.model_copy(update=dict(detector="whole-frame", every=4, margin=1.0, size=SIDE, frames=8))
    return p.model_copy(update=dict(faces=faces, data=p.data.model_copy(update=dict(compression="c23"))))


def write_splits(root, splits):
    (root/"splits").mkdir(parents=True, exist_ok=True)
    for name, pairs in splits.items(): (root/"splits"/f"{name}.json").write_text(json.dumps(pairs))


def real_video(root, name): return root/"original_sequences/youtube/c23/videos"/f"{name}.mp4"
def fake_video(root, method, name, level="c23"): return root/"manipulated_sequences"/method/level/"videos"/f"{name}.mp4"


def save(path, frames, **kwargs):
    path.parent.mkdir(parents=True, exist_ok=True)
    write_video(path, frames, **kwargs)


def make_corpus(root):
    "Real videos: noise. Fakes: black, white where the mask (a moving rectangle) is, so that a crop shows its mask. FaceShifter: no masks."
    rng = np.random.default_rng(0)
    write_splits(root, PAIRS)
    for (a, b), in PAIRS.values():
        for name in (a, b): save(real_video(root, name), rng.integers(0, 255, (FRAMES, SIDE, SIDE, 3), dtype=np.uint8))
        for k, name in enumerate((f"{a}_{b}", f"{b}_{a}")):
            mask = np.zeros((FRAMES, SIDE, SIDE, 3), np.uint8)
            for t in range(FRAMES): mask[t, 8 + 4*k:40, 4 + 2*t:24 + 2*t] = 255
            for method in ("Deepfakes", "FaceShifter"): save(fake_video(root, method, name), mask, lossless=True)
            save(fake_video(root, "Deepfakes", name, "masks"), mask, lossless=True)
    return root


@pytest.fixture(scope="module")
def corpus(tmp_path_factory): return make_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def store(corpus, params, tmp_path_factory):
    with pytest.MonkeyPatch.context() as m:  # the fixture above is set up later than this one
        m.setitem(DETECTORS, "whole-frame", whole_frame)
        return prepare_corpus(params, tmp_path_factory.mktemp("faces"), root=corpus, workers=1)


# --- the index -------------------------------------------------------------------------------------------------------

def test_index_of_a_layout(corpus):
    df = index_dataset(corpus)
    assert df.columns.tolist() == COLUMNS and len(df) == 6 + 2*6
    assert df.clip_id.is_monotonic_increasing and df.clip_id.is_unique
    real = df[df.label == 0]
    assert (real.method == "youtube").all() and (real.source_id == "").all() and (real.mask_path == "").all()
    fake = df.set_index("clip_id").loc["Deepfakes/c23/003_002"]
    assert (fake.label, fake.target_id, fake.source_id, fake.split) == (1, "003", "002", "val")
    assert fake.path == "manipulated_sequences/Deepfakes/c23/videos/003_002.mp4" and (corpus/fake.mask_path).is_file()
    assert (df.mask_path[df.method == "FaceShifter"] == "").all()
    identities = [set(g.target_id) | set(g.source_id) - {""} for _, g in df.groupby("split")]
    assert sum(map(len, identities)) == len(set.union(*identities)) == 6


@pytest.mark.parametrize("splits, culprit", [
    ({**PAIRS, "val": [["001", "000"]]}, "the pair 001, 000 is in both train.json and val.json"),
    ({**PAIRS, "test": [["001", "004"]]}, "001 in test, train"),
    ({**PAIRS, "test": "004"}, "expected a list of pairs"),
    ({"train": [], "val": []}, "test.json: missing"),
    ({"train": [["000", "002"]], "val": [["001", "003"]], "test": []}, "target 000 is in train, source 001 in val"),
])
def test_leaking_or_broken_splits_are_refused(tmp_path, splits, culprit):
    write_splits(tmp_path, splits)
    for p in (real_video(tmp_path, "000"), fake_video(tmp_path, "Deepfakes", "000_001")): p.parent.mkdir(parents=True); p.touch()
    with pytest.raises(CorpusError, match=culprit): index_dataset(tmp_path)


def test_missing_corpus_is_named(tmp_path):
    with pytest.raises(CorpusError, match="nowhere.*auto"): index_dataset(tmp_path/"nowhere")
    with pytest.raises(CorpusError, match="original_sequences/youtube"): index_dataset(tmp_path)


def test_two_cuts_of_one_youtube_video_never_straddle(tmp_path):
    write_splits(tmp_path, {"train": [["755", "100"]], "val": [], "test": [["756", "200"]]})
    videos = [real_video(tmp_path, n) for n in ("755", "100", "756", "200")]
    videos += [fake_video(tmp_path, "Deepfakes", n) for n in ("755_100", "100_755", "756_200")]
    for p in videos: p.parent.mkdir(parents=True, exist_ok=True); p.touch()
    with pytest.warns(UserWarning, match="755 .train. left out: cut from the same YouTube video as 756 .test.|3 clips are in no split"):
        df = index_dataset(tmp_path)
    assert df.attrs["notes"][0] == "755 (train) left out: cut from the same YouTube video as 756 (test)"
    split = df.set_index("clip_id").split
    assert split["youtube/c23/755"] == split["Deepfakes/c23/755_100"] == split["Deepfakes/c23/100_755"] == ""
    assert split["youtube/c23/756"] == split["Deepfakes/c23/756_200"] == "test" and split["youtube/c23/100"] == "train"


# --- decoding --------------------------------------------------------------------------------------------------------

def write_sound(path):
    with av.open(str(path), "w") as c:
        s = c.add_stream("aac", rate=44100)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 4096), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 44100
        c.mux(s.encode(frame)); c.mux(s.encode(None))


def spoil(kind, path, good):
    "Put a file that is no video at `path`."
    match kind:
        case "empty": path.write_bytes(b"")
        case "text": path.write_text("no video\n" * 200)
        case "sound": write_sound(path)
        case "no index": path.write_bytes(good.read_bytes()[:600])


REASONS = {"gone": "no such file", "empty": "empty", "text": "not a video", "sound": "only audio", "no index": "cut off"}

@pytest.mark.parametrize("kind, reason", REASONS.items())
def test_files_that_are_no_videos(tmp_path, corpus, kind, reason):
    spoil(kind, tmp_path/"x.mp4", real_video(corpus, "000"))
    for f in (read_frames, probe, video_length):
        with pytest.raises(VideoError, match=f"x.mp4: .*{reason}"): f(tmp_path/"x.mp4")


def truncate(source, target, share=0.6):
    data = source.read_bytes()
    target.write_bytes(data[:int(len(data) * share)])


def test_truncated_video_gives_what_is_there(tmp_path, corpus, params):
    truncate(real_video(corpus, "000"), tmp_path/"cut.mp4")
    with pytest.warns(UserWarning, match="cut.mp4: damaged or cut off"): frames, times = read_frames(tmp_path/"cut.mp4")
    assert 3 <= len(frames) < FRAMES and np.allclose(times, np.arange(len(frames))/25)
    assert np.array_equal(frames[0], read_frames(real_video(corpus, "000"), [0])[0][0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        clip = face_clip(tmp_path/"cut.mp4", params.faces, make_detector("whole-frame"))
    assert (clip.source_frames, clip.declared_frames) == (len(frames), FRAMES)
    assert clip.indices.max() < len(frames)


# --- faces -----------------------------------------------------------------------------------------------------------

def test_noise_has_no_face(tmp_path, params):
    save(tmp_path/"noise.mp4", np.random.default_rng(1).integers(0, 255, (6, 128, 128, 3), dtype=np.uint8))
    with pytest.raises(NoFaceError, match="noise.mp4: a face could be followed in 0 of 3"):
        face_clip(tmp_path/"noise.mp4", params.faces, make_detector("centerface"))


def test_crop_and_mask_share_their_geometry():
    rng = np.random.default_rng(2)
    mask = np.zeros((90, 120), np.uint8)
    mask[30:60, 40:90] = 255
    for _ in range(20):
        x, y, side, size = *rng.uniform(-20, 60, 2), rng.uniform(20, 100), int(rng.integers(16, 80))
        box = (x, y, x + side, y + side)
        crop, m = crop_face(np.repeat(mask[..., None], 3, 2), box, size), crop_face(mask, box, size, is_mask=True)
        assert ((crop[..., 0] >= 128) == m).mean() > 0.99


def test_crop_is_exact_to_a_fraction_of_a_pixel():
    ramp = np.tile(np.arange(0, 240, 4, dtype=np.uint8), (60, 1))  # 4 grey levels a pixel
    for shift in (0.25, 0.5, 0.75):
        assert np.allclose(crop_face(ramp, (10 + shift, 5, 30 + shift, 25), 20)[:, 5], 60 + 4*shift, atol=0.6)


# Another processor ends sums in other last bits. Nudges a million times as large must not change what is cut.

SQUARES = {"random": [(*np.random.default_rng(k).uniform(-20, 60, 2), np.random.default_rng(k).uniform(16, 140)) for k in range(60)],
           "whole": [(x, y, side) for x, y in ((0, 0), (10, 23), (-7, 40)) for side in (16, 31, 64, 96, 128, 192)],   # 64 is the output
           "half": [(x + .5, x + .25, side) for x in (0, 10) for side in (32.5, 64, 76.8, 128.5)]}

def nudged(box, rng, count=4): return [np.asarray(box) + rng.choice([-1e-9, 1e-9], len(box)) for _ in range(count)]


@pytest.mark.parametrize("kind", SQUARES)
def test_a_nudged_box_gives_the_same_crop(kind):
    rng = np.random.default_rng(3)
    frame, mask = rng.integers(0, 256, (90, 120, 3), dtype=np.uint8), np.where(rng.random((90, 120)) > .5, 255, 0).astype(np.uint8)
    for x, y, side in SQUARES[kind]:
        box = np.array([x, y, x + side, y + side])
        crop, cut = crop_face(frame, box, 64), crop_face(mask, box, 64, is_mask=True)
        for other in nudged(box, rng):
            assert np.abs(crop_face(frame, other, 64).astype(int) - crop).max() <= 1, box
            assert np.array_equal(crop_face(mask, other, 64, is_mask=True), cut), box


def test_half_covered_pixels_of_a_mask_are_altered():
    "However the processor rounds 127.5: at the scales 1 and 6/5, the latter with fractions that no float holds."
    mask = np.zeros((40, 40), np.uint8); mask[:, 20:] = 255
    assert crop_face(mask, (10.5, 0, 30.5, 20), 20, is_mask=True)[0].tolist() == [0]*9 + [1]*11
    assert crop_face(mask, (17, 0, 23, 6), 5, is_mask=True)[0].tolist() == [0, 0, 1, 1, 1]


def test_nudged_detections_give_the_same_boxes():
    rng = np.random.default_rng(4)
    for every, margin in ((1, 1.), (4, 1.), (6, 1.3), (8, 1.5)):
        track = {i: np.array([10 + i, 20, 70 + i, 90, .9]) for i in range(0, 25, every)}
        boxes = crop_boxes(track, 25, margin, every/2)
        assert np.array_equal(boxes % BOX_STEP, np.zeros_like(boxes))
        assert np.array_equal(boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1])   # still squares
        for _ in range(5):
            other = {i: nudged(b, rng, 1)[0] for i, b in track.items()}
            assert np.array_equal(crop_boxes(other, 25, margin, every/2), boxes)


def test_nudged_detections_give_the_same_tracks():
    "Two faces of one size, two boxes that overlap a face equally, and an overlap that is just large enough (20 of 100 pixels)."
    rng = np.random.default_rng(5)
    square = lambda x, y, side=10: [x, y, x + side, y + side, .9]
    cases = {"equal sizes": ({0: [square(0, 0), square(40, 0)], 4: [square(40, 0), square(0, 0)]}, [[0, 0], [40, 40]]),
             "equal overlaps": ({0: [square(10, 0)], 4: [square(8, 0), square(12, 0)]}, [[10, 8], [12]]),
             "just large enough": ({0: [[0, 0, 6, 10, .9]], 4: [[4, 0, 10, 10, .9]]}, [[0, 4]])}
    for name, (found, expected) in cases.items():
        for _ in range(20):
            tracks = link_tracks({i: np.stack([nudged(b, rng, 1)[0] for b in boxes]) for i, boxes in found.items()})
            assert [[round(b[0]) for b in t.values()] for t in tracks] == expected, name


# --- the store -------------------------------------------------------------------------------------------------------

def test_store_round_trip_and_mask_alignment(store, corpus, params):
    assert len(store.clips) == 18 and len(store.excluded) == 0 and (store.clips.n_frames == 8).all()
    assert store.clips.has_mask.sum() == 6 and (store.clips.method[store.clips.has_mask] == "Deepfakes").all()
    clip = store.clips[store.clips.has_mask].iloc[0]
    frames, masks = store.read(clip.clip_id, range(8))
    assert frames.shape == (8, SIDE, SIDE, 3) and masks.shape == (8, SIDE, SIDE) and set(np.unique(masks)) == {0, 1}
    for f, m in zip(frames, masks): assert np.array_equal(f[..., 0] > 127, m == 1)
    assert not np.array_equal(masks[0], masks[-1])  # the rectangle moves, so a mask of another frame would not fit
    indices = store.index[store.index.clip_id == clip.clip_id]["index"]
    assert indices.tolist() == sample_positions(FRAMES, 8).tolist()
    assert np.array_equal(frames, read_frames(corpus/clip.path, indices)[0])  # whole frame, same size: the pixels of the video
    real = store.clips[store.clips.label == 0].iloc[0]
    assert store.read(real.clip_id, [3, 1, 3])[1].max() == 0
    with pytest.raises(IndexError): store.read(real.clip_id, [8])


def digests(folder):
    return {p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_store_bytes_do_not_depend_on_the_run(store, corpus, params, tmp_path):
    prepare_corpus(params, tmp_path/"faces", root=corpus, workers=2)
    shards = {f"shards/{n:05d}.tar" for n in range(store.index.shard.nunique())}
    assert len(shards) > 2 and set(digests(tmp_path/"faces")) == {"clips.parquet", "frames.parquet", "excluded.csv", *shards}
    assert digests(tmp_path/"faces") == digests(store.folder)


def test_what_cannot_be_prepared_is_listed(tmp_path, params):
    corpus = make_corpus(tmp_path/"corpus")
    for kind, name in zip(("empty", "text", "sound"), ("000", "001", "002")): spoil(kind, real_video(corpus, name), None)
    fake_video(corpus, "Deepfakes", "004_005", "masks").write_bytes(b"")
    save(fake_video(corpus, "Deepfakes", "005_004", "masks"), np.zeros((4, SIDE, SIDE, 3), np.uint8), lossless=True)
    truncate(real_video(corpus, "003"), tmp_path/"cut.mp4"); (tmp_path/"cut.mp4").replace(real_video(corpus, "003"))
    save(real_video(corpus, "006"), np.zeros((4, SIDE, SIDE, 3), np.uint8))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        store = prepare_corpus(params, tmp_path/"faces", root=corpus, workers=1)
    assert store.excluded.columns.tolist() == [*COLUMNS, "reason"] and store.excluded.target_id.tolist() == ["000", "001", "002", "006"]
    reasons = store.excluded.set_index("clip_id").reason
    assert reasons.index.tolist() == [f"youtube/c23/{n}" for n in ("000", "001", "002", "006")]
    for reason, expected in zip(reasons, ("empty", "not a video", "only audio", "in no split")):
        assert expected in reason and str(tmp_path) not in reason
    clips = store.clips.set_index("clip_id")
    assert len(clips) + len(reasons) == 19
    cut = clips.loc["youtube/c23/003"]
    assert cut.source_frames < cut.declared_frames == FRAMES
    for name, expected in (("004_005", "empty"), ("005_004", "fewer")):  # unusable masks: the clips stay, without
        clip = clips.loc[f"Deepfakes/c23/{name}"]
        assert not clip.has_mask and "mask unusable" in clip.note and expected in clip.note


def test_no_face_is_excluded_not_cropped(tmp_path, corpus, params):
    faces = params.faces.model_copy(update=dict(detector="centerface"))
    with pytest.raises(ValueError, match="none of 18 clips gave crops.*a face could be followed in 0 of 4 probed frames"):
        prepare_corpus(params.model_copy(update=dict(faces=faces)), tmp_path/"faces", root=corpus, workers=1)
    with pytest.raises(FileNotFoundError, match="dvc repro prepare"): ClipStore(tmp_path/"faces")
    with pytest.raises(ValueError, match="haar.*choose one of centerface"): make_detector("haar")


# --- sampling and augmentation ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("n, count", [(16, 4), (8, 8), (17, 4), (300, 24), (3, 4)])
def test_training_and_testing_share_the_spacing(n, count):
    test = sample_positions(n, count)
    for phase in np.linspace(0, 0.999, 7):
        train = sample_positions(n, count, phase)
        assert train.min() >= 0 and train.max() < n
        assert np.abs(np.diff(train) - n/count).max() < 1 and np.abs(np.diff(test) - n/count).max() < 1
        if n % count == 0: assert np.array_equal(np.diff(train), np.diff(test))


def test_positions_are_exact():
    "A phase of torch's generator has 24 bits, so no product on the way to the floor is rounded."
    rng = np.random.default_rng(6)
    for _ in range(300):
        n, count, phase = int(rng.integers(1, 5000)), int(rng.integers(1, 64)), float(np.float32(rng.random(dtype=np.float32)))
        assert sample_positions(n, count, phase).tolist() == [min((k + Fraction(phase))*n//count, n - 1) for k in range(count)]


class Still(ClipStore):
    "A store whose clips stand still."
    def read(self, clip_id, positions):
        frames, masks = super().read(clip_id, [0])
        return np.repeat(frames, len(positions), 0), np.repeat(masks, len(positions), 0)


def test_all_frames_of_a_clip_share_one_augmentation(store):
    still = Still(store.folder)
    ds = ClipDataset(still, still.clips, frames=4, image_size=48, augment=AUGMENT, seed=0)
    plain = ClipDataset(still, still.clips, frames=4, image_size=48)
    for epoch in range(3):
        for i in range(len(ds)):
            item = ds[epoch, 0, i]
            for name in ("clip", "mask"): assert all(torch.equal(item[name][0], x) for x in item[name])
            assert not torch.equal(item["clip"], plain[i]["clip"])


def test_mask_follows_the_augmented_picture(store):
    shapes_only = AUGMENT.model_copy(update=dict(colour=0.0, blur=0.0, jpeg=0.0))
    clips = store.clips[store.clips.has_mask]
    ds = ClipDataset(store, clips, frames=4, image_size=SIDE, augment=shapes_only)
    for epoch in range(5):
        item = ds[epoch, 0, 0]
        assert ((item["clip"][:, 0] > 0) == item["mask"].bool()).float().mean() > 0.97 and 0 < item["mask"].mean() < 1


def test_items_are_a_function_of_seed_epoch_turn_and_index(store):
    make = lambda seed: ClipDataset(store, store.clips, frames=4, image_size=48, augment=AUGMENT, seed=seed)
    a, b = make(0), make(0)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first = a[1, 0, 2]["clip"]
    assert torch.equal(torch.get_rng_state(), state)  # the global generator is left alone
    b[7, 0, 3]
    assert torch.equal(b[1, 0, 2]["clip"], first)
    assert not any(torch.equal(other, first) for other in (a[2, 0, 2]["clip"], a[1, 5, 2]["clip"], make(1)[1, 0, 2]["clip"]))
    b.set_epoch(1)
    assert torch.equal(b[2]["clip"], first)


def test_plain_items_are_what_inference_makes(store):
    ds = ClipDataset(store, store.clips, frames=4, image_size=48)
    row = store.clips.iloc[4]
    item = ds[4]
    assert torch.equal(item["clip"], to_input(store.read(row.clip_id, [1, 3, 5, 7])[0], 48))
    assert item["clip"].dtype == item["mask"].dtype == torch.float32
    assert item["clip"].shape == (4, 3, 48, 48) and item["mask"].shape == (4, 48, 48)
    assert (item["label"], item["index"]) == (row.label, 4)
    known = pd.Series([ds[i]["mask_known"] for i in range(len(ds))], store.clips.method).groupby(level=0).all()
    assert known.to_dict() == {"Deepfakes": True, "FaceShifter": False, "youtube": True}


@pytest.mark.parametrize("side, size", [(30, 20), (300, 224), (64, 64), (48, 96)])
def test_input_is_what_torchvision_makes(side, size):
    "`to_input` does without torchvision, whose import takes seconds. Without AVX2 torchvision resizes in floats, up to one level off."
    from torchvision.transforms.v2 import functional as F
    frames = np.random.default_rng(0).integers(0, 256, (2, side, side, 3), dtype=np.uint8)
    resized = F.resize(torch.from_numpy(frames).permute(0, 3, 1, 2), [size, size], antialias=True)
    expected = F.normalize(F.to_dtype(resized, torch.float32, scale=True), MEAN, STD)
    if torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512"): assert torch.equal(to_input(frames, size), expected)
    else: assert (to_input(frames, size) - expected).abs().max() < 1.01/255/min(STD)


# --- batches ---------------------------------------------------------------------------------------------------------

def test_balanced_sampler_counts():
    labels = [0]*10 + [1]*40
    methods = ["youtube"]*10 + [m for m in ("Deepfakes", "Face2Face", "FaceSwap", "NeuralTextures") for _ in range(10)]
    sampler = BalancedSampler(labels, methods, seed=3, length=40)
    for epoch in range(3):
        sampler.set_epoch(epoch)
        epochs, turns, drawn = zip(*sampler)
        counts = np.bincount(drawn, minlength=50)
        assert set(epochs) == {epoch} and turns == tuple(range(40)) and len(drawn) == len(sampler) == 40
        assert (counts[:10] == 2).all()                                    # 20 draws from 10 real clips: each twice
        assert counts[10:].reshape(4, 10).sum(1).tolist() == [5]*4 and counts[10:].max() == 1  # 20 fakes: 5 per method, none twice
        assert all(sum(labels[i] for i in drawn[k:k+4]) == 2 for k in range(0, 40, 4))
        assert list(sampler) == list(zip(epochs, turns, drawn))
    assert len({tuple(BalancedSampler(labels, methods, seed=s, length=40)) for s in range(3)}) == 3


@pytest.mark.parametrize("prepared", [False, True])
def test_epochs_reach_living_workers(store, prepared):
    ds = ClipDataset(store, store.clips, frames=2, image_size=32, augment=AUGMENT, seed=0)
    sampler = BalancedSampler(store.clips.label, store.clips.method, seed=0, length=8)
    loader = DataLoader(ds, batch_size=4, sampler=sampler, num_workers=2, persistent_workers=True)
    if prepared: loader = accelerate.Accelerator(cpu=True).prepare(loader)
    seen = []
    for epoch in range(2):
        if not prepared: sampler.set_epoch(epoch)  # a prepared loader counts by itself
        keys = iter(BalancedSampler(store.clips.label, store.clips.method, seed=0, epoch=epoch, length=8))
        for batch in loader:
            assert batch["label"].sum() == 2
            for clip, key in zip(batch["clip"], keys): assert torch.equal(clip, ds[key]["clip"])
            seen.append(batch["index"].tolist())
    assert seen[:2] != seen[2:]


# --- the bundled corpus ----------------------------------------------------------------------------------------------

BUNDLED = find_root(Path(__file__).parent)/"data"

@pytest.mark.skipif(not BUNDLED.is_dir(), reason="data/ is not there: dvc pull data")
def test_bundled_corpus():
    df = index_dataset(BUNDLED, compression="c23")
    assert df.attrs["notes"] == [] and set(df.split) == {"train", "val", "test"}
    names = {m: set(g.target_id + "_" + g.source_id) for m, g in df[df.label == 1].groupby("method")}
    assert len(names) == 4
    for split in ("train", "val", "test"):
        pairs = [tuple(p) for p in json.loads((BUNDLED/"splits"/f"{split}.json").read_text())]
        here = df[df.split == split]
        assert set(here.target_id[here.label == 0]) == {p for pair in pairs for p in pair}  # every identity has a real video
        swaps = {f"{a}_{b}" for a, b in pairs} | {f"{b}_{a}" for a, b in pairs}
        assert all(swaps >= set(g.target_id + "_" + g.source_id) for _, g in here[here.label == 1].groupby("method"))
    identities = [set(g.target_id) | set(g.source_id) - {""} for _, g in df.groupby("split")]
    assert sum(map(len, identities)) == len(set.union(*identities))
    for row in df[df.label == 1].groupby("method").head(1).itertuples():
        assert row.mask_path and video_length(BUNDLED/row.mask_path).frames == video_length(BUNDLED/row.path).frames
        mask = read_frames(BUNDLED/row.mask_path, [0])[0]
        assert ((mask < 8) | (mask > 247)).all() and 0 < (mask > 127).mean() < 0.5
    clip = face_clip(BUNDLED/df.path.iloc[-1], load_params(BUNDLED.parent/"params.yaml").faces, make_detector())
    assert len(clip.frames) and clip.frames.shape[1:] == (300, 300, 3)
