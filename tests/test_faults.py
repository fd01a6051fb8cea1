"Trainings that are killed at any moment, full disks, and systems without what Unix has."
import errno
import json
import os
import pickle
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from spotter.data.toy import ToyStore
from spotter.model.checkpoint import load_model, save_model
from spotter.train.loop import train
from spotter.train.setup import make_loader, make_model
from test_train import settings

torch.set_num_threads(1)
RUN = """
import pickle, sys
from pathlib import Path
from spotter.data.toy import ToyStore
from spotter.train.loop import train
out = Path(sys.argv[2])
print("begun", flush=True)
train(pickle.loads(Path(sys.argv[1]).read_bytes()), "toy", ToyStore(pairs=6), out/"out", out/"live", out/"resume")
"""
SMALL = dict(init="random", epochs=4, steps_per_epoch=2, unfreeze_epoch=0, use_multiscale=True)


def files(folder) -> dict[str, bytes]:
    "Contents of all files below a folder, by path."
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.slow
def test_ten_kills_of_a_training_change_no_byte(tmp_path):
    "At random moments, writing of checkpoints and states among them."
    params, rng, kills = settings(**SMALL), random.Random(0), 0
    (tmp_path/"params.pickle").write_bytes(pickle.dumps(params))
    env = os.environ | dict(PYTHONPATH=str(Path(__file__).parents[1]), OMP_NUM_THREADS="1")
    def start(name): return subprocess.Popen([sys.executable, "-c", RUN, str(tmp_path/"params.pickle"), str(tmp_path/name)], env=env,
                                             stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True)
    whole = start("whole"); whole.stdout.readline(); begun = time.time()
    assert whole.wait() == 0
    lasts = time.time() - begun
    for _ in range(60):
        run = start("broken"); run.stdout.readline()
        time.sleep(rng.uniform(0, lasts*.6))
        if run.poll() is None: os.killpg(run.pid, signal.SIGKILL); kills += 1
        assert run.wait() in (0, -signal.SIGKILL)
        if kills == 10: break
    assert kills == 10, "the runs were to be killed on their way"
    assert start("broken").wait() == 0
    assert files(tmp_path/"broken") == files(tmp_path/"whole")   # and no other file
    for name in ("last", "weights"): load_model(tmp_path/"broken"/"out"/f"{name}.safetensors")


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
