"On a cluster as on one machine: the same shards and the same verdicts, whoever dies on the way."
import json
import multiprocessing
import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pandas as pd
import pytest
import typer

from spotter import cli
from spotter.data import prepare
from spotter.data.elsewhere import listed, open_place
from spotter.data.faces import DETECTORS
from spotter.data.prepare import prepare_corpus
from spotter.executors import Processes, WorkerError, cluster, completed, outcome
from spotter.predict.batch import DIED, Job, in_cluster
from spotter.predict.lines import identity
from test_batches import CLIP, SETTINGS, FakeDetector, files, weights   # noqa: F401, fixtures
from test_data import corpus, digests, params, store   # noqa: F401, fixtures
from whole_frame import pause, slow_whole_frame, whole_frame


@pytest.fixture(autouse=True)
def registered(monkeypatch): monkeypatch.setitem(DETECTORS, "whole-frame", whole_frame)


@pytest.fixture
def slowly(registered, monkeypatch): monkeypatch.setitem(DETECTORS, "whole-frame", slow_whole_frame)


@pytest.fixture(scope="module")
def dask():
    "A scheduler with two workers on this machine."
    distributed = pytest.importorskip("distributed", reason="Dask is in the extra `cluster`, which is not installed")
    with distributed.LocalCluster(n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None) as there: yield there


@pytest.fixture(scope="module")
def bucket():
    "A bucket of an S3 server on this machine, which processes that are started later know from their environment."
    for name in ("moto.server", "s3fs"): pytest.importorskip(name, reason=f"{name}, which tests of object stores need, is not installed")
    from moto.server import ThreadedMotoServer
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    with pytest.MonkeyPatch.context() as m:
        m.setenv("AWS_ENDPOINT_URL", "http://{}:{}".format(*server.get_host_and_port()))
        for name in ("ACCESS_KEY_ID", "SECRET_ACCESS_KEY"): m.setenv(f"AWS_{name}", "x")
        m.setenv("AWS_DEFAULT_REGION", "us-east-1")
        open_place("s3://bucket")[0].mkdir("bucket")
        yield "s3://bucket"
    server.stop()


def work(folder): return folder.parent/".prepare"/folder.name


# ---------------------------------------------------------------- processes of this machine

def test_a_process_that_is_killed_costs_time():
    with Processes(2) as processes:
        first = processes.submit(pause, 0).result()
        futures = [processes.submit(pause, n) for n in range(6)]
        os.kill(first, signal.SIGKILL)
        assert first not in {future.result() for future in futures}


def test_a_local_pool_that_breaks_is_built_anew(store, corpus, params, tmp_path, slowly):
    "Its processes are killed one after the other while there are shards to be made."
    killed, done = set(), threading.Event()
    def kill():
        while not done.is_set() and len(killed) < 2:
            alive = [p.pid for p in multiprocessing.active_children() if p.pid not in killed]
            if alive and any(work(tmp_path/"faces").glob("*.json")): os.kill(alive[0], signal.SIGKILL); killed.add(alive[0])
            time.sleep(.02)
    with ThreadPoolExecutor(1) as thread:
        watching = thread.submit(kill)
        prepare_corpus(params, tmp_path/"faces", root=corpus, workers=2)
        done.set(); watching.result()
    assert killed and digests(tmp_path/"faces") == digests(store.folder)


# ---------------------------------------------------------------- an object store

def test_shards_come_back_from_an_object_store(store, corpus, params, tmp_path, bucket, monkeypatch):
    place = f"{bucket}/local"
    prepare_corpus(params, tmp_path/"faces", root=corpus, workers=1, place=place)
    assert digests(tmp_path/"faces") == digests(store.folder)
    there = listed(place)
    assert len(there) == 2*store.index["shard"].nunique() and {Path(name).suffix for name in there} == {".tar", ".json"}
    made = []
    monkeypatch.setattr(prepare, "prepare_there", lambda shard, place: made.append(shard.key))
    prepare_corpus(params, tmp_path/"again", root=corpus, workers=1, place=place)   # another head, without a local copy
    assert made == [] and digests(tmp_path/"again") == digests(store.folder)


