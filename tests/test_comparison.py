"The comparison follows from the committed tables, whatever models there are."
import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from spotter.core import load_params
from spotter.evaluate.comparison import auc_over_baseline, comparison_rows, earlier_and_later, model_differences
from spotter.evaluate.comparison import read_metrics, write_comparison
from spotter.evaluate.heatmaps import heatmap_metrics, read_localisation
from spotter.evaluate.map_tables import AIM, aims, compared_maps, reference_name, relative_gains
from spotter.evaluate.references import CHEATS, CONSTANT
from spotter.evaluate.tables import overall_metrics, read_predictions
from spotter.evaluate.trainings import BASELINE, evaluation_folder
from spotter.evaluate.verdicts import write_curves
from spotter.metrics.localisation import SCORES

ROOT = Path(__file__).parents[1]
METRICS, MODELS = ROOT/"metrics", list(load_params(ROOT/"params.yaml").models)


def tables_of(metrics, names): return {name: read_predictions(evaluation_folder(metrics, name)/"predictions.csv") for name in names}


@pytest.fixture(scope="module")
def four(tmp_path_factory):
    "The committed tables and one model more, which has the tables of the last."
    folder = tmp_path_factory.mktemp("metrics")
    for part in ("models", "baseline"): shutil.copytree(METRICS/part, folder/part)
    shutil.copytree(folder/"models"/MODELS[-1], folder/"models"/"fourth")
    return folder


def test_stored_differences_are_those_of_the_tables():
    tables = {name: overall_metrics(t) for name, t in tables_of(METRICS, [BASELINE, *MODELS]).items()}
    rows = pd.read_csv(METRICS/"comparison.csv").query("kind == 'difference'")
    assert set(rows.name) == {f"{a} - {b}" for a, b in [*earlier_and_later(MODELS), *((model, BASELINE) for model in MODELS)]}
    for r in rows.itertuples():
        later, earlier = r.name.split(" - ")
        assert r.value == pytest.approx(tables[later][r.figure] - tables[earlier][r.figure], abs=2e-6), r


def test_words_of_the_file_stay():
    assert set(pd.read_csv(METRICS/"comparison.csv").verdict.dropna()) <= {"higher", "lower", "not significant", "undefined"}


def test_another_model_is_in_every_table(four, tmp_path):
    models = [*MODELS, "fourth"]
    tables, found = tables_of(four, [BASELINE, *models]), read_metrics(four, [BASELINE, *models])
    differences = model_differences(tables, earlier_and_later(models), 10, 0)
    assert len(differences) == len(models)*(len(models) - 1)//2
    same = differences[f"fourth - {MODELS[-1]}"]   # the same verdicts: no metric differs, in no resample
    assert {(d["value"], d["lo"], d["hi"]) for d in same.values()} == {(0., 0., 0.)}
    maps = compared_maps(four, models)
    gain = relative_gains(maps, models, 10, 0)
    assert gain["fourth: fused, all fakes"] == gain[f"{MODELS[-1]}: fused, all fakes"]
    kinds = {name.split(": ")[1] for name in maps.source.unique() if ": " in name} - {"semantic alone"}
    assert kinds <= {"shown", "fused"} and maps.source.nunique() == len(models)*len(kinds) + 3
    differences |= auc_over_baseline(tables, models, BASELINE, 10, 0)
    rows = write_comparison(tmp_path, models, found, differences, dict(baseline=reference_name(models), relative_gain=gain))
    assert {"fourth", "fourth - handmade", *(f"fourth - {m}" for m in MODELS)} <= set(rows.name)
    assert json.loads((tmp_path/"comparison.json").read_text())["models"] == models
    assert {r["verdict"] for r in rows.to_dict("records") if r["name"] == f"fourth - {MODELS[-1]}"} == {"not significant"}


def test_rows_come_in_a_fixed_order():
    metrics = read_metrics(METRICS, [BASELINE, *MODELS])
    committed = pd.read_csv(METRICS/"comparison.csv").query("kind == 'model'")[["name", "figure", "value", "lo", "hi"]]
    found = comparison_rows(metrics, {})[committed.columns]
    pd.testing.assert_frame_equal(found, committed, check_dtype=False, atol=1e-6)


@pytest.mark.parametrize("model", MODELS)
def test_curves_are_those_of_the_committed_table(model, tmp_path):
    folder = evaluation_folder(METRICS, model)
    write_curves(read_predictions(folder/"predictions.csv"), tmp_path)
    for name in ("roc.csv", "calibration.csv"): assert (tmp_path/name).read_bytes() == (folder/name).read_bytes(), name


@pytest.mark.parametrize("model", MODELS)
def test_localisation_of_a_metrics_file_follows_from_its_table(model):
    folder = evaluation_folder(METRICS, model)
    stored = json.loads((folder/"metrics.json").read_text())["localisation"]
    thresholds = {name: np.inf if t is None else t for name, t in stored["thresholds"].items()}
    _, _, found = heatmap_metrics(read_localisation(folder/"localisation.csv"), thresholds, stored["constants"], 5, 0)
    stored = {name.replace("lit_on_real", "above_threshold_on_real"): d for name, d in stored.items()}   # its name in files that are older
    assert set(found) <= set(stored) and list(found["maps"]) == list(stored["maps"]) and found["thresholds"] == stored["thresholds"]
    for source, scores in stored["maps"].items():
        for key in SCORES: assert found["maps"][source][key]["value"] == pytest.approx(scores[key]["value"], abs=2e-6), (source, key)
    real = "above_threshold_on_real"
    for source, d in stored[real].items(): assert found[real][source]["value"] == pytest.approx(d["value"], abs=2e-6)


def test_aims_are_read_from_the_metrics_file():
    "Every fixed picture, with and without the clip's probability, in both groups; a group that a corpus lacks has no aims."
    def about(value, word="higher"): return dict(value=value, lo=value - .01, hi=value + .01, significance=word)
    group = dict(scores=dict(shown=about(AIM)), differences={name: about(.1) for name in (*CONSTANT, *CHEATS, "noise")})
    deletion = dict(advantage=dict(deletion=dict(shown=dict(mean=about(.2), neighbours=dict(value=None, lo=None, hi=None)))))
    found = aims(dict(localisation=dict(pooled={"all fakes": group, "part of the face": group}), deletion=deletion))
    assert len(found) == 1 + 2*len((*CONSTANT, *CHEATS)) + 2 and "".join(found["mark"]) == "✓"*14 + "?"
    assert found.limit.tolist() == [AIM] + [0.]*14 and not found.aim.str.contains("noise").any()
    assert len(aims(dict(localisation=dict(pooled={"all fakes": group}), deletion=deletion))) == len(found) - len((*CONSTANT, *CHEATS))
    group["scores"]["shown"] = about(AIM - .001)
    assert aims(dict(localisation=dict(pooled={"all fakes": group}), deletion=deletion))["mark"][0] == "✗"
    with pytest.raises(ValueError, match="run the stage evaluate again"): aims(dict(localisation={}, deletion={}))
