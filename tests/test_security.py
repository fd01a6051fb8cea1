"Files of strangers: what is too large, what crashes, what would lead out of its folder, and names that would steer a page or a terminal."
import ast
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest
import torch
import typer
from test_batches import CLIP, FakeDetector, SETTINGS, files

from spotter import cli
from spotter.data.corpora import index_dataset
from spotter.data.names import CorpusError
from spotter.data.video import DamageWarning, VideoError, iter_frames, probe, video_index
from spotter.model.pickles import read_tensors
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
    for name in ("find_shots", "iter_frames", "count_decodable"): monkeypatch.setattr(f"spotter.predict.detector.{name}", decoded)
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


LISTS = "ffconcat version 1.0\nfile film.mp4\n", "#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nfilm.mp4\n#EXT-X-ENDLIST\n"


@pytest.mark.parametrize("text", LISTS)
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


# ---------------------------------------------------------------- paths

def corpus(root, text, *names):
    for name in names: (root/name).parent.mkdir(parents=True, exist_ok=True); (root/name).touch()
    (root/"manifest.csv").write_text(text)
    return root


@pytest.mark.parametrize("column", ["path", "mask"])
@pytest.mark.parametrize("name", ["../private/b.mp4", "/etc/passwd", r"..\private\b.mp4", "x/../../private/b.mp4",
                                  "link/b.mp4", "own.mp4"])
def test_a_manifest_names_nothing_outside_of_its_folder(tmp_path, column, name):
    row = dict(path="x/a.mp4", mask="", label="fake") | {column: name}
    text = "path,mask,label\n" + ",".join(row[c] for c in ("path", "mask", "label")) + "\n"
    (tmp_path/"private").mkdir(); (tmp_path/"private"/"b.mp4").touch()
    root = corpus(tmp_path/"corpus", text, "x/a.mp4")
    (root/"link").symlink_to(tmp_path/"private"); (root/"own.mp4").symlink_to(tmp_path/"private"/"b.mp4")
    with pytest.raises(CorpusError, match=f"line 2: the {column} leads out of the folder"): index_dataset(root, "manifest")


@pytest.mark.parametrize("name", ["../x.mp4", "/x.mp4", "a/link/x.mp4"])
def test_the_list_of_the_preview_names_nothing_outside(tmp_path, name):
    (tmp_path/"out").mkdir(); (tmp_path/"out"/"x.mp4").touch(); (tmp_path/"x.mp4").touch()
    root = tmp_path/"corpus"; (root/"a").mkdir(parents=True); (root/"a"/"link").symlink_to(tmp_path/"out")
    (root/"dataset.json").write_text(json.dumps({name: dict(label="fake", set="test", target="1")}))
    with pytest.raises(CorpusError, match="leads out of the folder"): index_dataset(root, "dfdc_preview")


def test_no_layout_gives_a_clip_a_name_that_climbs(tmp_path, monkeypatch):
    "Shards and heatmaps are written under these names."
    from spotter.data import corpora
    from spotter.data.table import COLUMNS, Layout
    row = dict.fromkeys(COLUMNS, "") | dict(clip_id="../../a", path="a.mp4", label=0)
    monkeypatch.setitem(corpora.LAYOUTS, "folders", Layout(lambda *_: ([row], []), (), "a toy"))
    with pytest.raises(CorpusError, match="not below the folder of the corpus"): index_dataset(tmp_path, "folders")


def test_heatmaps_that_lie_elsewhere_are_refused(tmp_path):
    from spotter.evaluate.foreign_maps import map_file
    (tmp_path/"maps").mkdir(); (tmp_path/"a.npz").touch(); (tmp_path/"maps"/"a.npz").symlink_to(tmp_path/"a.npz")
    with pytest.raises(ValueError, match="leads out of the folder of the heatmaps"): map_file(tmp_path/"maps", "a")


