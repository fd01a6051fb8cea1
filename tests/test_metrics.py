"""The metrics against scikit-learn, brute force and arithmetic; the bootstrap against cases whose answer is known."""
import json
import math

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.special import expit, softmax
from scipy.stats import binomtest
from sklearn.calibration import calibration_curve
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import (accuracy_score, average_precision_score, balanced_accuracy_score, brier_score_loss, f1_score, recall_score,
                             roc_auc_score, roc_curve)

from spotter.evaluate.seeds import over_seeds
from spotter.evaluate.tables import (PREDICTION_COLUMNS, at_own_prevalence, coverage, metrics_by_group, model_metrics,
                                     overall_metrics, prediction_table, read_predictions, recall_and_auc, write_json, write_predictions)
from spotter.metrics.bootstrap import (DIFFERENCE, SHARE, bootstrap_intervals, bootstrap_rows, couple_weights, drawn_weights,
                                       effective_units, few_units_factor, identity_units, interval, paired_differences, resampled_rows,
                                       resampling_units, significance)
from spotter.metrics.calibration import (CALIBRATION_BINS, TEMPERATURE_BOUNDS, calibration_error, calibration_table, fit_platt,
                                         platt_targets, prior_shift)
from spotter.metrics.classification import auc, classification_metrics, ranking_metrics
from spotter.metrics.coverage import METRICS, coverage_table
from spotter.metrics.threshold import choose_threshold, mean_f1
from spotter.model.logits import p_fake


def scores(seed, n=80, ties=False):
    "Labels of both classes and scores that are right more often than not, with ties on request."
    rng = np.random.default_rng(seed)
    y = rng.permutation([0, 1, *rng.integers(0, 2, n - 2)])
    p = np.clip(rng.normal(.4 + .2*y, .25), 0, 1)
    return y, np.round(p, 1) if ties else p


METHODS = ("Deepfakes", "Face2Face", "FaceSwap", "NeuralTextures")
FITTED = dict(threshold=.5, temperature=1., bias=0., prevalence=.8)   # 80 % of the clips of `predictions` are fake


def predictions(skill=1.5, pairs=12, seed=0):
    "A prediction table of `pairs` identity pairs: two real and eight fake clips of each."
    rng, rows = np.random.default_rng(seed), []
    for k in range(pairs):
        a, b, hardness = f"{2*k:03d}", f"{2*k + 1:03d}", rng.normal()
        rows += [(f"real/{t}", 0, "original", t, "", hardness) for t in (a, b)]
        rows += [(f"{m}/{t}_{s}", 1, m, t, s, hardness) for m in METHODS for t, s in ((a, b), (b, a))]
    clips = pd.DataFrame(rows, columns=["clip_id", "label", "method", "target_id", "source_id", "hardness"])
    clips = clips.assign(strength="", compression="c23")
    z = (2*clips.label - 1)*(skill/2 - .4*clips.hardness) + rng.normal(size=len(clips))
    return prediction_table(clips, np.stack([-z, z], 1), 1., 0., .5)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("threshold", [.5, .3])
def test_against_scikit_learn(seed, ties, threshold):
    y, p = scores(seed, ties=ties)
    verdict = (p >= threshold).astype(int)
    expected = dict(accuracy=accuracy_score(y, verdict), balanced_accuracy=balanced_accuracy_score(y, verdict),
                    real_recall=recall_score(y, verdict, pos_label=0), fake_recall=recall_score(y, verdict, pos_label=1),
                    auc=roc_auc_score(y, p), average_precision=average_precision_score(y, p), brier=brier_score_loss(y, p))
    found = classification_metrics(y, p, threshold)
    assert list(found)[:5] == ["accuracy", "balanced_accuracy", "real_recall", "fake_recall", "auc"]
    assert list(found)[5:] == ["average_precision", "eer", "ece", "brier"]
    assert {k: found[k] for k in expected} == pytest.approx(expected, abs=1e-12)


def test_per_class_recall_does_not_depend_on_the_order_of_rows():
    y, p = scores(3)
    order = np.random.default_rng(0).permutation(len(y))
    assert classification_metrics(y[order], p[order]) == pytest.approx(classification_metrics(y, p), abs=1e-12)


