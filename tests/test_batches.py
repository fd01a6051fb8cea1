"Many videos in one run: results are kept as they come, a stopped run goes on, and a table shows them."
import io
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import tracemalloc
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
from rich.cells import cell_len

from spotter import cli
from spotter.model.checkpoint import save_model
from spotter.model.network import TemporalCNN_GRU
from spotter.predict.batch import Batch, Job, Terminable, in_workers
from spotter.predict.detector import Analysis, Detector, Person
from spotter.predict.inputs import SUFFIXES, find_videos
from spotter.predict.table import print_table

CLIP = Path(__file__).parents[1]/"data"/"original_sequences"/"youtube"/"c23"/"videos"/"000.mp4"
SETTINGS = dict(checkpoint="nowhere.safetensors", sha256="0"*64, threshold=.5, unsure=None, prevalence=.5, shown_map="fused", device="cpu")


def person(p=.7, side=4, verdict="fake"):
    n = np.zeros(2)
    return Person(verdict, p, 1., 100., n, n, n, n, np.zeros((2, 4)), np.zeros((2, side, side, 3), np.uint8), np.zeros((2, 8, 8)))


class FakeDetector:
    "Says of every video that it is fake, unless its name asks for something else."
    def __init__(self, side=4, obey=True, **settings):
        self.settings, self.side, self.obey, self.seen, self.alive = SETTINGS | settings, side, obey, [], []

    def analyze(self, video, heatmaps=True):
        name = Path(video).stem
        self.seen.append(name)
        for word, number in dict(term=signal.SIGTERM, kill=signal.SIGKILL).items():
            if word in name and self.obey: os.kill(os.getpid(), number)
        if not Path(video).exists(): found = Analysis(str(video), "undetermined", "no such file", settings=self.settings)
        else: found = Analysis(str(video), "fake", people=(person(side=self.side),), frames=9, rate=25., settings=self.settings)
        self.alive = [ref for ref in self.alive if ref() is not None] + [weakref.ref(found)]
        return found

    def diagnostic_video(self, video, out, analysis):
        if analysis.people: Path(out).write_text("video")


@pytest.fixture(autouse=True)
def pages(monkeypatch):
    "Sections without figures, which take most of the time."
    from spotter.predict import page   # not at the top: processes of their own import this file, and need no figures
    monkeypatch.setattr(page, "html_section", lambda a: f"<section><h2>{a.path}: {a.verdict} {a.reason}</section>")


def files(folder, *names):
    for name in names: (folder/name).write_text(name)
    return [folder/name for name in names]


@pytest.fixture
def predict(monkeypatch):
    "The command in this process, with a stand-in; its exit code."
    def run(detector, *inputs, **options):
        monkeypatch.setattr(cli, "_detector", lambda *_: detector)
        try: cli.predict(list(map(str, inputs)), **options)
        except typer.Exit as e: return e.exit_code
        return 0
    return run


def lines(path): return [json.loads(line) for line in path.read_text().splitlines()]


# ---------------------------------------------------------------- results as they come, and going on

KILLED = """
import sys; sys.path.insert(0, {tests!r})
from spotter import cli; from test_batches import FakeDetector
cli._detector = lambda *_: FakeDetector(obey="--resume" not in sys.argv)
cli.app(prog_name="spotter")
"""


def command(*arguments):
    code = KILLED.format(tests=str(Path(__file__).parent))
    return subprocess.run([sys.executable, "-c", code, "predict", *map(str, arguments)], capture_output=True, text=True)


def films(folder, at, word):
    folder.mkdir()
    return files(folder, *(f"film{k:02}{word if k == at else ''}.mp4" for k in range(1, 21)))


