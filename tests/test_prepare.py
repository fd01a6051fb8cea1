"Preparing in shards: what is finished is kept, what is not is done, and the bytes are those of one run without a stop."
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from spotter.data import prepare
from spotter.data.faces import DETECTORS
from spotter.data.prepare import prepare_corpus
from spotter.data.store import ClipStore
from test_data import corpus, digests, fake_video, params, real_video, store   # noqa: F401, fixtures
from whole_frame import whole_frame

RUN = """
import pickle, sys
from pathlib import Path
from spotter.data.faces import DETECTORS
from spotter.data.prepare import prepare_corpus
from whole_frame import slow_whole_frame
DETECTORS["whole-frame"] = slow_whole_frame
prepare_corpus(pickle.loads(Path(sys.argv[1]).read_bytes()), sys.argv[2], root=sys.argv[3], workers=int(sys.argv[4]))
"""


@pytest.fixture(autouse=True)
def registered(monkeypatch): monkeypatch.setitem(DETECTORS, "whole-frame", whole_frame)


def names(folder) -> set[str]:
    "Finished and unfinished files of the shards of a store."
    folder = folder.parent/".prepare"/folder.name
    return set(os.listdir(folder)) if folder.exists() else set()


def work(folder) -> dict[str, int]:
    "These files, and when they were written."
    return {name: (folder.parent/".prepare"/folder.name/name).stat().st_mtime_ns for name in names(folder)}


@pytest.mark.parametrize("path, shards", [(fake_video(Path(), "Deepfakes", "003_002"), 1), (real_video(Path(), "003"), 2)], ids="fr")
def test_what_is_finished_is_not_done_again(store, corpus, params, tmp_path, path, shards):
    "A fake without a mask may be cropped where its original is, so another version of an original means its shard and that of this fake."
    root = shutil.copytree(corpus, tmp_path/"corpus")
    prepare_corpus(params, tmp_path/"faces", root=root, workers=1)
    before = work(tmp_path/"faces")
    assert len(before) == 2*store.index["shard"].nunique()
    os.utime(root/path, ns=(0, 0))               # another version of one video
    prepare_corpus(params, tmp_path/"faces", root=root, workers=1)
    after = work(tmp_path/"faces")
    assert len(before.items() - after.items()) == len(after.items() - before.items()) == 2*shards
    assert digests(tmp_path/"faces") == digests(store.folder)


def test_an_unfinished_run_goes_on(store, corpus, params, tmp_path, monkeypatch):
    done, prepare_shard = [], prepare.prepare_shard
    def stopped(shard):
        if len(done) == 2: raise KeyboardInterrupt
        done.append(shard.key)
        return prepare_shard(shard)
    monkeypatch.setattr(prepare, "prepare_shard", stopped)
    with pytest.raises(KeyboardInterrupt): prepare_corpus(params, tmp_path/"faces", root=corpus, workers=1)
    with pytest.raises(FileNotFoundError, match="no stored clips"): ClipStore(tmp_path/"faces")
    first, before = list(done), work(tmp_path/"faces")
    assert {Path(name).stem for name in before} == set(first)
    done[:] = [None]*100                                       # never stopped again
    prepare_corpus(params, tmp_path/"faces", root=corpus, workers=1)
    assert not set(done[100:]) & set(first) and before.items() <= work(tmp_path/"faces").items()
    assert digests(tmp_path/"faces") == digests(store.folder)


def test_nothing_of_older_settings_or_forms_is_left(store, corpus, params, tmp_path):
    small = params.model_copy(update=dict(faces=params.faces.model_copy(update=dict(size=48))))
    prepare_corpus(small, tmp_path/"faces", root=corpus, workers=1)
    old = work(tmp_path/"faces")
    with tarfile.open(tmp_path/"faces"/"train.tar", "w"): pass
    (tmp_path/"faces"/"shards"/"00999.tar").write_bytes(b"")
    (tmp_path/".prepare"/"faces"/"0.tar.1.tmp").write_bytes(b"")
    prepare_corpus(params, tmp_path/"faces", root=corpus, workers=1)
    assert digests(tmp_path/"faces") == digests(store.folder)
    assert not set(old) & set(work(tmp_path/"faces")) and len(old) == len(work(tmp_path/"faces"))


def test_any_executor_can_run_the_shards(store, corpus, params, tmp_path):
    with ThreadPoolExecutor(3) as pool: prepare_corpus(params, tmp_path/"faces", root=corpus, executor=pool)
    assert digests(tmp_path/"faces") == digests(store.folder)


@pytest.mark.slow
def test_ten_kills_change_no_byte(store, corpus, params, tmp_path):
    "Before each run one video gets a new time, so that there is always something to do."
    root, rng, out, kills, kept = shutil.copytree(corpus, tmp_path/"corpus"), random.Random(0), tmp_path/"faces", 0, set()
    videos = sorted(root.rglob("*.mp4"))
    (tmp_path/"params.pickle").write_bytes(pickle.dumps(params))
    paths = os.pathsep.join([str(Path(__file__).parent), str(Path(prepare.__file__).parents[2])])
    def start(workers):
        command = [sys.executable, "-c", RUN, str(tmp_path/"params.pickle"), str(out), str(root), str(workers)]
        return subprocess.Popen(command, env=os.environ | dict(PYTHONPATH=paths), start_new_session=True)
    for _ in range(60):
        os.utime(rng.choice(videos))
        before, run = names(out), start(rng.choice([1, 1, 2]))
        while not names(out) - before and run.poll() is None: time.sleep(.01)   # until the first shard is begun
        time.sleep(rng.uniform(0, 1.5))
        if run.poll() is None:
            os.killpg(run.pid, signal.SIGKILL)
            kills += 1
            kept |= {name for name in names(out) & before if name.endswith(".json")}
        assert run.wait() in (0, -signal.SIGKILL)
        if kills == 10: break
    assert kills == 10 and kept, "the runs were to be killed on their way, and to keep what they had"
    assert start(2).wait() == 0
    assert digests(out) == digests(store.folder)
    assert names(out) == {f"{Path(name).stem}{end}" for name in names(out) for end in (".tar", ".json")}
