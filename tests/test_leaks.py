"""`spotter audit` on a clean tree of tiny videos, and on trees with one fault each: the fault is found, and nothing else is."""
import json
import shutil
from pathlib import Path

import av
import cv2
import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

from spotter.cli import app
from spotter.core import find_root
from spotter.data.corpora import CorpusError, index_dataset
from spotter.evaluate.corpus_audit import audit_corpus
from spotter.evaluate.leaks import people_check

ROOT = find_root(Path(__file__).parent)
PEOPLE = dict(train=range(8), val=range(8, 10), test=range(10, 18))
KINDS, FOLDERS = ("real", "fake"), ("originals", "swaps")


def video(person: int, label: int, frames: int = 8, side: int = 64) -> np.ndarray:
    "A pattern of the person that moves, with a patch that differs between the real clip and the fake."
    def pattern(seed, n):
        noise = np.random.default_rng(seed).integers(100, 156, (n, n, 3)).astype(np.uint8)
        return cv2.resize(noise, (4*n, 4*n), interpolation=cv2.INTER_CUBIC)
    base = pattern([person, 9], 16)
    base[16:40, 24:48] = pattern([person, label], 6)
    return np.stack([cv2.resize(np.roll(base, t, 1), (side, side), interpolation=cv2.INTER_CUBIC) for t in range(frames)])


def write(path: Path, frames: np.ndarray, fps=25, codec="libx264", chroma="yuv420p", crf=23):
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=fps, options=dict(threads="1") | (dict(crf=str(crf)) if codec == "libx264" else {}))
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], chroma
        for frame in frames: container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, "rgb24")))
        container.mux(stream.encode())


def place(root: Path, label: int, person: int) -> Path: return root/FOLDERS[label]/f"{person:02}.mp4"


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    root, rows = tmp_path_factory.mktemp("corpus")/"clean", []
    for split, people in PEOPLE.items():
        for p in people:
            for label, kind in enumerate(KINDS):
                write(place(root, label, p), video(p, label))
                rows.append(dict(path=f"{FOLDERS[label]}/{p:02}.mp4", label=kind, identity=f"p{p:02}", source="",
                                 original=f"originals/{p:02}.mp4" if label else "", split=split))
    pd.DataFrame(rows).set_index("path").to_csv(root/"manifest.csv")
    return root


@pytest.fixture
def copied(tree, tmp_path): return Path(shutil.copytree(tree, tmp_path/"corpus"))


def edit(root: Path, path: str, **values):
    "Other values in a row of the manifest."
    table = pd.read_csv(root/"manifest.csv", dtype=str, keep_default_na=False, index_col="path")
    table.loc[path, list(values)] = list(values.values())
    table.to_csv(root/"manifest.csv")


def keep(root: Path, rows):
    "Only those rows of the manifest, and their videos."
    table = pd.read_csv(root/"manifest.csv", dtype=str, keep_default_na=False, index_col="path")
    for path in table.index[~rows(table)]: (root/path).unlink()
    table[rows(table)].to_csv(root/"manifest.csv")


@pytest.mark.filterwarnings("ignore")
def found(root: Path) -> dict[str, pd.DataFrame]:
    "The checks that found something."
    audit = audit_corpus(index_dataset(root), root, workers=1, resamples=100)
    return {check.name: check.found for check in audit.checks if len(check.found)}


def test_a_clean_tree_has_no_finding(tree):
    assert not (told := found(tree)), {name: rows.what.tolist() for name, rows in told.items()}


# ---- leaks --------------------------------------------------------------------------------------------------------------------------

def identity(root):
    edit(root, "originals/10.mp4", identity="p00")
    return "people", "p00 is in test (1 as target), train (2 as target)"


def source(root):
    edit(root, "swaps/10.mp4", source="p03")
    return "people", "p03 is in test (1 as source), train (2 as target)"


def elsewhere(root):
    edit(root, "swaps/10.mp4", original="originals/00.mp4")
    return "originals", "swaps/10 is in test, its original originals/00 is in train"


def gone(root):
    edit(root, "swaps/10.mp4", original="originals/xx.mp4")
    return "originals", "swaps/10 is in test, its original originals/xx is not in the corpus"


def no_split(root):
    edit(root, "originals/10.mp4", split="")
    return "originals", "swaps/10 is in test, its original originals/10 is in no split"


