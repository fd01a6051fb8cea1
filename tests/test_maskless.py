"""Corpora without masks: the stages evaluate and compare leave out what scores heatmaps, and the whole pipeline runs to its end.

The pipeline runs on bundled clips under the names of three public corpora."""
import ast
import builtins
import itertools
import json
import shutil
from pathlib import Path

import pandas as pd
import pytest
import yaml
from test_pipeline import NO_RUNS, ROOT, holds_no_times_and_no_paths, make_project, one_model

from spotter.evaluate.network_maps import SCORE_COLUMNS
from spotter.evaluate.reports import needs

SCORING = ["The sources of maps", "All pixels of all frames", "Single fakes", "By method, strength and extent",
           "The shown map against the others", "Where attention points", "Real clips", "The best and the worst of each method",
           "Maps of real clips", "Aims for the heatmaps", "What was tried, and what limits the maps"]


def cells(path: Path, kind: str) -> list[dict]:
    "Cells of a notebook, with their source as one text."
    return [c | dict(source="".join(c["source"])) for c in json.loads(path.read_text())["cells"] if c["cell_type"] == kind]


def names(source: str) -> tuple[set[str], set[str]]:
    "Names that a cell reads, and names that it binds."
    nodes = list(ast.walk(ast.parse(source)))
    found = [n for n in nodes if isinstance(n, ast.Name)]
    bound = {n.id for n in found if isinstance(n.ctx, ast.Store)} | {n.arg for n in nodes if isinstance(n, ast.arg)}
    bound |= {n.name for n in nodes if isinstance(n, ast.FunctionDef)}
    bound |= {a.asname or a.name for n in nodes if isinstance(n, (ast.Import, ast.ImportFrom)) for a in n.names}
    return {n.id for n in found} - bound, bound


@pytest.mark.parametrize("stage", ["evaluate", "compare"])
def test_cells_for_any_corpus_use_nothing_of_those_that_need_masks(stage):
    known, scored = set(dir(builtins)), set()
    for cell in cells(ROOT/"nbs"/"stages"/f"{stage}.ipynb", "code"):
        read, bound = names(cell["source"])
        if needs(cell["source"]) == "masks": scored |= bound
        else:
            assert not needs(cell["source"]), cell["source"]
            assert read <= known, (cell["source"], read - known)
            known |= bound
    assert scored - known


