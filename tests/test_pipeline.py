"""The whole pipeline, from videos to HTML, on a few clips and tiny networks in a temporary folder: with one model, and with several.

What only many models or many trainings can show is marked slow, and so is what runs the pipeline again."""
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import pytest
import yaml
from sklearn.metrics import accuracy_score, recall_score, roc_auc_score

from spotter.data.corpora import index_dataset
from spotter.evaluate.references import REFERENCES

ROOT = Path(__file__).parents[1]
PAIRS = dict(train=2, val=1, test=2)
SCORES = ("average_precision", "pointing", "energy", "iou")
slow = pytest.mark.slow


@dataclass
class Project:
    "A copy of the project with a few clips and tiny settings."
    folder: Path
    models: tuple[str, ...]

    def __truediv__(self, name): return self.folder/name

    def run(self, *command: str) -> str:
        env = {k: v for k, v in os.environ.items() if k != "IN_TEST"}
        env |= dict(PYTHONPATH=str(self.folder), PATH=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
        done = subprocess.run(command, cwd=self.folder, capture_output=True, text=True, env=env)
        assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
        return done.stdout + done.stderr

    def settings(self) -> dict: return yaml.safe_load((self/"params.yaml").read_text())
    def write(self, settings: dict): (self/"params.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))
    def table(self, name: str) -> pd.DataFrame: return pd.read_csv(self/"metrics"/f"{name}.csv", dtype=dict(target_id=str, source_id=str))
    def metrics(self, key: str) -> dict: return json.loads((self/"metrics"/"models"/key/"metrics.json").read_text())
    def changed(self, *targets: str) -> set[str]: return set(json.loads(self.run("dvc", "status", "--json", *targets).split("\n")[0]))


def subset(source: Path, out: Path, methods: set[str], both: bool):
    "The first pairs of each split of the bundled clips in the same layout, with some of the methods, manipulated one way or both ways."
    (out/"splits").mkdir(parents=True)
    names = set()
    for split, n in PAIRS.items():
        pairs = json.loads((source/"splits"/f"{split}.json").read_text())[:n]
        (out/"splits"/f"{split}.json").write_text(json.dumps(pairs))
        names |= {name for a, b in pairs for name in (a, b, f"{a}_{b}", *([f"{b}_{a}"] if both else []))}
    for video in source.rglob("*.mp4"):
        place = video.relative_to(source)
        if video.stem not in names or not methods & set(place.parts): continue
        (out/place).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(video, out/place)
    shutil.copy(source/"manifest.csv", out)


def tiny(settings: dict) -> dict:
    "Settings of seconds."
    settings["threads"] = 1   # as many as the other tests leave
    settings["faces"].update(size=96)
    settings["clips"].update(frames=2, eval_frames=2)
    settings["train"].update(workers=0, warmup_steps=0, sequence_epochs=0)
    settings["evaluate"]["resamples"] = 50
    for model in settings["models"].values(): model.update(image_size=64, batch_size=2, epochs=1, steps_per_epoch=2)
    return settings


def make_project(folder: Path, settings: dict, runs: dict, write_corpus: Callable[[Path], object], *targets: str) -> Project:
    "A project in which `dvc repro` has run on a corpus of a few clips, to the targets or to the end."
    for name in ("dvc.yaml", "settings.ini", ".dvcignore"): shutil.copy(ROOT/name, folder)
    for name in ("nbs/stages", "spotter", "results", "weights"):
        shutil.copytree(ROOT/name, folder/name, ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints", "dvc.lock"))
    (folder/"reports").mkdir()
    write_corpus(folder/"data")
    project = Project(folder, tuple(settings["models"]))
    project.write(tiny(settings))
    (folder/"results"/"params.yaml").write_text(yaml.safe_dump(runs, sort_keys=False))
    project.run("dvc", "init", "--no-scm", "--quiet")
    project.run("dvc", "repro", *targets)
    return project


def one_model(settings: dict) -> dict:
    "Settings with one model, under a name that stands nowhere else."
    small = next(m for m in settings["models"].values() if m["use_multiscale"] and m["use_attention"])
    return settings | dict(models={"small": small}, shipped="small")


NO_RUNS = dict(runs={}, ablation=dict(model="small", half="none"), robustness=[], attacked="small")


def some_runs(models: tuple[str, ...]) -> dict:
    "A second seed of every model, and a model without a method, on half of the pairs and from originals alone."
    studied, rest = models[1], dict(pairs=0, without="", self_blend=0)
    runs = {f"{key}-seed1": dict(model=key, seed=1, **rest) for key in models}
    runs["studied-without-FaceSwap"] = dict(model=studied, seed=0) | rest | dict(without="FaceSwap")
    runs["studied-pairs1"] = dict(model=studied, seed=0) | rest | dict(pairs=1)
    runs["studied-originals"] = dict(model=studied, seed=0) | rest | dict(self_blend=1)
    return dict(runs=runs, ablation=dict(model=studied, half="studied-pairs1"), robustness=[studied], attacked=studied)


@pytest.fixture(scope="module", params=["one model", pytest.param("all models", marks=slow)])
def project(request, tmp_path_factory):
    folder, settings = tmp_path_factory.mktemp("project"), yaml.safe_load((ROOT/"params.yaml").read_text())
    methods, more = {"youtube", "Deepfakes", "NeuralTextures"}, {"Face2Face", "FaceSwap"}
    if request.param == "one model":
        return make_project(folder, one_model(settings), NO_RUNS, lambda out: subset(ROOT/"data", out, methods, both=False))
    runs = some_runs(tuple(settings["models"]))
    return make_project(folder, settings, runs, lambda out: subset(ROOT/"data", out, methods | more, both=True))


all_models = pytest.mark.parametrize("project", [pytest.param("all models", marks=slow)], indirect=True)


def test_everything_of_a_model_is_in_its_folders(project):
    for key in project.models:
        names = [f"checkpoints/{key}/{name}.safetensors" for name in ("weights", "last", "best")]
        names += [f"metrics/models/{key}/{name}.csv" for name in ("predictions", "localisation", "roc", "calibration")]
        names += [f"metrics/models/{key}/{name}" for name in ("metrics.json", "training/metrics.json", "training/machine.json")]
        names += [f"reports/models/{key}/{name}" for name in ("train.ipynb", "calibrate.ipynb", "evaluate.ipynb", "heatmaps.jpg")]
        names += [f"reports/html/models/{key}/{name}.html" for name in ("train", "calibrate", "evaluate")]
        assert not (missing := [name for name in names if not (project/name).is_file()]), missing


def test_the_corpus_and_the_comparison_are_reported(project):
    names = [f"metrics/{name}.csv" for name in ("comparison", "localisation", "excluded", "audit", "audit_clips", "baseline/predictions")]
    names += [f"metrics/{name}.json" for name in ("comparison", "audit", "baseline/metrics")]
    names += [f"reports/html/{name}.html" for name in ("prepare", "audit", "baseline", "ship", "compare", "across")]
    assert not (missing := [name for name in names if not (project/name).is_file()]), missing
    assert json.loads((project/"metrics"/"comparison.json").read_text())["models"] == list(project.models)


def test_an_outsider_gets_the_same_metrics(project):
    for key in project.models:
        table, found = project.table(f"models/{key}/predictions"), project.metrics(key)
        recalls = recall_score(table.label, table.prediction, average=None)
        assert found["accuracy"]["value"] == pytest.approx(accuracy_score(table.label, table.prediction), abs=1e-6)
        assert (found["real_recall"]["value"], found["fake_recall"]["value"]) == pytest.approx(tuple(recalls), abs=1e-6)
        assert found["auc"]["value"] == pytest.approx(roc_auc_score(table.label, table.p_fake), abs=1e-6)


def test_the_localisation_metrics_are_those_of_the_table(project):
    for key in project.models:
        table, found = project.table(f"models/{key}/localisation"), project.metrics(key)["localisation"]
        for source, rows in table[table.label == 1].groupby("source"):
            for score in SCORES:
                assert found["maps"][source][score]["value"] == pytest.approx(rows[score].mean(), abs=2e-6), (source, score)
        for source, rows in table[table.label == 0].groupby("source"):
            assert found["above_threshold_on_real"][source]["value"] == pytest.approx(rows.above_threshold.mean(), abs=2e-6), source
        assert {"shown", "fine", "mid", "semantic", "fused", *REFERENCES} <= set(table.source)
        for group in found["pooled"].values(): assert set(group["scores"]) == set(table.source) == {"shown", *group["differences"]}
        assert set(project.metrics(key)["deletion"]["advantage"]) == {"deletion", "insertion"}
        assert "mask head" in set(table.source) # without a pyramid, too


def test_only_the_test_split_is_scored(project):
    test = {name for pair in json.loads((project/"data"/"splits"/"test.json").read_text()) for name in pair}
    table = project.table(f"models/{project.models[0]}/predictions")
    assert set(table.target_id) == test and set(table.source_id.dropna()) <= test


def holds_no_times_and_no_paths(project):
    for report in (project/"reports").rglob("*.ipynb"):
        text = report.read_text()
        assert str(project.folder) not in text, report.name
        for stamp in ("start_time", "end_time", "duration", "it/s"):
            assert f'"{stamp}"' not in text and f"{stamp}]" not in text, (report.name, stamp)


def test_reports_hold_no_times_and_no_paths(project): holds_no_times_and_no_paths(project)


def test_html_is_self_contained(project):
    for page in (project/"reports"/"html").rglob("*.html"):
        text = page.read_text()
        tags = '<script src="http', '<link rel="stylesheet" href="http', '<img src="http', '<img src="data/', 'src="//'
        assert not (outside := [tag for tag in tags if tag in text]), (page.name, outside)


def shown_plots(project) -> set[str]:
    "Files behind the plots of `dvc plots show`."
    return {name.split("::")[-1] for name in json.loads(project.run("dvc", "plots", "show", "--json"))["data"]}


def test_a_clone_fetches_network_and_clips(project, tmp_path):
    "Committed as the project is, with its remote inside, and cloned: a verdict needs one command, which leaves git clean."
    source, clone = Project(tmp_path/"source", project.models), Project(tmp_path/"clone", project.models)
    for name in ("spotter", "nbs", "results", "weights"):
        shutil.copytree(project/name, source/name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("dvc.yaml", "dvc.lock", "params.yaml", ".dvcignore"): shutil.copy(project/name, source/name)
    for name in (".gitignore", ".dvc/config", ".dvc/.gitignore"):
        (source/name).parent.mkdir(exist_ok=True); shutil.copy(ROOT/name, source/name)
    shutil.copytree(project/"data", source/"data")
    source.run("git", "init", "--quiet")
    source.run("dvc", "add", "data"); source.run("dvc", "push", "data.dvc")
    (project/".dvc"/"config.local").write_text(f"[core]\n remote = source\n['remote \"source\"']\n url = {source/'.dvcstore'}\n")
    project.run("dvc", "push", "checkpoints/shipped.safetensors")
    source.run("git", "add", "--all")
    source.run("git", "-c", "user.name=a", "-c", "user.email=a@b.invalid", "commit", "--quiet", "--message", "A project")
    source.run("git", "clone", "--quiet", str(source.folder), str(clone.folder))
    assert not any((clone/name).exists() for name in ("data", "checkpoints"))

    row = project.table(f"models/{project.settings()['shipped']}/predictions").iloc[-1]
    clips = index_dataset(project/"data", compression="c23").set_index("clip_id").path
    said = clone.run("spotter", "predict", f"data/{clips[row.clip_id]}", "--csv", "out.csv")
    assert all(word in said for word in ("fetching data (", "fetching checkpoints/shipped.safetensors (", "judging with ")), said
    assert pd.read_csv(clone/"out.csv").p_fake[0] == pytest.approx(row.p_fake, abs=.02)   # rounded weights, and bfloat16 where there is
    assert len(list((clone/"data").rglob("*.mp4"))) == len(list((project/"data").rglob("*.mp4")))
    assert clone.run("git", "status", "--porcelain").split() == ["??", "out.csv"]


@all_models
def test_a_video_gets_the_verdict_of_the_evaluation(project, tmp_path):
    key = project.models[1]
    table = project.table(f"models/{key}/predictions").groupby(["label", "method"]).head(1)
    data = index_dataset(project/"data", compression="c23").set_index("clip_id").path
    videos = [str(project/"data"/data[c]) for c in table.clip_id]
    project.run("spotter", "predict", *videos, "--checkpoint", f"checkpoints/{key}/best.safetensors", "--csv", str(tmp_path/"out.csv"))
    found = pd.read_csv(tmp_path/"out.csv")
    found = found[found.face.isna()]   # the rows of the videos, without those of their faces
    assert len(found) == 5 and found.p_fake.tolist() == pytest.approx(table.p_fake.tolist(), abs=.02)
    assert (found.verdict == "fake").tolist() == table.prediction.astype(bool).tolist()


@all_models
def test_second_run_does_nothing(project):
    assert "Data and pipelines are up to date" in project.run("dvc", "repro")


@all_models
def test_one_setting_of_a_model_reruns_that_model_alone(project):
    before, last = project.settings(), project.models[-1]
    settings = project.settings(); settings["models"][last]["learning_rate"] *= 2
    project.write(settings)
    try: assert project.changed("dvc.yaml") == {f"train@{last}", f"evaluate@{last}", "across", "compare"}
    finally: project.write(before)


@all_models
def test_other_weights_to_start_from_train_again(project):
    file = project/"weights"/"own.safetensors"; file.write_bytes(b"0")
    try: assert {f"train@{key}" for key in project.models} <= project.changed("dvc.yaml")
    finally: file.unlink()


@all_models
def test_a_change_of_figures_intervals_or_commands_retrains_nothing(project):
    files = [project/"spotter"/name for name in ("evaluate/figures.py", "metrics/bootstrap.py", "cli.py")]
    before = [path.read_text() for path in files]
    for path, text in zip(files, before): path.write_text(f"{text}\n# changed\n")
    changed = project.changed("dvc.yaml")
    for path, text in zip(files, before): path.write_text(text)
    assert changed == {"across", "audit", "baseline", "compare"} | {f"evaluate@{key}" for key in project.models}


@all_models
def test_results_of_many_trainings(project):
    project.run("dvc", "repro", "results/dvc.yaml")
    assert "up to date" in project.run("dvc", "repro", "results/dvc.yaml")
    seeds, studied = pd.read_csv(project/"metrics"/"results_seeds.csv").set_index(["name", "figure"]), project.models[1]
    for key in project.models:
        tables = [project.table(name) for name in (f"models/{key}/predictions", f"results/predictions_{key}-seed1")]
        aucs = [roc_auc_score(t.label, t.p_fake) for t in tables]
        assert seeds.loc[(key, "auc"), "value"] == pytest.approx(sum(aucs)/2, abs=1e-6)
        assert seeds.loc[(key, "auc"), "spread"] == pytest.approx(abs(aucs[0] - aucs[1])/2**.5, abs=1e-6)
        strong = project.table(f"results/predictions_{key}_c40")
        assert set(strong.compression) == {"c40"} and len(strong) == len(tables[0]) and set(strong.clip_id).isdisjoint(tables[0].clip_id)
    assert set(pd.read_csv(project/"metrics"/"results_groups.csv").group) >= {"c23: all", "c40: all", "c40: Deepfakes", "c23: hard"}
    unseen = pd.read_csv(project/"metrics"/"results_unseen.csv").set_index(["method", "training"]).value
    assert set(unseen.index) == {("FaceSwap", kind) for kind in ("seen", "never seen", "never seen - seen")}
    def auc(name, method=None):
        t = project.table(name)
        t = t[(t.label == 0) | (t.method == method)] if method else t
        return roc_auc_score(t.label, t.p_fake)
    both = [auc(name, "FaceSwap") for name in (f"models/{studied}/predictions", f"results/predictions_{studied}-seed1")]
    assert unseen["FaceSwap", "never seen"] == pytest.approx(auc("results/predictions_studied-without-FaceSwap", "FaceSwap"), abs=1e-6)
    assert unseen["FaceSwap", "seen"] == pytest.approx(sum(both)/2, abs=1e-6)
    alone = pd.read_csv(project/"metrics"/"results_originals.csv").set_index(["method", "training"]).value
    assert alone["all", "originals alone"] == pytest.approx(auc("results/predictions_studied-originals"), abs=1e-6)
    assert alone["FaceSwap", "supervised"] == pytest.approx(sum(both)/2, abs=1e-6)
    curve = pd.read_csv(project/"metrics"/"results_curve.csv").query("figure == 'auc'").set_index("pairs").value
    assert curve.index.tolist() == [1, PAIRS["train"]] and curve[1] == pytest.approx(auc("results/predictions_studied-pairs1"), abs=1e-6)
    assert (pd.read_csv(project/"metrics"/"results_cost.csv", index_col=0).loc[list(project.models)] > 0).all(axis=None)
    curves = pd.read_csv(project/"metrics"/"robustness"/f"{studied}.csv")
    assert set(curves.groupby("damage")["level"].apply(tuple)) == {(0, 1, 2, 3)} and curves.damage.nunique() == 8
    clean = curves[curves.level == 0]
    assert clean[["auc", "pooled_ap"]].nunique().tolist() == [1, 1] and (project/"reports"/"robustness.ipynb").is_file()
    assert clean.auc.iloc[0] == pytest.approx(auc(f"models/{studied}/predictions"), abs=.05)   # the same frames in other batches
    assert f"metrics/robustness/{studied}.csv" in shown_plots(project)
    for key in project.models:
        attacks = pd.read_csv(project/"metrics"/"attacks"/f"{key}.csv")
        assert attacks.groupby("condition").clip_id.nunique().unique().tolist() == [len(project.table(f"models/{key}/predictions"))]
    assert (project/"reports"/"adversarial.ipynb").is_file()
    holds_no_times_and_no_paths(project)


@all_models
def test_the_results_follow_the_files(project):
    "Another verdict in a table is another metric in the notebook."
    path, report = project/"metrics"/"results"/f"predictions_{project.models[1]}-seed1.csv", project/"reports"/"results.ipynb"
    before, text = path.read_text(), report.read_text()
    table = pd.read_csv(path, dtype=str)
    table.assign(prediction="1", p_fake=table.label.map({"0": "0.9", "1": "0.8"})).to_csv(path, index=False)
    project.run("papermill", "nbs/stages/results.ipynb", str(project/"other.ipynb"), "-p", "rounds", "1")
    path.write_text(before)
    def said(text):
        outputs = [o for c in json.loads(text)["cells"] for o in c.get("outputs", [])]
        return [o["data"] for o in outputs if "text/markdown" in o.get("data", {})]
    old, new = said(text), said((project/"other.ipynb").read_text())
    assert len(old) == len(new) > 2 and old[-1] != new[-1]


@all_models
def test_a_fourth_model_in_params_alone_appears_everywhere(project):
    "The last test of this file, because it changes the project."
    settings, others = project.settings(), project.models
    settings["models"]["fourth"] = settings["models"][others[1]] | dict(use_attention=False)
    project.write(settings)
    assert project.changed("dvc.yaml") == {"train@fourth", "calibrate@fourth", "evaluate@fourth", "across", "compare"}
    project.run("dvc", "repro")
    found = json.loads((project/"metrics"/"comparison.json").read_text())
    assert found["models"] == [*others, "fourth"] and f"fourth - {others[0]}" in found["differences"]
    assert {"fourth", f"fourth - {others[-1]}"} <= set(pd.read_csv(project/"metrics"/"comparison.csv").name)
    assert {"fourth: shown", "fourth: fused"} <= set(pd.read_csv(project/"metrics"/"localisation.csv").source)
    assert (project/"reports"/"html"/"models"/"fourth"/"evaluate.html").is_file()
    plots = shown_plots(project)
    for key in (*others, "fourth"):
        assert {f"metrics/models/{key}/{name}.csv" for name in ("roc", "calibration", "predictions")} <= plots
    assert "results/dvc.yaml:compressed@fourth" in project.run("dvc", "stage", "list", "results/dvc.yaml")