def test_sigterm_at_the_15th_of_20_leaves_14_and_the_same_command_goes_on(predict, tmp_path, capsys):
    videos = films(tmp_path/"films", 15, "term")
    out = dict(json_out=tmp_path/"out.json", report=tmp_path/"out.html", csv_out=tmp_path/"out.csv")
    first = FakeDetector()
    assert predict(first, tmp_path/"films", **out) == 143 and len(first.seen) == 15
    told = json.loads((tmp_path/"out.json").read_text())
    assert [r["path"] for r in told] == list(map(str, videos)) and [r["verdict"] for r in told] == ["fake"]*14 + ["undetermined"]*6
    assert {r["reason"] for r in told[14:]} == {"not judged, the run was stopped"}
    assert [r["path"] for r in lines(tmp_path/"out.jsonl")] == list(map(str, videos[:14]))
    assert (tmp_path/"out.html").read_text().count("not judged") == 6*2 and len(list((tmp_path/"out.html.parts").iterdir())) == 14
    second = FakeDetector(obey=False)
    assert predict(second, tmp_path/"films", resume=True, **out) == 0 and len(second.seen) == 6
    told = json.loads((tmp_path/"out.json").read_text())
    assert [r["path"] for r in told] == [r["path"] for r in lines(tmp_path/"out.jsonl")] == list(map(str, videos))
    assert {r["verdict"] for r in told} == {"fake"} and "14 of 20 videos are taken over" in capsys.readouterr().err
    assert (tmp_path/"out.html").read_text().count("<section><h2>/") == 20 and not (tmp_path/"out.html.parts").exists()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_kill_9_leaves_the_lines(tmp_path):
    videos, out = films(tmp_path/"films", 15, "kill"), ["--json", tmp_path/"out.json"]
    (tmp_path/"out.json").write_text("of the run before")
    assert command(tmp_path/"films", *out).returncode == -signal.SIGKILL
    assert [r["path"] for r in lines(tmp_path/"out.jsonl")] == list(map(str, videos[:14]))
    assert (tmp_path/"out.json").read_text() == "of the run before"
    done = command(tmp_path/"films", *out, "--resume")
    assert done.returncode == 0 and "14 of 20 videos are taken over" in done.stderr, done.stderr
    assert len(json.loads((tmp_path/"out.json").read_text())) == 20


def test_every_line_is_on_the_disk_before_the_next_video(predict, tmp_path, monkeypatch):
    videos, synced, there, fsync = files(tmp_path, *"abc"), [], [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda number: (synced.append(os.readlink(f"/proc/self/fd/{number}")), fsync(number)))
    class Looking(FakeDetector):
        def analyze(self, *args, **kwargs):
            there.append((len(lines(tmp_path/"out.jsonl")), synced.count(str(tmp_path/"out.jsonl"))))
            return super().analyze(*args, **kwargs)
    assert predict(Looking(), *videos, json_out=tmp_path/"out.json") == 0
    assert there == [(0, 0), (1, 1), (2, 2)]


def test_only_what_still_fits_is_taken_over(predict, tmp_path):
    "Size, time of change, settings with the SHA-256 of the network; undetermined ones are taken over too."
    videos, out = [*files(tmp_path, *"abcd"), tmp_path/"gone"], dict(json_out=tmp_path/"out.json")
    def again(detector=None, **options):
        detector = detector or FakeDetector()
        predict(detector, *videos, **out | options)
        return detector.seen
    assert again() == [*"abcd", "gone"] and again(resume=True) == []
    assert [r["verdict"] for r in lines(tmp_path/"out.jsonl")] == ["fake"]*4 + ["undetermined"]
    videos[0].write_text("longer")
    os.utime(videos[1], ns=(0, 0))
    assert again(resume=True) == ["a", "b"] and again(resume=True) == []
    videos[4].write_text("here"); assert again(resume=True) == ["gone"]
    assert again(FakeDetector(sha256="1"*64), resume=True) == [*"abcd", "gone"]
    assert again(FakeDetector(sha256="1"*64, threshold=.4), resume=True) == [*"abcd", "gone"]
    assert len(lines(tmp_path/"out.jsonl")) == 5   # one for each
    assert again(FakeDetector(sha256="1"*64, threshold=.4), resume=True) == []
    assert again(FakeDetector(sha256="1"*64, threshold=.4)) == [*"abcd", "gone"]   # without --resume


def test_a_half_written_line_is_told_and_its_video_judged_again(predict, tmp_path, capsys):
    videos, out = files(tmp_path, *"abc"), dict(json_out=tmp_path/"out.json")
    predict(FakeDetector(), *videos, **out)
    before = json.loads((tmp_path/"out.json").read_text())
    data = (tmp_path/"out.jsonl").read_bytes()
    for cut in (1, 50):
        (tmp_path/"out.jsonl").write_bytes(data[:-cut])
        detector = FakeDetector(); capsys.readouterr()
        assert predict(detector, *videos, resume=True, **out) == 0 and detector.seen == ["c"]
        assert "out.jsonl: line 3 was not written to its end" in capsys.readouterr().err
        assert json.loads((tmp_path/"out.json").read_text()) == before and len(lines(tmp_path/"out.jsonl")) == 3