@pytest.mark.parametrize("decimals", [1, 2, 16])
@pytest.mark.parametrize("seed", range(20))
def test_auc_is_the_area_under_the_curve(seed, decimals):
    "The sum of ranks gives what the trapezoids under the ROC curve give, with many ties, few, and none."
    y, p = scores(seed, n=20 + 10*seed)
    p = np.round(p, decimals)
    fpr, tpr, _ = roc_curve(y, p, drop_intermediate=False)
    assert ranking_metrics(y, p)["auc"] == auc(y, p) == pytest.approx(np.trapezoid(tpr, fpr), abs=1e-12)
    assert auc(y, np.stack([p, -p, 0*p], 1)).tolist() == pytest.approx([auc(y, p), 1 - auc(y, p), .5], abs=1e-12)


def test_auc_by_hand():
    # fakes .4 and .9 against reals .1 and .4: of four couples three are in order and one ties
    assert auc([0, 0, 1, 1], [.1, .4, .4, .9]) == 3.5/4
    assert math.isnan(auc([1, 1], [.1, .2])) and np.isnan(auc([0, 0], np.ones((2, 3)))).tolist() == [True]*3


def brute_force_eer(y, p):
    "Both error rates at every threshold, counted clip by clip; the crossing sought by walking along each segment in small steps."
    cuts = [2., *sorted(set(p), reverse=True)]
    errors = [(np.mean([s >= c for s in p[y == 0]]), np.mean([s < c for s in p[y == 1]])) for c in cuts]
    walk = [(1 - t)*np.array(a) + t*np.array(b) for a, b in zip(errors, errors[1:]) for t in np.linspace(0, 1, 401)]
    return min(walk, key=lambda e: abs(e[0] - e[1])).mean()


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_equal_error_rate_against_brute_force(seed, ties):
    y, p = scores(seed, n=40, ties=ties)
    assert classification_metrics(y, p)["eer"] == pytest.approx(brute_force_eer(y, p), abs=1e-3)


def test_calibration_error_by_hand():
    # (0.2, 0.3] holds .22 .28 with one fake: |.25 - .5|; (0.7, 0.8] holds .75 .75 .8 with three: |.766667 - 1|; (0.9, 1] 1, a fake: 0
    y, p = [0, 1, 1, 1, 1, 1], [.22, .28, .75, .75, .8, 1.]
    assert classification_metrics(y, p)["ece"] == pytest.approx((2*.25 + 3*(1 - 2.3/3) + 0)/6)
    assert calibration_table(y, p).n.tolist() == [2, 3, 1]


@pytest.mark.parametrize("seed", range(3))
def test_calibration_bins_are_those_of_scikit_learn(seed):
    y, p = scores(seed, n=200)
    fakes, mean = calibration_curve(y, p, n_bins=CALIBRATION_BINS)
    table = calibration_table(y, p)
    np.testing.assert_allclose(table.fake_share, fakes); np.testing.assert_allclose(table.mean_p_fake, mean)


def test_an_absent_class_leaves_nan_and_nothing_made_up():
    for label, missing in ((1, "real_recall"), (0, "fake_recall")):
        found = classification_metrics([label]*3, [.2, .6, .9])
        assert {k for k, v in found.items() if math.isnan(v)} == {missing, "balanced_accuracy", "auc", "average_precision", "eer"}


@pytest.mark.parametrize("y, p, words", [
    ([0, 1], [.1, math.nan], "not finite"), ([0, 1], [.1, math.inf], "not finite"), ([0, 1, 1], [.1, .2], "shape"),
    ([0, 1], [.1, 1.2], "probabilities"), ([0, 2], [.1, .2], "labels"), ([], [], "no clips")])
def test_bad_scores_are_refused(y, p, words):
    with pytest.raises(ValueError, match=words): classification_metrics(y, p)


def test_identity_units_are_pairs():
    table = predictions(pairs=3)
    units = identity_units(table)
    assert units.value_counts().to_dict() == {"000": 10, "002": 10, "004": 10}
    shuffled = table.sample(frac=1, random_state=0)
    pd.testing.assert_series_equal(identity_units(shuffled).sort_index(), units)


