"The network that comes with the project: it is small, it is in the remote, and it is fetched when somebody wants a verdict."
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from dvc.repo import Repo
from sklearn.metrics import roc_auc_score

from spotter.core import load_params
from spotter.data.toy import ToyStore
from spotter.evaluate.calibrate import calibrate_checkpoint
from spotter.model.checkpoint import inspect_checkpoint, save_model, shrink_checkpoint
from spotter.model.logits import clip_logits, p_fake
from spotter.model.network import TemporalCNN_GRU
from spotter.predict.choose import USUAL, alarm_words, find_checkpoint, validation_of

ROOT = Path(__file__).parents[1]
SHIPPED, LIMIT = "checkpoints/shipped.safetensors", 36e6   # bytes


# ---------------------------------------------------------------- in a small project

@pytest.fixture
def project(tmp_path, monkeypatch):
    "A project that has shipped a network and lost it; what pushed it is in the remote."
    Repo.init(tmp_path, no_scm=True).close()
    (tmp_path/".dvc"/"config").write_text("[core]\n no_scm = true\n remote = demo\n['remote \"demo\"']\n url = ../.dvcstore\n")
    (tmp_path/"params.yaml").touch()
    (tmp_path/SHIPPED).parent.mkdir(); (tmp_path/SHIPPED).write_bytes(b"weights")
    monkeypatch.chdir(tmp_path)
    with Repo() as repo: repo.add(SHIPPED); repo.push()
    (tmp_path/SHIPPED).unlink(); shutil.rmtree(tmp_path/".dvc"/"cache")
    return tmp_path


def test_the_shipped_network_is_fetched_once(project, capsys):
    assert find_checkpoint() == project/SHIPPED and (project/SHIPPED).read_bytes() == b"weights"
    assert f"fetching {SHIPPED}" in capsys.readouterr().err
    assert find_checkpoint() == project/SHIPPED and not capsys.readouterr().err


@pytest.mark.parametrize("own", ["spotter_v1.pth", "b3/best.safetensors", "b0/best.safetensors"])
def test_a_network_of_ones_own_comes_first(project, own):
    (project/"checkpoints"/own).parent.mkdir(exist_ok=True); (project/"checkpoints"/own).touch()
    assert find_checkpoint() == project/"checkpoints"/own and not (project/SHIPPED).exists()


def write(project, **aucs: float | None):
    "Checkpoints below checkpoints/, each with its validation AUC, or without one."
    torch.manual_seed(0)
    for name, auc in aucs.items():
        notes = {} if auc is None else dict(validation=dict(auc=auc, real_clips=8, false_alarms=.125, false_alarms_interval=[.02, .47]))
        save_model(TemporalCNN_GRU(hidden_size=8), project/"checkpoints"/USUAL[dict(b3=1, b0=2, shipped=3)[name]], **notes)


BEST = [(dict(b3=.9, b0=.95), 2), (dict(b3=.95, b0=.9), 1), (dict(b3=.9, b0=.9), 1), (dict(b3=None, b0=.6), 2), (dict(b3=.6, b0=None), 1),
        (dict(b3=None, b0=None), 1), (dict(b0=.6, shipped=.99), 2), (dict(b0=None, shipped=.99), 2), (dict(shipped=.6), 3)]


@pytest.mark.parametrize("aucs, best", BEST, ids=str)
def test_the_best_network_by_its_validation_auc_is_taken(project, aucs, best):
    write(project, **aucs)
    assert find_checkpoint() == project/"checkpoints"/USUAL[best]


def test_the_predecessors_network_comes_behind_those_that_say_their_auc(project):
    (project/"checkpoints"/"spotter_v1.pth").touch()
    write(project, b0=None)
    assert find_checkpoint().name == "spotter_v1.pth"
    write(project, b0=.6)
    assert find_checkpoint() == project/"checkpoints"/USUAL[2]


def test_calibration_notes_how_the_network_does_on_validation(tmp_path):
    "AUC by scikit-learn, the shares by counting, and nothing of what the training noted is lost."
    store, params, network = ToyStore(), load_params(ROOT/"params.yaml"), TemporalCNN_GRU(hidden_size=8, use_multiscale=True)
    params = params.model_copy(update=dict(train=params.train.model_copy(update=dict(workers=0, precision="fp32"))))
    network.image_size = 64
    save_model(network, tmp_path/"weights.safetensors", key="b0", epoch=3)
    model, _ = calibrate_checkpoint(tmp_path/"weights.safetensors", store, params, tmp_path/"best.safetensors")
    val = store.clips.query("split == 'val'")
    p = p_fake(clip_logits(model, store, val, params.clips.eval_frames, "fp32"), model.temperature, model.bias)
    real, found = p[val.label == 0], validation_of(tmp_path/"best.safetensors")
    assert inspect_checkpoint(tmp_path/"best.safetensors").metadata == dict(key="b0", epoch=3, validation=found)
    assert (found["clips"], found["real_clips"]) == (len(val), len(real)) == (8, 4)
    assert found["auc"] == round(roc_auc_score(val.label, p), 6) and found["false_alarms"] == (real >= model.threshold).mean()
    assert found["recall_fake"] == (p[val.label == 1] >= model.threshold).mean()
    lo, hi = found["false_alarms_interval"]
    assert 0 <= lo <= found["false_alarms"] <= hi <= 1 and hi - lo > .3   # four clips say little
    said = f"at this threshold, {(real >= model.threshold).sum()} of 4 real validation videos would be called fake ("
    assert alarm_words(found).startswith(said)


