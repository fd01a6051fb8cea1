"""The bundled clips without DVC, PyAV and face detector: files of the remote, decoded by OpenCV, cut at boxes found elsewhere."""
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import yaml

from spotter.data.codec import encode_crop
from spotter.data.faces import crop_face
from spotter.data.store import ClipStore

REMOTE = Path(".dvcstore/files/md5")                        # of .dvc/config
TABLES = "clips.parquet", "frames.parquet", "excluded.csv"  # of `prepare_corpus`; frames.parquet holds the box of every crop


def data_hash(root: Path) -> str:  # of the folder data/, as data.dvc names it
    "MD5 that identifies a version of the bundled clips."
    return yaml.safe_load((root/"data.dvc").read_text())["outs"][0]["md5"]


def tracked_files(
    root: Path,          # of the checkout
) -> dict[str, Path]:    # path below data/ -> file of the remote
    "The files of data/ in the in-repo remote. `FileNotFoundError` that names the first one that is not there."
    def place(md5): return root/REMOTE/md5[:2]/md5[2:]
    listing = place(data_hash(root))
    if not listing.is_file(): raise FileNotFoundError(f"{listing}: missing, the list of files that data.dvc names; copy .dvcstore whole")
    files = {entry["relpath"]: place(entry["md5"]) for entry in json.loads(listing.read_text())}
    lost = [f"{path} ({name})" for name, path in files.items() if not path.is_file()]
    if lost: raise FileNotFoundError(f"{lost[0]}: not there, like {len(lost) - 1} other files of {listing.name}; copy .dvcstore whole")
    return files


def decode(
    path: Path,
    indices: list[int],       # wanted frames, counted from 0, ascending
) -> list[np.ndarray]:        # each (H, W, 3) uint8 BGR
    "Frames of a video, by OpenCV's FFmpeg in one thread. `ValueError` when one cannot be decoded."
    capture = cv2.VideoCapture(str(path), cv2.CAP_FFMPEG, [cv2.CAP_PROP_N_THREADS, 1])
    if not capture.isOpened(): raise ValueError(f"{path}: OpenCV cannot open it; was it built with FFmpeg (cv2.getBuildInformation())?")
    frames, wanted = [], set(indices)
    try:
        for i in range(max(indices) + 1):
            if not capture.grab(): raise ValueError(f"{path}: frame {i} cannot be decoded, {max(indices) + 1} are needed")
            if i in wanted: frames.append(capture.retrieve()[1])
    finally: capture.release()
    return frames


def cut(
    video: Path, mask: Path | None,   # files; None: the clip has no mask
    index: pd.DataFrame,              # the clip's rows of frames.parquet
    size: int,                        # S, side of a crop in pixels
) -> tuple[np.ndarray, np.ndarray]:   # crops (N, S, S, 3) uint8 RGB, masks (N, S, S) uint8 0/1
    "Crops of one clip and their masks, as `prepare_corpus` stores them but for what another decoder changes."
    wanted, boxes = index["index"].tolist(), index[["x0", "y0", "x1", "y1"]].to_numpy()
    frames = [cv2.cvtColor(frame, cv2.COLOR_BGR2RGB) for frame in decode(video, wanted)]
    crops = np.stack([crop_face(frame, box, size) for frame, box in zip(frames, boxes)])
    if mask is None: return crops, np.zeros(crops.shape[:3], np.uint8)
    altered = [np.ascontiguousarray(frame[..., 0]) for frame in decode(mask, wanted)]
    return crops, np.stack([crop_face(frame, box, size, is_mask=True) for frame, box in zip(altered, boxes)])


class CropStore:
    "Crops of many clips in two arrays on disk, which several processes read. It has the attributes and the `read` of `ClipStore`."
    def __init__(self, folder: str | Path):  # of `cut_store`
        self.folder = Path(folder)
        self.clips, self.index = (pd.read_parquet(self.folder/name) for name in TABLES[:2])
        self.excluded = pd.read_csv(self.folder/TABLES[2], dtype=str, keep_default_na=False).astype(dict(label=int))
        self.rows = {clip: np.sort(rows) for clip, rows in self.index.groupby("clip_id").indices.items()}  # rows of the arrays
        self._open()

    def _open(self): self.crops, self.masks = (np.load(self.folder/f"{name}.npy", mmap_mode="r") for name in ("crops", "masks"))
    def __getstate__(self): return {name: value for name, value in self.__dict__.items() if name not in ("crops", "masks")}
    def __setstate__(self, state): self.__dict__ |= state; self._open()

    def read(self, clip_id: str, positions) -> tuple[np.ndarray, np.ndarray]:
        "Frames (T, S, S, 3) uint8 RGB and masks (T, S, S) uint8 0/1 of a clip."
        rows = self.rows[clip_id][np.asarray(positions)]
        return self.crops[rows], self.masks[rows]


