"The results follow from the committed tables of all trainings, whatever models there are."
import math
import shutil
from pathlib import Path

import pandas as pd
import pytest
import yaml

from spotter.core import load_params
from spotter.evaluate import results
from spotter.evaluate.tables import overall_metrics, recall_and_auc
from spotter.evaluate.trainings import BASELINE, Trainings
from spotter.evaluate.wording import ablation_conclusion, ablation_note, curve_table, results_conclusion
from spotter.evaluate.wording import text_table, trainings_note, with_spread
from spotter.metrics.bootstrap import significance

ROOT = Path(__file__).parents[1]
PARAMS, RUNS = load_params(ROOT/"params.yaml"), yaml.safe_load((ROOT/"results"/"params.yaml").read_text())["runs"]
MADE = (ROOT/"metrics"/"results_seeds.csv").is_file()
pytestmark = pytest.mark.skipif(not MADE, reason="`make results` has not been run on these clips")


@pytest.fixture(scope="module")
def trainings(): return Trainings(ROOT/"metrics", list(PARAMS.models), RUNS, PARAMS.seed)


def committed(name): return pd.read_csv(ROOT/"metrics"/f"results_{name}.csv")


def test_every_training_has_its_tables(trainings):
    for name in [*PARAMS.models, *RUNS]:
        fine, strong = trainings.predictions(name), results.named_as_c23(trainings.predictions(name, "_c40"))
        assert sorted(fine.clip_id) == sorted(strong.clip_id), name
        assert set(trainings.heatmaps(name).clip_id) == set(fine.clip_id[fine.label == 1]), name


def test_stored_means_are_those_of_the_tables(trainings):
    stored = committed("seeds").query("kind == 'model'").set_index(["name", "figure"])
    for name in [BASELINE, *PARAMS.models]:
        names = [BASELINE] if name == BASELINE else trainings.seeds(name)
        each = pd.DataFrame([overall_metrics(trainings.predictions(n)) for n in names])
        for key in each:
            assert stored.loc[(name, key), "value"] == pytest.approx(each[key].mean(), abs=2e-6), (name, key)
            assert stored.loc[(name, key), "seeds"] == len(each)
    groups = committed("groups").set_index(["model", "group", "figure"]).value
    for model in PARAMS.models:
        aucs = [recall_and_auc(trainings.predictions(n, "_c40"))["auc"] for n in trainings.seeds(model)]
        assert groups[model, "c40: all", "auc"] == pytest.approx(sum(aucs)/len(aucs), abs=2e-6)


def test_stored_curve_and_unseen_methods_are_those_of_the_tables(trainings):
    curve, unseen = committed("curve").set_index(["figure", "pairs"]).value, committed("unseen").set_index(["method", "training"]).value
    for pairs, name in trainings.on_fewer_pairs().items():
        assert curve["auc", pairs] == pytest.approx(recall_and_auc(trainings.predictions(name))["auc"], abs=2e-6)
        assert curve["average_precision", pairs] == pytest.approx(trainings.heatmaps(name).average_precision.mean(), abs=2e-6)
    for method, name in trainings.without_method().items():
        auc = recall_and_auc(results.only_method(trainings.predictions(name), method))["auc"]
        assert unseen[method, "never seen"] == pytest.approx(auc, abs=2e-6)


@pytest.fixture(scope="module")
def four(tmp_path_factory):
    "One model more, which was trained once and has the tables of the last."
    folder, last = tmp_path_factory.mktemp("metrics"), list(PARAMS.models)[-1]
    for part in ("models", "baseline", "results"): shutil.copytree(ROOT/"metrics"/part, folder/part)
    shutil.copytree(folder/"models"/last, folder/"models"/"fourth")
    shutil.copy(folder/"results"/f"predictions_{last}_c40.csv", folder/"results"/"predictions_fourth_c40.csv")
    return Trainings(folder, [*PARAMS.models, "fourth"], RUNS, PARAMS.seed)


def test_a_model_that_was_trained_once_is_in_every_table(four):
    first, last = four.models[0], four.models[-2]
    fine, strong = ({m: [four.predictions(n, level) for n in four.seeds(m)] for m in (first, last, "fourth")} for level in ("", "_c40"))
    assert "What was trained once (`fourth`)" in trainings_note({m: four.seeds(m) for m in four.models})
    rivals = {BASELINE: [four.predictions(BASELINE)]} | fine
    found = results.seed_metrics(rivals, recall_and_auc, 5, 0)
    auc = found["fourth"]["auc"]
    assert auc["seeds"] == 1 and math.isnan(auc["spread"]) and "±" not in with_spread(auc)
    assert list(text_table(found, dict(auc="AUC"), with_spread)) == list(rivals)
    told = results.seed_differences(rivals, [(last, BASELINE), ("fourth", BASELINE), ("fourth", last)], recall_and_auc, 5, 0)
    assert [d["auc"]["seeds"] for d in told.values()] == [len(four.seeds(last)), 1, 1]
    assert told[f"fourth - {last}"]["auc"]["value"] == 0                  # the first training of the one against that of the other
    assert significance(results.widened(told["fourth - handmade"]["auc"])) == "undefined"
    groups = results.group_aucs({"fourth": fine["fourth"]}, {"fourth": strong["fourth"]}, 5, 0)
    at_c40, lost = results.compression_losses({"fourth": fine["fourth"]}, {"fourth": strong["fourth"]}, 5, 0)
    table = results.groups_table(groups, at_c40, lost)
    assert set(table.model) == {"fourth"} and {"c23: all", "c40: all", "c40 - c23"} <= set(table.group)
    maps = {m: [four.heatmaps(n) for n in four.seeds(m)] for m in (first, "fourth")}
    nearer = results.map_differences(maps, four.heatmaps(last, "centre"), ["fourth"], 5, 0)
    assert list(nearer) == [f"fourth - {first}", "fourth - centre"] and nearer["fourth - centre"]["iou"]["seeds"] == 1


def test_the_conclusions_follow_the_tables(trainings):
    "Another value in a table is another word in the conclusion."
    curve = committed("curve")
    d = dict(value=.1, lo=.05, hi=.15, spread=.01, seeds=3)
    def said(d, curve):
        nearer = {"b0 - centre": dict(average_precision=d)}
        return results_conclusion(dict(b0=dict(auc=d)), dict(b0=640), {"b0 - b0_plain": dict(auc=d)}, nearer, {}, {}, curve)
    assert "0.100 [0.069, 0.131]" not in said(d, curve) and "`b0` minus `b0_plain` 0.100" in said(d, curve)
    assert "higher" in said(d, curve) and "higher" not in said(d | dict(lo=-.05), curve)
    assert said(d, curve) != said(d, curve.assign(to_whole_value=.5))
    assert "not significant" in curve_table(curve).to_string() and "told from noise" not in curve_table(curve).to_string()


def test_the_ablation_is_said_as_it_is_stored():
    table = pd.read_csv(ROOT/"metrics"/"ablation.csv")
    layers = [source for source in table.source.unique() if source.startswith("Grad-CAM")]
    said = ablation_conclusion(table, table.mask_loss.max(), layers)
    rows = table.query("source == 'verdict' and score == 'auc' and share == 1").set_index("mask_loss").value
    assert f"the AUC is {rows[0.]:.2f} [" in said and all(f"{value:.2f} [" in ablation_note(table) for value in rows)