def test_identity_units_join_chains_and_refuse_numbers():
    chain = pd.DataFrame(dict(target_id=["a", "b", "c", "d", "e"], source_id=["b", "c", None, "", math.nan]))
    assert identity_units(chain).tolist() == ["a", "a", "a", "d", "e"]
    with pytest.raises(ValueError, match="numbers"): identity_units(pd.DataFrame(dict(target_id=[0, 1], source_id=[1., math.nan])))
    with pytest.raises(ValueError, match="without a target_id"): identity_units(chain.assign(target_id=None))


def hits(n, share, copies=1):
    "`n` identities, `copies` rows of each with the same outcome, right for a share of the identities."
    once = pd.DataFrame(dict(target_id=[f"{i:03d}" for i in range(n)], source_id="", hit=np.arange(n) < round(share*n)))
    return pd.concat([once]*copies, ignore_index=True)


def share_of_hits(table): return dict(share=float(table.hit.mean()))


def share_interval(table, resamples, seed=0):
    "The interval of the share of hits: `bootstrap_intervals` with `share_of_hits`, by positions and so in a fraction of the time."
    hit = table.hit.to_numpy(float)
    return interval(*bootstrap_rows(table, lambda rows: hit[rows].mean(), resamples, seed), SHARE)


def test_resamples_take_all_rows_of_a_unit():
    units = pd.Series(["b", "a", "b", "c"])
    for rows in resampled_rows(units, 30, 0):
        counts = np.bincount(rows, minlength=4)
        assert counts[0] == counts[2] and counts[[0, 1, 3]].sum() == 3                # three units are drawn; b has rows 0 and 2


def test_pairs_are_drawn_as_whole_units():
    "Row by row what drawing pairs and taking their rows gives; the order of the rows changes nothing."
    table = predictions(pairs=7)
    codes = pd.factorize(identity_units(table), sort=True)[0]
    draws = np.random.default_rng(3).integers(0, 7, (20, 7))
    expected = np.stack([(draw == codes[:, None]).sum(1) for draw in draws])
    np.testing.assert_array_equal(drawn_weights(resampling_units(table), 20, 3), expected)
    order = np.random.default_rng(0).permutation(len(table))
    np.testing.assert_array_equal(drawn_weights(resampling_units(table.iloc[order]), 20, 3), expected[:, order])
    assert (couple_weights(resampling_units(table), 5, 3) == 1).all()


def graph(*couples, reals=1):
    "Fakes of the given targets and sources (`ab`), and `reals` real clips of each identity; hits by chance."
    clips = [(1, *couple) for couple in couples] + [(0, name, "") for name in sorted({*"".join(couples)}) for _ in range(reals)]
    table = pd.DataFrame(clips, columns=["label", "target_id", "source_id"])
    return table.assign(hit=np.random.default_rng(0).random(len(table)) < .7)


RING = [a + b for a, b in zip("abcdefghijkl", "bcdefghijkla")]


def recalls(table): return {name: float(table.hit[table.label == c].mean()) for c, name in enumerate(("real", "fake"))}


def test_large_components_are_split_and_small_ones_are_not():
    connected, pairs = graph(*RING), graph("xy", "yx", "uv", "vu")
    table = pd.concat([connected, pairs, graph("zw").query("label == 0")], ignore_index=True)
    units = resampling_units(table)
    assert set(np.unique(units)) == {*"abcdefghijkl", "x", "u", "z", "w"}
    assert (units.target != units.source).sum() == 12
    alone = resampling_units(connected)
    pd.testing.assert_frame_equal(alone, units[:len(alone)])
    others = pd.DataFrame(dict(label=0, target_id=[f"{k:03}" for k in range(600)], source_id="", hit=True))
    many = pd.concat([table, others], ignore_index=True)
    assert resampling_units(many).eq(identity_units(many), axis=0).all(axis=None)          # 24 of 634 clips: one unit among many


