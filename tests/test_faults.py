"Trainings that are killed at any moment, full disks, and systems without what Unix has."
import errno
import json
import os
import pickle
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from spotter.data.store import ClipStore
from spotter.data.toy import ToyStore
from spotter.data.video import video_length
from spotter.model.checkpoint import load_model, save_model
from spotter.train.loop import train
from spotter.train.setup import make_loader, make_model
from test_batches import CLIP, weights              # noqa: F401, fixtures
from test_data import corpus, params, registered   # noqa: F401, fixtures
from test_train import settings

torch.set_num_threads(1)
TRAINING = """
import pickle, sys
from pathlib import Path
from spotter.data.toy import ToyStore
from spotter.train.loop import train
out = Path(sys.argv[1])
print("begun", flush=True)
train(pickle.loads(Path(sys.argv[2]).read_bytes()), "toy", ToyStore(pairs=6), out/"out", out/"live", out/"resume")
"""
PREPARING = """
import pickle, sys
from pathlib import Path
from spotter.data.faces import DETECTORS
from spotter.data.prepare import prepare_corpus
from whole_frame import slow_whole_frame
if __name__ == "__main__":
    DETECTORS["whole-frame"] = slow_whole_frame
    print("begun", flush=True)
    prepare_corpus(pickle.loads(Path(sys.argv[2]).read_bytes()), Path(sys.argv[1])/"faces", root=sys.argv[3], workers=2)
"""
JUDGING = """
import sys
from pathlib import Path
from spotter import cli
if __name__ == "__main__":
    out = Path(sys.argv[1])
    print("begun", flush=True)
    cli.predict(sys.argv[3:], checkpoint=Path(sys.argv[2]), device="cpu", workers=2, resume=True, json_out=out/"all.json",
                csv_out=out/"all.csv", parquet_out=out/"all.parquet", report=out/"all.html", diagnostic=out/"shown")
"""
SMALL = dict(init="random", epochs=4, steps_per_epoch=2, unfreeze_epoch=0, use_multiscale=True)
KILLS = 10   # of a training, of preparing and of judging each


def files(folder) -> dict[str, bytes]:
    "Contents of all files below a folder, by path."
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def broken_off(folder: Path, program: str, *arguments, share: float) -> tuple[Path, Path]:
    """Run a program in the folder `whole`, and again and again in `broken`: killed at random moments, until that has happened so often.
    Then it may come to its end. Of two kills one meets all processes, the other the first of them alone. `share`: of the time of a run,
    within which it is killed."""
    code, rng, kills, tests = folder/"program.py", random.Random(0), 0, Path(__file__).parent
    code.write_text(program)
    env = os.environ | dict(PYTHONPATH=f"{tests.parent}{os.pathsep}{tests}", OMP_NUM_THREADS="1")
    def start(name):
        (folder/name).mkdir(exist_ok=True)
        run = subprocess.Popen([sys.executable, str(code), str(folder/name), *map(str, arguments)], env=env,
                               stdout=subprocess.PIPE, stderr=(folder/"told").open("w"), start_new_session=True)
        assert run.stdout.readline() == b"begun\n", (folder/"told").read_text()
        return run
    def ended(run): assert run.wait() == 0, (folder/"told").read_text()
    whole, begun = start("whole"), time.time()
    ended(whole)
    lasts = time.time() - begun
    for _ in range(8*KILLS):
        run = start("broken")
        try: run.wait(rng.uniform(0, lasts*share))
        except subprocess.TimeoutExpired:
            kills += 1
            (os.killpg if kills % 2 else os.kill)(run.pid, signal.SIGKILL)
        else:
            assert run.returncode == 0, (folder/"told").read_text()
            shutil.rmtree(folder/"broken")   # what is finished cannot be broken off
        run.wait()
        if kills == KILLS: break
    assert kills == KILLS, "the runs were to be killed on their way"
    ended(start("broken"))
    return folder/"whole", folder/"broken"


@pytest.mark.slow
def test_kills_of_a_training_change_no_byte(tmp_path):
    "At random moments, writing of checkpoints and states among them."
    (tmp_path/"params.pickle").write_bytes(pickle.dumps(settings(**SMALL)))
    whole, broken = broken_off(tmp_path, TRAINING, tmp_path/"params.pickle", share=.6)
    assert files(broken) == files(whole)   # and no other file
    for name in ("last", "weights"): load_model(broken/"out"/f"{name}.safetensors")


@pytest.mark.slow
def test_kills_of_preparing_change_no_byte(tmp_path, corpus, params):
    (tmp_path/"params.pickle").write_bytes(pickle.dumps(params))
    whole, broken = broken_off(tmp_path, PREPARING, tmp_path/"params.pickle", corpus, share=.6)
    assert files(broken) == files(whole) and len(ClipStore(broken/"faces").index) > 0


