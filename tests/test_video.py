"What files contain: clocks, sizes, colours, fields, pictures, and the same frames whether they are reached by counting or by hops."
import warnings
from fractions import Fraction
from functools import lru_cache
from io import BytesIO
from pathlib import Path
from struct import pack

import av
import cv2
import numpy as np
import pytest
from PIL import Image, ImageCms

from spotter.core import FaceParams, find_root
from spotter.data.faces import DETECTORS, face_clip, prepare_clip
from spotter.data.video import (DamageWarning, VideoError, count_decodable, iter_frames, probe, read_frames, video_index, video_length,
                                write_video)
from whole_frame import whole_frame

BUNDLED = find_root(Path(__file__).parent)/"data"
FACES = FaceParams(detector="whole-frame", every=4, min_score=.5, margin=1., size=32, frames=8)


def counted(n, height=48, width=64):
    "Frames that differ all over, so that a wrong number shows: a moving ramp on a grey level of its own."
    y, x = np.mgrid[:height, :width]
    return [np.stack([(x*3 + 9*i) % 256, (y*4 + 5*i) % 256, np.full_like(x, i*7 % 256)], -1).astype(np.uint8) for i in range(n)]

X265 = "log-level=none:frame-threads=1:pools=none"   # with threads, one file in a hundred could not be written


def encode(path, frames, codec="libx264", fmt="yuv420p", options=None, stamps=None, tick=None, container=None, tags=None, edit=None):
    "Frames (H, W, 3), which `edit` may turn into FFmpeg's; `stamps` in ticks."
    with av.open(str(path), "w", options=container or {}) as c:
        s = c.add_stream(codec, rate=25, options=options or {})
        (s.height, s.width), s.pix_fmt, s.codec_context.thread_count = frames[0].shape[:2], fmt, 1
        if tick: s.time_base = s.codec_context.time_base = tick
        for k, v in (tags or {}).items(): setattr(s.codec_context, k, v)
        for i, f in enumerate(frames):
            frame = edit(f) if edit else av.VideoFrame.from_ndarray(f, format="rgb24").reformat(format=fmt)
            frame.pts, frame.time_base = (i if stamps is None else stamps[i]), tick or Fraction(1, 25)
            for k, v in (tags or {}).items(): setattr(frame, k, v)
            c.mux(s.encode(frame))
        c.mux(s.encode(None))
    return path


def before(path):
    "Numbers, times and frames as they were read before anything here was asked for: ordinary videos must stay as they are."
    with av.open(str(path)) as c:
        s, start = c.streams.video[0], Fraction(c.start_time or 0, av.time_base)
        s.codec_context.thread_count = 1
        for i, frame in enumerate(c.decode(s)):
            time = i/float(s.average_rate) if frame.pts is None else float(frame.pts*s.time_base - start)
            yield i, time, frame.reformat(format="rgb24").to_ndarray()


def same(found, expected):
    found, expected = list(found), list(expected)
    return len(found) == len(expected) and all(a[:2] == b[:2] and np.array_equal(a[2], b[2]) for a, b in zip(found, expected))


# ---------------------------------------------------------------- ordinary videos

@pytest.mark.parametrize("pattern", ["original_sequences/youtube/c23/videos/*.mp4", "manipulated_sequences/Deepfakes/*/videos/*.mp4"])
def test_bundled_clips_are_read_as_ever(pattern):
    for path in sorted(BUNDLED.glob(pattern))[::60]:
        notes, expected = set(), list(before(path))
        assert same(iter_frames(path, notes=notes), expected) and not notes
        assert same(iter_frames(path, index=video_index(path)), expected)
        assert same(iter_frames(path, [20, 3], video_index(path)), [expected[3], expected[20]])
        length = video_length(path)
        assert (length.frames, length.seconds, length.lacking) == (24, .96, 0) and video_index(path).rate == 25


@pytest.mark.parametrize("codec, name", [("libx264", "a.mp4"), ("mpeg4", "a.avi"), ("mpeg4", "a.mp4"), ("libvpx-vp9", "a.webm")])
def test_progressive_sdr_files_are_read_as_ever(tmp_path, codec, name):
    path, notes = encode(tmp_path/name, counted(20), codec), set()
    assert same(iter_frames(path, notes=notes), before(path)) and not notes


def beside(left, right):
    "Two pictures of the same kind side by side, the right one at three quarters of its size, on black (or 0)."
    left, right = (cv2.resize(np.ascontiguousarray(p), (s, s), interpolation=cv2.INTER_AREA) for p, s in ((left, 256), (right, 192)))
    return np.concatenate([left, np.pad(right, ((0, 64), (0, 0), (0, 0)))], 1)


