"""Scores of heatmaps against scikit-learn, brute force and arithmetic; tables of them against the bootstrap of `spotter.metrics`."""
import itertools
import math

import cv2
import matplotlib
import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.metrics import average_precision_score, roc_auc_score

from spotter.evaluate.deletion import (AREA, ELSEWHERE, FILLS, deletion_metrics, elsewhere, from_neighbours, marked, pieces,
                                       removal_order, trials)
from spotter.evaluate.evidence import draw_evidence, overlay
from spotter.evaluate.heatmaps import (above_threshold_on_real, best_median_worst, gains, localisation_summary, localisation_table,
                                       read_localisation, write_localisation)
from spotter.evaluate.localisation_figures import draw_by_method, draw_localisation
from spotter.evaluate.pooled import ALL, PixelPool, compared, pooled_scores
from spotter.evaluate.references import (CHEATS, CONSTANT, ORACLE, Priors, centre_maps, centre_prior, clip_masks, mean_mask, noise_maps,
                                         perfect_maps, reference_maps)
from spotter.evaluate.tables import write_json
from spotter.metrics.bootstrap import bootstrap_intervals, paired_differences, significance
from spotter.metrics.localisation import (GRID, SCORES, choose_iou_threshold, localisation_by_frame, localisation_metrics, on_common_grid,
                                          on_grid, pixel_ap, pointing_game, rank_scores, share_above_threshold, value_scores)
from spotter.metrics.pooled import level_counts, pooled_ap, precision_over_levels, value_levels

matplotlib.use("Agg")


def maps_and_masks(seed, frames=12, cells=14, pixels=90, ties=False):
    "Maps that know something of round masks of every size."
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:pixels, :pixels]/pixels
    masks = np.stack([(y - cy)**2 + (x - cx)**2 < r**2 for cy, cx, r in rng.uniform([.2, .2, .06], [.8, .8, .4], (frames, 3))])
    maps = .5*perfect_maps(masks, cells) + rng.random((frames, cells, cells))
    return np.round(maps, 1) if ties else maps, masks


def corpus(sources=("a", "b"), pairs=8, seed=0):
    "Rows of `score_clip` for made-up scores: pairs of identities, one of which is harder than the next."
    rng, rows = np.random.default_rng(seed), []
    for k in range(pairs):
        hard = rng.normal(0, .1)
        a, b = f"{2*k:03d}", f"{2*k + 1:03d}"
        for (t, s), m in itertools.product([(a, b), (b, a)], ("Deepfakes", "NeuralTextures")):
            clip = dict(clip_id=f"{m}/{t}_{s}", label=1, method=m, strength=("hard", "obvious")[k % 2], target_id=t, source_id=s)
            for i, name in enumerate(sources):
                scores = {score: .5 + hard - .05*i + rng.normal(0, .03) for score in SCORES}
                rows.append(dict(source=name, **clip) | scores | dict(above_threshold=hard**2))
    return pd.DataFrame(rows)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("cells", [7, 10, 14, 28, 38, 75])
def test_ranks_against_scikit_learn(cells, ties):
    maps, masks = maps_and_masks(cells, cells=cells, ties=ties)
    h, m = on_common_grid(maps, masks)
    found = localisation_by_frame(maps, masks)
    assert h.shape == (12, 56*56)
    assert found.average_precision.tolist() == pytest.approx([average_precision_score(a, b) for a, b in zip(m, h)], abs=1e-12)
    assert found.auroc.tolist() == pytest.approx([roc_auc_score(a, b) for a, b in zip(m, h)], abs=1e-12)