def test_what_was_altered_or_half_written_is_made_again(store, corpus, params, tmp_path, bucket):
    place = f"{bucket}/altered"
    prepare_corpus(params, tmp_path/"faces", root=corpus, workers=1, place=place)
    s3, path = open_place(place)
    altered, without, alone = sorted(name for name in listed(place) if name.endswith(".tar"))[:3]
    s3.pipe_file(f"{path}/{altered}", b"not these bytes")
    s3.rm_file(f"{path}/{without}")                                    # a record without its tar
    s3.rm_file(f"{path}/{Path(alone).with_suffix('.json')}")           # the worker was killed between the two
    before = s3.info(f"{path}/{altered}")["size"]
    prepare_corpus(params, tmp_path/"again", root=corpus, workers=1, place=place)
    assert digests(tmp_path/"again") == digests(store.folder)
    assert s3.info(f"{path}/{altered}")["size"] != before and len(listed(place)) == 2*store.index["shard"].nunique()


def test_a_bucket_that_is_not_there_is_told_before_the_work(corpus, params, tmp_path, bucket):
    with pytest.raises(FileNotFoundError, match="s3://elsewhere/crops: there is no such bucket"):
        prepare_corpus(params, tmp_path/"faces", root=corpus, workers=1, place="s3://elsewhere/crops")
    assert not list(work(tmp_path/"faces").iterdir())


# ---------------------------------------------------------------- Dask

@pytest.mark.slow
def test_dask_makes_the_same_shards(store, corpus, params, tmp_path, dask):
    with cluster(dask.scheduler_address) as workers: prepare_corpus(params, tmp_path/"faces", root=corpus, executor=workers)
    assert digests(tmp_path/"faces") == digests(store.folder)


@pytest.mark.slow
def test_dask_leaves_the_same_shards_in_an_object_store(store, corpus, params, tmp_path, bucket):
    pytest.importorskip("distributed", reason="Dask is in the extra `cluster`, which is not installed")
    from distributed import LocalCluster   # a new one, whose workers know the server from their environment
    with LocalCluster(n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None) as there:
        with cluster(there.scheduler_address) as workers:
            prepare_corpus(params, tmp_path/"faces", root=corpus, executor=workers, place=f"{bucket}/dask")
    assert digests(tmp_path/"faces") == digests(store.folder) and len(listed(f"{bucket}/dask")) == 2*store.index["shard"].nunique()


@pytest.mark.slow
def test_a_worker_that_is_killed_costs_nothing_but_time(store, corpus, params, tmp_path, dask, slowly):
    from distributed import Client
    with Client(dask.scheduler_address, set_as_default=False) as client: pids = client.run(os.getpid)
    victim, killed = [*pids.values()][0], []
    def kill():
        until = time.monotonic() + 120
        while not any(work(tmp_path/"faces").glob(".*.part")):   # in the middle of a shard
            assert time.monotonic() < until, "no shard was begun"
            time.sleep(.01)
        os.kill(victim, signal.SIGKILL); killed.append(len([*work(tmp_path/"faces").glob("*.json")]))
    with ThreadPoolExecutor(1) as thread, cluster(dask.scheduler_address) as workers:
        killing = thread.submit(kill)
        prepare_corpus(params, tmp_path/"faces", root=corpus, executor=workers)
        killing.result()
    assert killed[0] < store.index["shard"].nunique(), "it was to be killed while there was work"
    assert digests(tmp_path/"faces") == digests(store.folder)


@pytest.mark.slow
def test_a_worker_that_sees_another_corpus_makes_nothing(corpus, params, tmp_path, dask):
    "It is told what differs, and no video is called lost."
    class Late(ThreadPoolExecutor):   # a video changes after the work was planned
        def submit(self, job, shard): os.utime(corpus/shard.rows[0]["path"]); return super().submit(job, shard)
    with Late(1) as workers, pytest.raises(WorkerError, match="or other files in"):
        prepare_corpus(params, tmp_path/"faces", root=corpus, executor=workers)
    assert not [p for p in work(tmp_path/"faces").iterdir() if p.suffix == ".json"]