def test_a_member_of_a_checkpoint_writes_no_file(tmp_path, monkeypatch):
    "A checkpoint of torch.save is a zip; its members are read by name and never unpacked."
    import zipfile
    path = tmp_path/"in"/"net.pt"; path.parent.mkdir(); monkeypatch.chdir(path.parent)
    torch.save(dict(a=torch.zeros(2)), path)
    with zipfile.ZipFile(path, "a") as archive:
        for name in ("../out.txt", str(tmp_path/"out.txt"), "net/../../out.txt"): archive.writestr(name, "planted")
    try: read_tensors(path)
    except ValueError as e: assert str(path) in str(e)
    assert sorted(p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*")) == ["in", "in/net.pt"]


# ---------------------------------------------------------------- names

NAME = "<img src=x onerror=alert(1)>\x1b[2J\n\u202e4pm.exe.mp4"
SEEN = r"\x1b[2J\n\u202e4pm.exe.mp4"   # after the tag


def test_a_name_cannot_steer_page_or_terminal(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cli, "_detector", lambda *_: FakeDetector()); monkeypatch.setenv("COLUMNS", "300")
    (tmp_path/NAME).write_bytes(b"x")
    cli.predict([str(tmp_path/NAME)], csv_out=tmp_path/"out.csv", report=tmp_path/"out.html")
    page, said = (tmp_path/"out.html").read_text(), capsys.readouterr()
    assert "<img src=x" not in page and page.count("&lt;img src=x onerror=alert(1)&gt;" + SEEN) >= 2
    for text in (page, said.out, said.err): assert "\x1b" not in text and "\u202e" not in text
    assert SEEN in said.out


def test_a_name_cannot_steer_warnings_and_errors(tmp_path):
    data = CLIP.read_bytes()
    (tmp_path/NAME).write_bytes(data[:len(data)//2])
    with pytest.warns(DamageWarning) as warned: list(iter_frames(tmp_path/NAME))
    assert SEEN in str(warned[0].message) and not set("\x1b\n\u202e") & set(str(warned[0].message))
    for folder in ("real", "fake"): (tmp_path/"c"/folder).mkdir(parents=True); (tmp_path/"c"/folder/NAME).touch()
    with pytest.warns() as warned: notes = index_dataset(tmp_path/"c", "folders", splits="judged").attrs["notes"]
    assert not any(set("\x1b\n\u202e") & set(text) for text in [*notes, *(str(w.message) for w in warned)])
    for folder in ("original_sequences/youtube/c23/videos", "splits"): (tmp_path/"f"/folder).mkdir(parents=True)
    (tmp_path/"f"/"splits"/"train.json").touch(); (tmp_path/"f"/"original_sequences/youtube/c23/videos"/NAME).touch()
    with pytest.raises(CorpusError) as refused: index_dataset(tmp_path/"f", "ffpp")
    assert SEEN in str(refused.value) and "\x1b" not in str(refused.value)


def test_errors_of_commands_are_escaped(tmp_path, capsys):
    with pytest.raises(typer.Exit): cli.audit(tmp_path/NAME, layout="ffpp")
    said = capsys.readouterr().err
    assert r"\x1b[2J" in said and "\x1b" not in said and "\u202e" not in said


# ---------------------------------------------------------------- nothing is run

def forbidden(tree: ast.AST) -> list[str]:
    "Calls that run what is in a file or a text."
    found = []
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        name, given = ast.unparse(call.func), {k.arg: ast.unparse(k.value) for k in call.keywords}
        last = name.split(".")[-1]
        if last in ("exec", "execfile", "popen", "system", "getoutput", "getstatusoutput", "read_pickle", "Unpickler", "extractall") \
                or name in ("eval", "compile", "__import__", "yaml.load", "joblib.load", "marshal.loads", "marshal.load") \
                or re.fullmatch(r"(c?[pP]ickle|dill|shelve)\.(loads?|open)", name): found.append(name)
        if name == "torch.load" and given.get("weights_only") != "True": found.append(name)
        if last == "load" and given.get("allow_pickle") == "True" or given.get("shell") not in (None, "False"): found.append(name)
    names = {a.name for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom)) for a in node.names}
    modules = {getattr(node, "module", None) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    harmless = {"UnpicklingError"}   # an error to catch
    return found + sorted(names & {"pickle", "dill", "marshal", "shelve", "subprocess"}) + [
        m for m in modules & {"pickle", "dill", "marshal", "subprocess", "os.system"} if m and not names & harmless]


@pytest.mark.parametrize("path", sorted((ROOT/"spotter").rglob("*.py")), ids=lambda p: p.relative_to(ROOT).as_posix())
def test_the_package_runs_no_pickle_no_text_and_no_shell(path):
    assert forbidden(ast.parse(path.read_text())) == []


@pytest.mark.parametrize("code", ["pickle.load(f)", "torch.load(f)", "torch.load(f, weights_only=False)", "eval('1')", "exec('1')",
                                  "os.system('ls')", "run('ls', shell=True)", "np.load(f, allow_pickle=True)", "yaml.load(f)",
                                  "import pickle", "tar.extractall()",
                                  "from pickle import loads", "pd.read_pickle(f)", "import subprocess"])
def test_the_rule_would_notice(code): assert forbidden(ast.parse(code))


# ---------------------------------------------------------------- what is installed

def test_the_bill_of_materials_is_cyclonedx(tmp_path):
    "Made as `make sbom` makes it: from uv.lock alone."
    uv = shutil.which("uv") or next(iter(ROOT.glob(".uv/bin/uv")), None)
    if uv is None: pytest.skip("no uv on the PATH or in .uv")
    options = next(line for line in (ROOT/"Makefile").read_text().splitlines() if "cyclonedx" in line).split("$(UV) ")[1].split()[:-1]
    subprocess.run([uv, *options, tmp_path/"sbom.json"], cwd=ROOT, check=True)
    bill = json.loads((tmp_path/"sbom.json").read_text())
    assert (bill["bomFormat"], bill["specVersion"]) == ("CycloneDX", "1.5")
    assert {"torch", "av", "pillow"} <= {part["name"] for part in bill["components"] if part["version"]}


@pytest.mark.slow
def test_bandit_finds_nothing_that_is_not_explained():
    command = [sys.executable, "-m", "bandit", "--quiet", "--recursive", "--configfile", "pyproject.toml", "spotter"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