def test_one_average_precision_for_pictures_and_maps():
    "A picture for all frames, a map for each frame, and rows of pixels give the same; empty masks give nan, and ties are scikit-learn's."
    picture, masks = np.round(centre_prior(20), 1), np.random.default_rng(0).random((4, 20, 20)) < .2
    masks[2] = False
    found = pixel_ap(picture, masks)
    assert np.isnan(found).tolist() == [False, False, True, False]
    seen = masks[[0, 1, 3]].reshape(3, -1)
    assert found[[0, 1, 3]].tolist() == pytest.approx([average_precision_score(m, picture.ravel()) for m in seen], abs=1e-12)
    assert pixel_ap(centre_maps(3, 20), masks[[0, 1, 3]]).tolist() == pixel_ap(centre_prior(20).ravel(), seen).tolist()
    rows = np.broadcast_to(picture.ravel(), seen.shape)
    assert rank_scores(rows, seen)["average_precision"].tolist() == pixel_ap(rows, seen).tolist() == found[[0, 1, 3]].tolist()


def test_average_precision_by_hand():
    # .9 misses, the tie at .5 holds one hit of two (precision 1/3), .1 is a hit (precision 2/4)
    assert pixel_ap(np.array([[.9, .5], [.5, .1]]), np.array([[[0, 1], [0, 1]]], bool)).tolist() == [(1/3 + 1/2)/2]


def test_ties_count_with_their_expectation():
    "All orders of the pixels of a small map that are compatible with its values, one by one."
    values, hits = np.array([3, 2, 2, 2, 1, 1.]), np.array([0, 1, 0, 1, 1, 0], bool)
    orders = [o for o in itertools.permutations(range(6)) if (np.diff(values[list(o)]) <= 0).all()]
    top = np.mean([hits[list(o)[:3]].mean() for o in orders])
    found = rank_scores(values[None], hits[None])
    assert found["rank_accuracy"][0] == pytest.approx(top)
    assert found["iou_at_area"][0] == pytest.approx(3*top/(6 - 3*top))


@pytest.mark.parametrize("cells", [7, 14, 38])
def test_rank_accuracy_and_its_iou_by_sorting(cells):
    h, m = on_common_grid(*maps_and_masks(1, cells=cells))
    found = rank_scores(h, m)
    for k, (values, mask) in enumerate(zip(h, m)):
        top = np.zeros_like(mask)
        top[np.argsort(-values)[:mask.sum()]] = True
        assert found["rank_accuracy"][k] == pytest.approx((top & mask).sum()/mask.sum(), abs=.02)     # border cells tie
        assert found["iou_at_area"][k] == pytest.approx((top & mask).sum()/(top | mask).sum(), abs=.02)


def test_grid():
    rng = np.random.default_rng(0)
    maps = rng.random((3, 7, 7)).astype(np.float32)
    enlarged = np.stack([cv2.resize(m, (56, 56), interpolation=cv2.INTER_LINEAR) for m in maps])
    assert on_grid(maps, (56, 56)) == pytest.approx(enlarged, abs=1e-6)
    masks = rng.random((3, 224, 224)) < .5
    assert on_grid(masks, (56, 56)) == pytest.approx(masks.reshape(3, 56, 4, 56, 4).mean((2, 4)), abs=1e-6)
    assert on_common_grid(maps, masks)[1].tolist() == (masks.reshape(3, 56, 4, 56, 4).sum((2, 4)) >= 8).reshape(3, -1).tolist()
    assert on_common_grid(maps, masks[:, :20, :30])[0].shape == (3, 600)                             # no finer than the mask
    for constant in (.1, .3, 1/3, .7): assert np.ptp(on_grid(np.full((1, 38, 38), constant, np.float32), (56, 56))) == 0


def test_scores_do_not_depend_on_the_scale_of_a_map():
    maps, masks = maps_and_masks(2)
    scaled = localisation_by_frame(4*maps, masks, 2.)
    assert scaled.to_numpy() == pytest.approx(localisation_by_frame(maps, masks, .5).to_numpy(), abs=1e-6)


