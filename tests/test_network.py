"The network that comes with the project: it is small, it is in the remote, and it is fetched when somebody wants a verdict."
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from dvc.repo import Repo

from spotter.predict.detector import find_checkpoint

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


def test_a_network_that_nobody_pushed_is_told(project):
    shutil.rmtree(project/".dvcstore")
    with pytest.raises(FileNotFoundError, match="has to run `dvc push`; .*make repro"): find_checkpoint()


def test_a_network_that_is_not_made_yet_is_not_fetched(project):
    (project/f"{SHIPPED}.dvc").unlink()
    (project/"dvc.yaml").write_text(yaml.safe_dump(dict(stages=dict(ship=dict(cmd="true", outs=[SHIPPED])))))
    with pytest.raises(FileNotFoundError, match="none of .*shipped.safetensors is there: .*make repro"): find_checkpoint()


def test_dvc_is_imported_only_when_something_is_missing():
    code = "import sys, spotter.cli, spotter.predict.detector; sys.exit('dvc' in sys.modules)"
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
