"Readers of files that somebody else made, fed with files damaged at random: they come to an end, or raise what they say."
import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file

from spotter.core import load_params
from spotter.data.corpora import index_dataset
from spotter.data.names import CorpusError
from spotter.data.layouts.celeb_df import read_test_list
from spotter.data.layouts.deeper_forensics import read_lists
from spotter.data.layouts.dfdc import read_dfdc_preview, test_rows as read_labels
from spotter.data.layouts.ffpp import read_splits, read_strengths
from spotter.data.video import VideoError, iter_frames, probe, video_index, write_video
from spotter.model.checkpoint import FORMAT, inspect_checkpoint, load_model
from spotter.model.pickles import read_tensors

ROOT = Path(__file__).parents[1]


# ---------------------------------------------------------------- seeds, made of small files

def checkpoints(folder: Path) -> list[bytes]:
    "Of safetensors and of torch.save, with a tensor or two."
    header = dict(format=FORMAT, config=dict(backbone="efficientnet-b0", use_multiscale=True, use_attention=True), image_size=64,
                  temperature=1.5, bias=.1, prevalence=.5, threshold=.5, shown_map="fused", metadata=dict(frames=4, epoch=1))
    save_file({"temporal.weight": torch.ones(2, 2)}, folder/"a", {"spotter": json.dumps(header)})
    save_file({"classifier.weight": torch.ones(2, 2)}, folder/"b", {"of": "another program"})
    torch.save(dict(model_state_dict={"module.a": torch.ones(2)}, epoch=np.int64(3), out=Path("runs")), folder/"c")
    torch.save({"_conv_stem.weight": torch.ones(2, 2)}, folder/"d", _use_new_zipfile_serialization=False)
    return [(folder/name).read_bytes() for name in "abcd"]


def videos(folder: Path) -> list[bytes]:
    "Films in several formats, photos and an animation, of 32 pixels."
    import av
    pictures = np.random.default_rng(0).integers(0, 255, (6, 32, 32, 3), np.uint8)
    write_video(folder/"a.mp4", pictures)
    for name, codec in {"b.mkv": "libx264", "c.ts": "mpeg2video", "d.avi": "mpeg4", "e.webm": "libvpx"}.items():
        with av.open(str(folder/name), "w") as out:
            stream = out.add_stream(codec, rate=25); stream.width = stream.height = 32; stream.pix_fmt = "yuv420p"
            for picture in pictures: out.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
            out.mux(stream.encode(None))
    stills = [Image.fromarray(picture) for picture in pictures]
    for name in ("f.jpg", "g.png", "h.webp", "i.tiff", "j.bmp", "k.avif"): stills[0].save(folder/name)
    stills[0].save(folder/"l.gif", save_all=True, append_images=stills[1:])
    return [path.read_bytes() for path in sorted(folder.iterdir())]


PAIRS = [b'[["071", "054"], ["002", "003"]]', b"[]"]
LISTS = [b"1 Celeb-real/id0_0001.mp4\n0 Celeb-synthesis/id0_id1_0001.mp4\n", b"000_W001.mp4\n001_W002.mp4\n", *PAIRS]
TABLES = [b"path,label,identity,source,original,mask,split\nx/a.mp4,real,anna,,,,train\nx/b.mp4,1,anna,ben,x/a.mp4,x/m.mp4,test\n",
          b"path,label\na.mp4,fake\n", b"method,name,strength\nDeepfakes,000_001,hard\n", b"filename,label\na.mp4,1\nx.mp4,0\n",
          b'{"x/a.mp4": {"label": "REAL", "set": "train", "target": "1234567"}, "a.mp4": {"label": "fake", "set": "test", "target": 1}}']


# ---------------------------------------------------------------- readers, and the errors that they document

def only(*documented: type[Exception]) -> Callable:
    "Runs a reader; a documented error is an end like any other."
    def run(read: Callable, *args):
        try: read(*args)
        except documented as e: assert str(e)
    return run


def read_checkpoint(path: Path):
    run = only(ValueError)
    for read in (inspect_checkpoint, load_model, read_tensors): run(read, path)


def read_split(path: Path):
    run, folder = only(CorpusError), path.parent
    for name in ("train.json", "val.json", "test.json", "train.txt", "val.txt", "test.txt"): shutil.copy(path, folder/name)
    run(read_splits, folder); run(read_lists, folder); run(read_test_list, path)


def read_manifests(path: Path):
    run, folder = only(CorpusError), path.parent
    for name in ("x/a.mp4", "x/b.mp4", "x/m.mp4", "a.mp4", "x.mp4"): (folder/name).parent.mkdir(exist_ok=True); (folder/name).touch()
    for name in ("manifest.csv", "labels.csv", "dataset.json"): shutil.copy(path, folder/name)
    for how in ("official", "judged"): run(index_dataset, folder, "manifest", None, how)
    run(read_strengths, folder/"manifest.csv"); run(read_labels, folder, folder.parent); run(read_dfdc_preview, folder, None)


def read_video(path: Path):
    run = only(VideoError)
    run(probe, path)
    def watch():
        index = video_index(path, 10_000)
        for frames in (iter_frames(path), iter_frames(path, [0, max(0, index.frames - 1)], index)):
            for _, (number, moment, picture) in zip(range(20), frames): assert picture.ndim == 3 and np.isfinite(moment)
    run(watch)


READERS = {"checkpoint": (checkpoints, read_checkpoint), "params": (lambda _: [(ROOT/"params.yaml").read_bytes(), b"seed: 0\n"],
                                                                    lambda path: only(ValueError)(load_params, path)),
           "split": (lambda _: LISTS, read_split), "manifest": (lambda _: TABLES, read_manifests), "video": (videos, read_video)}