def test_perfect_and_hopeless_maps():
    masks = maps_and_masks(3)[1]
    for map_, expected in ((masks*1., 1), (1. - masks, 0)):
        found = localisation_by_frame(map_, masks, .5, grid=90)
        for name in ("pointing", "energy", "auroc", "iou"): assert found[name].tolist() == [expected]*12
    assert (localisation_by_frame(masks*1., masks, .5, grid=90)[list(SCORES)] == 1).all(axis=None)


def test_a_map_of_zeros_points_nowhere():
    masks = maps_and_masks(3)[1]
    found = localisation_by_frame(np.zeros((12, 7, 7)), masks, .01)
    for name in ("pointing", "energy", "iou"): assert (found[name] == 0).all()
    assert (found.auroc == .5).all() and found.average_precision.tolist() == pytest.approx(found.mask_share.tolist())


def test_pointing_game_looks_at_the_centre_of_the_highest_cell():
    maps, mask = np.zeros((4, 7, 7)), np.zeros((4, 70, 70), bool)
    mask[:, 30:40, 30:40] = True                                           # the cell in the middle
    maps[0, 3, 3], maps[1, 3, 4], maps[2, 3, 3:5] = 1, 1, 1
    assert pointing_game(maps, mask).tolist() == [1, 0, .5, 0]
    assert pointing_game(centre_maps(4), mask).tolist() == [1]*4


@pytest.mark.parametrize("cells", [7, 14, 28])
def test_noise_points_evenly(cells):
    rng = np.random.default_rng(0)
    hits = pointing_game(rng.random((2000, cells, cells)), np.broadcast_to(np.arange(112)[:, None] < 56, (2000, 112, 112)))
    assert hits.mean() == pytest.approx((np.arange(cells) + .5 < cells/2).mean(), abs=.05)


def test_frames_without_a_mask_are_left_out_and_counted():
    maps, masks = maps_and_masks(4)
    some = masks.copy()
    some[[2, 7]] = False
    table, found = localisation_by_frame(maps, some, .5), localisation_metrics(maps, some, .5)
    assert table.isna().any(axis=1).to_numpy().nonzero()[0].tolist() == [2, 7]
    rest = [k for k in range(12) if k not in (2, 7)]
    expected = localisation_metrics(maps[rest], masks[rest], .5)
    assert found == pytest.approx(expected | dict(frames_without_mask=2))
    unseen = localisation_metrics(maps, 0*masks, .5)
    assert (unseen["frames"], unseen["frames_without_mask"]) == (0, 12) and all(math.isnan(unseen[k]) for k in SCORES)
    full = localisation_metrics(maps, np.ones_like(masks), .01)
    assert math.isnan(full["auroc"]) and full["average_precision"] == full["energy"] == full["pointing"] == 1


def test_a_score_without_a_threshold_is_not_guessed():
    found = localisation_metrics(*maps_and_masks(0))
    assert math.isnan(found["iou"]) and [k for k in found if k in SCORES] == list(SCORES)


def test_tensors_are_taken_as_they_are():
    maps, masks = maps_and_masks(5)
    assert localisation_metrics(torch.tensor(maps), torch.tensor(masks), .5) == localisation_metrics(maps, masks, .5)


@pytest.mark.parametrize("heatmaps, masks, message", [
    (np.ones((2, 7, 7)), np.ones((3, 9, 9), bool), "same frames"), (np.ones((7, 7)), np.ones((9, 9), bool), "same frames"),
    (np.ones((0, 7, 7)), np.ones((0, 9, 9), bool), "same frames"), (np.full((1, 7, 7), np.inf), np.ones((1, 9, 9), bool), "finite"),
    (-np.ones((1, 7, 7)), np.ones((1, 9, 9), bool), "at least 0"), (np.ones((1, 7, 7)), np.full((1, 9, 9), .4), "bool or 0/1")])
def test_what_cannot_be_scored_is_refused(heatmaps, masks, message):
    with pytest.raises(ValueError, match=message): localisation_metrics(heatmaps, masks)


