"Files of strangers: what is too large, what crashes, what would lead out of its folder, and names that would steer a page or a terminal."
import ast
import json
import os
import re
import signal
from pathlib import Path

import av
import numpy as np
import pytest
import typer
from test_batches import CLIP, FakeDetector, SETTINGS, files

from spotter import cli
from spotter.data.video import VideoError, iter_frames, probe, video_index
from spotter.predict.batch import Job, in_workers
from spotter.predict.detector import Detector
from spotter.predict.limits import Limits
from spotter.predict.sandbox import GIB, Fence, fence_for

ROOT = Path(__file__).parents[1]


# ---------------------------------------------------------------- limits

@pytest.fixture(scope="module")
def film(tmp_path_factory):
    "Ten frames, a second apart, with sound that says nothing."
    path = tmp_path_factory.mktemp("film")/"film.mkv"
    with av.open(str(path), "w") as out:
        video, sound = out.add_stream("libx264", rate=1), out.add_stream("aac", rate=8000)
        video.width, video.height, video.pix_fmt = 320, 240, "yuv420p"
        for _ in range(10): out.mux(video.encode(av.VideoFrame.from_ndarray(np.zeros((240, 320, 3), np.uint8), format="rgb24")))
        out.mux(video.encode(None))
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        silence.sample_rate = 8000
        out.mux(sound.encode(silence)); out.mux(sound.encode(None))
    return path


@pytest.mark.parametrize("limit, value, reason", [
    ("seconds", 5., "10 seconds, and at most 5 are allowed"), ("pixels", 70_000, "76,800 pixels a frame, and at most 70,000 are allowed"),
    ("streams", 1, "2 streams, and at most 1 are allowed"), ("frames", 9, "more than 9 frames")])
def test_a_video_above_a_limit_is_undetermined_before_anything_is_decoded(detector, film, monkeypatch, limit, value, reason):
    def decoded(*_, **__): raise AssertionError("decoded")
    for name in ("find_shots", "iter_frames", "count_decodable"): monkeypatch.setattr(f"spotter.predict.detector.{name}", decoded, raising=False)
    monkeypatch.setattr(detector, "limits", Limits(**{limit: value}))
    found = detector.analyze(film)
    assert (found.verdict, found.reason) == ("undetermined", reason)


def test_the_limits_stand_in_the_record(detector):
    assert detector.settings["limits"] == dict(seconds=43_200., frames=2_592_000, pixels=89_478_485, streams=100)


def test_frames_that_grow_are_not_decoded(tmp_path, monkeypatch):
    "The header tells the size of the first ones."
    def stream(side):
        with av.open(str(tmp_path/"one.ts"), "w", format="mpegts") as out:
            video = out.add_stream("libx264", rate=25); video.width = video.height = side; video.pix_fmt = "yuv420p"
            for _ in range(10): out.mux(video.encode(av.VideoFrame.from_ndarray(np.zeros((side, side, 3), np.uint8), format="rgb24")))
            out.mux(video.encode(None))
        return (tmp_path/"one.ts").read_bytes()
    (tmp_path/"grows.ts").write_bytes(stream(64) + stream(256))
    def sides(): return {frame.shape[0] for _, _, frame in iter_frames(tmp_path/"grows.ts")}
    assert sides() == {64, 256}
    monkeypatch.setattr("spotter.data.video.LARGEST", 128*128)
    with pytest.warns(match="damaged"): assert sides() == {64}


@pytest.mark.parametrize("text", ["ffconcat version 1.0\nfile film.mp4\n", "#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nfilm.mp4\n#EXT-X-ENDLIST\n"])
@pytest.mark.parametrize("name", ["list.mp4", "list.m3u8", "list.ffconcat"])
def test_a_list_of_other_files_is_no_video(tmp_path, text, name):
    "Or a stranger would get a verdict on a film that lies beside it."
    (tmp_path/"film.mp4").write_bytes(CLIP.read_bytes()); (tmp_path/name).write_text(text)
    for read in (probe, video_index, lambda path: list(iter_frames(path))):
        with pytest.raises(VideoError, match="a list of other files|not a video"): read(tmp_path/name)


def test_a_name_with_a_number_is_no_series(tmp_path):
    from PIL import Image
    for k in range(3): Image.new("RGB", (64, 64)).save(tmp_path/f"a{k}.jpg")
    (tmp_path/"a%d.jpg").write_bytes(b"\xff\xd8 no picture")
    with pytest.raises(VideoError): probe(tmp_path/"a%d.jpg")


# ---------------------------------------------------------------- the sandbox

class Attacked(FakeDetector):
    "Does what the names of videos say."
    def analyze(self, video, heatmaps=True):
        name = Path(video).stem
        if name == "hang": re.match("(a+)+$", "a"*64 + "b")   # for years, and no other thread of Python runs meanwhile
        if name == "eat": self.eaten = [np.empty(GIB//64) for _ in range(64)]   # an eighth of a GiB each
        if name == "segv": os.kill(os.getpid(), signal.SIGSEGV)
        return super().analyze(video, heatmaps)


def test_what_hangs_eats_or_dies_costs_its_own_verdict(tmp_path):
    jobs, fence = [Job(path) for path in files(tmp_path, "eat", "a", "segv", "b", "hang")], Fence(seconds=4, memory=GIB//2)
    found = {job.video.name: record for job, record in in_workers(Attacked, jobs, 1, SETTINGS, fence)}
    assert {name for name, r in found.items() if r["verdict"] == "fake"} == {"a", "b"}
    assert found["eat"]["reason"] == "memory was short: a video may take 0.5 GiB" and "died (SIGSEGV)" in found["segv"]["reason"]
    assert found["hang"]["reason"] == "it took longer than 4 seconds, after which it was stopped"


@pytest.mark.slow
def test_closing_ends_a_process_that_hears_nothing(tmp_path):
    results = in_workers(Attacked, [Job(path) for path in files(tmp_path, "a", "hang")], 2, SETTINGS)
    assert next(results)[0].video.name == "a"
    results.close()   # returns when the processes have ended


def test_the_command_judges_in_a_sandbox(detector, tmp_path, capsys):
    (tmp_path/"b.mp4").write_bytes(CLIP.read_bytes()[:5000])
    out = dict(checkpoint=Path(detector.settings["checkpoint"]), device="cpu")
    told = []
    for sandbox in (False, True):
        with pytest.raises(typer.Exit) as ended:
            cli.predict([str(CLIP), str(tmp_path/"b.mp4")], sandbox=sandbox, json_out=tmp_path/"out.json", **out)
        assert ended.value.exit_code == 3
        told.append([r | dict(seconds=None) for r in json.loads((tmp_path/"out.json").read_text())])
    assert told[0] == told[1] and told[0][0]["p_fake"] is not None


def test_the_fence_follows_the_budget():
    assert fence_for(30).seconds == 660 and fence_for().seconds == 600 + 2*12*360