def test_a_fake_is_drawn_as_often_as_the_product_of_its_identities():
    units = resampling_units(graph("ab", "ba", "bc", "ca", "cd"))
    weights = drawn_weights(units, 200, 0)
    own = {name: weights[:, 5 + k] for k, name in enumerate("abcd")}
    for k, (t, s) in enumerate(("ab", "ba", "bc", "ca")): np.testing.assert_array_equal(weights[:, k], own[t]*own[s])
    np.testing.assert_array_equal(weights[:, 4], own["c"])                                 # d has no other partner
    assert (sum(own.values()) == 4).all()
    couples = couple_weights(units, 200, 0)
    assert (couples[:, 4:] == 1).all() and (couples[:, 0] == couples[:, 1]).all()           # ab and ba are one couple
    assert (couples[:, [0, 2, 3]].sum(1) == 3).all()


def test_a_connected_graph_has_intervals_in_any_order_of_rows():
    table = graph(*RING, *RING)
    found = bootstrap_intervals(table, recalls, 200, 0)
    assert all(0 <= d["lo"] < d["value"] < d["hi"] <= 1 for d in found.values())
    shuffled = bootstrap_intervals(table.sample(frac=1, random_state=0), recalls, 200, 0)
    for name in found: assert list(shuffled[name].values()) == pytest.approx(list(found[name].values()), abs=1e-12)


def test_one_identity_in_all_fakes_leaves_them_without_an_interval():
    star = graph(*(f"{leaf}x" for leaf in "abcdefghij"), reals=2)
    found = bootstrap_intervals(star, recalls, 200, 0)
    assert math.isfinite(found["real"]["lo"]) and math.isnan(found["fake"]["lo"]) and math.isfinite(found["fake"]["value"])
    assert effective_units(resampling_units(star)[star.label == 1]) == pytest.approx(1)
    assert effective_units(resampling_units(star)[star.label == 0]) == pytest.approx(11)
    only = star[star.target_id == "x"]
    assert all(math.isnan(d["lo"]) for d in bootstrap_intervals(only, recalls, 20, 0).values())   # a single identity


def test_units_are_counted_where_a_metric_looks():
    table = pd.concat([graph(*RING, reals=0), graph("mn", "op", "qr", "st", "uv", "wx", "yz").query("label == 0")], ignore_index=True)
    def counts(rows):
        classes = [table.label.to_numpy()[rows] == c for c in (0, 1)]
        present = [1. if c.any() else math.nan for c in classes]
        return [*present, sum(present), 1.]                                                # real, fake, both, either
    units = bootstrap_rows(table, counts, 20, 0)[2]
    assert units.tolist() == pytest.approx([14, 6, 6, effective_units(resampling_units(table))])


def test_all_right_is_not_certain():
    table = predictions(pairs=12).assign(hit=True)
    for name, c in (("real", 0), ("fake", 1)):
        found = bootstrap_intervals(table, recalls, 100, 0)[name]
        expected = binomtest(12, 12).proportion_ci(.95, method="wilson")
        assert list(found.values()) == pytest.approx([1, expected.low, 1])
        wrong = bootstrap_intervals(table.assign(hit=False), recalls, 100, 0)[name]
        assert list(wrong.values()) == pytest.approx([0, 0, 1 - expected.low])
    half = table.assign(hit=table.method == "FaceSwap")                                    # the same in all resamples, and no bound
    assert list(bootstrap_intervals(half, recalls, 100, 0)["fake"].values()) == pytest.approx([.25]*3)


def test_few_units_widen_an_interval():
    assert few_units_factor(24) == pytest.approx(math.sqrt(24/23)*2.0687/1.9600, abs=1e-4)
    assert 1 < few_units_factor(1000) < 1.003
    with pytest.raises(ValueError, match="only 0 to 1 is possible"):
        bootstrap_intervals(graph(*RING), lambda table: dict(loss=2.3), 10, 0)


@pytest.mark.parametrize("table, words", [
    (pd.DataFrame(dict(target_id=["a"])), "lacks the column source_id"),
    (pd.DataFrame(dict(source_id=["a"])), "lacks the column target_id"),
    (pd.DataFrame(dict(target_id=["a", "b"], source_id=[1, 2])), "source_id holds numbers"),
    (pd.DataFrame(dict(target_id=["a", ""], source_id=["", "a"])), "without a target_id")])
