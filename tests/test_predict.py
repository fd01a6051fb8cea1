"Broken and odd files: each gets a verdict or a reason, soon and in little memory."
import faulthandler
import json
import os
import struct
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path

import av
import cv2
import numpy as np
import pytest
import typer

from spotter import cli
from spotter.data.video import DamageWarning, read_frames
from spotter.model.checkpoint import save_model
from spotter.predict.batch import in_turn, plan_jobs
from spotter.predict.detector import Detector
from spotter.predict.outputs import record, summary
from spotter.predict.page import html_section

CLIP = Path(__file__).parents[1]/"data"/"original_sequences"/"youtube"/"c23"/"videos"/"000.mp4"
SECONDS = 60   # for any file


@pytest.fixture(scope="session")
def frames(): return read_frames(CLIP)[0]


def copied(path, *more):
    "The bundled clip under another name, or several of them in a list."
    for p in (path, *more): p.write_bytes(CLIP.read_bytes())
    return [path, *more] if more else path


def encode(path, pictures, codec="libx264", pixels="yuv420p", rate=25, format=None, times=None, options=None):
    with av.open(str(path), "w", format=format) as out:
        stream = out.add_stream(codec, rate=rate, options=options or {})
        stream.height, stream.width, stream.pix_fmt = *pictures[0].shape[:2], pixels
        if times is not None: stream.time_base = stream.codec_context.time_base = Fraction(1, 1000)
        for i, picture in enumerate(pictures):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
            if times is not None: frame.pts, frame.time_base = times[i], Fraction(1, 1000)
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    return path


def rotated(path, pictures):
    "A video of a camera that lay on its side: turned pixels, and a matrix in the track's header that turns them back."
    encode(path, [np.rot90(p) for p in pictures])
    data = bytearray(path.read_bytes())
    at = data.index(b"tkhd") + 44
    data[at:at + 36] = struct.pack(">9i", 0, 1 << 16, 0, -(1 << 16), 0, 0, 0, 0, 1 << 30)
    path.write_bytes(data)
    return path


def sound(path):
    with av.open(str(path), "w") as out:
        stream = out.add_stream("aac", rate=16_000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 16_000), np.int16), format="s16", layout="mono")
        frame.sample_rate = 16_000
        out.mux(stream.encode(frame)); out.mux(stream.encode(None))
    return path


