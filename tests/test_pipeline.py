"The whole pipeline, from videos to HTML, on a few clips and tiny networks in a temporary folder."
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import yaml
from sklearn.metrics import accuracy_score, recall_score, roc_auc_score

from spotter.data.corpora import index_dataset

ROOT = Path(__file__).parents[1]
ARMS = ("b0_plain", "b0", "b3")
PAIRS = dict(train=2, val=1, test=2)
RUNS = {"b0_plain-seed1": dict(key="b0_plain", seed=1, pairs=0, without=""), "b0-seed1": dict(key="b0", seed=1, pairs=0, without=""), "b3-seed1": dict(key="b3", seed=1, pairs=0, without=""),
        "b0-without-FaceSwap": dict(key="b0", seed=0, pairs=0, without="FaceSwap"), "b0-pairs1": dict(key="b0", seed=0, pairs=1, without="")}


def subset(source: Path, out: Path):
    "The first pairs of each split of the bundled clips, in the same layout."
    (out/"splits").mkdir(parents=True)
    names = set()
    for split, n in PAIRS.items():
        pairs = json.loads((source/"splits"/f"{split}.json").read_text())[:n]
        (out/"splits"/f"{split}.json").write_text(json.dumps(pairs))
        names |= {name for a, b in pairs for name in (a, b, f"{a}_{b}", f"{b}_{a}")}
    for video in source.rglob("*.mp4"):
        if video.stem in names:
            target = out/video.relative_to(source); target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(video, target)
    shutil.copy(source/"manifest.csv", out)


def tiny(settings: dict) -> dict:
    "Settings of seconds."
    settings["threads"] = 1   # as many as the other tests leave
    settings["faces"].update(size=96)
    settings["clips"].update(frames=2, eval_frames=2)
    settings["train"].update(workers=0, warmup_steps=0, grow_epochs=0)
    settings["evaluate"]["resamples"] = 50
    for key in settings["arms"].values(): key.update(image_size=64, batch_size=2, epochs=1, steps_per_epoch=2)
    return settings


