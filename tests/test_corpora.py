"Each layout on a tree of empty files in its very form: recognised, read, split without a leak, and its faults told."
import itertools
import json
from typing import get_args

import pytest

from spotter.core import DataParams
from spotter.data.corpora import LAYOUTS, CorpusError, find_layout, index_dataset, torn_people
from spotter.data.table import COLUMNS


def touch(root, *names):
    for name in names:
        (root/name).parent.mkdir(parents=True, exist_ok=True)
        (root/name).touch()
    return root


def write(root, name, content):
    touch(root, name)
    (root/name).write_text(content if isinstance(content, str) else json.dumps(content))
    return root


def ffpp(root):
    pairs = dict(train=[["000", "001"]], val=[["002", "003"]], test=[["004", "005"]])
    for split, listed in pairs.items(): write(root, f"splits/{split}.json", listed)
    touch(root, *[f"original_sequences/youtube/c23/videos/{i:03}.mp4" for i in range(6)])
    both = [f"{a}_{b}" for (pair,) in pairs.values() for a, b in (pair, pair[::-1])]
    for method in ("Deepfakes", "FaceShifter"): touch(root, *[f"manipulated_sequences/{method}/c23/videos/{n}.mp4" for n in both])
    return touch(root, *[f"manipulated_sequences/Deepfakes/masks/videos/{n}.mp4" for n in both])


def dfd(root):
    people = [f"{i:02}" for i in range(1, 13)]
    touch(root, *[f"original_sequences/actors/c23/videos/{a}__{s}.mp4" for a in people for s in ("walking", "hugging_happy")])
    return touch(root, *[f"manipulated_sequences/DeepFakeDetection/c23/videos/{a}_{b}__walking__ABCDEF{k:02}.mp4"
                         for k, (a, b) in enumerate(itertools.combinations(people, 2))])


def celeb_df(root, inside=""):
    people = [f"id{i}" for i in range(8)]
    touch(root, *[f"Celeb-real/{inside}{p}_{n:04}.mp4" for p in people for n in range(2)])
    touch(root, *[f"YouTube-real/{inside}{n:05}.mp4" for n in range(4)])
    touch(root, *[f"Celeb-synthesis/{inside}{a}_{b}_{n:04}.mp4" for a, b in itertools.permutations(people, 2) for n in range(2)])
    listed = "1 YouTube-real/00000.mp4\n1 Celeb-real/id0_0000.mp4\n0 Celeb-synthesis/id0_id1_0000.mp4\n"
    return write(root, "List_of_testing_videos.txt", listed)


def dfdc(root, tested=False):
    for k in range(10):
        entries = {"a.mp4": dict(label="REAL", split="train"), "b.mp4": dict(label="FAKE", split="train", original="a.mp4")}
        write(touch(root, *[f"dfdc_train_part_{k}/{n}" for n in entries]), f"dfdc_train_part_{k}/metadata.json", entries)
    if tested: write(touch(root, "test/x.mp4", "test/y.mp4"), "test/labels.csv", "filename,label\nx.mp4,1\ny.mp4,0\n")
    return root


def dfdc_preview(root):
    people = [str(1000000 + i) for i in range(20)]
    split = dict(zip(people, ["train"]*16 + ["test"]*4))
    entries = {f"original_videos/{p}/{p}_A_001.mp4": dict(label="real", set=split[p]) for p in people}
    entries |= {f"method_A/{a}_{b}/{a}_{b}_A_001.mp4": dict(label="fake", set=split[a], target=a, swapped=b)
                for a, b in zip(people[::2], people[1::2])}
    return write(touch(root, *entries), "dataset.json", entries)


def deeper_forensics(root):
    names = [f"{i:03}_{'WM'[i % 2]}{i:03}" for i in range(10)]
    for split, listed in dict(train=names[:6], val=names[6:8], test=names[8:]).items():
        write(root, f"lists/splits/{split}.txt", "".join(f"{n}.mp4\n" for n in listed))
    touch(root, *[f"manipulated_videos/end_to_end/{n}.mp4" for n in names])
    return touch(root, *[f"original_sequences/youtube/c23/videos/{i:03}.mp4" for i in range(10)])


def df40(root):
    ffpp(root)
    for p in (root/"manipulated_sequences").rglob("*.mp4"): p.unlink()
    touch(root, "Celeb-real/id0_0000.mp4", "Celeb-real/id1_0000.mp4", "simswap/cdf/id0_id1_0000.mp4")
    write(root, "List_of_testing_videos.txt", "1 Celeb-real/id0_0000.mp4\n1 Celeb-real/id1_0000.mp4\n")
    return touch(root, *[f"{m}/ff/{n}.mp4" for m in ("simswap", "fomm") for n in ("000_001", "002_003", "004_005")])


def folders(root): return touch(root, *[f"real/p{i}.mp4" for i in range(12)], *[f"fake/swap/p{i}_p{i ^ 1}.mp4" for i in range(12)])


def split_folders(root):
    people = dict(train=range(10), test=range(10, 14))
    return touch(root, *[f"{s}/{name}.mp4" for s, who in people.items() for i in who for name in (f"real/p{i}", f"fake/p{i}_x")])