def copy(names: list[str], of: str, out: Path):
    "Bundled clips under other names: real ones, or those of a method."
    places = dict(real="original_sequences/youtube", fake="manipulated_sequences/FaceSwap")
    clips = itertools.cycle(sorted((ROOT/"data"/places[of]/"c23"/"videos").glob("*.mp4")))
    for name, clip in zip(names, clips):
        (out/name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(clip, out/name)


def celeb_df(out: Path):
    "Everybody swapped with everybody, so that all people are connected."
    people = [f"id{k}" for k in range(8)]
    copy([f"Celeb-real/{p}_{n:04}.mp4" for p in people for n in range(2)], "real", out)
    copy([f"Celeb-synthesis/{a}_{b}_0000.mp4" for a, b in itertools.permutations(people, 2)], "fake", out)
    (out/"List_of_testing_videos.txt").write_text("1 Celeb-real/id0_0000.mp4\n0 Celeb-synthesis/id0_id1_0000.mp4\n")


def dfdc(out: Path):
    parts = [f"dfdc_train_part_{k}" for k in range(10)]
    copy([f"{part}/a.mp4" for part in parts], "real", out)
    copy([f"{part}/{name}.mp4" for part in parts for name in "bc"], "fake", out)
    entries = {"a.mp4": dict(label="REAL", split="train")}
    entries |= {f"{name}.mp4": dict(label="FAKE", split="train", original="a.mp4") for name in "bc"}
    for part in parts: (out/part/"metadata.json").write_text(json.dumps(entries))


def folders(out: Path):
    copy([f"real/p{i}.mp4" for i in range(12)], "real", out)
    copy([f"fake/p{i}_p{i ^ 1}.mp4" for i in range(12)], "fake", out)


@pytest.fixture(scope="module", params=[celeb_df, dfdc, folders], ids=lambda corpus: corpus.__name__)
def project(request, tmp_path_factory):
    settings = one_model(yaml.safe_load((ROOT/"params.yaml").read_text()))
    settings["data"].update(splits="own")
    return make_project(tmp_path_factory.mktemp(request.param.__name__), settings, NO_RUNS, request.param)


def outputs(report: Path, kind: str) -> list[str]:
    "Texts that the cells of a report display."
    found = [o["data"].get(kind, []) for c in cells(report, "code") for o in c["outputs"] if "data" in o]
    return ["".join(text) for text in found if text]


@pytest.mark.slow
def test_reports_have_a_sentence_in_place_of_scores(project):
    evaluated, compared = project/"reports/models/small/evaluate.ipynb", project/"reports/compare.ipynb"
    why = "This corpus has no masks of its fakes for training, validation and test, so what scores heatmaps is left out."
    assert outputs(evaluated, "text/markdown").count(why) == 1
    assert sum(text.startswith("This corpus has no masks, so") for text in outputs(compared, "text/markdown")) == 1
    for report in (evaluated, compared):
        assert not [c["source"] for c in cells(report, "code") if needs(c["source"])]
        titles = [c["source"].partition("\n")[0].lstrip("# ") for c in cells(report, "markdown") if c["source"].startswith("#")]
        assert not set(titles) & set(SCORING) and titles[-1] == "What to take from this"
        said = "\n".join(outputs(report, "text/markdown") + outputs(report, "text/html"))
        assert "average precision over" not in said and "pointing" not in said and "mean mask" not in said
    titles = "".join(c["source"] for c in cells(evaluated, "markdown"))
    assert "## What the maps look like" in titles and "## Does the verdict rest on what the map shows?" in titles
    assert len(outputs(evaluated, "image/jpeg")) > 0 and (project/"reports/models/small/heatmaps.jpg").stat().st_size > 10_000
    holds_no_times_and_no_paths(project)


@pytest.mark.slow
def test_every_file_is_written(project):
    scores = pd.read_csv(project/"metrics/models/small/localisation.csv")
    assert list(scores) == SCORE_COLUMNS and scores.empty
    compared = pd.read_csv(project/"metrics/localisation.csv")
    assert list(compared) == ["by", "group", "clips", "source", "score", "value", "lo", "hi"] and compared.empty
    found = project.metrics("small")
    assert "localisation" not in found and set(found["deletion"]["advantage"]["deletion"]) == {"shown"}
    assert found["coverage"]["real"]["scored"] > 0 and found["coverage"]["fake"]["scored"] > 0
    written = json.loads((project/"metrics/comparison.json").read_text())
    assert written["models"] == ["small"] and "small - handmade" in written["differences"] and "localisation" not in written
    assert set(pd.read_csv(project/"metrics/comparison.csv").name) == {"handmade", "small", "small - handmade"}
    assert (project/"reports/html/models/small/evaluate.html").is_file() and (project/"checkpoints/shipped.safetensors").is_file()


@pytest.mark.slow
def test_a_rerun_is_compared_without_heatmaps(project):
    project.run("spotter", "verify", "--record")
    assert "Identical: every table is the committed one, byte for byte." in project.run("spotter", "verify")
    path = project/"metrics/models/small/metrics.json"
    before, changed = path.read_text(), project.metrics("small") | dict(added=1)   # other bytes, the same metrics
    path.write_text(json.dumps(changed))
    said = project.run("spotter", "verify")
    path.write_text(before)
    assert "Reproduced: every metric is equal or inside its tolerance." in said
    assert [line.split()[-2:] for line in said.splitlines() if "pooled AP" in line] == [["not", "there"]]