def predicted(tmp_path, weights, name, *inputs, **options):
    "What the command says of videos: exit code, records and tables."
    out = dict(json_out=tmp_path/f"{name}.json", csv_out=tmp_path/f"{name}.csv", parquet_out=tmp_path/f"{name}.parquet")
    try: cli.predict([str(p) for p in inputs], checkpoint=weights, device="cpu", **out, **options); code = 0
    except typer.Exit as e: code = e.exit_code
    told = [r | dict(seconds=None) for r in json.loads(out["json_out"].read_text())]
    return code, told, out["csv_out"].read_bytes(), out["parquet_out"].read_bytes()


@pytest.mark.slow
def test_dask_says_what_one_process_says(weights, tmp_path, dask, monkeypatch):
    (tmp_path/"videos").mkdir()
    for name, clip in zip("abcde", ("000", "004", "000", "004", "000")):
        (tmp_path/"videos"/f"{name}.mp4").write_bytes(CLIP.with_stem(clip).read_bytes())
    (tmp_path/"videos"/"letter.mp4").write_text("Dear Sir")
    monkeypatch.chdir(tmp_path)   # the workers are elsewhere, and the name is relative
    one = predicted(tmp_path, weights, "one", "videos")
    two = predicted(tmp_path, weights, "two", "videos", scheduler=dask.scheduler_address)
    assert one[0] == 3 and one == two
    table = pd.read_parquet(tmp_path/"two.parquet")
    assert len(table) == len(pd.read_csv(tmp_path/"two.csv")) and set(table.face) == {"", "face 1"}


@pytest.mark.slow
def test_a_video_that_kills_its_workers_costs_itself(tmp_path, dask):
    from distributed import Client
    with Client(dask.scheduler_address, set_as_default=False) as client:   # how often a scheduler tries
        client.run_on_scheduler(lambda dask_scheduler: setattr(dask_scheduler, "allowed_failures", 0))
    jobs = [Job(path, identity(path)) for path in files(tmp_path, "a", "kill", "b")]
    with cluster(dask.scheduler_address) as workers:
        found = {job.video.name: record for job, record in in_cluster(workers, FakeDetector, jobs, SETTINGS)}
    assert {name: r["verdict"] for name, r in found.items()} == dict(a="fake", kill="undetermined", b="fake")
    assert found["kill"]["reason"] == DIED


@pytest.mark.slow
def test_work_of_a_scheduler_that_is_gone_is_told():
    distributed = pytest.importorskip("distributed", reason="Dask is in the extra `cluster`, which is not installed")
    there = distributed.LocalCluster(n_workers=1, threads_per_worker=1, processes=True, dashboard_address=None)
    with pytest.raises(WorkerError, match="the scheduler is gone"), cluster(there.scheduler_address) as workers:
        for number, future in completed(workers, pause, range(100)):
            if number == 0: there.close()
            outcome(future, "a video")


def test_a_scheduler_that_does_not_answer_is_told(weights, tmp_path, capsys):
    pytest.importorskip("distributed", reason="Dask is in the extra `cluster`, which is not installed")
    with pytest.raises(typer.Exit) as e: cli.predict([str(CLIP)], checkpoint=weights, device="cpu", scheduler="nowhere")
    assert e.value.exit_code == 2 and "no Dask scheduler answers at nowhere" in capsys.readouterr().err


def test_without_dask_the_extra_is_named(monkeypatch):
    import sys
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(ValueError, match="extra `cluster`"), cluster("tcp://head:8786"): pass


# ---------------------------------------------------------------- estimates

def test_hours_and_cost_follow_from_the_rate(monkeypatch):
    "Half a clip a second of each core: 6,000 videos take a core 12,000 s, and the cost does not depend on the number of cores."
    monkeypatch.syspath_prepend(Path(__file__).parents[1]/"benchmarks")
    from cluster import estimate
    table = estimate(rate=.5, cores=[1, 10], price=.06)
    assert table.loc["FaceForensics++"].round(3).tolist() == [6000, 3.333, .333, .2]
    assert estimate(rate=1, cores=[1], price=1, share=.5).loc["DFDC", "1 cores, h"] == 120_000/.5/3600