def test_pictures_that_are_gone_are_made_again(predict, tmp_path):
    videos, out = files(tmp_path, *"abc"), dict(json_out=tmp_path/"out.json", report=tmp_path/"out.html", diagnostic=tmp_path/"shown")
    (tmp_path/"shown").mkdir()
    class Stopped(FakeDetector):
        def analyze(self, video, heatmaps=True):
            if Path(video).stem == "c": raise KeyboardInterrupt
            return super().analyze(video, heatmaps)
    assert predict(Stopped(), *videos, **out) == 130
    parts = sorted((tmp_path/"out.html.parts").iterdir(), key=lambda p: "/a:" in p.read_text())
    parts[-1].unlink(); (tmp_path/"shown"/"002_b.mp4").unlink()
    detector = FakeDetector()
    assert predict(detector, *videos, resume=True, **out) == 0 and detector.seen == [*"abc"]
    page = (tmp_path/"out.html").read_text()
    assert [page.index(f"/{name}: fake") for name in "abc"] == sorted(page.index(f"/{name}: fake") for name in "abc")
    assert not (tmp_path/"out.html.parts").exists() and len(list((tmp_path/"shown").iterdir())) == 3


def test_resume_needs_json_and_lines_are_no_input(predict, tmp_path, capsys):
    video, = files(tmp_path, "a.jsonl")
    assert predict(FakeDetector(), video, resume=True) == 2 and "--json" in capsys.readouterr().err
    assert predict(FakeDetector(), video, json_out=tmp_path/"a.json") == 2 and "would be lost" in capsys.readouterr().err
    assert predict(FakeDetector(), video, json_out=tmp_path/"b.jsonl") == 2 and "choose another" in capsys.readouterr().err
    assert predict(FakeDetector(), video, json_out=tmp_path/"b.json", csv_out=tmp_path/"b.json") == 2
    assert "two things" in capsys.readouterr().err and video.read_text() == "a.jsonl"
    assert predict(FakeDetector(), video, json_out=Path("/dev/null")) == 0 and not Path("/dev/null.jsonl").exists()


def test_a_full_disk_costs_the_lines_and_not_the_run(predict, tmp_path, monkeypatch, capsys):
    from spotter.predict.lines import Lines
    def full(self, entry): raise OSError("no space left on device")
    monkeypatch.setattr(Lines, "add", full)
    assert predict(FakeDetector(), *files(tmp_path, *"ab"), json_out=tmp_path/"out.json") == 1
    assert len(json.loads((tmp_path/"out.json").read_text())) == 2 and "no space left" in capsys.readouterr().err


# ---------------------------------------------------------------- memory

def test_memory_does_not_grow_with_the_number_of_videos(predict, tmp_path, monkeypatch):
    "Each video has 3 MB of crops and a section of 1 MB: neither stays."
    from spotter.predict import page
    videos = files(tmp_path, *(f"{k}.mp4" for k in range(20)))
    monkeypatch.setattr(page, "html_section", lambda analysis: "x"*1_000_000)
    most, peaks = 0, []
    class Counting(FakeDetector):
        def analyze(self, *args, **kwargs):
            nonlocal most
            most = max(most, sum(ref() is not None for ref in self.alive))
            return super().analyze(*args, **kwargs)
    for n in (5, 20):
        tracemalloc.start()
        assert predict(Counting(side=700), *videos[:n], json_out=tmp_path/"out.json", report=tmp_path/"out.html") == 0
        peaks.append(tracemalloc.get_traced_memory()[1]); tracemalloc.stop()
    assert most == 0 and (tmp_path/"out.html").stat().st_size > 20_000_000
    assert peaks[1] < peaks[0] + 1_000_000, peaks


# ---------------------------------------------------------------- processes

def test_a_process_that_dies_costs_its_video(tmp_path):
    jobs = [Job(path) for path in files(tmp_path, "a", "kill", "b")]
    found = {job.video.name: record for job, record in in_workers(FakeDetector, jobs, 2, SETTINGS)}
    assert {name: r["verdict"] for name, r in found.items()} == dict(a="fake", kill="undetermined", b="fake")
    assert "its process died (SIGKILL)" in found["kill"]["reason"]


