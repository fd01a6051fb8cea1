"Broken and odd files: each gets a verdict or a reason, soon and in little memory."
import os
import resource
import signal
import struct
from fractions import Fraction
from pathlib import Path

import av
import cv2
import numpy as np
import pytest
import torch

from spotter.checkpoint import save_model
from spotter.inference import Detector
from spotter.model import TemporalCNN_GRU
from spotter.video import read_frames

FILM = Path(__file__).parents[1]/"data"/"original_sequences"/"youtube"/"c23"/"videos"/"000.mp4"
SECONDS = 60   # for any file


@pytest.fixture(scope="module")
def detector(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("checkpoint")/"random.safetensors"
    save_model(TemporalCNN_GRU(freeze_backbone=False, use_multiscale=True, use_attention=True), path, frames=4)
    return Detector(path)


@pytest.fixture(scope="module")
def frames(): return read_frames(FILM)[0]


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
    "A film that was held upright by a camera lying on its side: turned pixels, and a matrix in the track's header that turns them back."
    encode(path, [np.rot90(p) for p in pictures])
    data = bytearray(path.read_bytes())
    at = data.index(b"tkhd") + 44
    data[at:at + 36] = struct.pack(">9i", 0, 1 << 16, 0, -(1 << 16), 0, 0, 0, 0, 1 << 30)
    path.write_bytes(data)
    return path


def sound(path):
    with av.open(str(path), "w") as out:
        stream = out.add_stream("aac", rate=16_000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 16_000), np.int16), format="s16", layout="mono"); frame.sample_rate = 16_000
        out.mux(stream.encode(frame)); out.mux(stream.encode(None))
    return path


def flipped(path, share):
    rng, data = np.random.default_rng(0), np.frombuffer(FILM.read_bytes(), np.uint8).copy()
    body = np.arange(len(data)//3, len(data))   # behind the index
    at = rng.choice(body, int(share*len(body)), replace=False)
    data[at] ^= rng.integers(1, 256, len(at), np.uint8)
    path.write_bytes(data.tobytes())
    return path


def cut(path, share):
    path.write_bytes(FILM.read_bytes()[:int(share*FILM.stat().st_size)])
    return path


def piped(path): os.mkfifo(path); return path
def folder(path): path.mkdir(); return path
def copied(path): path.write_bytes(FILM.read_bytes()); return path
def written(path, data): path.write_bytes(data); return path
def enlarged(frames, side): return [cv2.resize(f, (side, side)) for f in frames]


JUDGED = {   # these a player would show
    "as it is": lambda d, f: copied(d/"a.mp4"),
    "wrong extension": lambda d, f: copied(d/"a.txt"),
    "name of spaces and umlauts": lambda d, f: copied(d/"ein Film ü.mp4"),
    "rotated": lambda d, f: rotated(d/"a.mp4", f),
    "odd size, 4:4:4": lambda d, f: encode(d/"a.mkv", f[:, :255, :253], pixels="yuv444p"),
    "ten bits": lambda d, f: encode(d/"a.mp4", f, pixels="yuv420p10le"),
    "very large": lambda d, f: encode(d/"a.mp4", enlarged(f[:8], 3072), options={"preset": "ultrafast"}),
    "variable rate": lambda d, f: encode(d/"a.mp4", f, times=np.cumsum(np.arange(24) % 3*60 + 20).tolist()),
    "raw stream without an index": lambda d, f: encode(d/"a.h264", f, format="h264"),
    "stream for broadcasting": lambda d, f: encode(d/"a.ts", f),
    "another code": lambda d, f: encode(d/"a.avi", f, codec="mpeg4"),
    "four frames": lambda d, f: encode(d/"a.mp4", f[:4]),
    "animation": lambda d, f: encode(d/"a.gif", f, codec="gif", pixels="rgb8"),
}
REFUSED = {   # and of these there is no verdict
    "truncated": (lambda d, f: cut(d/"a.mp4", .05), "frame"),
    "text": (lambda d, f: written(d/"a.mp4", b"Dear Sir or Madam,\n"*50), "not a video"),
    "noise": (lambda d, f: written(d/"a.mp4", np.random.default_rng(0).bytes(50_000)), "not a video"),
    "zero length": (lambda d, f: written(d/"a.mp4", b""), "empty"),
    "sound alone": (lambda d, f: sound(d/"a.m4a"), "no video stream"),
    "one frame": (lambda d, f: encode(d/"a.mp4", f[:1]), "a verdict needs"),
    "picture": (lambda d, f: written(d/"a.png", cv2.imencode(".png", f[0])[1].tobytes()), "a verdict needs"),
    "very small": (lambda d, f: encode(d/"a.mp4", enlarged(f, 16)), "no face"),
    "nobody in it": (lambda d, f: encode(d/"a.mp4", np.full_like(f, 90)), "no face"),
    "folder": (lambda d, f: folder(d/"a.mp4"), "a folder"),
    "pipe": (lambda d, f: piped(d/"a.mp4"), "a pipe"),
    "nothing": (lambda d, f: d/"a.mp4", "no such file"),
}


@pytest.fixture
def limited():
    "Kill what takes too long; a hanging decoder would take the test run with it."
    def over(*_): raise TimeoutError(f"more than {SECONDS} seconds")
    before = signal.signal(signal.SIGALRM, over)
    signal.alarm(SECONDS)
    yield
    signal.alarm(0); signal.signal(signal.SIGALRM, before)


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


def test_rotation_is_followed(detector, frames, tmp_path):
    upright, turned = (detector.analyze(path, heatmaps=False) for path in (encode(tmp_path/"a.mp4", frames), rotated(tmp_path/"b.mp4", frames)))
    assert turned.people[0].boxes == pytest.approx(upright.people[0].boxes, abs=6)


def test_memory_stays_bounded_on_a_long_film(detector, frames, tmp_path):
    "Five minutes and an hour: more film, no more memory."
    def peak(n):
        path = long(tmp_path/f"{n}.mp4", frames, n)
        found = detector.analyze(path, heatmaps=False)
        assert found.verdict in ("real", "fake") and found.frames == n, found.reason
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/1024
    first = peak(3_600)
    assert peak(43_200) - first < 100   # MB; the frames alone would be 8,500


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
