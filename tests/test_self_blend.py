"Fakes made of originals: what a blend changes, what a training reads, that it can be continued, and a corpus of originals alone."
import hashlib
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from test_maskless import copy
from test_pipeline import NO_RUNS, ROOT, make_project, one_model
from test_train import SIDE, settings

from spotter.core import DataParams, TrainParams
from spotter.data import faces
from spotter.data.corpora import index_dataset
from spotter.data.loader import ClipDataset
from spotter.data.prepare import prepare_corpus
from spotter.data.sampling import sample_positions
from spotter.data.self_blend import LEAST, METHOD, blend_clip, self_blended
from spotter.data.toy import ToyStore, toy_detector, toy_video
from spotter.data.video import write_video
from spotter.evaluate.calibrate import calibrate_checkpoint
from spotter.model.checkpoint import inspect_checkpoint
from spotter.train.loop import train
from spotter.train.resume import fingerprint
from spotter.train.setup import make_loader

torch.set_num_threads(1)   # the tests run side by side
MARGIN = 1.3


class Originals(ToyStore):
    "Its fakes must not be read."
    def read(self, clip_id, positions):
        assert clip_id.startswith("real"), f"{clip_id} is a true fake"
        return super().read(clip_id, positions)


# ---------------------------------------------------------------- what a blend changes

@pytest.fixture(scope="module")
def picture(): return toy_video("003", frames=4)[0][:, :, 16:80]


@pytest.mark.parametrize("seed", range(12))
def test_a_blend_changes_what_its_mask_says(picture, seed):
    def made(): return blend_clip(picture, np.arange(4)/4, MARGIN, np.random.default_rng(seed))
    (blended, masks), again = made(), made()
    assert np.array_equal(blended, again[0]) and np.array_equal(masks, again[1])
    assert blended.dtype == masks.dtype == np.uint8 and blended.shape == picture.shape and masks.shape == picture.shape[:3]
    changed = (blended != picture).any(-1)
    assert changed[masks == 1].all() and not masks[~changed].any() and masks.mean() >= LEAST
    outside = ~changed.any(0)
    assert outside[:2].all()   # the rest of the head and the background are the original's


def test_frames_of_a_clip_change_alike(picture):
    "The same picture at two times: masks differ by a pixel or two at most, and no colour jumps."
    still = np.repeat(picture[:1], 8, 0)
    for seed in range(12):
        blended, masks = blend_clip(still, np.arange(8)/8, MARGIN, np.random.default_rng(seed))
        for a, b in zip(blended, blended[1:]):
            step, change = np.abs(a.astype(int) - b), np.abs(a.astype(int) - still[0])
            assert step.mean() <= .25*change.mean(), seed


def test_what_cannot_be_blended_is_told():
    with pytest.raises(ValueError, match="differ from it in less than 1%"):   # a face of a pixel
        blend_clip(np.full((1, 32, 32, 3), 99, np.uint8), np.zeros(1), 1000., np.random.default_rng(0))


# ---------------------------------------------------------------- what a training reads

def test_the_table_of_a_training_does_not_depend_on_the_fakes():
    whole, bare = ToyStore(), ToyStore()
    bare.clips = bare.clips.query("label == 0").reset_index(drop=True)
    views = [self_blended(store, 1., 0, MARGIN) for store in (whole, bare)]
    assert views[0].clips.to_csv() == views[1].clips.to_csv() and set(views[0].clips.method) == {"youtube", METHOD}
    made = views[0].clips.query("label == 1")
    assert made.has_mask.all() and made.clip_id.is_unique and (made.source_id == made.target_id).all()
    assert (made.original == made.clip_id.str.removeprefix(f"{METHOD}/")).all()


def test_validation_stands_still_and_training_does_not():
    view = self_blended(ToyStore(), 1., 0, MARGIN)
    val, fakes = view.clips.query("split == 'val' and label == 1"), view.clips.query("split == 'train' and label == 1")
    data = ClipDataset(view, val, 2, SIDE)
    first = data[0]; torch.manual_seed(5); again = data[0]
    assert torch.equal(first["clip"], again["clip"]) and torch.equal(first["mask"], again["mask"]) and first["mask"].any()
    assert first["label"] == 1 and first["mask_known"]
    both, one = view.read(val.clip_id.iloc[0], sample_positions(8, 2)), view.read(val.clip_id.iloc[0], sample_positions(8, 2)[1:])
    assert np.array_equal(both[0][1], one[0][0])   # a frame does not depend on those read with it
    data = ClipDataset(view, fakes, 1, SIDE, settings().train.augment.model_copy(update=dict.fromkeys(("shift", "zoom", "colour"), 0.)))
    before = torch.get_rng_state()
    items = [data[epoch, turn, 0] for epoch, turn in ((0, 0), (0, 1), (1, 0), (0, 0))]
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(items[0]["clip"], items[3]["clip"]) and torch.equal(items[0]["mask"], items[3]["mask"])
    assert not torch.equal(items[0]["mask"], items[1]["mask"]) and not torch.equal(items[0]["mask"], items[2]["mask"])


def test_without_the_setting_nothing_is_touched():
    toy, params = ToyStore(), settings(init="random")
    assert self_blended(toy, 0., 0, MARGIN) is toy
    data = make_loader(params, "toy", toy).dataset
    assert data.store is toy and fingerprint(params, "toy", toy) != fingerprint(settings(init="random", self_blend=.5), "toy", toy)


@pytest.mark.parametrize("share", [.25, .5, 1.])
def test_the_share_is_that_of_the_draws(share):
    params = settings(init="random", self_blend=share, batch_size=8, steps_per_epoch=20)
    view = self_blended(ToyStore(), share, 0, MARGIN)
    clips = view.clips.query("split == 'train'")
    methods = clips.method.to_numpy()[[i for batch in make_loader(params, "toy", view).batch_sampler for _, _, i in batch]]
    counts = pd.Series(methods).value_counts()
    assert counts["youtube"] == 80 and counts[METHOD] == 80*share