def flipped(path, share):
    rng, data = np.random.default_rng(0), np.frombuffer(CLIP.read_bytes(), np.uint8).copy()
    body = np.arange(len(data)//3, len(data))   # behind the index
    at = rng.choice(body, int(share*len(body)), replace=False)
    data[at] ^= rng.integers(1, 256, len(at), np.uint8)
    path.write_bytes(data.tobytes())
    return path


def cut(path, share):
    path.write_bytes(CLIP.read_bytes()[:int(share*CLIP.stat().st_size)])
    return path


def retitled(path, pictures):
    "A video whose title is no text in any encoding that its container knows."
    with av.open(str(path), "w", format="avi") as out:
        out.metadata["title"] = "XXXXXXXX"
        stream = out.add_stream("mpeg4", rate=25)
        stream.height, stream.width, stream.pix_fmt = *pictures[0].shape[:2], "yuv420p"
        for picture in pictures: out.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        out.mux(stream.encode(None))
    data = path.read_bytes()
    assert data.count(b"XXXXXXXX") == 1
    path.write_bytes(data.replace(b"XXXXXXXX", b"\xff\xfe\xe9\x80\xff\xfe\xe9\x80"))
    return path


def squeezed(path, pictures):
    "A video of pixels twice as wide as high."
    with av.open(str(path), "w") as out:
        stream = out.add_stream("libx264", rate=25)
        stream.height, stream.width, stream.pix_fmt, stream.codec_context.sample_aspect_ratio = 256, 128, "yuv420p", Fraction(2)
        narrow = [cv2.resize(picture, (128, 256)) for picture in pictures]
        for picture in narrow: out.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        out.mux(stream.encode(None))
    return path


def with_sound(path, pictures, codec="pcm_s16le"):
    with av.open(str(path), "w") as out:
        video, audio = out.add_stream("libx264", rate=25), out.add_stream(codec, rate=16_000)
        video.height, video.width, video.pix_fmt = *pictures[0].shape[:2], "yuv420p"
        samples = np.random.default_rng(0).integers(-9999, 9999, (1, 16_000), np.int16)
        noise = av.AudioFrame.from_ndarray(samples, format="s16", layout="mono"); noise.sample_rate, noise.pts = 16_000, 0
        for picture in pictures: out.mux(video.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        out.mux(audio.encode(noise)); out.mux(video.encode(None)); out.mux(audio.encode(None))
    return path


def piped(path): os.mkfifo(path); return path
def folder(path): path.mkdir(); return path
def written(path, data): path.write_bytes(data); return path
def resized(path, frames):
    return written(path, b"".join(encode(path, enlarged(frames, side), format="h264").read_bytes() for side in (256, 512)))


def enlarged(frames, side): return [cv2.resize(f, (side, side)) for f in frames]


UNEVEN = np.cumsum(np.arange(24) % 3*60 + 20) - 20   # milliseconds
JUDGED = {   # these a player would show
    "as it is": lambda d, f: copied(d/"a.mp4"),
    "wrong extension": lambda d, f: copied(d/"a.txt"),
    "name of spaces and umlauts": lambda d, f: copied(d/"ein Vídeo ü.mp4"),
    "rotated": lambda d, f: rotated(d/"a.mp4", f),
    "odd size, 4:4:4": lambda d, f: encode(d/"a.mkv", f[:, :255, :253], pixels="yuv444p"),
    "ten bits": lambda d, f: encode(d/"a.mp4", f, pixels="yuv420p10le"),
    "very large": lambda d, f: encode(d/"a.mp4", enlarged(f[:5], 3072), options={"preset": "ultrafast"}),
    "variable rate": lambda d, f: encode(d/"a.mp4", f, times=UNEVEN.tolist()),
    "raw stream without an index": lambda d, f: encode(d/"a.h264", f, format="h264"),
    "stream for broadcasting": lambda d, f: encode(d/"a.ts", f),
    "another codec": lambda d, f: encode(d/"a.avi", f, codec="mpeg4"),
    "four frames": lambda d, f: encode(d/"a.mp4", f[:4]),
    "broken title": lambda d, f: retitled(d/"a.avi", f),
    "oblong pixels": lambda d, f: squeezed(d/"a.mp4", f),
    "a colon in its name": lambda d, f: copied(d/"talk:1.mp4"),
    "animation": lambda d, f: encode(d/"a.gif", f, codec="gif", pixels="rgb8"),
    "photo": lambda d, f: written(d/"a.jpg", cv2.imencode(".jpg", f[0][..., ::-1])[1].tobytes()),
    "two sizes": lambda d, f: resized(d/"a.h264", f),
    "four broadcasts in a row": lambda d, f: written(d/"a.ts", 4*encode(d/"one.ts", f).read_bytes()),
}
REFUSED = {   # and of these there is no verdict
    "truncated": (lambda d, f: cut(d/"a.mp4", .05), "frame"),
    "text": (lambda d, f: written(d/"a.mp4", b"Dear Sir or Madam,\n"*50), "not a video"),
    "noise": (lambda d, f: written(d/"a.mp4", np.random.default_rng(0).bytes(50_000)), "not a video"),
    "zero length": (lambda d, f: written(d/"a.mp4", b""), "empty"),
    "sound alone": (lambda d, f: sound(d/"a.m4a"), "no video stream"),
    "one frame": (lambda d, f: encode(d/"a.mp4", f[:1]), "a verdict needs"),
    "very small": (lambda d, f: encode(d/"a.mp4", enlarged(f, 16)), "no face"),
    "nobody in it": (lambda d, f: encode(d/"a.mp4", np.full_like(f, 90)), "no face"),
    "folder": (lambda d, f: folder(d/"a.mp4"), "a folder"),
    "pipe": (lambda d, f: piped(d/"a.mp4"), "a pipe"),
    "unknown codec": (lambda d, f: written(d/"a.mp4", CLIP.read_bytes().replace(b"avc1", b"zzz1")), "no decoder"),
    "nothing": (lambda d, f: d/"a.mp4", "no such file"),
}


@pytest.fixture
def limited():
    "End the process that takes too long: a decoder that hangs would not hear a signal's handler."
    faulthandler.dump_traceback_later(SECONDS, exit=True)
    yield
    faulthandler.cancel_dump_traceback_later()


@pytest.mark.parametrize("kind", JUDGED)
def test_odd_files_are_judged(kind, detector, frames, tmp_path, limited):
    found = detector.analyze(JUDGED[kind](tmp_path, frames))
    assert found.verdict in ("real", "fake"), found.reason
    assert 0 <= found.p_fake <= 1 and not found.reason and found.people[0].coverage > .5


@pytest.mark.parametrize("kind", REFUSED)
def test_broken_files_get_a_reason(kind, detector, frames, tmp_path, limited):
    make, word = REFUSED[kind]
    found = detector.analyze(make(tmp_path, frames))
    assert (found.verdict, found.p_fake, found.people) == ("undetermined", None, ())
    assert word in found.reason and "a.mp4" not in found.reason, found.reason


@pytest.mark.parametrize("share", [1e-4, 1e-3, 1e-2])
def test_flipped_bytes(share, detector, tmp_path, limited):
    found = detector.analyze(flipped(tmp_path/"a.mp4", share))
    assert (found.verdict == "undetermined") == bool(found.reason) == (not found.people)


@pytest.mark.parametrize("format, times", [("mp4", UNEVEN/1000), ("ts", np.arange(24)/25)])
def test_times_are_those_of_a_player(format, times, detector, frames, tmp_path):
    "Uneven ones stay uneven, and a broadcast does not start at the 1.4 seconds that its first time stamp says."
    found = detector.analyze(encode(tmp_path/f"a.{format}", frames, times=UNEVEN.tolist() if format == "mp4" else None), heatmaps=False)
    assert found.people[0].times == pytest.approx(times[found.people[0].indices], abs=2e-3)
    assert found.duration == pytest.approx(times[-1]*24/23, abs=2e-3)


def test_a_video_that_ends_too_early_says_so(detector, tmp_path):
    "Cut where a frame ends, so that nothing in it is damaged."
    with av.open(str(CLIP)) as video: ends = sorted(p.pos + p.size for p in video.demux(video=0) if p.size)
    (tmp_path/"a.mp4").write_bytes(CLIP.read_bytes()[:ends[11]])
    found = detector.analyze(tmp_path/"a.mp4", heatmaps=False)
    assert found.people and 8 <= found.frames <= 12
    assert found.note == f"damaged: {found.frames} of 24 frames can be decoded"


def test_rotation_is_followed(detector, frames, tmp_path):
    beside = np.pad(frames, ((0, 0), (0, 0), (0, 128), (0, 0)))   # neither square nor with the face in the middle
    paths = encode(tmp_path/"a.mp4", beside), rotated(tmp_path/"b.mp4", beside)
    upright, turned = (detector.analyze(path, heatmaps=False) for path in paths)
    assert turned.size == upright.size == (464, 336)
    assert turned.people[0].boxes == pytest.approx(upright.people[0].boxes, abs=6)


def tracks(path):
    with av.open(str(path)) as video: return len(video.streams.audio), video.streams.video[0].frames


def test_a_video_with_unknown_sound_is_shown_without(detector, frames, tmp_path):
    path = with_sound(tmp_path/"a.mov", frames)
    detector.diagnostic_video(path, tmp_path/"whole.mp4")
    path.write_bytes(path.read_bytes().replace(b"sowt", b"zzzz"))
    with pytest.warns(DamageWarning, match="no decoder for its sound"): detector.diagnostic_video(path, tmp_path/"mute.mp4")
    assert [tracks(tmp_path/f"{name}.mp4") for name in ("whole", "mute")] == [(1, 24), (0, 24)]


def test_a_video_with_damaged_sound_is_shown_with_what_there_is(detector, frames, tmp_path):
    path = with_sound(tmp_path/"a.mov", frames, "alac")
    with av.open(str(path)) as video: packets = [(p.pos, p.size) for p in video.demux(audio=0) if p.size]
    data = bytearray(path.read_bytes())
    for at, size in packets[len(packets)//2:]: data[at + 8:at + size] = bytes(size - 8)
    path.write_bytes(data)
    with pytest.warns(DamageWarning, match="read up to there"): detector.diagnostic_video(path, tmp_path/"shown.mp4")
    assert tracks(tmp_path/"shown.mp4") == (1, 24)


def test_one_bad_file_never_stops_the_batch(detector, tmp_path, monkeypatch):
    "Not even one that breaks what nobody has thought of."
    videos = copied(*(tmp_path/f"{name}.mp4" for name in "abc"))
    analyze, show = detector.analyze, detector.diagnostic_video
    def fail(call, name): return lambda video, *args, **kwargs: 1/0 if Path(video).stem == name else call(video, *args, **kwargs)
    monkeypatch.setattr(detector, "analyze", fail(analyze, "a")); monkeypatch.setattr(detector, "diagnostic_video", fail(show, "b"))
    jobs = plan_jobs(videos, detector.settings, tmp_path/"out", tmp_path)
    records = [found for _, found in in_turn(detector, jobs)]
    assert [r["verdict"] == "undetermined" for r in records] == [True, False, False] and all(job.section.is_file() for job in jobs)
    assert "ZeroDivisionError" in records[0]["reason"] and "no diagnostic video" in records[1]["note"] and records[2]["note"] is None
    assert [p.name for p in (tmp_path/"out").iterdir()] == ["003_c.mp4"]


def test_a_bias_moves_every_probability(detector, tmp_path, monkeypatch):
    "A bias of log 9 multiplies all odds by nine; what a probability depends on stands in the record."
    before = detector.analyze(CLIP, heatmaps=False)
    for name, value in dict(bias=float(np.log(9)), prevalence=.25).items(): monkeypatch.setattr(detector.model, name, value)
    save_model(detector.model, tmp_path/"biased.safetensors", frames=4)
    biased = Detector(tmp_path/"biased.safetensors")
    said = json.loads(json.dumps(biased.settings))
    assert [said[k] for k in ("temperature", "bias", "prevalence", "threshold")] == [1, np.log(9), .25, .5]
    for heatmaps in (False, True):
        found = biased.analyze(CLIP, heatmaps)
        for p, q in ((before.p_fake, found.p_fake), (before.people[0].scores, found.people[0].scores)):
            np.testing.assert_allclose(q/(1 - q), 9*p/(1 - p), rtol=2e-3)


def pasted(picture, other, side, x):
    "A picture with another one, scaled to a square, in its lower part."
    out = picture.copy()
    out[-side:, x:x + side] = cv2.resize(other, (side, side), interpolation=cv2.INTER_AREA)
    return out


@pytest.fixture(scope="session")
def other(): return read_frames(CLIP.with_stem("004"))[0]


def test_one_fake_face_makes_a_video_fake(detector, frames, other, tmp_path, monkeypatch):
    "Whichever it is: a large face beside a smaller one, and a threshold between their probabilities."
    wide = np.pad(frames, ((0, 0), (0, 0), (0, 256), (0, 0)))
    path = encode(tmp_path/"a.mp4", [pasted(f, g, 256, 336) for f, g in zip(wide, other)])
    before = detector.analyze(path, heatmaps=False)
    large, small = before.people
    assert large.size > 1.2*small.size and large.boxes[0, 0] < small.boxes[0, 0]
    monkeypatch.setattr(detector.model, "threshold", (large.p_fake + small.p_fake)/2)
    found = detector.analyze(path)
    fake = next(p for p in found.people if p.verdict == "fake")
    assert found.verdict == "fake" and found.p_fake == found.confidence == fake.p_fake > min(p.p_fake for p in found.people)
    told = json.loads(json.dumps(record(found)))
    assert told["main"] == "face 1" and [p["verdict"] for p in told["people"]].count("fake") == 1
    assert summary([told]).verdict.tolist() == ["fake", *(p.verdict for p in found.people)]
    assert f"Face {1 + found.people.index(fake)}: fake" in html_section(found)


def test_the_main_face_is_the_one_with_most_area_and_time(frames, other, detector, tmp_path):
    "A small face that is there all the time, such as one on a poster, is neither in front of the speaker nor judged."
    wall = np.full((336, 464, 3), 90, np.uint8)
    poster = [pasted(wall, g, 96, 352) for g in other]
    speaker = [np.concatenate([f, p[:, 336:]], 1) for f, p in zip(frames, poster)]
    found = detector.analyze(encode(tmp_path/"a.mp4", [*poster, *speaker, *speaker]), heatmaps=False)
    assert len(found.people) == len(found.unjudged) == 1 and found.verdict == found.people[0].verdict
    assert found.people[0].size > 100 and .4 < found.people[0].coverage < .8
    assert found.unjudged[0].size < 64 and found.unjudged[0].coverage > .9 and "64 are needed" in found.unjudged[0].reason
    alone = detector.analyze(encode(tmp_path/"b.mp4", poster), heatmaps=False)
    assert (alone.verdict, alone.people, len(alone.unjudged)) == ("undetermined", (), 1) and "no face is large enough" in alone.reason


def test_coverage_is_a_share_of_the_videos_time(detector, frames, tmp_path):
    "Ten minutes with the face in every frame, of which ten windows of four frames, 10/24 of a second apart, are looked at."
    found = detector.analyze(long(tmp_path/"a.mp4", frames, 12*600), heatmaps=False)
    assert found.people[0].coverage == pytest.approx(10*40/24/600, abs=.001)


def test_threads_may_share_a_detector(detector):
    alone = detector.analyze(CLIP)
    with ThreadPoolExecutor(4) as pool: found = list(pool.map(detector.analyze, [CLIP]*4))
    assert all(f.p_fake == alone.p_fake and np.array_equal(f.people[0].heatmaps, alone.people[0].heatmaps) for f in found)


@pytest.fixture
def predict(detector, monkeypatch):
    "The command in this process, with the detector of these tests; its exit code."
    monkeypatch.setattr(cli, "_detector", lambda *_: detector)
    def run(*inputs, **outputs):
        with pytest.raises(typer.Exit) as ended: cli.predict(list(map(str, inputs)), precision="auto", **outputs)
        return ended.value.exit_code
    return run


def test_ctrl_c_keeps_what_was_found(detector, predict, tmp_path, monkeypatch, capsys):
    videos, analyze = copied(*(tmp_path/f"{name}.mp4" for name in "abc")), detector.analyze
    def stop(video, *args, **kwargs):
        if Path(video).stem == "b": raise KeyboardInterrupt
        return analyze(video, *args, **kwargs)
    monkeypatch.setattr(detector, "analyze", stop)
    assert predict(*videos, json_out=tmp_path/"out.json", report=tmp_path/"out.html") == 130
    told = json.loads((tmp_path/"out.json").read_text())
    assert [r["reason"] for r in told] == [None] + ["not judged, the run was stopped"]*2
    assert (tmp_path/"out.html").read_text().count("<section><h2>") == 4 and capsys.readouterr().out.count("stopped") == 2


def test_names_need_not_be_text(predict, tmp_path, capsys):
    video, link = copied(tmp_path/"\udcff\n\x1b[2J.mp4"), tmp_path/"link.mp4"
    link.symlink_to("nowhere")
    assert predict(tmp_path, csv_out=tmp_path/"out.csv", json_out=tmp_path/"out.json", report=tmp_path/"out.html") == 3
    shown = capsys.readouterr().out
    assert r"\udcff\n\x1b[2J.mp4" in shown and "\x1b" not in shown and "no such file" in shown
    assert [r["path"] for r in json.loads((tmp_path/"out.json").read_text())] == [str(link), str(video)]   # in the order of their letters


def test_no_video_is_written_over_an_input(predict, tmp_path, capsys):
    videos = copied(tmp_path/"a.mp4", tmp_path/"001_a.mp4")
    assert predict(*videos, diagnostic=tmp_path) == 2
    assert "001_a.mp4 is an input" in capsys.readouterr().err and videos[1].read_bytes() == CLIP.read_bytes()


def test_what_cannot_be_written_is_told(predict, tmp_path, capsys):
    video = copied(tmp_path/"a.mp4")
    assert predict(video, csv_out=Path("/dev/full"), json_out=tmp_path/"out.json") == 1
    said = capsys.readouterr()
    assert "/dev/full could not be written" in said.err and "a.mp4" in said.out and (tmp_path/"out.json").is_file()
    assert predict(video, json_out=Path("/proc/out.json")) == 2 and not capsys.readouterr().out   # nobody can write there


def loaded(module):
    "Top-level names and modules that a process holds after one import."
    done = subprocess.run([sys.executable, "-c", f"import sys, {module}; print(*sys.modules)"], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_help_waits_for_no_library():
    assert not loaded("spotter.cli") & {"torch", "numpy", "pandas", "matplotlib", "cv2", "av", "rich", "spotter.predict.detector"}


def test_a_detector_loads_what_judging_needs():
    "torch._dynamo and sympy come with torchvision.ops, which every part of timm imports; tables and pages are made later."
    found = loaded("spotter.predict.detector")
    assert not found & {"accelerate", "jinja2", "matplotlib", "onnxruntime", "pandas", "pyarrow", "seaborn", "skimage", "sklearn"}
    assert not {name for name in found if name.startswith(("spotter.train", "spotter.metrics", "spotter.synth"))}


CHILD = """
import resource, sys
from spotter.predict.detector import Detector
detector = Detector(sys.argv[1])
for path, n in zip(sys.argv[2::2], map(int, sys.argv[3::2])):
    found = detector.analyze(path, heatmaps=False)
    assert found.verdict in ("real", "fake") and found.frames == n, found.reason
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss//1024)
"""


@pytest.mark.slow
def test_memory_stays_bounded_in_a_long_video(detector, frames, tmp_path):
    "Five minutes, then an hour, in a process of their own: a longer video takes no more memory."
    videos = [arg for n in (3_600, 43_200) for arg in (str(long(tmp_path/f"{n}.mp4", frames, n)), str(n))]
    done = subprocess.run([sys.executable, "-c", CHILD, detector.settings["checkpoint"], *videos], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    first, second = map(int, done.stdout.split())
    assert second - first < 100   # MB; the frames alone would be 8,500


def long(path, frames, n):
    with av.open(str(path), "w") as out:
        stream = out.add_stream("libx264", rate=12, options={"preset": "ultrafast", "crf": "40"})
        stream.height, stream.width, stream.pix_fmt = *frames[0].shape[:2], "yuv420p"
        still = [av.VideoFrame.from_ndarray(f, format="rgb24").reformat(format="yuv420p") for f in frames[:2]]
        for i in range(n):
            still[i % 2].pts = i; still[i % 2].time_base = Fraction(1, 12)
            out.mux(stream.encode(still[i % 2]))
        out.mux(stream.encode(None))
    return path