def one_class(root):
    keep(root, lambda t: (t.split != "val") | (t.label == "real"))
    return "balance", "val has no fake clip"


def no_training(root):
    keep(root, lambda t: t.split != "train")
    return "balance", "train has no real or fake clip"


def both_labels(root):
    write(place(root, 1, 0), video(0, 0), crf=26)
    return "duplicates", "originals/00 (real, train) and swaps/00 (fake, train) show the same"


def not_listed(root):
    shutil.copy(place(root, 0, 0), root/"originals/extra.mp4")
    return "files", "1 on disk but not in manifest.csv: originals/extra.mp4"


def not_there(root):
    place(root, 1, 10).unlink()
    return "files", "1 in manifest.csv but not on disk: swaps/10.mp4"


def empty(root):
    place(root, 1, 10).write_bytes(b"")
    return "files", "swaps/10.mp4: the file is empty"


def text(root):
    place(root, 1, 10).write_text("no video at all\n"*50)
    return "files", "swaps/10.mp4: not a video"


@pytest.mark.parametrize("plant", [identity, source, elsewhere, gone, no_split, one_class, no_training, both_labels, not_listed, not_there,
                                   empty, text], ids=lambda f: f.__name__)
def test_a_planted_leak_is_the_only_finding(plant, copied):
    check, said = plant(copied)
    told = found(copied)
    assert list(told) == [check] and len(told[check]) == 1 and said in told[check].what[0], {k: v.what.tolist() for k, v in told.items()}


@pytest.mark.parametrize("coding", [dict(crf=35), dict(fps=30), dict(codec="mpeg4"), dict(side=128)], ids=str)
def test_a_video_coded_again_is_found_in_another_split(coding, copied):
    options = {k: v for k, v in coding.items() if k != "side"}
    write(place(copied, 0, 10), video(0, 0, side=coding.get("side", 64)), **options)
    told = found(copied)
    assert list(told) == ["duplicates"]
    pairs = set(zip(told["duplicates"].clip_a, told["duplicates"].clip_b))
    assert ("originals/00", "originals/10") in {tuple(sorted(p)) for p in pairs} and set(told["duplicates"].kind) == {"two splits"}
    assert all("originals/10" in p for p in pairs), pairs   # with the original, and perhaps with the fake of it


def test_a_shared_original_that_is_missing_is_found(copied):
    for p in (0, 10): edit(copied, f"swaps/{p:02}.mp4", original="originals/xx.mp4")
    assert found(copied)["originals"].kind.tolist() == ["missing", "missing", "shared"]


def test_pairs_of_faceforensics_that_are_one_video_are_found(tmp_path):
    for split, pair in dict(train=["605", "000"], val=["001", "002"], test=["606", "003"]).items():
        (tmp_path/"splits").mkdir(exist_ok=True)
        (tmp_path/f"splits/{split}.json").write_text(json.dumps([pair]))
        for name in pair: write(tmp_path/f"original_sequences/youtube/c23/videos/{name}.mp4", video(int(name), 0))
    with pytest.warns(UserWarning, match="left out"): index = index_dataset(tmp_path)
    assert people_check(index, tmp_path, "ffpp").found.what.tolist() == [
        "605 (train) and 606 (test) are cut from one video; Spotter leaves one of them out"]
    with pytest.warns(UserWarning): own = index_dataset(tmp_path, splits="own")
    torn = own.set_index("target_id").split[["605", "606"]].nunique() == 2
    assert len(people_check(own, tmp_path, "ffpp").found) == torn


# ---- files that tell the label ------------------------------------------------------------------------------------------------------

BITS = {"bit_rate", "bits_per_pixel"}


@pytest.mark.parametrize("feature, coding, implied", [
    ("codec", dict(codec="mpeg4"), BITS | {"settings", "encoder", "colour", "key_frame_distance"}),
    ("chroma", dict(chroma="yuv444p"), BITS | {"settings"}),
    ("size", dict(side=128), BITS | {"pixels", "settings"}),
    ("bit_rate", dict(crf=40), BITS | {"settings"}),
    ("seconds", dict(frames=14), BITS | {"frames", "key_frame_distance"}),
    ("fps", dict(fps=30), BITS | {"seconds", "settings"})], ids=lambda x: x if isinstance(x, str) else "")