def test_the_setting_is_a_share():
    assert TrainParams.model_fields["self_blend"].is_required()
    with pytest.raises(ValueError): TrainParams.model_validate(settings().train.model_dump() | dict(self_blend=1.5))


# ---------------------------------------------------------------- trainings

def digests(folder): return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.glob("*.safetensors"))}


class Killed(Exception): pass


class BreakingOriginals(Originals):
    reads = 0
    def read(self, *args):
        self.reads += 1
        if self.reads > 12: raise Killed("killed")
        return super().read(*args)


def test_a_training_on_originals_reads_no_fake_and_can_be_continued(tmp_path):
    params = settings(init="lite", self_blend=1., workers=1)
    def run(name, store): return train(params, "toy", store, tmp_path/name, tmp_path/f"{name}_live", tmp_path/f"{name}_resume")
    whole = run("whole", Originals())
    with pytest.raises(Killed): run("broken", BreakingOriginals())
    assert (tmp_path/"broken_resume"/"toy"/"progress.json").is_file()
    assert run("broken", Originals()).equals(whole)
    assert digests(tmp_path/"whole") == digests(tmp_path/"broken") and len(digests(tmp_path/"whole")) == 2
    weights, params = tmp_path/"whole"/"weights.safetensors", settings(workers=0)
    assert inspect_checkpoint(weights).metadata["self_blend"] == 1
    model, candidates = calibrate_checkpoint(weights, Originals(), params, tmp_path/"best.safetensors")
    assert model.prevalence == .5 and len(candidates) and inspect_checkpoint(tmp_path/"best.safetensors").metadata["self_blend"] == 1


def test_a_share_keeps_the_true_fakes_of_validation(tmp_path):
    "And so is the calibration on them."
    view = self_blended(ToyStore(), .5, 0, MARGIN).clips
    methods = {split: set(rows.method) for split, rows in view.groupby("split")}
    assert methods == dict(train={"youtube", "noise", METHOD}, val={"youtube", "noise"})
    train(settings(init="random", self_blend=.5, epochs=1), "toy", ToyStore(), tmp_path/"half", tmp_path/"live", tmp_path/"resume")
    with pytest.raises(AssertionError, match="is a true fake"):
        calibrate_checkpoint(tmp_path/"half"/"weights.safetensors", Originals(), settings(workers=0), tmp_path/"best.safetensors")


def test_without_fakes_the_error_names_the_setting(tmp_path):
    bare = ToyStore(); bare.clips = bare.clips.query("label == 0")
    for share in (0., .5):
        with pytest.raises(ValueError, match="train.self_blend: 1"):
            train(settings(init="random", self_blend=share), "toy", bare, tmp_path/"a", tmp_path/"b", tmp_path/"c")


# ---------------------------------------------------------------- a corpus of originals alone

def originals(root: Path, layout: str) -> Path:
    "Videos of twelve people, without a fake."
    people = {f"{i:03}": "test" if i < 2 else "val" if i < 4 else "train" for i in range(12)}
    places = {name: f"{split}/real/{name}.mp4" if layout == "split_folders" else f"real/{name}.mp4" for name, split in people.items()}
    for name, place in places.items():
        (root/place).parent.mkdir(parents=True, exist_ok=True)
        write_video(root/place, toy_video(name)[0], lossless=True)
    lines = ["path,label,identity", *(f"{place},real,{name}" for name, place in places.items())]
    if layout == "manifest": (root/"manifest.csv").write_text("\n".join(lines))
    return root


@pytest.mark.parametrize("layout", ["folders", "split_folders", "manifest"])
def test_a_corpus_of_originals_alone(layout, tmp_path, monkeypatch):
    "From videos to a calibrated network."
    monkeypatch.setitem(faces.DETECTORS, "toy", toy_detector)
    root = originals(tmp_path/"corpus", layout)
    with pytest.warns(UserWarning, match="no fakes: .*train.self_blend: 1"): table = index_dataset(root)
    assert set(table.split) == {"train", "val", "test"} and not table.label.any()
    params = settings(init="random", self_blend=1., epochs=1)
    own = dict(faces=params.faces.model_copy(update=dict(detector="toy", size=SIDE, frames=4, every=4)),
               data=DataParams(root="corpus", layout="auto", compression="c23", splits="official", split_seed=0))
    params = params.model_copy(update=own)
    with pytest.warns(UserWarning): store = prepare_corpus(params, tmp_path/"faces", root=root, workers=0)
    train(params, "toy", store, tmp_path/"out", tmp_path/"live", tmp_path/"resume")
    model, _ = calibrate_checkpoint(tmp_path/"out"/"weights.safetensors", store, params, tmp_path/"best.safetensors")
    assert model.prevalence == .5 and model.heatmap_constants


def test_the_stages_make_a_detector_of_originals_alone(tmp_path):
    "To the network for `spotter predict`; what compares verdicts with labels needs fakes."
    params = one_model(yaml.safe_load((ROOT/"params.yaml").read_text()))
    params["train"]["self_blend"] = 1.
    def corpus(out): copy([f"real/p{i}.mp4" for i in range(10)], "real", out)
    project = make_project(tmp_path, params, NO_RUNS, corpus, "ship")
    assert inspect_checkpoint(project/"checkpoints"/"shipped.safetensors").metadata["self_blend"] == 1
    for stage in ("train", "calibrate"): assert METHOD in (project/"reports"/"models"/"small"/f"{stage}.ipynb").read_text()