def test_two_people_and_their_mask_are_read_to_the_pixel(tmp_path):
    "An original beside a smaller fake, and the mask of both: frames and masks have the same numbers, times and size."
    fake = BUNDLED/"manipulated_sequences/Deepfakes"
    original, altered, mask = (read_frames(p)[0] for p in (BUNDLED/"original_sequences/youtube/c23/videos/000.mp4",
                                                           fake/"c23/videos/000_001.mp4", fake/"masks/videos/000_001.mp4"))
    masks = [beside(np.zeros_like(m), m)[..., 0] > 127 for m in mask]
    write_video(tmp_path/"two.mp4", [beside(*pair) for pair in zip(original, altered)])
    write_video(tmp_path/"two_mask.mp4", masks, lossless=True)
    (frames, times), (found, mask_times) = (read_frames(tmp_path/name) for name in ("two.mp4", "two_mask.mp4"))
    assert frames.shape == found.shape == (24, 256, 448, 3) and np.array_equal(times, mask_times)
    assert np.array_equal(found[..., 0] > 0, masks) and found[:, :, 256:].any() and not found[:, :, :256].any()


# ---------------------------------------------------------------- clocks

def broadcast(path, n=24, start=0, **how):
    stamps, how = [start*90_000 + 3600*i for i in range(n)], how | dict(tick=Fraction(1, 90_000), container={"mpegts_copyts": "1"})
    return encode(path, counted(n), stamps=stamps, **how)


@pytest.fixture(scope="module")
def twice(tmp_path_factory):
    "The same MPEG-TS file four times in a row."
    path = broadcast(tmp_path_factory.mktemp("twice")/"once.ts", options={"bf": "2"})
    (joined := path.with_name("twice.ts")).write_bytes(path.read_bytes()*4)
    return joined


def test_a_clock_that_restarts_goes_on(twice):
    index, times = video_index(twice), np.array([t for _, t, _ in iter_frames(twice)])
    assert len(times) == index.frames == 96 and index.rate == pytest.approx(25) and index.jumps == 3
    assert np.diff(times) == pytest.approx(1/25) and index.times == pytest.approx(times)
    assert video_length(twice).seconds == pytest.approx(96/25)
    assert index.obstacle == "its clock jumps"


def test_a_clock_that_jumps_by_hours_goes_on(tmp_path):
    parts = [broadcast(tmp_path/f"{k}.ts", 12, start) for k, start in enumerate((36_000, 3, 7_200))]
    (path := tmp_path/"jumps.ts").write_bytes(b"".join(p.read_bytes() for p in parts))
    times = np.array([t for _, t, _ in iter_frames(path)])
    assert len(times) == 36 and np.diff(times) == pytest.approx(1/25) and video_index(path).times == pytest.approx(times)
    assert video_index(path).rate == pytest.approx(25) and video_length(path).seconds == pytest.approx(36/25)
    assert times[0] == pytest.approx(0, abs=.1)


def test_numbers_stay_right_where_the_clock_jumps(twice):
    expected = list(iter_frames(twice))
    assert same(iter_frames(twice, [70, 95], video_index(twice)), [expected[70], expected[95]])


@pytest.mark.parametrize("name", ["pause.mkv", "pause.mp4"])
def test_an_hour_without_frames_is_a_pause_where_the_clock_cannot_restart(tmp_path, name):
    stamps = [40*i for i in range(20)] + [3_600_000 + 40*i for i in range(20)]
    path = encode(tmp_path/name, counted(40), stamps=stamps, tick=Fraction(1, 1000))
    times = np.array([t for _, t, _ in iter_frames(path)])
    assert times == pytest.approx(np.array(stamps)/1000, abs=1e-3) and video_index(path).times == pytest.approx(times)
    assert video_index(path).rate == pytest.approx(25) and video_length(path).seconds > 3600 and not video_index(path).jumps


# ---------------------------------------------------------------- sizes

@pytest.fixture(scope="module")
def resize(tmp_path_factory):
    "64×48 pixels, then 128×96 in the same stream."
    folder = tmp_path_factory.mktemp("resize")
    parts = [encode(folder/f"{k}.h264", counted(24, 48*k, 64*k)) for k in (1, 2)]
    (path := folder/"resize.h264").write_bytes(b"".join(p.read_bytes() for p in parts))
    return path


def test_each_frame_has_its_own_size(resize):
    notes = set()
    assert [f.shape[:2] for _, _, f in iter_frames(resize, notes=notes)] == [(48, 64)]*24 + [(96, 128)]*24
    assert notes == {"its frames change size"}