# ---------------------------------------------------------------- damage

TOKENS = [b"\x00", b"\xff"*4, b"\x7f\xff\xff\xff", b"\n", b",", b'"', b"{", b"[", b"]", b"null", b"-1", b"1e999", b"nan",
          b"../", b"/", b"\xef\xbb\xbf",
          b"&a [*a]", b"!!python/object/apply:os.system [ls]", b"9"*30, b"2001-99-99", b"? ", b": ", b"true", b"{}", b"\xed\xa0\x80"]


@st.composite
def damaged(draw, seeds: list[bytes]) -> bytes:
    "A seed with a few bytes changed, put in, taken out or repeated."
    data = bytearray(draw(st.sampled_from(seeds)))
    for _ in range(draw(st.integers(1, 6))):
        a, n = draw(st.integers(0, len(data))), draw(st.integers(0, 40))
        how = draw(st.sampled_from(["change", "put in", "take out", "repeat", "cut"]))
        token = draw(st.sampled_from(TOKENS) | st.binary(max_size=8))
        if how == "change": data[a:a + len(token)] = token
        elif how == "put in": data[a:a] = token
        elif how == "take out": del data[a:a + n]
        elif how == "repeat": data[a:a] = data[a:a + n]*draw(st.integers(1, 4))
        elif a > 8: del data[a:]
    return bytes(data)


def fuzzed(name: str, examples: int, **how) -> Callable:
    "A function that feeds a reader with so many files; hypothesis shows the file at which it fails."
    seeds, read = READERS[name]
    with TemporaryDirectory() as folder: corpus = seeds(Path(folder))
    @settings(max_examples=examples, deadline=None, database=None, suppress_health_check=list(HealthCheck), **how)
    @given(damaged(corpus))
    def feed(data: bytes):
        with TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            path = Path(folder)/"file"; path.write_bytes(data)
            read(path)
    return feed


@pytest.mark.parametrize("name", READERS)
def test_a_damaged_file_raises_what_is_documented(name):
    "The same few files each time; `benchmarks/fuzz.py` tries others for as long as it is told."
    fuzzed(name, dict(checkpoint=40, video=60).get(name, 100), derandomize=True, phases=[Phase.generate, Phase.shrink])()


def test_a_runtime_error_of_a_decoder_is_a_picture_that_cannot_be_read(tmp_path, monkeypatch):
    "Found by the fuzzer: Pillow's decoder of AVIF raises one. Here it is raised by hand."
    Image.new("RGB", (32, 32)).save(tmp_path/"a.png")
    def broken(*_, **__): raise RuntimeError("Failed to decode frame")
    monkeypatch.setattr(Image, "open", broken)
    with pytest.raises(VideoError, match="a picture that cannot be read"): video_index(tmp_path/"a.png")


def test_a_gif_may_be_cut_off_anywhere(tmp_path):
    "Found by the fuzzer: Pillow raises errors of three kinds, depending on the byte."
    frames = [Image.new("RGB", (32, 32), colour) for colour in ("red", "green", "blue")]
    frames[0].save(tmp_path/"whole.gif", save_all=True, append_images=frames[1:], duration=100)
    data, counts = (tmp_path/"whole.gif").read_bytes(), []
    assert video_index(tmp_path/"whole.gif").frames == 3
    for length in range(20, len(data)):
        (tmp_path/"cut.gif").write_bytes(data[:length])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try: counts.append(sum(1 for _ in iter_frames(tmp_path/"cut.gif")))
            except VideoError as e: assert "cut.gif" in str(e); counts.append(0)
    assert counts == sorted(counts) and {0, 1, 2, 3} == set(counts)


@pytest.mark.parametrize("width", [6913, 65535])
def test_pixels_that_are_too_wide_are_a_clear_error(tmp_path, width):
    "Found by the fuzzer: FFmpeg's converter has several errors for a picture that would be too large in square pixels."
    Image.new("RGB", (32, 32)).save(tmp_path/"a.jpg")
    data = bytearray((tmp_path/"a.jpg").read_bytes())
    about = data.index(b"JFIF\0") + 7
    data[about:about + 5] = b"\0" + width.to_bytes(2, "big") + b"\0\1"   # of a pixel, over its height
    (tmp_path/"a.mjpeg").write_bytes(b"\0" + data)   # with a byte in front it is no picture for Pillow
    with pytest.raises(VideoError, match="in a form that FFmpeg cannot convert"): list(iter_frames(tmp_path/"a.mjpeg"))


def test_a_header_that_asks_for_all_memory_is_a_damaged_file(tmp_path, monkeypatch):
    "Found by the fuzzer, in a header of MP4. Here the error is raised by hand: how much is too much depends on the machine."
    import av
    (tmp_path/"a.mp4").write_bytes(b"ftyp")
    def short(*_, **__): raise av.error.MemoryError(12, "Cannot allocate memory")
    monkeypatch.setattr(av, "open", short)
    with pytest.raises(VideoError, match="asks for more memory than there is"): probe(tmp_path/"a.mp4")


def test_undamaged_seeds_are_read(tmp_path):
    "Or nothing would be fuzzed but the first line of each reader."
    for k, data in enumerate(videos(tmp_path)):
        (tmp_path/f"whole{k}").write_bytes(data)
        assert probe(tmp_path/f"whole{k}").width == 32 and len(list(iter_frames(tmp_path/f"whole{k}"))) in (1, 6)