def test_unusable_identities_are_named(table, words):
    with pytest.raises(ValueError, match=words): bootstrap_rows(table, len, 5, 0)


@pytest.mark.parametrize("shape", ["pairs", "dense"])
def test_intervals_of_a_simulation_cover(shape):
    found = coverage_table(shape, 30, 60, resamples=150).set_index("metric")
    assert list(found.index) == list(METRICS) and (found.undefined == 0).all()
    assert found.covered.between(.85, 1).all() and .9 <= found.covered.mean() <= .985


def test_one_loop_serves_arrays_and_tables():
    table, values = hits(6, .5, copies=2), np.arange(12.)
    value, samples, units = bootstrap_rows(table, lambda rows: [values[rows].mean(), len(rows)], 40, 0)
    assert units.tolist() == [6, 6]
    assert value.tolist() == [5.5, 12] and samples.shape == (40, 2) and (samples[:, 1] == 12).all()
    assert samples[:, 0].tolist() == [values[rows].mean() for rows in resampled_rows(identity_units(table), 40, 0)]
    assert bootstrap_intervals(table, share_of_hits, 40, 0)["share"] == share_interval(table, 40)


@pytest.mark.parametrize("n, share", [(50, .6), (100, .8), (200, .5)])
def test_interval_of_a_proportion_is_near_the_exact_one(n, share):
    found = share_interval(hits(n, share), 2000)
    exact = binomtest(round(share*n), n).proportion_ci(.95, method="wilson")
    assert found["value"] == pytest.approx(share)
    assert (found["lo"], found["hi"]) == pytest.approx((exact.low, exact.high), abs=.025)


def test_interval_covers_the_truth_about_as_often_as_it_says():
    rng, covered = np.random.default_rng(0), 0
    for trial in range(150):
        table = hits(60, .5).assign(hit=rng.random(60) < .7)
        found = share_interval(table, 150, trial)
        covered += found["lo"] <= .7 <= found["hi"]
    assert .88 <= covered/150 <= .99


def test_copies_of_a_clip_add_no_evidence():
    def width(table):
        found = share_interval(table, 2000)
        return found["hi"] - found["lo"]
    copied = hits(40, .7, copies=4)
    as_if_independent = copied.assign(target_id=[f"{i:03d}" for i in range(len(copied))])
    assert width(copied) == pytest.approx(width(hits(40, .7)))
    assert width(copied)/width(as_if_independent) == pytest.approx(2, rel=.15)


def test_undefined_intervals():
    one = bootstrap_intervals(hits(1, 1, copies=5), share_of_hits, 20, 0)["share"]
    assert one["value"] == 1 and math.isnan(one["lo"]) and math.isnan(one["hi"])
    only_fakes = bootstrap_intervals(predictions().query("label == 1"), overall_metrics, 50, 0)
    assert all(math.isnan(v) for v in only_fakes["auc"].values()) and math.isfinite(only_fakes["fake_recall"]["lo"])


def test_shuffled_rows_give_the_same_file(tmp_path):
    table = predictions()
    for name, rows in (("a", table), ("b", table.sample(frac=1, random_state=1))):
        write_json(tmp_path/f"{name}.json", model_metrics(rows, table[:0], FITTED, 30, 0))
    assert (tmp_path/"a.json").read_bytes() == (tmp_path/"b.json").read_bytes()
    stored = json.loads((tmp_path/"a.json").read_text())
    assert stored["n"] == {"clips": 120, "real": 24, "fake": 96, "units": 12}
    assert set(stored["auc"]) == {"value", "lo", "hi"} and stored["auc"]["lo"] < stored["auc"]["value"] < stored["auc"]["hi"]
    assert {name: stored[name] for name in FITTED} == FITTED and stored["ece_at_50"]["lo"] < stored["ece_at_50"]["hi"]


def test_a_model_does_not_differ_from_itself():
    table = predictions()
    for difference in paired_differences(table, table.sample(frac=1, random_state=0), overall_metrics, 30, 0).values():
        assert list(difference.values()) == pytest.approx([0, 0, 0], abs=1e-12)
        assert significance(difference) == "not significant"