@pytest.mark.parametrize("seed", range(4))
def test_threshold_against_trying_them_all(seed):
    maps, masks = maps_and_masks(seed, frames=6)
    h, m = on_common_grid(maps, masks)
    tried = max(value_scores(h, m, t)["iou"].mean() for t in np.quantile(h, np.linspace(0, 1, 1000)))
    chosen = choose_iou_threshold(maps, masks)
    assert chosen > 0 and localisation_metrics(maps, masks, chosen)["iou"] == pytest.approx(tried, abs=.005)
    sparse = np.concatenate([masks, np.zeros_like(masks)])
    assert choose_iou_threshold(np.concatenate([maps, maps]), sparse) == chosen                      # frames without a mask have no say


def test_share_above_threshold():
    maps = np.stack([np.zeros((8, 8)), np.ones((8, 8)), np.tile([1, 0], (8, 4))]).astype(float)
    assert share_above_threshold(maps, .5, grid=8).tolist() == [0, 1, .5]
    region = np.zeros((8, 8), bool)
    region[:, :1] = True
    assert share_above_threshold(maps, .5, region, grid=8).tolist() == [0, 1, 1]
    assert share_above_threshold(np.zeros((2, 7, 7)), choose_iou_threshold(*maps_and_masks(0))).tolist() == [0, 0]


def test_references():
    masks = maps_and_masks(6)[1]
    on_masks = pixel_ap(centre_prior(56), on_common_grid(centre_maps(12), masks)[1].reshape(12, 56, 56))
    assert localisation_by_frame(centre_maps(12), masks).average_precision.tolist() == pytest.approx(on_masks)
    assert mean_mask(masks) == pytest.approx(on_grid(masks, (56, 56)).mean(0))
    noise = localisation_by_frame(noise_maps(12, 0), masks)
    assert noise.auroc.mean() == pytest.approx(.5, abs=.03) and noise.energy.mean() == pytest.approx(noise.mask_share.mean(), abs=.02)
    assert (noise_maps(2, [0, 1]) != noise_maps(2, [0, 2])).any() and (noise_maps(2, [0, 1]) == noise_maps(2, [0, 1])).all()


@pytest.mark.parametrize("size", [300, 75, 150])
def test_masks_of_the_audit_are_averaged_over_whole_cells(size):
    "Stored masks on a grid of 75 cells; a cell counts when at least half of its pixels are manipulated."
    class Store:
        index = pd.DataFrame(dict(clip_id=["x"]*6))
        masks = np.random.default_rng(size).random((6, size, size)) < .5
        def read(self, clip_id, positions): return None, self.masks[positions].astype(np.uint8)
    found, cell = clip_masks(Store(), "x", frames=6), size//75
    assert found.tolist() == (2*Store.masks.reshape(6, 75, cell, 75, cell).sum((2, 4)) >= cell**2).tolist()


def mean_scores(rows): return {k: rows[k].mean() for k in SCORES}


@pytest.mark.parametrize("column, group", [("all", "all"), ("method", "Deepfakes"), ("strength", "hard")])
def test_table_is_the_bootstrap_of_spotter_metrics(column, group):
    scores = corpus()
    table = localisation_table(scores, 200, 3)
    assert len(table) == 5*2*7
    rows = scores if column == "all" else scores[scores[column] == group]
    for source in ("a", "b"):
        found = table[(table.by == column) & (table.group == group) & (table.source == source)].set_index("score")[["value", "lo", "hi"]]
        for score, expected in bootstrap_intervals(rows[rows.source == source], mean_scores, 200, 3).items():
            assert found.loc[score].tolist() == pytest.approx(list(expected.values()))


def test_share_on_real_clips_is_the_same_bootstrap():
    scores = corpus()
    for source, found in above_threshold_on_real(scores, 100, 3).items():
        def mean(rows): return dict(above=rows.above_threshold.to_numpy().mean())
        expected = bootstrap_intervals(scores[scores.source == source], mean, 100, 3)["above"]
        assert found == expected
    one_pair = above_threshold_on_real(scores[scores.target_id.isin(["002", "003"])], 10)["a"]
    assert math.isfinite(one_pair["value"]) and math.isnan(one_pair["lo"])