def cut_store(
    files: dict[str, Path],   # of `tracked_files`
    clips: pd.DataFrame, index: pd.DataFrame, excluded: pd.DataFrame,  # as in `TABLES`
    folder: Path,             # is made
    size: int,                # side of a crop in pixels
    threads: int,             # that decode
) -> CropStore:
    "Decode and cut clips, and write them as a store. `ValueError` when the tables are of other clips than `files`."
    unknown = [p for p in [*clips.path, *clips.mask_path[clips.has_mask]] if p not in files]
    if unknown: raise ValueError(f"{unknown[0]} and {len(unknown) - 1} other files of the face tables are not in data.dvc: "
                                 "the tables are of another version of the clips; run `dvc repro prepare`, then `gpu.py pack` again")
    folder.mkdir(parents=True)
    index = index[index.clip_id.isin(clips.clip_id)].reset_index(drop=True)
    def array(name, shape): return np.lib.format.open_memmap(folder/f"{name}.npy", "w+", np.uint8, (len(index), size, size, *shape))
    crops, masks, rows = array("crops", (3,)), array("masks", ()), index.groupby("clip_id").indices
    def job(clip):
        own = np.sort(rows[clip.clip_id])
        crops[own], masks[own] = cut(files[clip.path], files[clip.mask_path] if clip.has_mask else None, index.iloc[own], size)
    with ThreadPoolExecutor(threads) as pool: list(pool.map(job, clips.itertuples()))   # OpenCV decodes without the interpreter's lock
    crops.flush(); masks.flush()
    clips.to_parquet(folder/TABLES[0], index=False); index.to_parquet(folder/TABLES[1], index=False)
    excluded.to_csv(folder/TABLES[2], index=False)
    return CropStore(folder)


def read_tables(
    faces: Path,  # folder with `TABLES`
) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    "Clips, crops with their boxes, and clips without crops. `FileNotFoundError` that says how to get them."
    for name in TABLES:
        if not (faces/name).is_file(): raise FileNotFoundError(f"{faces/name}: missing; run `dvc repro prepare`, then `gpu.py pack`")
    clips, index = (pd.read_parquet(faces/name) for name in TABLES[:2])
    return clips, index, pd.read_csv(faces/TABLES[2], dtype=str, keep_default_na=False)


def first_pairs(
    clips: pd.DataFrame,
    pairs: int,             # identity pairs of each split
) -> pd.DataFrame:          # the clips of these people
    "A small corpus that has every split and class."
    fakes = clips[clips.label == 1]
    kept = set()
    for _, rows in fakes.groupby("split"):
        known = sorted({tuple(sorted(pair)) for pair in zip(rows.target_id, rows.source_id)})
        kept |= {identity for pair in known[:pairs] for identity in pair}
    return clips[clips.target_id.isin(kept)].reset_index(drop=True)


def compressed(
    clips: pd.DataFrame, index: pd.DataFrame,   # as in `TABLES`
    files: dict[str, Path],                     # of `tracked_files`
    level: str = "c40",
) -> tuple[pd.DataFrame, pd.DataFrame]:         # the same tables for the test clips that exist at that compression
    "Strongly compressed test clips, to be cut at the boxes of the weakly compressed ones (`make results` detects the faces anew)."
    test = clips[clips.split == "test"]
    def other(column): return [text.replace(f"/{now}/", f"/{level}/") for text, now in zip(test[column], test.compression)]
    test = test.assign(new_id=other("clip_id"), path=other("path"), compression=level, has_mask=False, mask_path="")
    test = test[test.path.isin(files)]
    names = dict(zip(test.clip_id, test.new_id))
    index = index[index.clip_id.isin(names)].reset_index(drop=True)
    test = test.assign(clip_id=test.new_id).drop(columns="new_id").reset_index(drop=True)
    return test, index.assign(clip_id=index.clip_id.map(names))


def write_references(
    faces: Path,       # folder of prepared crops
    out: Path,         # folder of image files; is made
    count: int = 8,
):
    "Some prepared crops, which tell how far another machine's decoder and another OpenCV are from those that prepared."
    store = ClipStore(faces)
    out.mkdir(parents=True)
    for row in store.clips.iloc[np.linspace(0, len(store.clips) - 1, count).astype(int)].drop_duplicates("clip_id").itertuples():
        place = row.n_frames//2
        (out/f"{row.clip_id.replace('/', '@')}@{place}.webp").write_bytes(encode_crop(store.read(row.clip_id, [place])[0][0]))


def reference_difference(
    folder: Path,               # of `write_references`
    files: dict[str, Path],     # of `tracked_files`
    store: CropStore,
) -> dict | None:               # crops, mean and largest difference in grey levels; None without a reference
    "Crops that are cut here against prepared ones."
    paths, found = dict(zip(store.clips.clip_id, store.clips.path)), []
    for file in sorted(folder.glob("*.webp")):
        *clip, place = file.stem.split("@")
        if (name := "/".join(clip)) not in paths: continue
        before = cv2.cvtColor(cv2.imread(str(file)), cv2.COLOR_BGR2RGB).astype(int)
        found.append(np.abs(cut(files[paths[name]], None, store.index.iloc[store.rows[name][[int(place)]]], len(before))[0][0] - before))
    return dict(crops=len(found), mean=float(np.mean(found)), largest=int(np.max(found))) if found else None