def test_paired_differences_have_the_sign_of_a_minus_b_and_are_narrower_than_unpaired_ones():
    a, b = predictions(2.), predictions(1.6)
    found = paired_differences(a, b, recall_and_auc, 200, 0)["auc"]
    assert found["value"] == pytest.approx(roc_auc_score(a.label, a.p_fake) - roc_auc_score(b.label, b.p_fake))
    assert significance(found) == "higher"
    assert significance(paired_differences(b, a, recall_and_auc, 200, 0)["auc"]) == "lower"
    alone = bootstrap_intervals(a, recall_and_auc, 200, 0)["auc"]
    assert found["hi"] - found["lo"] < alone["hi"] - alone["lo"]


def test_different_clips_cannot_be_paired():
    table = predictions()
    for other, words in ((table[1:], "one model only"), (table.assign(label=1 - table.label), "labels")):
        with pytest.raises(ValueError, match=words): paired_differences(table, other, overall_metrics, 10, 0)


def test_words_of_significance():
    limits = ((.1, .2), (-.2, -.1), (-.1, .1), (0, .1), (math.nan, math.nan), (None, None))
    words = [significance(dict(value=0, lo=lo, hi=hi)) for lo, hi in limits]
    assert words == ["higher", "lower", "not significant", "not significant", "undefined", "undefined"]
    for lo, hi in ((1e-16, .1), (-.1, -1e-16), (-1e-16, -1e-16)):                               # 0 but for the last bit
        assert significance(dict(value=0, lo=lo, hi=hi)) == "not significant"
    assert significance(dict(value=0, lo=1e-6, hi=.1)) == "higher"


def test_seeds_are_averaged_on_the_same_resamples():
    tables, others = [predictions(2., seed=k) for k in range(3)], [predictions(1., seed=k) for k in range(3)]
    rows = list(resampled_rows(identity_units(tables[0]), 50, 1))
    def means(tables): return np.mean([[recall_and_auc(t.iloc[r])["auc"] for r in rows] for t in tables], 0)
    for reference, drawn in ((None, means(tables)), (others, means(tables) - means(others))):
        found = over_seeds(tables, recall_and_auc, 50, 1, reference)["auc"]
        expected = interval(found["value"], drawn, 12, SHARE if reference is None else DIFFERENCE)
        assert [found["lo"], found["hi"]] == pytest.approx([expected["lo"], expected["hi"]], abs=1e-12)
    values = [recall_and_auc(t)["auc"] - recall_and_auc(o)["auc"] for t, o in zip(tables, others)]
    assert (found["value"], found["spread"]) == pytest.approx((np.mean(values), np.std(values, ddof=1)))


def pair(d):
    "Logits whose difference is `d`."
    return np.stack([-np.asarray(d)/2, np.asarray(d)/2], 1)


@pytest.mark.parametrize("scale, shift", [(.5, 0.), (1., 2.), (4., -3.)])
def test_platt_recovers_a_known_scaling_and_shift(scale, shift):
    rng = np.random.default_rng(0)
    d = rng.normal(1, 2, 20000)
    y = (rng.random(len(d)) < expit(d)).astype(int)
    temperature, bias = fit_platt(pair(scale*d + shift), y)
    assert temperature == pytest.approx(scale, rel=.05) and bias == pytest.approx(-shift/scale, abs=.1)
    assert expit((scale*d + shift)/temperature + bias).mean() == pytest.approx(y.mean(), abs=1e-3)   # the share of fakes is met


@pytest.mark.parametrize("seed", range(5))
def test_platt_finds_the_minimum_of_a_weighted_logistic_regression(seed):
    rng = np.random.default_rng(seed)
    d = rng.normal(size=60)*rng.uniform(.5, 5) + rng.normal(0, 3)
    y = rng.permutation([0, 1, *(rng.random(58) < expit(d[2:] - d.mean()))]).astype(int) if seed else (d > np.median(d)).astype(int)
    t = platt_targets(y)
    twice = dict(X=np.tile(d, 2)[:, None], y=np.repeat([1, 0], 60), sample_weight=np.concatenate([t, 1 - t]))
    known = LogisticRegression(C=np.inf, solver="newton-cholesky", tol=1e-10).fit(**twice)
    slope, (temperature, bias) = known.coef_.item(), fit_platt(pair(d), y)
    if .05 < slope < 5: assert (1/temperature, bias) == pytest.approx((slope, known.intercept_.item()), abs=1e-5)
    else: assert temperature == TEMPERATURE_BOUNDS[slope < .05]
    order = rng.permutation(60)
    assert fit_platt(pair(d)[order], y[order]) == (temperature, bias)
    assert fit_platt(pair(d).astype(np.float32), y) == pytest.approx((temperature, bias), abs=1e-5)