def manifest(root):
    rows = [f"{kind}{i}.mp4,{kind},p{i}" for i in range(12) for kind in ("real", "fake")]
    return write(touch(root, *[r.split(",")[0] for r in rows]), "manifest.csv", "\n".join(["path,label,identity", *rows]))


TREES = [ffpp, dfd, celeb_df, dfdc, dfdc_preview, deeper_forensics, df40, folders, split_folders, manifest]


def test_params_know_every_layout():
    assert set(get_args(DataParams.model_fields["layout"].annotation)) == {"auto", *LAYOUTS} == {"auto", *[t.__name__ for t in TREES]}


@pytest.mark.parametrize("tree", TREES, ids=lambda t: t.__name__)
def test_every_layout(tree, tmp_path):
    root = tree(tmp_path)
    assert find_layout(root, "auto") == tree.__name__
    for splits in ("official", "own"):
        table = index_dataset(root, splits=splits)
        assert table.columns.tolist() == COLUMNS and table.clip_id.is_unique and table.notna().all().all()
        assert all((root/p).is_file() for p in table.path) and set(table.label) == {0, 1}
        known = table[table.original != ""]
        assert (known.label == 1).all() and (table.set_index("clip_id").loc[known.original].label == 0).all()
        if splits == "own" or tree is not celeb_df:   # whose list names test videos only
            both = table[table.split != ""].groupby("split").label.agg(set)
            assert set(both.index) == {"train", "val", "test"} and all(v == {0, 1} for v in both), both
        assert torn_people(table) == []
        again = index_dataset(root, tree.__name__, splits=splits)
        assert again.equals(table)
    assert any((index_dataset(root, splits="own", seed=seed).split != table.split).any() for seed in (1, 2, 3))


def test_labels_of_celeb_df_are_not_turned_over(tmp_path):
    table = index_dataset(celeb_df(tmp_path/"a")).set_index("clip_id")
    assert table.label["Celeb-synthesis/id0_id1_0000"] == 1
    assert table.label["Celeb-real/id0_0000"] == table.label["YouTube-real/00000"] == 0
    assert sorted(table.index[table.split == "test"]) == ["Celeb-real/id0_0000", "Celeb-synthesis/id0_id1_0000", "YouTube-real/00000"]
    inside = index_dataset(celeb_df(tmp_path/"b", "videos/")).set_index("clip_id")   # as some copies have it
    assert inside.drop(columns="path").equals(table.drop(columns="path"))


def test_parts_of_dfdc_stay_whole(tmp_path):
    table = index_dataset(dfdc(tmp_path, tested=True))
    assert table[table.clip_id.str.startswith("test/")].split.unique().tolist() == ["test"]
    assert table.groupby("target_id").split.nunique().max() == 1 and (table.split == "val").sum() == 2   # one part of two clips
    assert any("drawn with seed 0, are for validation" in n for n in table.attrs["notes"])


def test_what_is_missing_or_not_listed_is_told(tmp_path):
    (dfdc(tmp_path/"dfdc")/"dfdc_train_part_0/b.mp4").rename(tmp_path/"dfdc/dfdc_train_part_0/c.mp4")
    notes = "\n".join(index_dataset(tmp_path/"dfdc").attrs["notes"])
    assert "on disk but not in dfdc_train_part_0/metadata.json: c.mp4" in notes
    assert "in dfdc_train_part_0/metadata.json but not on disk: b.mp4" in notes
    (celeb_df(tmp_path/"celeb")/"Celeb-real/id0_0000.mp4").unlink()
    notes = "\n".join(index_dataset(tmp_path/"celeb").attrs["notes"])
    assert "in List_of_testing_videos.txt but not on disk: Celeb-real/id0_0000" in notes
    (ffpp(tmp_path/"ffpp")/"original_sequences/youtube/c23/videos/004.mp4").unlink()
    assert "1 in the split files but not on disk: 004" in index_dataset(tmp_path/"ffpp").attrs["notes"]


def test_a_wrong_root_says_what_it_holds(tmp_path):
    touch(tmp_path, "clips/a.mp4")
    two = touch(tmp_path/"two", "real/a.mp4", "fake/a_b.mp4")
    for root, layout, said in [
        (tmp_path, "auto", r"It holds clips/, two/\. Wanted for each layout:\n(.*\n)*  celeb_df: Celeb-real, Celeb-synthesis"),
        (tmp_path, "celeb_df", "not Celeb-DF: there is no Celeb-real and no Celeb-synthesis. It holds clips/"),
        (two, "auto", "too few for train, val, test")]:
        with pytest.raises(CorpusError, match=said): index_dataset(root, layout)


def test_shared_actors_are_told(tmp_path):
    root = deeper_forensics(tmp_path)
    (root/"lists/splits/test.txt").write_text("008_W000.mp4\n009_M009.mp4\n")
    (root/"manipulated_videos/end_to_end/008_W008.mp4").rename(root/"manipulated_videos/end_to_end/008_W000.mp4")
    assert "1 people are in more than one split: W000" in index_dataset(root).attrs["notes"]
    assert torn_people(index_dataset(root, splits="own")) == []