def run(folder: Path, *command: str) -> str:
    env = {k: v for k, v in os.environ.items() if k != "IN_TEST"} | dict(PYTHONPATH=str(folder), PATH=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=env)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    "A copy of the project with a few clips and tiny settings, run once."
    folder = tmp_path_factory.mktemp("project")
    for name in ("dvc.yaml", "settings.ini", ".dvcignore"): shutil.copy(ROOT/name, folder)
    for name in ("nbs", "spotter", "results"): shutil.copytree(ROOT/name, folder/name, ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints"))
    (folder/"reports").mkdir()
    subset(ROOT/"data", folder/"data")
    (folder/"params.yaml").write_text(yaml.safe_dump(tiny(yaml.safe_load((ROOT/"params.yaml").read_text())), sort_keys=False))
    (folder/"results"/"params.yaml").write_text(yaml.safe_dump(dict(runs=RUNS, half="b0-pairs1"), sort_keys=False))
    run(folder, "dvc", "init", "--no-scm", "--quiet")
    run(folder, "dvc", "repro")
    return folder


def test_everything_is_there(project):
    for key in ARMS:
        for name in (f"checkpoints/{key}/best.safetensors", f"checkpoints/{key}/last.safetensors", f"metrics/{key}.json", f"metrics/predictions_{key}.csv",
                     f"metrics/training/{key}/metrics.json", f"metrics/localisation_{key}.csv", f"reports/heatmaps_{key}.jpg", f"reports/train_{key}.ipynb", f"reports/html/evaluate_{key}.html"):
            assert (project/name).is_file(), name
    for name in ("metrics/comparison.json", "metrics/localisation.csv", "metrics/excluded.csv", "metrics/audit.csv", "metrics/audit.json", "reports/html/audit.html", "reports/html/compare.html", "reports/html/prepare.html"): assert (project/name).is_file(), name


@pytest.mark.parametrize("arm", ARMS)
def test_an_outsider_gets_the_same_figures(project, key):
    table = pd.read_csv(project/"metrics"/f"predictions_{key}.csv", dtype=dict(target_id=str, source_id=str))
    figures = json.loads((project/"metrics"/f"{key}.json").read_text())
    recalls = recall_score(table.label, table.prediction, average=None)
    assert figures["accuracy"]["value"] == pytest.approx(accuracy_score(table.label, table.prediction), abs=1e-6)
    assert (figures["real_recall"]["value"], figures["fake_recall"]["value"]) == pytest.approx(tuple(recalls), abs=1e-6)
    assert figures["auc"]["value"] == pytest.approx(roc_auc_score(table.label, table.p_fake), abs=1e-6)


@pytest.mark.parametrize("arm", ARMS)
def test_the_localisation_figures_are_those_of_the_table(project, key):
    table = pd.read_csv(project/"metrics"/f"localisation_{key}.csv", dtype=dict(target_id=str, source_id=str))
    figures = json.loads((project/"metrics"/f"{key}.json").read_text())["localisation"]
    for source, rows in table[table.label == 1].groupby("source"):
        for score in ("average_precision", "pointing", "energy", "iou"): assert figures["maps"][source][score]["value"] == pytest.approx(rows[score].mean(), abs=2e-6), (source, score)
    for source, rows in table[table.label == 0].groupby("source"): assert figures["lit_on_real"][source]["value"] == pytest.approx(rows.lit.mean(), abs=2e-6), source
    assert {"fine", "mid", "semantic", "fused", "centre", "face", "noise", "random weights"} <= set(table.source) and ("mask head" in set(table.source)) == (key != "b0_plain")


def test_only_the_test_split_is_scored(project):
    test = {name for pair in json.loads((project/"data"/"splits"/"test.json").read_text()) for name in pair}
    table = pd.read_csv(project/"metrics"/"predictions_b0.csv", dtype=str)
    assert set(table.target_id) == test and set(table.source_id.dropna()) <= test


def holds_no_times_and_no_paths(project):
    for report in (project/"reports").rglob("*.ipynb"):
        text = report.read_text()
        assert str(project) not in text, report.name
        for stamp in ("start_time", "end_time", "duration", "it/s"): assert f'"{stamp}"' not in text and f"{stamp}]" not in text, (report.name, stamp)


def test_reports_hold_no_times_and_no_paths(project): holds_no_times_and_no_paths(project)


def test_a_video_gets_the_verdict_of_the_evaluation(project, tmp_path):
    table = pd.read_csv(project/"metrics"/"predictions_b0.csv").groupby(["label", "method"]).head(1)
    data = index_dataset(project/"data", compression="c23").set_index("clip_id").path
    run(project, "spotter", "predict", *(str(project/"data"/data[c]) for c in table.clip_id), "--checkpoint", "checkpoints/b0/best.safetensors", "--csv", str(tmp_path/"out.csv"))
    found = pd.read_csv(tmp_path/"out.csv")
    assert len(found) == 5 and found.p_fake.tolist() == pytest.approx(table.p_fake.tolist(), abs=.02)
    assert (found.verdict == "fake").tolist() == table.prediction.astype(bool).tolist()


def test_html_is_self_contained(project):
    for page in (project/"reports"/"html").glob("*.html"):
        text = page.read_text()
        outside = [tag for tag in ('<script src="http', '<link rel="stylesheet" href="http', '<img src="http', '<img src="data/', 'src="//') if tag in text]
        assert not outside, (page.name, outside)


def test_second_run_does_nothing(project):
    assert "Data and pipelines are up to date" in run(project, "dvc", "repro")


def test_one_setting_of_b3_reruns_b3_alone(project):
    path = project/"params.yaml"
    before, settings = path.read_text(), yaml.safe_load(path.read_text())
    settings["arms"]["b3"]["learning_rate"] *= 2
    path.write_text(yaml.safe_dump(settings, sort_keys=False))
    status = json.loads(run(project, "dvc", "status", "--json", "dvc.yaml").split("\n")[0])
    path.write_text(before)
    assert set(status) == {"train@b3", "evaluate@b3", "compare"}, status


def test_results_of_many_trainings(project):
    run(project, "dvc", "repro", "results/dvc.yaml")
    assert "up to date" in run(project, "dvc", "repro", "results/dvc.yaml")
    seeds = pd.read_csv(project/"metrics"/"results_seeds.csv").set_index(["name", "figure"])
    for key in ARMS:
        tables = [pd.read_csv(project/"metrics"/name) for name in (f"predictions_{key}.csv", f"results/predictions_{key}-seed1.csv")]
        aucs = [roc_auc_score(t.label, t.p_fake) for t in tables]
        assert seeds.loc[(key, "auc"), "value"] == pytest.approx(sum(aucs)/2, abs=1e-6)
        assert seeds.loc[(key, "auc"), "spread"] == pytest.approx(abs(aucs[0] - aucs[1])/2**.5, abs=1e-6)
        coarse = pd.read_csv(project/"metrics"/f"predictions_{key}_c40.csv")
        assert set(coarse.compression) == {"c40"} and len(coarse) == len(tables[0]) and set(coarse.clip_id).isdisjoint(tables[0].clip_id)
    assert set(pd.read_csv(project/"metrics"/"results_groups.csv").group) >= {"c23: all", "c40: all", "c40: Deepfakes", "c23: hard"}
    unseen = pd.read_csv(project/"metrics"/"results_unseen.csv").set_index(["method", "training"]).value
    assert set(unseen.index) == {("FaceSwap", kind) for kind in ("seen", "never seen", "never seen - seen")}
    def auc(name, method=None):
        t = pd.read_csv(project/"metrics"/f"{name}.csv")
        t = t[(t.label == 0) | (t.method == method)] if method else t
        return roc_auc_score(t.label, t.p_fake)
    both = [auc(name, "FaceSwap") for name in ("predictions_b0", "results/predictions_b0-seed1")]
    assert unseen["FaceSwap", "never seen"] == pytest.approx(auc("results/predictions_b0-without-FaceSwap", "FaceSwap"), abs=1e-6)
    assert unseen["FaceSwap", "seen"] == pytest.approx(sum(both)/2, abs=1e-6)
    curve = pd.read_csv(project/"metrics"/"results_curve.csv").query("figure == 'auc'").set_index("pairs").value
    assert curve.index.tolist() == [1, PAIRS["train"]] and curve[1] == pytest.approx(auc("results/predictions_b0-pairs1"), abs=1e-6)
    assert (pd.read_csv(project/"metrics"/"results_cost.csv", index_col=0).loc[list(ARMS)] > 0).all(axis=None)
    holds_no_times_and_no_paths(project)


def test_the_results_follow_the_files(project):
    "Another verdict in a table is another figure in the notebook."
    path, report = project/"metrics"/"results"/"predictions_b0-seed1.csv", project/"reports"/"results.ipynb"
    before, text = path.read_text(), report.read_text()
    table = pd.read_csv(path, dtype=str)
    table.assign(prediction="1", p_fake=table.label.map({"0": "0.9", "1": "0.8"})).to_csv(path, index=False)
    run(project, "papermill", "nbs/stages/results.ipynb", str(project/"other.ipynb"), "-p", "rounds", "1")
    path.write_text(before)
    said = [[o["data"] for c in json.loads(t)["cells"] for o in c.get("outputs", []) if "text/markdown" in o.get("data", {})] for t in (text, (project/"other.ipynb").read_text())]
    assert len(said[0]) == len(said[1]) > 2 and said[0][-1] != said[1][-1]