def test_platt_stays_finite_and_within_its_bounds():
    d = np.array([-2., -2., 2., 2.])
    assert fit_platt(pair(d), [0, 0, 1, 1]) == (round(2/math.log(3), 6), 0.)             # no mistake: targets of 1/4 and 3/4
    assert fit_platt(pair(d), [0, 0, 1, 1]) != fit_platt(pair(3*d), [0, 0, 1, 1])
    assert fit_platt(pair(d*1e-3), [0, 0, 1, 1]) == (TEMPERATURE_BOUNDS[0], 0.)
    for worse in (pair(-d), pair(0*d), pair(0*d + 1e4)):
        temperature, bias = fit_platt(worse, [0, 0, 1, 1])
        assert temperature == TEMPERATURE_BOUNDS[1] and math.isfinite(bias)
        assert expit((worse[:, 1] - worse[:, 0])/temperature + bias).mean() == pytest.approx(.5, abs=1e-4)
    with pytest.raises(ValueError, match="finite"): fit_platt(pair(d*math.nan), [0, 0, 1, 1])
    with pytest.raises(ValueError, match="shape"): fit_platt(d, [0, 0, 1, 1])
    with pytest.raises(ValueError, match="4 real and 0 fake clips"): fit_platt(pair(d), [0]*4)


def test_probability_of_logits():
    z = np.random.default_rng(0).normal(0, 4, (500, 2))
    for temperature in (.2, 1., 7.):
        old = softmax(z/temperature, axis=1)[:, 1]
        np.testing.assert_array_equal(np.round(p_fake(z, temperature), 6), np.round(old, 6))
        single = p_fake(torch.from_numpy(z).float(), temperature)
        assert single.dtype == torch.float32 and np.abs(single.numpy() - old).max() < 2e-6
    odds = lambda p: p/(1 - p)
    np.testing.assert_allclose(odds(p_fake(z, 2., .7)), odds(p_fake(z, 2.))*math.exp(.7))
    assert p_fake(z.reshape(5, 100, 2), 3., -1.).tolist() == p_fake(z, 3., -1.).reshape(5, 100).tolist()
    assert p_fake([[0, 1000], [1000, 0]]).tolist() == [1., 0.]


@pytest.mark.parametrize("held, at", [(.8, .5), (.5, .01), (1/3, .9)])
def test_a_shift_is_what_bayes_says(held, at):
    "Densities of a score among fakes and real clips, and the posterior at both prevalences."
    x = np.linspace(-3, 3, 13)
    fake, real = np.exp(-(x - 1)**2/2), np.exp(-(x + 1)**2/2)
    posterior = lambda share: share*fake/(share*fake + (1 - share)*real)
    np.testing.assert_allclose(prior_shift(posterior(held), held, at), posterior(at), rtol=1e-12)
    assert (np.diff(prior_shift(np.arange(1001)/1000, held, at)) > 0).all()                  # the order stays
    for share in (0, 1, math.nan):
        with pytest.raises(ValueError, match="share of fakes"): prior_shift(.5, share, at)


def test_calibration_error_at_a_prevalence():
    "Calibrated at 80 % fakes: at one half, it is calibrated when moved and weighted. Weights and copies of clips do the same."
    rng = np.random.default_rng(0)
    y = (rng.random(40000) < .8).astype(int)
    d = rng.normal(2*y - 1, 1)
    p = expit(2*d + math.log(4))                                                              # the posterior of two normal densities
    assert calibration_error(y, p) < .01 and calibration_error(y, prior_shift(p, .8, .5), .5) < .015
    assert calibration_error(y, p, .5) > .1 < calibration_error(y, prior_shift(p, .8, .5))
    few, q = np.array([1, 1, 1, 0]), np.array([.9, .7, .4, .35])
    copies = np.concatenate([few, [0, 0]]), np.concatenate([q, [.35, .35]])
    assert calibration_error(few, q, .5) == pytest.approx(calibration_error(*copies)) and math.isnan(calibration_error(few[:3], q[:3], .5))


