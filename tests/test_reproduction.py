"""Whether a rerun reproduces the committed metrics: tolerances and verdicts by hand, the command, and what must give the same bytes.

No stage is run: the metrics are made up, and trainings are of seconds."""
import contextlib
import hashlib
import json
import re
import shutil
from pathlib import Path

import pandas as pd
import pytest
import yaml
from typer.testing import CliRunner

from spotter.cli import app
from spotter.core import ClipParams, find_root, load_params
from spotter.evaluate.reproduction import METRICS, SPREAD, measured_spread, tolerance, write_spread

ROOT = find_root(Path(__file__).parent)
VALUES = dict(auc=.95, balanced_accuracy=.9, real_recall=.88, fake_recall=.92, ece=.06)
EPYC = dict(processor="AMD EPYC", instructions="AVX2", precision="fp32", threads=2, torch="2.15.0")
XEON = dict(processor="Intel Xeon", instructions="AVX512", precision="bf16", threads=16, torch="2.15.0")


def write_metrics(folder: Path, machine: dict = EPYC, pooled: float | None = .85, **values):
    "The files of one evaluation that the comparison reads, with 50 real and 100 fake clips."
    (folder/"training").mkdir(parents=True, exist_ok=True)
    found = {name: dict(value=value, lo=0., hi=1.) for name, value in (VALUES | values).items() if value is not None}
    maps = dict(localisation=dict(pooled={"all fakes": dict(scores=dict(shown=dict(value=pooled)))})) if pooled else {}
    (folder/"metrics.json").write_text(json.dumps(found | maps | dict(n=dict(clips=150, real=50, fake=100, units=25))))
    (folder/"predictions.csv").write_text(f"clip_id,p_fake\na,{(VALUES | values)['auc']}\n")
    (folder/"training"/"machine.json").write_text(json.dumps([machine]))
    return folder