def test_frames_of_several_sizes_are_no_array(resize):
    with pytest.raises(VideoError, match="resize.h264: frames of several sizes, 128x96 and 64x48 pixels"): read_frames(resize)
    assert read_frames(resize, [30, 40])[0].shape == (2, 96, 128, 3)


def test_a_clip_that_changes_size_is_left_out_with_the_reason(resize, monkeypatch):
    monkeypatch.setitem(DETECTORS, "whole-frame", whole_frame)
    with pytest.raises(VideoError, match="resize.h264: its frames change size, from 64x48 to 128x96 pixels"):
        face_clip(resize, FACES, whole_frame(.5))
    row, crops = prepare_clip(dict(clip_id="a", path="resize.h264", split="train", mask_path=""), resize.parent, FACES, whole_frame)
    assert row["reason"] == "its frames change size, from 64x48 to 128x96 pixels" and not crops


# ---------------------------------------------------------------- colours

def flat(yuv, depth=8):
    "A function that fills a frame with one colour."
    def fill(shape):
        kind, wide = ("yuv420p", np.dtype("u1")) if depth == 8 else ("yuv420p10le", np.dtype("<u2"))
        frame = av.VideoFrame(shape.shape[1], shape.shape[0], kind)
        for plane, value in zip(frame.planes, yuv): plane.update(np.full(plane.buffer_size//wide.itemsize, value, wide))
        return frame
    return fill


def coded(path, yuv, depth=10, **tags):
    "A lossless video of one colour."
    deep = dict(codec="libx265", fmt="yuv420p10le", options={"x265-params": f"lossless=1:bframes=0:{X265}"})
    how = dict(options={"qp": "0"}) if depth == 8 else deep
    return encode(path, [np.zeros((64, 64, 3))]*3, edit=flat(yuv, depth), tags=tags, **how)


def yuv10(rgb, red, blue):
    "Limited-range codes of 10 bits of an RGB signal in [0, 1]; weights of red and blue in the luma."
    r, g, b = rgb
    y = red*r + (1 - red - blue)*g + blue*b
    return round(64 + 876*y), round(512 + 896*(b - y)/(2 - 2*blue)), round(512 + 896*(r - y)/(2 - 2*red))


def pq(nits):
    root = (nits/10_000)**(2610/16384)
    return ((3424/4096 + 2413/128*root)/(1 + 2392/128*root))**(2523/32)


PQ, HLG, BT709, BT2020, P3 = 16, 18, 1, 9, 12
HDR = dict(colorspace=BT2020, color_primaries=BT2020, color_range=1)


def first(path, notes=None): return next(iter_frames(path, [1], notes=notes))[2][30, 30].astype(int)


@pytest.mark.parametrize("nits, expected", [
    ((203, 203, 203), (255, 255, 255)),                  # reference white
    ((0, 0, 0), (0, 0, 0)),
    ((100, 100, 100), (190, 190, 190)),                  # (100/203)^(1/2.4)·255
    ((1000, 1000, 1000), (255, 255, 255)),               # clipped
    ((203, 0, 0), (255, 0, 0)),                          # the red primary of BT.2020 lies outside BT.709
    ((60, 40, 30), (167, 126, 112))])                    # by the matrix of BT.2087: (73.9, 37.6, 28.4)/203
def test_pq_becomes_sdr(tmp_path, nits, expected):
    path, notes = coded(tmp_path/"pq.mp4", yuv10([pq(v) for v in nits], .2627, .0593), color_trc=PQ, **HDR), set()
    assert first(path, notes) == pytest.approx(expected, abs=2) and notes == {"HDR (PQ), tone-mapped to SDR"}


@pytest.mark.parametrize("signal, expected", [(.75, 255), (0, 0), (.5, 143), (1, 255)])   # of .5: (50.6 nits/203)^(1/2.4)·255
def test_hlg_becomes_sdr(tmp_path, signal, expected):
    path, notes = coded(tmp_path/"hlg.mp4", yuv10([signal]*3, .2627, .0593), color_trc=HLG, **HDR), set()
    assert first(path, notes) == pytest.approx([expected]*3, abs=2) and notes == {"HDR (HLG), tone-mapped to SDR"}


def test_grey_stays_neutral(tmp_path):
    for trc in (PQ, HLG):
        for signal in (.2, .4, .55):
            found = first(coded(tmp_path/"grey.mp4", yuv10([signal]*3, .2627, .0593), color_trc=trc, **HDR))
            assert np.ptp(found) <= 1, (trc, signal, found)


@pytest.mark.parametrize("primaries, matrix, weights, name, expected", [
    (BT2020, BT2020, (.2627, .0593), "BT.2020", (142, 98, 72)),
    (P3, BT709, (.2126, .0722), "Display P3", (132, 101, 72))])
def test_wide_gamut_keeps_its_colours(tmp_path, primaries, matrix, weights, name, expected):
    tags, notes = dict(color_trc=1, color_primaries=primaries, colorspace=matrix), set()
    path = coded(tmp_path/"wide.mp4", yuv10((.5, .4, .3), *weights), **tags)
    assert first(path, notes) == pytest.approx(expected, abs=2) and notes == {f"wide gamut ({name}), converted to BT.709"}


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("matrix, red, blue", [(BT709, .2126, .0722), (5, .299, .114), (6, .299, .114), (2, .299, .114)])
def test_matrix_and_range_are_honoured(tmp_path, matrix, red, blue, full):
    y, u, v = 110, 90, 170
    path = coded(tmp_path/"tagged.mp4", (y, u, v), 8, colorspace=matrix, color_range=2 if full else 1)
    y, u, v = (y/255, (u - 128)/255, (v - 128)/255) if full else ((y - 16)/219, (u - 128)/224, (v - 128)/224)
    r, b = y + 2*(1 - red)*v, y + 2*(1 - blue)*u
    expected = 255*np.array([r, (y - red*r - blue*b)/(1 - red - blue), b])
    notes = set()
    assert first(path, notes) == pytest.approx(expected, abs=2.5) and not notes


def test_colours_that_cannot_be_converted_are_a_clear_error(tmp_path):
    path = coded(tmp_path/"constant.mp4", (110, 90, 170), 8, colorspace=10)   # BT.2020 with constant luminance
    with pytest.raises(VideoError, match="constant.mp4: frames in a form that FFmpeg cannot convert"): read_frames(path)


# ---------------------------------------------------------------- fields

def bar(i, both, size=(96, 128)):
    "Planes of a frame in which a bar stands at one place, or at two in the two halves of the lines."
    def grey(x): return np.where((np.arange(size[1]) >= x) & (np.arange(size[1]) < x + 16), 235, 16).astype(np.uint8)
    planes = np.full((size[0]*3//2, size[1]), 128, np.uint8)
    planes[:size[0]:2], planes[1:size[0]:2] = grey(10 + 4*i), grey(10 + 4*i + 2*both)
    return planes


def field_video(path, both=True, n=20, **how):
    return encode(path, [np.zeros((96, 128, 3))]*n, edit=iter_planes(both), **how)


def iter_planes(both):
    numbers = iter(range(1000))
    return lambda _: av.VideoFrame.from_ndarray(bar(next(numbers), both), format="yuv420p")


def combing(frame):
    "How much lines differ from the mean of their two neighbours, beyond what these differ from each other; grey levels."
    above, line, below = (frame[k:len(frame) - 2 + k, :, 1].astype(float) for k in range(3))
    return np.maximum(abs(line - (above + below)/2) - abs(above - below)/2, 0).mean()


FIELDS = {"x264.mp4": dict(options={"x264-params": "interlaced=1:tff=1", "qp": "4"}),
          "x264.mkv": dict(options={"x264-params": "interlaced=1:tff=1:keyint=8", "qp": "4"}),
          "mpeg2.ts": dict(codec="mpeg2video", options={"flags": "+ildct+ilme", "b": "8M", "g": "8"}),
          "mpeg4.mp4": dict(codec="mpeg4", options={"flags": "+ildct+ilme", "b": "8M"})}


@pytest.mark.parametrize("name", FIELDS)
def test_interlaced_frames_lose_their_combs(tmp_path, name):
    path, notes = field_video(tmp_path/name, **FIELDS[name]), set()
    woven, found = list(before(path)), list(iter_frames(path, notes=notes))
    assert [f[:2] for f in found] == [f[:2] for f in woven], "numbers and times stay"
    assert min(combing(f) for *_, f in woven) > 3 and max(combing(f) for *_, f in found) < 1
    assert notes == {"interlaced, deinterlaced"}


def test_progressive_frames_do_not_pass_the_filter(tmp_path, monkeypatch):
    monkeypatch.setattr("spotter.data.video.deinterlace", lambda *_: pytest.fail("the filter was asked"))
    path, notes = field_video(tmp_path/"flat.mp4", both=False), set()
    assert same(iter_frames(path, notes=notes), before(path)) and not notes


@pytest.mark.parametrize("name", ["x264.mkv", "mpeg2.ts"])
def test_an_interlaced_frame_is_the_same_wherever_decoding_begins(tmp_path, name):
    path = field_video(tmp_path/name, n=60, **FIELDS[name])
    whole, index = list(iter_frames(path)), video_index(path)
    assert not index.obstacle and len(index.keys) > 3
    for k in index.keys[1:]: assert same(iter_frames(path, [int(k)], index), [whole[k]])
    assert same(iter_frames(path, [0, 59], index), [whole[0], whole[59]])


# ---------------------------------------------------------------- pictures

def halves():
    "Red above, green at the lower left, black at the lower right."
    picture = np.zeros((48, 64, 3), np.uint8)
    picture[:24], picture[24:, :32] = (200, 40, 40), (40, 200, 40)
    return picture


def boxed(kind, *parts):
    data = b"".join(parts)
    return pack(">I4s", 8 + len(data), kind) + data


def versioned(kind, version, *parts): return boxed(kind, pack(">I", version << 24), *parts)


def heic(path, turns=0, tiles=1):
    "A picture as phones store it: HEVC in a HEIF file, one item, or several that a grid puts side by side."
    encode(path.with_suffix(".mp4"), [halves()], "libx265", options={"x265-params": f"lossless=1:bframes=0:{X265}"})
    with av.open(str(path.with_suffix(".mp4"))) as c:
        config, data = bytes(c.streams.video[0].codec_context.extradata), bytes(next(c.demux(video=0)))
    if not config.startswith(b"\1"): raise AssertionError("no hvcC")
    grid, n = pack(">BBBBHH", 0, 0, 0, tiles - 1, 64*tiles, 48), tiles + (tiles > 1)
    items = [(i + 1, b"hvc1", data) for i in range(tiles)] + [(n, b"grid", grid)]*(tiles > 1)
    properties = [boxed(b"hvcC", config), versioned(b"ispe", 0, pack(">II", 64, 48)), boxed(b"irot", bytes([turns])),
                  versioned(b"ispe", 0, pack(">II", 64*tiles, 48))]
    def owned(kind): return bytes([2, 4, 3]) if kind == b"grid" else bytes([3, 0x81, 2, 0x83])
    def meta(offset):
        places, at = [], offset
        for i, _, d in items: places.append(pack(">HHHII", i, 0, 1, at, len(d))); at += len(d)
        names = [versioned(b"infe", 2, pack(">HH4s", i, 0, kind), b"\0") for i, kind, _ in items]
        owns = [pack(">H", i) + owned(kind) for i, kind, _ in items]
        refs = [versioned(b"iref", 0, boxed(b"dimg", pack(">HH", n, tiles), *(pack(">H", i + 1) for i in range(tiles))))]*(tiles > 1)
        return versioned(b"meta", 0, versioned(b"hdlr", 0, b"\0\0\0\0pict", b"\0"*13), versioned(b"pitm", 0, pack(">H", n)),
                         versioned(b"iloc", 0, b"\x44\0", pack(">H", n), *places), versioned(b"iinf", 0, pack(">H", n), *names), *refs,
                         boxed(b"iprp", boxed(b"ipco", *properties), versioned(b"ipma", 0, pack(">I", n), *owns)))
    head = boxed(b"ftyp", b"heic\0\0\0\0mif1heic")
    path.write_bytes(head + meta(len(head) + len(meta(0)) + 8) + boxed(b"mdat", *(d for *_, d in items)))
    return path


EXACT = {"PNG": {}, "BMP": {}, "TIFF": {}, "WEBP": dict(lossless=True), "GIF": {}}


@pytest.mark.parametrize("kind", [*EXACT, "JPEG", "AVIF"])
def test_a_picture_is_one_frame_whatever_its_name(tmp_path, kind):
    path, notes = tmp_path/"picture.mp4", set()
    Image.fromarray(halves()).save(path, format=kind, **EXACT.get(kind, dict(quality=95)))
    (i, time, frame), = iter_frames(path, notes=notes)
    assert (i, time, frame.dtype, frame.shape) == (0, 0., np.uint8, (48, 64, 3)) and notes == {f"a still picture ({kind})"}
    assert np.abs(frame.astype(int) - halves()).mean() <= (0 if kind in EXACT else 4)
    assert (probe(path).kind, probe(path).width, probe(path).frames) == ("image", 64, 1)
    assert (video_length(path).frames, video_length(path).seconds, count_decodable(path)) == (1, 0., 1)
    assert np.array_equal(read_frames(path, [0])[0][0], frame) and not list(iter_frames(path, [3]))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
def test_a_picture_stands_upright(tmp_path, kind):
    "EXIF orientations: 6 is turned a quarter, 2 mirrored."
    for orientation, upright in ((6, np.rot90(halves(), -1)), (2, halves()[:, ::-1]), (3, np.rot90(halves(), 2))):
        exif = Image.Exif(); exif[0x112] = orientation
        Image.fromarray(halves()).save(tmp_path/"held", format=kind, exif=exif)
        frame = read_frames(tmp_path/"held")[0][0]
        assert frame.shape == upright.shape and np.abs(frame.astype(int) - upright).mean() < 8, orientation


@pytest.mark.parametrize("turns", [0, 3])
def test_heic_of_one_item_is_read(tmp_path, turns):
    path = heic(tmp_path/"photo.heic", turns)
    (i, time, frame), = iter_frames(path)
    expected = np.rot90(halves(), turns)
    assert (i, time, frame.shape) == (0, 0., expected.shape) and np.abs(frame.astype(int) - expected).mean() < 4
    assert probe(path).kind == "image" and (video_length(path).frames, video_length(path).seconds) == (1, 0.)


def test_heic_in_tiles_is_refused_with_the_remedy(tmp_path):
    path = heic(tmp_path/"tiles.heic", tiles=2)
    for f in (probe, read_frames, video_length):
        with pytest.raises(VideoError, match="tiles.heic: a picture in 2 parts .HEIC.*convert it to JPEG"): f(path)


def test_transparency_lies_on_white(tmp_path):
    for kind in ("PNG", "WEBP", "GIF"):
        picture = np.dstack([halves(), np.full((48, 64), 255, np.uint8)]); picture[:, 32:, 3] = 0
        Image.fromarray(picture).save(tmp_path/"clear", format=kind, **EXACT[kind])
        frame = read_frames(tmp_path/"clear")[0][0]
        assert (frame[:, 32:] == 255).all() and np.array_equal(frame[:, :32], halves()[:, :32]), kind


def test_grey_of_16_bits_keeps_its_upper_eight(tmp_path):
    Image.fromarray(np.full((4, 4), 0x80ff, np.uint16)).save(tmp_path/"deep.png")
    assert (read_frames(tmp_path/"deep.png")[0] == 0x80).all()


ANIMATED = ["GIF", "PNG", "WEBP", "AVIF"]


@pytest.mark.parametrize("kind", ANIMATED)
def test_an_animation_has_its_frames_and_times(tmp_path, kind):
    shades = [Image.fromarray(np.full((48, 64, 3), 50*i, np.uint8)) for i in range(5)]
    shades[0].save(path := tmp_path/"moving.jpg", format=kind, save_all=True, append_images=shades[1:], duration=[40, 80, 120, 40, 0])
    numbers, times, frames = zip(*iter_frames(path))
    assert list(numbers) == [0, 1, 2, 3, 4] and times == pytest.approx([0, .04, .12, .24, .28])
    assert [f.mean() for f in frames] == pytest.approx([0, 50, 100, 150, 200], abs=4)
    assert probe(path).kind == "animation" and (index := video_index(path)).obstacle == "it is a picture"
    assert (index.frames, index.seconds) == (5, pytest.approx(.38)) and index.times == pytest.approx(times)   # no delay: .1 s
    assert [i for i, *_ in iter_frames(path, [3, 1], index)] == [1, 3]


def test_an_animation_that_breaks_off_gives_what_is_there(tmp_path):
    noise = [Image.fromarray(f) for f in np.random.default_rng(0).integers(0, 255, (6, 48, 64), dtype=np.uint8)]
    noise[0].save(whole := tmp_path/"whole.gif", save_all=True, append_images=noise[1:], duration=40)
    data = whole.read_bytes(); (path := tmp_path/"cut.gif").write_bytes(data[:len(data)//2])
    with pytest.warns(DamageWarning, match="cut.gif: damaged or cut off"): found = list(iter_frames(path))
    assert 1 <= len(found) < 6 and same(found, list(iter_frames(whole))[:len(found)])


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "AVIF"])
def test_a_broken_picture_is_a_video_error(tmp_path, kind):
    noise = np.random.default_rng(0).integers(0, 255, (48, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(buffer := BytesIO(), format=kind)
    (path := tmp_path/"broken").write_bytes(buffer.getvalue()[:len(buffer.getvalue())//2])
    with pytest.raises(VideoError, match="broken: "): read_frames(path)


def test_a_decompression_bomb_is_a_video_error(tmp_path, monkeypatch):
    Image.fromarray(halves()).save(tmp_path/"bomb.png")
    for limit in (2000, 1000):   # Pillow warns beyond its limit and raises beyond twice that
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        for f in (probe, read_frames, video_length, count_decodable):
            with pytest.raises(VideoError, match="bomb.png: a picture that cannot be read .*decompression bomb"): f(tmp_path/"bomb.png")


def test_a_stream_of_jpegs_is_a_video(tmp_path):
    Image.fromarray(halves()).save(buffer := BytesIO(), format="JPEG")
    (path := tmp_path/"camera").write_bytes(buffer.getvalue()*5)
    assert probe(path).kind == "video" and len(list(iter_frames(path))) == 5


def test_the_profile_of_a_picture_is_applied(tmp_path):
    "A profile whose red is the green of sRGB, and the other way round; one that is no profile."
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    swapped = srgb.replace("sRGB".encode("utf-16-be"), "swap".encode("utf-16-be"))
    for a, b in ((b"rXYZ", b"????"), (b"gXYZ", b"rXYZ"), (b"????", b"gXYZ")): swapped = swapped.replace(a, b, 1)
    for profile, expected in ((srgb, halves()), (swapped, halves()[..., [1, 0, 2]]), (b"nothing", halves())):
        Image.fromarray(halves()).save(tmp_path/"photo.png", icc_profile=profile)
        assert np.abs(read_frames(tmp_path/"photo.png")[0][0].astype(int) - expected).max() <= 2


# ---------------------------------------------------------------- hops

def irregular(n): return np.cumsum([0] + [(20, 40, 60, 33)[i % 4] for i in range(n - 1)]).tolist()


HOPS = {"b.mp4": dict(options={"g": "12", "bf": "3"}),
        "b.mkv": dict(options={"g": "12", "bf": "3"}),
        "b.ts": dict(options={"g": "12", "bf": "3"}),
        "open.mp4": dict(options={"x264-params": "open-gop=1:keyint=12:bframes=3:b-adapt=0:b-pyramid=normal:scenecut=0"}),
        "open.mkv": dict(options={"x264-params": "open-gop=1:keyint=12:bframes=3:b-adapt=0:b-pyramid=normal:scenecut=0"}),
        "open.ts": dict(options={"x264-params": "open-gop=1:keyint=12:bframes=3:b-adapt=0:scenecut=0"}),
        "hevc.mp4": dict(codec="libx265", options={"x265-params": f"keyint=12:bframes=3:open-gop=1:{X265}"}),
        "hevc.mkv": dict(codec="libx265", options={"x265-params": f"keyint=12:bframes=3:{X265}"}),
        "vp9.webm": dict(codec="libvpx-vp9", options={"g": "12", "auto-alt-ref": "1", "lag-in-frames": "12", "cpu-used": "8"}),
        "av1.mp4": dict(codec="libsvtav1", options={"g": "12", "preset": "12"}),
        "mpeg4.mp4": dict(codec="mpeg4", options={"g": "12", "bf": "2"}),
        "mpeg4.avi": dict(codec="mpeg4", options={"g": "12", "bf": "2"}),
        "mpeg2.ts": dict(codec="mpeg2video", options={"g": "12", "bf": "2"}),
        "variable.mp4": dict(options={"g": "12", "bf": "3"}, tick=Fraction(1, 1000), stamps=irregular(100)),
        "variable.mkv": dict(options={"g": "12", "bf": "3"}, tick=Fraction(1, 1000), stamps=irregular(100)),
        "late.ts": dict(options={"g": "12", "bf": "3"}, tick=Fraction(1, 90_000), stamps=[90_000*36_000 + 3600*i for i in range(100)],
                        container={"mpegts_copyts": "1"})}
WANTED = [[99], [50, 51, 52], [0, 99], [3, 12, 24, 25, 47, 48, 60, 98], [11, 12, 13, 71, 72, 73], list(range(30, 40)), [24, 36], [99, 500]]


@lru_cache
def hop_file(folder, name): return encode(folder/name, counted(100, 64, 64), **HOPS[name])


@pytest.fixture(scope="module")
def folder(tmp_path_factory): return tmp_path_factory.mktemp("hops")


@pytest.fixture
def restarts(monkeypatch):
    "Times that decoding had to start again at the beginning."
    from spotter.data import video
    made, cursor = [], video._Cursor
    monkeypatch.setattr(video, "_Cursor", lambda *args: made.append(args[3]) or cursor(*args))
    return lambda: sum(index is None for index in made)


@pytest.mark.parametrize("name", HOPS)
def test_hops_find_the_same_frames(folder, name, restarts):
    path = hop_file(folder, name)
    whole, index = list(iter_frames(path)), video_index(path)
    assert len(whole) == index.frames == 100 and index.times == pytest.approx([t for _, t, _ in whole])
    assert not index.obstacle and len(index.keys) >= 5
    base = restarts()
    for wanted in WANTED: assert same(iter_frames(path, wanted, index), [whole[i] for i in wanted if i < 100]), wanted
    assert restarts() == base, "a hop went astray"


@pytest.mark.parametrize("name", ["b.mp4", "b.ts", "open.mkv", "vp9.webm"])
def test_hops_decode_less(folder, name, monkeypatch):
    path, decoded = hop_file(folder, name), []
    from spotter.data import video
    for f in ("_in_order", "_from_key"):
        def watched(*args, f=getattr(video, f)):
            for item in f(*args): decoded.append(item[0]); yield item
        monkeypatch.setattr(video, f, watched)
    list(iter_frames(path, [5, 90], video_index(path)))
    assert len(decoded) < 40 and {5, 90} <= set(decoded)


def test_hops_turn_frames_upright(folder, tmp_path):
    data, one = bytearray(hop_file(folder, "b.mp4").read_bytes()), 1 << 16
    def matrix(*v): return b"".join(x.to_bytes(4, "big", signed=True) for x in v)
    start = data.index(matrix(one, 0, 0, 0, one, 0), data.index(b"tkhd"))
    data[start:start + 24] = matrix(0, one, 0, -one, 0, 0)
    (path := tmp_path/"held.mp4").write_bytes(data)
    (i, _, frame), = iter_frames(path, [60], video_index(path))
    assert np.array_equal(frame, np.rot90(read_frames(folder/"b.mp4", [60])[0][0], -1))


@pytest.mark.parametrize("change", ["keys", "stamps", "places"])
def test_an_index_that_does_not_fit_gives_no_wrong_number(folder, change):
    "It is another file's, or wrong: decoding starts again and counts."
    from dataclasses import replace
    path = hop_file(folder, "b.mp4")
    whole, index = list(iter_frames(path)), video_index(path)
    wrong = dict(keys=dict(keys=index.keys + (index.keys > 0)), stamps=dict(stamps=index.stamps + np.where(np.arange(100) > 50, 7, 0)),
                 places=dict(places=index.places[::-1].copy()))[change]
    for wanted in WANTED: assert same(iter_frames(path, wanted, replace(index, **wrong)), [whole[i] for i in wanted if i < 100])


def test_hops_are_refused_where_numbers_are_not_sure(tmp_path, resize, twice):
    vp8 = encode(tmp_path/"vp8.webm", counted(30), "libvpx", options={"deadline": "realtime"})
    assert "no time stamp" in video_index(resize).obstacle and "clock" in video_index(twice).obstacle
    assert "vp8" in video_index(vp8).obstacle
    for path in (vp8, resize): assert same(iter_frames(path, [20], video_index(path)), iter_frames(path, [20]))


def test_a_file_that_was_cut_off_is_not_hopped_in(tmp_path):
    write_video(whole := tmp_path/"whole.mp4", np.random.default_rng(0).integers(0, 255, (30, 48, 64, 3), dtype=np.uint8))
    data = whole.read_bytes(); (path := tmp_path/"cut.mp4").write_bytes(data[:len(data)//2])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DamageWarning)
        assert video_index(path).obstacle == "it is damaged" and video_index(path).lacking


# ---------------------------------------------------------------- threads

@pytest.mark.parametrize("name", ["b.mp4", "open.mkv", "hevc.mp4", "vp9.webm", "mpeg2.ts"])
def test_threads_change_nothing(folder, name):
    path = hop_file(folder, name)
    whole, index = list(iter_frames(path)), video_index(path)
    for threads in (2, 4, 0):
        assert same(iter_frames(path, threads=threads), whole)
        assert same(iter_frames(path, [10, 60, 99], index, threads), [whole[i] for i in (10, 60, 99)])


def test_threads_change_nothing_in_a_damaged_file(tmp_path):
    write_video(whole := tmp_path/"whole.mp4", np.random.default_rng(0).integers(0, 255, (30, 48, 64, 3), dtype=np.uint8))
    data = whole.read_bytes(); (path := tmp_path/"cut.mp4").write_bytes(data[:len(data)//2])
    with pytest.warns(DamageWarning): expected = list(iter_frames(path))
    with pytest.warns(DamageWarning): found = list(iter_frames(path, threads=4))
    assert 3 <= len(expected) < 20 and same(found, expected)