def test_scores_survive_the_disk(tmp_path):
    scores = corpus()
    scores.loc[0, ["source_id", "strength"]], scores.loc[1, ["energy", "above_threshold"]] = "", np.nan
    path = tmp_path/"models"/"b0"/"localisation.csv"
    write_localisation(scores, path)
    back = read_localisation(path)
    assert back.loc[0, ["target_id", "source_id", "strength"]].tolist() == ["000", "", ""]           # text stays text, empty or not
    assert back.loc[1, ["energy", "above_threshold"]].isna().all() and (back.dtypes[[*SCORES, "above_threshold"]] == float).all()
    assert back[list(SCORES)].to_numpy() == pytest.approx(scores[list(SCORES)].to_numpy(), abs=6e-7, nan_ok=True)
    first = path.read_bytes()
    write_localisation(back, path)
    assert path.read_bytes() == first
    scores.drop(columns=["above_threshold"]).to_csv(path, index=False)
    with pytest.raises(ValueError, match="lacks the column.*above_threshold"): read_localisation(path)
    with pytest.raises(FileNotFoundError, match="stage evaluate"): read_localisation(tmp_path/"none.csv")


def test_gains_are_paired():
    scores = corpus()
    a, b = (scores[scores.source == n] for n in "ab")
    found = gains(scores.sample(frac=1, random_state=0), "a", "b", 200, 3)
    expected, table = paired_differences(a, b, mean_scores, 200, 3), localisation_table(scores, 200, 3, by=())
    for score in SCORES:
        assert found.loc[score, ["difference", "difference_lo", "difference_hi"]].tolist() == pytest.approx(list(expected[score].values()))
        assert found.loc[score, "relative"] == pytest.approx(a[score].mean()/b[score].mean() - 1)
        alone = table.query("source == 'a' and score == @score").iloc[0]
        width = found.loc[score, "difference_hi"] - found.loc[score, "difference_lo"]
        assert width < alone.hi - alone.lo                                                          # what is hard for both cancels


def test_what_is_undefined_stays_so():
    scores = corpus()
    scores["iou"] = np.nan
    scores.loc[scores.clip_id == "Deepfakes/000_001", list(SCORES)] = np.nan                         # a clip whose mask is never in sight
    table = localisation_table(scores, 50)
    assert table[table.score == "iou"].value.isna().all()
    assert table[table.score == "auroc"][["value", "lo", "hi"]].notna().all(axis=None)
    assert gains(scores, "a", "b", 50).loc["iou"].isna().all()
    one_pair = localisation_table(scores[scores.target_id.isin(["002", "003"])], 20)
    assert one_pair.lo.isna().all() and one_pair[one_pair.score == "energy"].value.notna().all()


def test_sources_must_be_scored_on_the_same_clips():
    scores = corpus()
    with pytest.raises(ValueError, match="scored by one model only"): localisation_table(scores[1:], 5)
    with pytest.raises(ValueError, match="occurs twice"): localisation_table(pd.concat([scores, scores]), 5)
    with pytest.raises(ValueError, match="no maps of 'c'"): gains(scores, "a", "c", 5)


def test_summary_goes_into_a_metrics_file(tmp_path):
    table = localisation_table(corpus(), 50)
    summary = localisation_summary(table)
    write_json(tmp_path/"metrics.json", dict(localisation=summary))
    assert list(summary["b"]) == [*SCORES, "clips", "per_method", "per_strength"]
    assert summary["b"]["per_strength"]["hard"]["clips"] == 16
    row = table.query("source == 'b' and by == 'method' and group == 'NeuralTextures' and score == 'iou'").iloc[0]
    assert summary["b"]["per_method"]["NeuralTextures"]["iou"] == dict(value=row.value, lo=row.lo, hi=row.hi)