@pytest.fixture(scope="session")
def weights(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("checkpoint")/"random.safetensors"
    model = TemporalCNN_GRU(use_multiscale=True, use_attention=True); model.image_size = 64
    save_model(model, path, frames=4)
    return path


def compared(weights, folder, run, *names):
    "What one process and two say of the bundled clips of these names, and of a letter: record, table, page and what was printed."
    videos = folder/"videos"; videos.mkdir()
    for name, clip in zip("cab", names): (videos/f"{name}.mp4").write_bytes(CLIP.with_stem(clip).read_bytes())
    (videos/"letter.mp4").write_text("Dear Sir")
    for workers in (1, 2):
        printed = run(workers, videos)
        told = [r | dict(seconds=None) for r in json.loads((folder/f"{workers}.json").read_text())]
        assert [Path(r["path"]).stem for r in told] == [*sorted("cab"[:len(names)]), "letter"]
        yield printed, told, *(p.read_text() for p in sorted(folder.glob(f"{workers}.*")) if p.suffix in (".csv", ".html"))


def test_two_workers_say_what_one_says(weights, tmp_path, capsys):
    def run(workers, videos):
        with pytest.raises(typer.Exit) as ended:
            cli.predict([str(videos)], checkpoint=weights, device="cpu", workers=workers,
                        json_out=tmp_path/f"{workers}.json", csv_out=tmp_path/f"{workers}.csv")
        assert ended.value.exit_code == 3
        return capsys.readouterr().out
    one, two = compared(weights, tmp_path, run, "000", "004")
    assert one == two and len(one) == 3


@pytest.mark.slow
def test_two_workers_draw_what_one_draws(weights, tmp_path):
    def run(workers, videos):
        program = [sys.executable, "-c", "from spotter.cli import app; app()"]
        command = [*program, "predict", videos, "--checkpoint", weights, "--workers", str(workers)]
        out = [f"--{option}={tmp_path/str(workers)}.{suffix}" for option, suffix in dict(json="json", csv="csv", report="html").items()]
        done = subprocess.run([*command, *out], capture_output=True, text=True)
        assert done.returncode == 3, done.stderr
        return done.stdout
    one, two = compared(weights, tmp_path, run, "000", "004", "000")
    assert one == two and one[3].count("data:image/png") == 3


ENDLESS = """
import sys; sys.path.insert(0, {tests!r})
from pathlib import Path
from spotter.predict.batch import Batch, Job, Terminable, in_workers
from test_batches import SETTINGS, Sleeper
if __name__ == "__main__":
    for job, record in in_workers(Sleeper, [Job(Path("first")), Job(Path("endless"))], 1, SETTINGS): print("judged", flush=True)
"""


class Sleeper(FakeDetector):
    "Judges one video, and says of another that it is endless."
    def analyze(self, video, heatmaps=True):
        if Path(video).name == "endless":
            print("endless", flush=True)
            signal.pause()
        return super().analyze(video, heatmaps)


def test_processes_end_with_the_one_that_started_them(tmp_path):
    "Even if it is killed: an orphan would go on and write."
    (tmp_path/"run.py").write_text(ENDLESS.format(tests=str(Path(__file__).parent)))
    with subprocess.Popen([sys.executable, tmp_path/"run.py"], stdout=subprocess.PIPE, text=True) as run:
        said = {run.stdout.readline() for _ in range(2)}
        run.kill()
        assert said == {"judged\n", "endless\n"}
        assert run.stdout.read() == ""   # this waits until the last process that may write there has ended


@pytest.mark.slow
def test_sigterm_ends_processes_in_the_middle_of_their_videos(tmp_path):
    "What the others have judged until then is kept."
    batch, stop = Batch([Job(tmp_path/name) for name in ("first", "endless", "third")], SETTINGS), Terminable()
    class Kept(dict):
        def __setitem__(self, *item): super().__setitem__(*item); os.kill(os.getpid(), signal.SIGTERM)
    batch.found = Kept()
    with stop: batch.run(in_workers(Sleeper, batch.jobs, 2, SETTINGS), stop, print)
    assert stop.code == 143 and [Path(path).name for path in batch.found] == ["first"]
    assert [job.video.name for job in batch.left] == ["endless", "third"] and not multiprocessing.active_children()


# ---------------------------------------------------------------- the table

def row(path, *people, verdict="fake", p=.7, reason=None, note=None):
    faces = [dict(name=f"face {k}", verdict=v, p_fake=.7, coverage=.5, size=123., reason=r) for k, (v, r) in enumerate(people, 1)]
    return dict(path=path, verdict=verdict, p_fake=p if people else None, reason=reason, note=note, people=faces)


LONG = "folder with a long name/" + "a very long name of a film "*8 + "[take 2].mp4"
ROWS = [row("a.mp4", ("fake", None)), row(LONG, ("fake", None), ("undetermined", "its side is 16 pixels, and 64 are needed")),
        row("映"*60 + ".mp4", ("real", None), verdict="real", note="damaged: 20 of 24 frames can be decoded"),
        row("b.mp4", verdict="undetermined", reason="no face could be followed, in 24 frames that were searched, and more of that "*2)]


@pytest.mark.parametrize("columns", [50, 80, 200])
def test_the_table_fits_the_terminal(columns, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", str(columns))
    print_table(ROWS)
    said = capsys.readouterr().out.splitlines()
    assert max(map(cell_len, said)) <= columns and said[0].split()[:5] == ["video", "verdict", "p_fake", "judged", "size"]
    long = next(k for k, line in enumerate(said) if line.startswith("fol"))
    assert "…" in said[long] and said[long].split("  ")[0].endswith(".mp4") and "fake" in said[long]
    assert said[long + 1].startswith("  face 1 ") and said[long + 2].startswith("  face 2 ")   # people are under their video
    assert "no face could be followed" in " ".join("\n".join(said).split())
    if columns >= 80: assert said[long].startswith("folder with a ") and "[take 2].mp4 " in said[long]
    if columns == 200: assert len(said[long].split("  ")[0]) > 100


def test_a_pipe_gets_80_columns_of_plain_text(monkeypatch, capsys):
    monkeypatch.delenv("COLUMNS", raising=False); monkeypatch.setenv("FORCE_COLOR", "1")
    print_table(ROWS)
    said = capsys.readouterr().out
    assert 60 < max(map(cell_len, said.splitlines())) <= 80 and "\x1b" not in said


def test_a_terminal_gets_colours(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self): return True
    monkeypatch.setenv("TERM", "xterm"); monkeypatch.delenv("NO_COLOR", raising=False)
    print_table(ROWS, terminal := Terminal())
    assert "\x1b[" in terminal.getvalue()
    monkeypatch.setenv("NO_COLOR", "1"); print_table(ROWS, plain := Terminal())
    assert "\x1b[33m" not in plain.getvalue() and "\x1b[1;33m" not in plain.getvalue()


def test_names_can_neither_steer_nor_mark_up(predict, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "200")
    folder = tmp_path/"[red]x["; folder.mkdir()
    assert predict(FakeDetector(), *files(folder, "red].mp4", "a\n\x1b[31mb.mp4", ":smile:.mp4"), tmp_path/"[bold]\x1b[2J.mp4") == 3
    said = capsys.readouterr().out
    assert "/[red]x[/red].mp4 " in said and r"a\n\x1b[31mb.mp4 " in said and "/:smile:.mp4" in said and r"/[bold]\x1b[2J.mp4" in said
    assert "\x1b" not in said and len(said.splitlines()) == 1 + 4


def test_an_ascii_terminal_is_served(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")   # which raises for what is not in it
    print_table(ROWS, out); out.flush()
    said = out.buffer.getvalue().splitlines()
    assert any(b"..." in line for line in said) and max(map(len, said)) <= 80


# ---------------------------------------------------------------- threshold and unsure

@pytest.fixture(scope="session")
def p_fake(weights): return Detector(weights).analyze(CLIP, heatmaps=False).p_fake


@pytest.mark.parametrize("apart, verdict", [((.01, None), "real"), ((-.01, None), "fake"), ((0, None), "fake"),
                                            ((-.01, .01), "unsure"), ((.01, .02), "real"), ((-.02, -.01), "fake")])
def test_threshold_and_bounds_decide(weights, p_fake, tmp_path, apart, verdict):
    low, high = (p_fake + d if d is not None else None for d in apart)
    options = dict(threshold=low) if high is None else dict(unsure=f"{low!r},{high!r}")
    cli.predict([str(CLIP)], checkpoint=weights, json_out=tmp_path/"out.json", device="cpu", **options)   # 0 is raised by nobody
    told, = json.loads((tmp_path/"out.json").read_text())
    assert told["verdict"] == told["people"][0]["verdict"] == verdict and (told["confidence"] is None) == (verdict == "unsure")
    assert told["settings"]["threshold"] == (low if high is None else .5) and told["settings"]["unsure"] == (high and [low, high])


@pytest.mark.parametrize("option, value, word", [
    ("--threshold", "1.5", "from 0 to 1"), ("--threshold", "nan", "from 0 to 1"), ("--threshold", "x", "a valid number"),
    ("--unsure", "0.4", "such as 0.4,0.6"), ("--unsure", "", "such as 0.4,0.6"),
    ("--unsure", "a,b", "such as 0.4,0.6"), ("--unsure", "0.6,0.4", "the lower one first"),
    ("--unsure", "0.4,1.2", "from 0 to 1"), ("--workers", "0", "--workers")])
def test_wrong_values_are_told(option, value, word, weights):
    from typer.testing import CliRunner
    done = CliRunner().invoke(cli.app, ["predict", str(CLIP), "--checkpoint", str(weights), option, value], env=dict(COLUMNS="200"))
    assert done.exit_code == 2 and word in done.output, done.output


def test_a_threshold_outside_of_the_bounds_is_told(weights, capsys):
    with pytest.raises(typer.Exit) as e: cli.predict([str(CLIP)], checkpoint=weights, device="cpu", threshold=.2, unsure="0.4,0.6")
    assert e.value.exit_code == 2 and "leave one of them out" in capsys.readouterr().err


# ---------------------------------------------------------------- what is found

NEW = ".m2ts .vob .asf .mxf .264 .h264 .265 .hevc .gif .jpg .jpeg .png .webp .bmp .tif .tiff .heic .heif .avif"


def test_videos_and_pictures_are_found_in_folders(tmp_path):
    assert set(NEW.split()) < SUFFIXES
    named = files(tmp_path, *(f"a{suffix.upper()}" for suffix in NEW.split()))
    files(tmp_path, "a.txt", "._a.mp4", "._b.jpg"); (tmp_path/"__MACOSX").mkdir(); files(tmp_path/"__MACOSX", "b.mp4")
    assert find_videos([str(tmp_path)]) == sorted(named)


def test_linked_folders_are_followed_once(tmp_path):
    for name in ("in/deep", "out"): (tmp_path/name).mkdir(parents=True)
    a, b, c = [*files(tmp_path/"in", "a.mp4"), *files(tmp_path/"in"/"deep", "b.mp4"), *files(tmp_path/"out", "c.mp4")]
    for link, to in (("in/deep/circle", tmp_path/"in"), ("in/again", tmp_path/"in"/"deep"), ("in/outside", tmp_path/"out")):
        (tmp_path/link).symlink_to(to)
    outside = tmp_path/"in"/"outside"/"c.mp4"
    assert find_videos([str(tmp_path/"in")]) == [a, b, outside]
    assert find_videos([str(tmp_path/"in"), str(tmp_path/"out"), str(tmp_path/"in"/"deep")]) == [a, b, outside]
    (tmp_path/"link").symlink_to("in")
    assert find_videos([str(tmp_path/"link")])[0] == tmp_path/"link"/"a.mp4"


def test_brackets_alone_are_no_pattern(predict, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "250")
    there, other = files(tmp_path, "clip[1].mp4", "clip2.mp4")
    assert find_videos([str(there)]) == [there] and find_videos([str(tmp_path/"clip[0-9]*")]) == [other]
    assert predict(FakeDetector(), there, tmp_path/"clip[2].mp4") == 3
    assert "clip[2].mp4  undetermined       -       -     -  no such file" in capsys.readouterr().out
    with pytest.raises(ValueError, match="no videos there"): find_videos([str(tmp_path/"film*.mp4")])


@pytest.mark.parametrize("name", ["a"*246 + ".mp4", "é"*123 + ".mp4", "映"*82 + ".mp4"])
def test_a_name_of_250_bytes_has_an_annotated_video(name, weights, tmp_path):
    assert len(os.fsencode(name)) == 250
    for folder in "xy": (tmp_path/folder).mkdir(); (tmp_path/folder/name).write_bytes(CLIP.read_bytes())
    cli.predict([str(tmp_path/folder) for folder in "xy"], checkpoint=weights, device="cpu", diagnostic=tmp_path/"shown")
    shown = sorted(p.name for p in (tmp_path/"shown").iterdir())
    assert [n[:5] for n in shown] == [f"001_{name[0]}", f"002_{name[0]}"] and all(n.endswith(f"{name[0]}.mp4") for n in shown)


def test_help_says_it_all():
    from typer.testing import CliRunner
    said = " ".join(CliRunner().invoke(cli.app, ["predict", "--help"], env=dict(COLUMNS="100", TERM="dumb")).output.split())
    words = "--resume", "--workers", "--threshold", "--unsure", ".jsonl", "SIGTERM", "143", "brackets alone", "picture"
    assert [word for word in words if word not in said] == []