def test_metrics_are_at_the_prevalence_of_their_clips():
    table = predictions()
    moved = table.assign(p_fake=prior_shift(table.p_fake, .8, .3))   # what a validation split with 30 % fakes would give
    verdicts = dict(prediction=(moved.p_fake >= .5).astype(int))
    there = model_metrics(moved.assign(**verdicts), table[:0], FITTED | dict(prevalence=.3), 20, 0)
    here = model_metrics(table, table[:0], FITTED, 20, 0)
    for key in ("auc", "average_precision", "eer", "ece", "brier", "ece_at_50"):
        assert list(there[key].values()) == pytest.approx(list(here[key].values()), abs=1e-9), key
    assert at_own_prevalence(table, .8) is table and at_own_prevalence(table, None) is table


def test_threshold_by_hand():
    assert choose_threshold([0, 0, 1, 1], [.1, .3, .6, .9]) == .45
    assert choose_threshold([1, 0, 1, 0], [.9, .3, .6, .1]) == .45                  # the order of the clips does not matter
    assert choose_threshold([0, 0, 1, 1, 1], [.1, .5, .3, .6, .9]) == .55
    assert choose_threshold([0, 1, 0, 1], [.2, .4, .6, .9]) == .75                  # a tie: the wider interval
    with pytest.raises(ValueError, match="both"): choose_threshold([0, 0], [.1, .2])


@pytest.mark.parametrize("seed", range(10))
def test_no_threshold_beats_the_chosen_one(seed):
    y, p = scores(seed, n=30, ties=seed % 2)
    p = np.round(p, 6)
    best = max(f1_score(y, p >= t, average="macro", zero_division=0) for t in {*p, 1.1})    # verdicts change at scores only
    assert mean_f1(y, p >= choose_threshold(y, p)) >= best - 1e-12


def test_prediction_tables_survive_the_disk(tmp_path):
    clips = predictions().drop(columns=["p_fake", "prediction"])
    z = np.random.default_rng(0).normal(0, 3, (len(clips), 2))
    table = prediction_table(clips, z, 1.7, -.4, .43123456789)
    write_predictions(table, tmp_path/"predictions.csv")
    back = read_predictions(tmp_path/"predictions.csv")
    assert list(back) == PREDICTION_COLUMNS
    np.testing.assert_array_equal(back.p_fake, table.p_fake)
    np.testing.assert_array_equal(back.prediction, (back.p_fake >= .431235).astype(int))
    np.testing.assert_allclose(back.set_index("clip_id").p_fake[clips.clip_id], expit((z[:, 1] - z[:, 0])/1.7 - .4), atol=5.1e-7)
    assert back.target_id.iloc[0] == "000" and back.source_id[back.label == 0].isna().all()
    outsider = pd.read_csv(tmp_path/"predictions.csv")
    assert roc_auc_score(outsider.label, outsider.p_fake) == pytest.approx(overall_metrics(back)["auc"])


def test_groups_are_measured_against_the_real_clips():
    table = predictions()
    found = metrics_by_group(table, "method", 50, 0)
    rows = table[(table.method == "FaceSwap") | (table.label == 0)]
    assert found["FaceSwap"]["auc"]["value"] == pytest.approx(roc_auc_score(rows.label, rows.p_fake))
    assert found["FaceSwap"]["fake_recall"]["value"] == pytest.approx(recall_score(rows.label, rows.prediction))
    assert found["FaceSwap"]["fakes"] == 24 and metrics_by_group(table, "strength", 50, 0) == {}


def test_coverage_counts_what_was_left_out():
    table = predictions(pairs=2)
    assert coverage(table[3:], table[:3]) == {"real": {"scored": 4, "total": 4}, "fake": {"scored": 13, "total": 16}}