def test_a_damaged_network_among_the_usual_ones_is_told(project):
    write(project, b3=.9, b0=.95)
    path = project/"checkpoints"/USUAL[1]
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match="b3/best.safetensors is not a safetensors file, or is damaged"): find_checkpoint()


def test_the_shipped_network_keeps_what_it_did_on_validation(project):
    write(project, b0=.95)
    shrink_checkpoint(project/"checkpoints"/USUAL[2], project/SHIPPED)
    assert validation_of(project/SHIPPED) == validation_of(project/"checkpoints"/USUAL[2]) and validation_of(project/SHIPPED)["auc"] == .95


def test_a_network_that_nobody_pushed_is_told(project):
    shutil.rmtree(project/".dvcstore")
    with pytest.raises(FileNotFoundError, match="has to run `dvc push`; .*make repro"): find_checkpoint()


def test_a_network_that_is_not_made_yet_is_not_fetched(project):
    (project/f"{SHIPPED}.dvc").unlink()
    (project/"dvc.yaml").write_text(yaml.safe_dump(dict(stages=dict(ship=dict(cmd="true", outs=[SHIPPED])))))
    with pytest.raises(FileNotFoundError, match="none of .*shipped.safetensors is there: .*make repro"): find_checkpoint()


def test_dvc_is_imported_only_when_something_is_missing():
    code = "import sys, spotter.cli, spotter.predict.choose, spotter.predict.detector; sys.exit('dvc' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


# ---------------------------------------------------------------- in this repository

def git(*arguments: str) -> str: return subprocess.check_output(["git", *arguments], cwd=ROOT, text=True)


@pytest.fixture(scope="module")
def committed():
    "Sizes of the remote's objects by hash, and the hashes that `data.dvc` and `dvc.lock` name, all as committed."
    if not (ROOT/".git").exists(): pytest.skip("this is no clone")
    lines = [line.split(maxsplit=4) for line in git("ls-tree", "-r", "-l", "HEAD", ".dvcstore").splitlines()]
    objects = {"".join(Path(path).parts[-2:]): int(size) for *_, size, path in lines}
    (data,) = yaml.safe_load(git("show", "HEAD:data.dvc"))["outs"]
    stage = yaml.safe_load(git("show", "HEAD:dvc.lock"))["stages"].get("ship", dict(outs=[]))
    return objects, data["md5"], next((out["md5"] for out in stage["outs"] if out["path"] == SHIPPED), None)


def test_the_remote_holds_what_is_named_and_nothing_else(committed):
    objects, data, network = committed
    listed = json.loads(git("show", f"HEAD:.dvcstore/files/md5/{data[:2]}/{data[2:]}"))
    named = {data, *(file["md5"] for file in listed), *filter(None, [network])}
    assert not (lacking := named - set(objects)), f"run `dvc push`, and commit .dvcstore: {sorted(lacking)[:5]}"
    assert not (older := set(objects) - named), f"see CONTRIBUTING.md on cleaning .dvcstore: {sorted(older)[:5]}"


@pytest.fixture
def network(committed):
    if committed[2] is None: pytest.skip(f"dvc.lock names no {SHIPPED} yet")
    return committed[2]


def test_the_network_is_small(committed, network): assert committed[0][network] <= LIMIT


@pytest.mark.slow
def test_a_clone_judges_at_once(network, tmp_path):
    git("clone", "--quiet", str(ROOT), str(tmp_path/"clone"))
    env = dict(os.environ, PYTHONPATH=str(tmp_path/"clone"))
    videos = [f"data/original_sequences/youtube/c23/videos/{name}.mp4" for name in ("000", "004")]
    command = [sys.executable, "-c", "from spotter.cli import app; app()", "predict", *videos]
    done = subprocess.run(command, cwd=tmp_path/"clone", env=env, capture_output=True, text=True)
    assert done.returncode == 0 and f"fetching {SHIPPED}" in done.stderr, done.stderr
