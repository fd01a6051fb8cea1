"Further corpora: what depends on them, and a project trained on one tiny maskless corpus that is judged on two others."
import json

import pandas as pd
import pytest
import yaml
from sklearn.metrics import roc_auc_score
from test_maskless import celeb_df, dfdc, folders, outputs
from test_pipeline import NO_RUNS, ROOT, holds_no_times_and_no_paths, make_project, one_model
from test_structure import PIPELINES, load_stages

from spotter.evaluate.across import ACROSS, ACROSS_COLUMNS, HOME

CORPORA = [dict(name="celeb", root="celeb", layout="auto", compression="c23"),
           dict(name="parts", root="parts", layout="dfdc", compression="c23")]


def read_params(stage: dict) -> set[str]:
    "Settings that a stage depends on, of params.yaml."
    return {name for name in stage.get("params", []) if isinstance(name, str)}


@pytest.mark.parametrize("path", PIPELINES)
def test_only_the_page_of_all_corpora_depends_on_the_list(path):
    for name, stage in load_stages(path).items():
        assert not {"evaluate", "evaluate.corpora"} & read_params(stage) or name == "across", name


def test_stages_of_a_further_corpus_exist_only_where_one_is_listed():
    stages = yaml.safe_load((ROOT/"dvc.yaml").read_text())["stages"]
    assert stages["further"]["foreach"] == "${evaluate.corpora}"
    assert stages["judge"]["matrix"] == dict(model="${models}", corpus="${evaluate.corpora}")
    assert yaml.safe_load((ROOT/"params.yaml").read_text())["evaluate"]["corpora"] == []


def test_a_further_corpus_is_prepared_as_that_of_the_training():
    "By the same code, so that no change of figures or metrics prepares a large corpus again."
    stages = load_stages("dvc.yaml")
    deps = [{d for d in stages[name]["deps"] if d.startswith("spotter/")} for name in ("prepare", "further")]
    assert deps[0] == deps[1]


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    folder = tmp_path_factory.mktemp("across")
    celeb_df(folder/"celeb"); dfdc(folder/"parts")
    settings = one_model(yaml.safe_load((ROOT/"params.yaml").read_text()))
    settings["data"].update(splits="own")
    return make_project(folder, settings, NO_RUNS, folders)


@pytest.mark.slow
def test_models_are_judged_on_two_further_corpora_without_training_again(project):
    table, page = project/"metrics"/"across.csv", project/"reports"/"across.ipynb"
    assert list(pd.read_csv(table)) == ACROSS_COLUMNS and pd.read_csv(table).empty
    assert outputs(page, "text/markdown")[0].startswith("No further corpora are listed") and not (project/"faces_corpora").exists()
    settings = project.settings(); settings["evaluate"]["corpora"] = CORPORA
    project.write(settings)
    assert not [name for name in project.changed("dvc.yaml") if name.partition("@")[0] in ("prepare", "train", "calibrate", "evaluate")]
    said = project.run("dvc", "repro")
    assert not [name for name in ("train@", "calibrate@", "evaluate@") if f"Running stage '{name}" in said], said

    found = pd.read_csv(table)
    assert found.groupby("corpus", sort=False).size().index.tolist() == [HOME, "celeb", "parts"]
    assert set(found.metric) == set(ACROSS) - {"pooled_ap"}                    # none of the three has masks
    assert found.groupby("corpus").clips.first()[["celeb", "parts"]].tolist() == [2, 30]   # the official test list; all clips
    values = found.set_index(["corpus", "metric"]).value
    for corpus, name in {HOME: "predictions", "parts": "corpora/parts"}.items():
        clips = project.table(f"models/small/{name}")
        assert values[corpus, "auc"] == pytest.approx(roc_auc_score(clips.label, clips.p_fake), abs=1e-6)
    assert outputs(page, "image/png") and len(outputs(page, "text/html")) == 2
    written = [json.loads((project/f"metrics/models/small/corpora/{c['name']}.json").read_text()) for c in CORPORA]
    assert written[0]["alarm_threshold"] == written[1]["alarm_threshold"]
    assert (project/"reports/html/models/small/on_parts.html").is_file() and (project/"reports/corpora/celeb.ipynb").is_file()
    holds_no_times_and_no_paths(project)
    assert "Data and pipelines are up to date" in project.run("dvc", "repro")