@pytest.fixture
def project(tmp_path):
    "A project with the metrics of two models, a reference of the same metrics, and no git."
    settings = yaml.safe_load((ROOT/"params.yaml").read_text())
    settings |= dict(models={key: settings["models"]["b0"] for key in ("plain", "full")}, shipped="full")
    (tmp_path/"params.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))
    write_metrics(tmp_path/"metrics/models/plain", pooled=None)
    write_metrics(tmp_path/"metrics/models/full")
    assert verify(tmp_path, "--record").exit_code == 0
    return tmp_path


def verify(project: Path, *arguments):
    with contextlib.chdir(project): return CliRunner().invoke(app, ["verify", *map(str, arguments)])


def spreads(project: Path, sd: float = .01, kinds=("seed", "processor"), n: int = 3):
    "Spreads of all metrics of both models."
    cases = [(model, name, kind) for model in ("plain", "full") for name in METRICS for kind in kinds]
    rows = [dict(model=model, metric=name, kind=kind, n=n, sd=sd, where="here") for model, name, kind in cases]
    write_spread(project, pd.DataFrame(rows, columns=SPREAD))


def judged(output: str, model: str, metric: str) -> str:
    "The last column of a row of the report."
    section = re.search(rf"^{model}: .*?(?=^\S|\Z)", output, re.M | re.S).group()
    return re.search(rf"^  {re.escape(METRICS[metric])} .*?([a-z][a-z ]*)$", section, re.M).group(1).strip()


# ---------------------------------------------------------------- verdicts

def test_the_tolerance_by_hand():
    "Three seeds and three processors of SD .01 have four degrees of freedom: t is 4.604, and 4.604·√(2·.0002) is .0921."
    assert tolerance([(.01, 3), (.01, 3)], 0.) == pytest.approx(4.60409*.02, abs=1e-6)
    assert tolerance([(.001, 30), (.001, 30)], 1/50) == 1/50      # one real clip of fifty


def test_identical(project):
    done = verify(project)
    assert done.exit_code == 0 and "Identical: every table is the committed one" in done.stdout
    assert "plain: identical, byte for byte" in done.stdout and judged(done.stdout, "plain", "pooled_ap") == "not there"


@pytest.mark.parametrize("auc, word, code", [(.95 - .092, "inside", 0), (.95 - .093, "outside", 1), (.95 + .093, "outside", 1)])
def test_inside_and_outside(project, auc, word, code):
    spreads(project)
    write_metrics(project/"metrics/models/full", machine=XEON, auc=auc)
    done = verify(project)
    assert (judged(done.stdout, "full", "auc"), done.exit_code) == (word, code)
    assert ("Reproduced: " in done.stdout) == (code == 0)
    assert ("Not reproduced: outside the tolerance, or missing: AUC of full." in done.stdout) == (code == 1)
    assert "committed: seed 0, AMD EPYC (AVX2, fp32, threads 2)" in done.stdout
    assert "own: seed 0, Intel Xeon (AVX512, bf16, threads 16)" in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 100
    assert verify(project, "--no-fail").exit_code == 0


def test_other_bytes_with_the_same_metrics_are_reproduced(project):
    (project/"metrics/models/full/predictions.csv").write_text("clip_id,p_fake\na,0.949999\n")
    done = verify(project)
    assert done.exit_code == 0 and "full: reproduced" in done.stdout and judged(done.stdout, "full", "auc") == "equal"


def test_without_a_measured_spread_nothing_is_said(project):
    write_metrics(project/"metrics/models/full", auc=.949)
    done = verify(project)
    assert done.exit_code == 3 and "Undetermined" in done.stdout and "measured for AUC of full." in done.stdout
    assert judged(done.stdout, "full", "auc") == "undetermined" and verify(project, "--no-fail").exit_code == 0


def test_one_kind_of_spread_can_say_inside_but_not_outside(project):
    spreads(project, kinds=("seed",))          # 9.925·√2·.01 is .140
    for auc, word, code in ((.82, "inside", 0), (.80, "undetermined", 3)):
        write_metrics(project/"metrics/models/full", auc=auc)
        done = verify(project)
        assert (judged(done.stdout, "full", "auc"), done.exit_code) == (word, code)


def test_a_metric_that_one_side_lacks(project):
    spreads(project)
    write_metrics(project/"metrics/models/full", pooled=None)
    done = verify(project)
    assert judged(done.stdout, "full", "pooled_ap") == "missing" and done.exit_code == 1
    write_metrics(project/"metrics/models/full"); write_metrics(project/"metrics/models/plain", pooled=.5)
    done = verify(project)
    assert judged(done.stdout, "plain", "pooled_ap") == "no reference" and done.exit_code == 3


def test_another_experiment_is_not_judged(project):
    settings = yaml.safe_load((project/"params.yaml").read_text())
    settings["train"]["focal_gamma"] += 1; settings["seed"] = 7; settings["threads"] = 5
    (project/"params.yaml").write_text(yaml.safe_dump(settings))
    write_metrics(project/"metrics/models/full", auc=.3)
    done = verify(project)
    assert done.exit_code == 3 and "settings: train.focal_gamma 2.0 -> 3.0" in done.stdout and "threads 2.0" not in done.stdout
    assert "Another experiment" in done.stdout


def test_a_committed_rerun_is_not_compared_with_itself(project):
    "Only `--record` writes the reference; no stage does, and reading and comparing leaves every file as it is."
    spreads(project)
    write_metrics(project/"metrics/models/full", auc=.5)
    before = digests(project/"metrics")
    assert verify(project).exit_code == 1 and digests(project/"metrics") == before
    for path in ("dvc.yaml", "results/dvc.yaml"): assert not re.search(r"metrics/(reference|spread)", (ROOT/path).read_text())
    assert verify(project, "--record").exit_code == 0 and verify(project).exit_code == 0


def test_neither_git_nor_a_reference_is_needed(project, monkeypatch):
    monkeypatch.setenv("PATH", str(project))
    assert verify(project).exit_code == 0
    (project/"metrics/reference.json").unlink()
    done = verify(project)
    assert done.exit_code == 3 and "`spotter verify --record` writes" in " ".join(done.stdout.split())


def test_models_that_one_side_has(project):
    settings = yaml.safe_load((project/"params.yaml").read_text())
    settings["models"]["new"] = settings["models"].pop("plain")
    (project/"params.yaml").write_text(yaml.safe_dump(settings))
    done = verify(project)
    assert done.exit_code == 2 and "metrics/models/new/metrics.json is not there: `make repro` writes it" in done.output
    write_metrics(project/"metrics/models/new")
    done = verify(project)
    assert done.exit_code == 0 and all(f"only one side has it: {key}." in done.stdout for key in ("plain", "new"))


@pytest.mark.parametrize("name, text, said", [
    ("reference.json", "{", "reference.json is no JSON file"),
    ("models/full/metrics.json", "{}", "holds no metrics of an evaluation"),
    ("spread.csv", "model,sd\nfull,.1\n", "the columns must be model, metric, kind, n, sd, where")])
def test_broken_files_are_named(project, name, text, said):
    (project/"metrics"/name).write_text(text)
    done = verify(project)
    assert done.exit_code == 2 and said in done.output


def test_spreads_are_measured_from_repeated_runs(project):
    runs = [write_metrics(project/f"run{i}"/"full", auc=auc, pooled=None if i == 1 else .8) for i, auc in enumerate((.94, .95, .96))]
    done = verify(project, "--spread", "seed", *(run/"metrics.json" for run in runs))
    assert done.exit_code == 0, done.output
    table = pd.read_csv(project/"metrics/spread.csv").set_index("metric")
    assert list(table.reset_index().columns) == ["metric", "model", "kind", "n", "sd", "where"] and table.sd["auc"] == pytest.approx(.01)
    assert "pooled_ap" not in table.index and set(table.n) == {3} and set(table["where"]) == {"AMD EPYC (AVX2, fp32, threads 2)"}
    for wrong in (["--spread", "seed"], [runs[0]/"metrics.json"], ["--spread", "age", *runs], ["--record", "--spread", "seed", *runs]):
        assert verify(project, *wrong).exit_code == 2, wrong


def test_runs_that_do_not_differ_are_refused(tmp_path):
    runs = [write_metrics(tmp_path/str(i)/"full") for i in range(2)]
    with pytest.raises(ValueError, match="the files of all runs are the same"): measured_spread(runs, "seed")
    with pytest.raises(ValueError, match="the machines of all runs are the same"): measured_spread(runs, "processor")
    with pytest.raises(ValueError, match="a single run has no spread"): measured_spread([runs[0], runs[0]/"../full"], "seed")


def test_repro_tells_and_verify_fails():
    "The last command of `make repro` never fails, and `make verify` is the same without that."
    rules = dict(re.findall(r"^(repro|verify):.*\n((?:\t.*\n)+)", (ROOT/"Makefile").read_text(), re.M))
    last = {name: commands.splitlines()[-1] for name, commands in rules.items()}
    assert last["repro"].endswith("spotter verify --no-fail") and last["verify"].endswith("spotter verify")


# ---------------------------------------------------------------- what gives the same bytes

def digests(folder: Path) -> dict[str, str]:
    return {p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    "Originals and fakes of one method of the first test pair, in the corpus's own layout."
    if not (ROOT/"data/manifest.csv").exists(): pytest.skip(f"{ROOT/'data'} holds no data set: `dvc pull data` fetches it")
    out, (a, b) = tmp_path_factory.mktemp("corpus"), json.loads((ROOT/"data/splits/test.json").read_text())[0]
    (out/"splits").mkdir()
    for split in ("train", "val", "test"): (out/"splits"/f"{split}.json").write_text(json.dumps([[a, b]] if split == "test" else []))
    for video in (ROOT/"data").rglob("*.mp4"):
        place = video.relative_to(ROOT/"data")
        if video.stem not in {a, b, f"{a}_{b}", f"{b}_{a}"} or not {"youtube", "FaceSwap"} & set(place.parts): continue
        (out/place).parent.mkdir(parents=True, exist_ok=True); shutil.copy(video, out/place)
    return out


def test_the_number_of_processes_changes_no_byte_of_crops(pair, tmp_path):
    from spotter.data.prepare import prepare_corpus
    params = load_params(ROOT/"params.yaml")
    one, two, four = (digests(prepare_corpus(params, tmp_path/f"faces{n}", pair, n).folder) for n in (1, 2, 4))
    assert two == one and four == one


def test_the_number_of_processes_does_not_change_the_audit(pair):
    "But for the reference, a clip coded anew: with AVX-512, libx264 does not give the same bytes in every run."
    from spotter.evaluate.audit import measure_corpus
    params = load_params(ROOT/"params.yaml")
    one, two, four = (measure_corpus(params, pair, frames=8, workers=n) for n in (1, 2, 4))
    anew = ["reference", "ratio", "inside_reference", "inside_ratio", "clear"]
    for other in (two, four):
        assert other.drop(columns=anew).to_csv() == one.drop(columns=anew).to_csv()
        pd.testing.assert_frame_equal(one[anew], other[anew], rtol=1e-2)


def test_loader_processes_and_a_stop_change_no_bit_of_a_training(tmp_path, monkeypatch, capsys):
    "One training in one go without loader processes; the same stopped after its first epoch, and continued with two of them elsewhere."
    from spotter.data.toy import ToyStore
    from spotter.train import loop
    params = load_params(ROOT/"params.yaml")
    spec = params.models["b0"].model_copy(update=dict(image_size=64, batch_size=2, epochs=2, steps_per_epoch=2))
    def train(out, workers):
        recipe = params.train.model_copy(update=dict(workers=workers, warmup_steps=0, sequence_epochs=1))
        changed = dict(threads=1, models={"toy": spec}, train=recipe, clips=ClipParams(frames=1, last_frames=2, eval_frames=1))
        loop.train(params.model_copy(update=changed), "toy", ToyStore(), out, out/"live", out/"resume")
    train(tmp_path/"whole", 0)
    run_epoch = loop.run_epoch
    def stopped(session, epoch):
        if epoch: raise KeyboardInterrupt
        return run_epoch(session, epoch)
    monkeypatch.setattr(loop, "run_epoch", stopped)
    with pytest.raises(KeyboardInterrupt): train(tmp_path/"parts", 1)
    monkeypatch.setattr(loop, "run_epoch", run_epoch)
    monkeypatch.setattr(loop, "machine", lambda *_: XEON)
    train(tmp_path/"parts", 2)
    for name in ("weights.safetensors", "last.safetensors"):
        assert (tmp_path/"parts"/name).read_bytes() == (tmp_path/"whole"/name).read_bytes(), name
    assert "goes on under other conditions" in capsys.readouterr().out
    assert [m["processor"] for m in json.loads((tmp_path/"parts/live/machine.json").read_text())][1:] == ["Intel Xeon"]
    assert len(json.loads((tmp_path/"whole/live/machine.json").read_text())) == 1