@pytest.mark.slow
def test_kills_of_judging_change_no_verdict(tmp_path, weights):
    (tmp_path/"videos").mkdir()
    for name, clip in zip("abcdef", ("000", "004")*3): (tmp_path/"videos"/f"{name}.mp4").write_bytes(CLIP.with_stem(clip).read_bytes())
    whole, broken = broken_off(tmp_path, JUDGING, weights, tmp_path/"videos", share=.6)
    def found(folder):
        "Files and what they say; not the seconds it took, nor the bytes of videos, which x264 varies."
        said = files(folder)
        records = [json.loads(line) for line in [*said.pop("all.jsonl").splitlines(), *map(json.dumps, json.loads(said.pop("all.json")))]]
        shown = {name: video_length(folder/name).frames for name in said if name.endswith(".mp4")}
        return said | shown, sorted((r | dict(seconds=None) for r in records), key=lambda r: (r["path"], "file" in r))
    assert found(broken) == found(whole) and len(found(whole)[1]) == 12


def test_a_loss_that_is_no_number_stops_at_once(tmp_path, monkeypatch):
    from spotter.train import loop
    true_loss, calls = loop.batch_loss, []
    def poisoned(*args, **kwargs):
        calls.append(1)
        return true_loss(*args, **kwargs)*(np.nan if len(calls) == 4 else 1)
    monkeypatch.setattr(loop, "batch_loss", poisoned)
    params = settings(init="random")
    with pytest.raises(FloatingPointError, match="toy, epoch 2, batch 2: the loss is nan.*epoch before is kept.*learning_rate"):
        train(params, "toy", ToyStore(), tmp_path/"out", tmp_path/"live", tmp_path/"resume")
    assert len(calls) == 4 and json.loads((tmp_path/"resume"/"toy"/"progress.json").read_text())["state"] == "epoch_001"
    assert not [*(tmp_path/"out").iterdir()]


def test_a_full_disk_leaves_the_last_state(tmp_path, monkeypatch):
    "No file may be larger than half a state, as on a disk that has no more room; then it may, and the training goes on."
    params = settings(init="random")
    whole = train(params, "toy", ToyStore(), tmp_path/"whole", tmp_path/"live", tmp_path/"resume")
    from spotter.train import resume
    written, saved = [], resume._write_state
    def limited(folder, accelerator):
        written.append(1)
        if len(written) != 2: return saved(folder, accelerator)
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, before[1]))
        try: return saved(folder, accelerator)
        finally: resource.setrlimit(resource.RLIMIT_FSIZE, before)
    monkeypatch.setattr(resume, "_write_state", limited)
    args = params, "toy", ToyStore(), tmp_path/"broken", tmp_path/"live2", tmp_path/"resume2"
    with pytest.raises(OSError, match="could not be written.*That of the epoch before is whole: make room"): train(*args)
    assert json.loads((tmp_path/"resume2"/"toy"/"progress.json").read_text())["state"] == "epoch_001"
    assert train(*args).equals(whole) and files(tmp_path/"broken") == files(tmp_path/"whole") and not [*(tmp_path/"resume2").iterdir()]


def test_a_checkpoint_survives_a_full_disk(tmp_path, monkeypatch):
    model = make_model(settings(init="random"), "toy")
    save_model(model, tmp_path/"a.safetensors", epoch=1)
    before, fsync = files(tmp_path), os.fsync
    def full(place): raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="the disk is full; make room"): save_model(model, tmp_path/"a.safetensors", epoch=2)
    monkeypatch.setattr(os, "fsync", fsync)
    assert files(tmp_path) == before


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_may_not_be_written_to_is_told(tmp_path):
    (tmp_path/"locked").mkdir(mode=0o555)
    with pytest.raises(PermissionError, match="may not be written to; change its permissions"):
        save_model(make_model(settings(init="random"), "toy"), tmp_path/"locked"/"a.safetensors")


def test_nothing_needs_what_only_unix_has(tmp_path, monkeypatch):
    "Without them files are written and read, and a training runs; its clips reach processes that are not forked."
    for name in ("pread", "O_DIRECTORY", "fork", "killpg", "sched_getaffinity", "posix_fadvise", "register_at_fork"):
        monkeypatch.delattr(os, name, raising=False)
    for name in ("SIGHUP", "SIGQUIT"): monkeypatch.delattr(signal, name, raising=False)
    from spotter.train.launch import _own_signals
    with _own_signals(): pass
    params = settings(init="random", epochs=1)
    train(params, "toy", ToyStore(), tmp_path/"out", tmp_path/"live", tmp_path/"resume")
    load_model(tmp_path/"out"/"weights.safetensors")
    again = pickle.loads(pickle.dumps(make_loader(params, "toy", ToyStore()).dataset))   # as a spawned process gets it
    assert torch.equal(again[(0, 0, 1)]["clip"], make_loader(params, "toy", ToyStore()).dataset[(0, 0, 1)]["clip"])