def test_a_property_that_tells_the_label_is_found(feature, coding, implied, copied):
    form = {k: coding.pop(k) for k in ("side", "frames") if k in coding}
    for people in PEOPLE.values():
        for p in people: write(place(copied, 1, p), video(p, 1, **form), **coding)
    told = found(copied)
    assert list(told) == ["headers"]
    rows = told["headers"]
    assert set(rows.split[rows.kind == feature]) == {"train", "test"}, rows.what.tolist()
    assert set(rows.kind) <= implied | {feature}, rows.what.tolist()
    assert (rows.value[rows.kind == feature] == 1).all()


def test_a_property_that_tells_the_label_in_one_split_only(copied):
    for p in PEOPLE["test"]: write(place(copied, 0, p), video(p, 0), codec="mpeg4")
    rows = found(copied)["headers"]
    assert set(rows.split) == {"test"} and "codec in test" in rows.what[0] and "real mpeg4 (8 of 8), fake h264 (8 of 8)" in rows.what[0]


def test_a_property_that_both_classes_have_tells_nothing(copied):
    for people in PEOPLE.values():
        for p in list(people)[::2]:
            for label in (0, 1): write(place(copied, label, p), video(p, label, side=128), codec="mpeg4", fps=30)
    assert found(copied) == {}


# ---- the command --------------------------------------------------------------------------------------------------------------------

def run(*arguments): return CliRunner().invoke(app, ["audit", *map(str, arguments)], env=dict(COLUMNS="140", NO_COLOR="1", TERM="dumb"))


def test_exit_codes_and_output(tree, copied, tmp_path):
    clean = run(tree, "--strict")
    assert clean.exit_code == 0 and "nothing found in 6 checks" in clean.stdout, clean.output
    edit(copied, "originals/10.mp4", identity="p00")
    lax, strict = run(copied, "--json", tmp_path/"found.json"), run(copied, "--strict")
    assert (lax.exit_code, strict.exit_code) == (0, 1) and "1 FOUND" in strict.stdout and "p00 is in test" in strict.stdout
    told = json.loads((tmp_path/"found.json").read_text())
    assert told["findings"] == 1 and not told["checks"]["people"]["ok"] and told["checks"]["people"]["found"][0]["who"] == "p00"
    assert {name for name, check in told["checks"].items() if check["ok"]} == {"originals", "duplicates", "balance", "headers", "files"}
    assert told["corpus"]["clips"] == 36 and {row["split"] for row in told["headers"]} == {"train", "test"}


def test_many_findings_are_counted_and_some_are_shown(copied):
    for p in PEOPLE["test"]: edit(copied, f"swaps/{p}.mp4", original="originals/00.mp4")
    text = run(copied).stdout
    assert "originals   8 FOUND" in text and "… and 3 more" in text and text.count("its original originals/00 is in train") == 5


def test_wrong_usage_is_told(tree, tmp_path, monkeypatch):
    (tmp_path/"heap").mkdir()
    monkeypatch.chdir(tmp_path)   # where no params.yaml is
    for arguments, word in [(["nowhere"], "no such folder"), (["heap"], "no corpus that Spotter knows"),
                            ([tree, "--layout", "x"], "choose auto"), ([tree, "--layout", "ffpp"], "not FaceForensics++"),
                            ([tree, "--json", tmp_path], "is a folder"), ([], "no params.yaml")]:
        wrong = run(*arguments)
        assert wrong.exit_code == 2 and word in wrong.output, (arguments, wrong.output)


def test_a_corpus_of_unreadable_files_is_no_crash(copied):
    for path in copied.rglob("*.mp4"): path.write_bytes(b"")
    told = run(copied, "--strict")
    assert told.exit_code == 1 and "files       36 FOUND" in told.stdout, told.output


def test_two_processes_find_the_same(copied):
    edit(copied, "originals/10.mp4", identity="p00")
    index = index_dataset(copied)
    one, two = (audit_corpus(index, copied, workers=n, resamples=50) for n in (1, 2))
    assert one.headers.equals(two.headers) and [c.sentence for c in one.checks] == [c.sentence for c in two.checks]


@pytest.mark.slow
@pytest.mark.skipif(not (ROOT/"data"/"manifest.csv").exists(), reason="no bundled clips: `dvc pull data` fetches them")
def test_the_bundled_clips_are_clean():
    told = found(ROOT/"data")
    assert not told, {name: rows.what.tolist() for name, rows in told.items()}