def test_shown_clips_are_chosen_by_score():
    scores = corpus()
    scores.loc[0, "energy"] = np.nan
    shown = best_median_worst(scores, "a", "energy")
    for method, rows in scores[(scores.source == "a") & scores.energy.notna()].groupby("method"):
        ordered = rows.energy.sort_values(ascending=False).tolist()
        assert shown[shown.method == method].energy.tolist() == [ordered[0], ordered[len(ordered)//2], ordered[-1]]


# ---------------------------------------------------------------- pooled pixels

@pytest.mark.parametrize("ties", [False, True])
def test_pooled_precision_against_scikit_learn(ties):
    maps, masks = on_common_grid(*maps_and_masks(7, frames=30, ties=ties))
    masks[::3] = False                                                                               # originals
    assert pooled_ap(maps, masks) == pytest.approx(average_precision_score(masks.ravel(), maps.ravel()), abs=1e-12)
    levels = value_levels(maps)
    for rows in (slice(None), slice(0, 9), slice(5, 20)):
        binned = precision_over_levels(*level_counts(maps[rows], masks[rows], levels))
        assert binned == pytest.approx(pooled_ap(maps[rows], masks[rows]), abs=1e-3)
    assert math.isnan(pooled_ap(maps[::3], masks[::3]))


def test_pooled_precision_by_hand():
    "The fake alone: hits at ranks 1 and 3. Two pixels of an original between them put the second hit at rank 5; its tie there at rank 6."
    fake, hit = [.9, .8, .7, .1], [1, 0, 1, 0]
    assert pooled_ap(fake, np.array(hit, bool)) == pytest.approx((1 + 2/3)/2)
    assert pooled_ap([*fake, .75, .85], np.array([*hit, 0, 0], bool)) == pytest.approx((1 + 2/5)/2)
    assert pooled_ap([*fake, .75, .85, .7], np.array([*hit, 0, 0, 0], bool)) == pytest.approx((1 + 2/6)/2)


def pool_of(sources, pairs=6, seed=0):
    "A pool of pairs, each with a fake and an original; a source is a function of masks, label and generator."
    rng, pool = np.random.default_rng(seed), PixelPool()
    for k, label in itertools.product(range(pairs), (1, 0)):
        masks = maps_and_masks([seed, k], frames=2)[1]*bool(label)
        clip = dict(clip_id=f"{label}/{k}", label=label, extent=("part of the face", "whole face")[k % 2]*label)
        pool.add(clip | dict(target_id=f"{2*k:03}", source_id=f"{2*k + 1:03}"*label),
                 {name: make(masks, label, rng) for name, make in sources.items()}, masks)
    return pool


def test_a_map_that_lights_up_on_everybody_loses_where_originals_count():
    glow = lambda masks: np.broadcast_to(centre_prior(56), (len(masks), 56, 56))
    sources = dict(shown=lambda m, label, rng: on_grid(m, (28, 28))*.9 + .2*rng.random((2, 28, 28)),
                   blind=lambda m, label, rng: glow(m), cheat=lambda m, label, rng: glow(m)*(.9 if label else .1))
    pooled = pooled_scores(pool_of(sources), 100, 0)
    assert list(pooled) == [ALL, "part of the face", "whole face"] and [g["clips"] for g in pooled.values()] == [12, 9, 9]
    scores = {name: d["value"] for name, d in pooled[ALL]["scores"].items()}
    assert scores["shown"] > .9 > scores["cheat"] > scores["blind"]
    for name, d in pooled[ALL]["differences"].items():
        assert d["value"] == pytest.approx(scores["shown"] - scores[name]) and d["significance"] == significance(d) == "higher"
    assert compared(pooled[ALL]["differences"]).startswith("significantly higher than blind (+")


def test_pooled_intervals_are_the_bootstrap_of_spotter_metrics():
    pool = pool_of(dict(shown=lambda m, label, rng: on_grid(m, (14, 14)) + rng.random((2, 14, 14))*(1 + label)))
    def slow(rows): return dict(ap=pooled_ap(*(np.concatenate([part[k] for k in rows.k]) for part in (pool.maps["shown"], pool.masks))))
    expected = bootstrap_intervals(pd.DataFrame(pool.clips).assign(k=range(12)), slow, 50, 3)["ap"]
    assert pooled_scores(pool, 50, 3)[ALL]["scores"]["shown"] == pytest.approx(expected, abs=1e-3)
    with pytest.raises(ValueError, match="maps of other, the clips before it of shown"):
        pool.add(pool.clips[0], dict(other=np.ones((2, 7, 7))), np.zeros((2, 56, 56), bool))


def test_pooled_intervals_of_a_connected_graph():
    "Ten identities in a ring, each the source of the next: clips of one target and source are drawn together."
    pool = pool_of(dict(shown=lambda m, label, rng: on_grid(m, (14, 14)) + rng.random((2, 14, 14))*(1 + label)), pairs=10)
    for k, clip in enumerate(pool.clips): clip |= dict(target_id=str(k//2), source_id=str((k//2 + 1) % 10)*clip["label"])
    def slow(rows): return dict(ap=pooled_ap(*(np.concatenate([part[k] for k in rows.k]) for part in (pool.maps["shown"], pool.masks))))
    expected = bootstrap_intervals(pd.DataFrame(pool.clips).assign(k=range(20)), slow, 50, 3)["ap"]
    assert expected["lo"] < expected["value"] < expected["hi"]
    assert pooled_scores(pool, 50, 3)[ALL]["scores"]["shown"] == pytest.approx(expected, abs=3e-3)


def test_a_picture_times_the_verdict_changes_between_clips_only():
    square, whole = np.eye(4), np.ones((4, 4))
    priors = Priors({"mean mask": square, "face oval": whole, "centre": centre_prior(4)}, dict(FaceSwap=whole/2))
    found = {label: reference_maps(dict(label=label, method="FaceSwap" if label else "real"), priors, .25, 3, 0) for label in (0, 1)}
    for plain, cheat in zip(CONSTANT, CHEATS): assert found[1][cheat] == pytest.approx(found[1][plain]/4)
    assert (found[1][ORACLE] == .5).all() and (found[0][ORACLE] == 0).all() and found[1]["mean mask"].shape == (3, 4, 4)


@pytest.mark.parametrize("nudge", [1e-7, -1e-7])
def test_scores_do_not_hang_on_the_last_bit(nudge):
    "Cells that are covered by half, and highest cells that tie, in maps with other last bits."
    masks = np.zeros((1, 224, 224), bool)
    masks[:, :, 50:146] = True                                            # both edges run through cells of 4 pixels
    flat = np.zeros((1, 7, 7)); flat[0, 3, [2, 6]] = .5                                              # one inside, one outside
    other = flat*(1 + nudge*np.arange(7))
    assert pointing_game(flat, masks).tolist() == pointing_game(other, masks).tolist() == [.5]
    cells = on_common_grid(flat, masks)[1].reshape(GRID, GRID)[0]
    assert cells.sum() == 25                                              # columns 12 to 36, the first and the last by half
    assert (on_grid(masks, (GRID, GRID))[0, 0] + nudge >= .5 - 1e-6).sum() == 25


# ---------------------------------------------------------------- deletion and insertion

def test_areas_follow_the_map_and_have_their_size():
    heat = centre_maps(1, 28)[0]
    order = removal_order(heat, (112, 112))
    assert sorted(order.ravel()) == list(range(112**2))
    own = marked(order)
    other = elsewhere(own, np.random.default_rng(1))
    assert own.sum() == other.sum() == round(AREA*112**2) and pieces(own) == 1 and own[56, 56]
    assert abs(pieces(other) - 1) <= 1 and (other != own).any()
    flat = marked(removal_order(np.zeros((7, 7)), (112, 112)), .5)                                    # ties go in random order
    assert flat[:56].mean() == pytest.approx(.5, abs=.05) == flat[:, :56].mean()


def test_neighbours_fill_a_hole_with_what_is_around_it():
    frame = np.zeros((64, 64, 3), np.float32); frame[:, 32:] = 1
    hole = np.zeros((64, 64), bool); hole[20:40, 4:24] = True; hole[20:40, 40:60] = True
    found = from_neighbours(frame, hole)
    assert found[hole][:, 0].min() >= 0 and found[30, 10].max() < .1 and found[30, 54].min() > .9
    assert (found[~hole] == frame[~hole]).all()
    alone = ~np.zeros((64, 64), bool); alone[0, 0] = False
    assert from_neighbours(frame + .5, alone) == pytest.approx(np.full((64, 64, 3), .5), abs=1e-6)    # one pixel is left, and fills all


def test_deletion_rewards_the_map_that_the_verdict_rests_on():
    "A detector that looks at a square: taking it away, or keeping it alone, tells the right map from areas elsewhere and a wrong map."
    rng = np.random.default_rng(0)
    square = np.zeros((32, 32), bool); square[4:12, 4:12] = True                                      # a sixteenth of the frame
    rows = []
    for k in range(8):
        frame = rng.random((32, 32, 3)).astype(np.float32)
        def p_fake(x): return float((np.abs(x - frame).max(-1)[square] < 1e-6).mean())
        for told, picture in trials(frame, dict(shown=square*1., wrong=1. - square), [0, k]):
            clip = dict(clip_id=f"fake/{k}", target_id=f"{k:03}", source_id="", p_whole=1.)
            rows.append(clip | told | dict(p_fake=p_fake(picture)))
    found = deletion_metrics(pd.DataFrame(rows), 100, 0)
    for kind, fill in itertools.product(("deletion", "insertion"), (*FILLS, "all fills")):
        right, wrong = (found["advantage"][kind][name][fill] for name in ("shown", "wrong"))
        assert right["significance"] == "higher" and wrong["significance"] == "lower", (kind, fill)
    assert found["whole"]["value"] == 1 and found["means"]["deletion"]["noise"]["shown"]["value"] == 0
    assert set(found["means"]["insertion"]["mean"]) == {"shown", "wrong", ELSEWHERE}


def test_figures_draw_what_they_are_given():
    table = localisation_table(corpus(("fine", "mid", "semantic", "fused", "centre")), 20)
    assert [a.get_title("left") for a in draw_localisation(table).axes if a.axison] == list(SCORES.values())
    by_method = draw_by_method(table)
    names = [t.get_text() for t in by_method.axes[0].get_yticklabels()]
    assert names == ["all (32)", "Deepfakes (16)", "NeuralTextures (16)", "hard (16)", "obvious (16)"]
    frames, masks = np.full((3, 64, 64, 3), 99, np.uint8), np.zeros((3, 64, 64), bool)
    masks[:2, 10:30, 10:30] = True
    figure = draw_evidence(frames, masks, {"fused": np.random.default_rng(0).random((3, 28, 28))})
    assert [len(a.texts) for a in figure.axes[6:9]] == [1, 1, 0] and figure.axes[-1].get_ylim() == (0, 1)
    dark, bright = (overlay(frames, np.full((3, 7, 7), v)) for v in (0, 1))
    assert np.ptp(dark) == 0 and bright[0, 0, 0].sum() > dark[0, 0, 0].sum()
    with pytest.raises(ValueError, match=r"scale them to \[0, 1\]"): draw_evidence(frames, masks, {"raw": np.full((3, 7, 7), 2.)})
    matplotlib.pyplot.close("all")
