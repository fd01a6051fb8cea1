"""The product's evaluation of a trained network, in processes of its own, so that the next training need not wait for it."""
import json
import multiprocessing
import time
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from spotter.core import Params
from spotter.evaluate.calibrate import calibrate, scale_heatmaps
from spotter.evaluate.deletion import deletion_metrics, deletion_rows
from spotter.evaluate.heatmaps import heatmap_metrics, read_localisation, write_localisation
from spotter.evaluate.network_maps import score_split
from spotter.evaluate.pooled import pooled_scores
from spotter.evaluate.tables import model_metrics, overall_metrics, prediction_table, read_predictions, write_json, write_predictions
from spotter.model.checkpoint import MEASURED, inspect_checkpoint, load_model, save_model, shrink_checkpoint

from .corpus import CropStore


def write_verdicts(
    model,                              # trained; its temperature and threshold are fitted here
    val: tuple[np.ndarray, np.ndarray], # logits (N, 2) and labels (N,) of the validation clips
    tests: dict[str, tuple[pd.DataFrame, np.ndarray]],  # file name -> clips, and their logits
    folder: Path,
) -> dict[str, float]:                  # the metrics of the first table, without intervals
    "Calibrate on validation, and write the prediction tables."
    calibrate(model, *val)
    fitted = model.temperature, model.bias, model.threshold
    tables = {name: prediction_table(clips, logits, *fitted) for name, (clips, logits) in tests.items()}
    for name, table in tables.items(): write_predictions(table, folder/name)
    return overall_metrics(next(iter(tables.values())))


def evaluate_run(
    weights: Path,       # a checkpoint with what belongs to the verdict; what belongs to the heatmaps is added
    folder: Path,        # with predictions.csv; metrics.json and localisation.csv are written
    store: CropStore,
    params: Params,
    device: str,
) -> dict:               # what metrics.json holds, and the seconds that it took
    "Metrics with intervals, and the heatmaps' scores, as the stages calibrate and evaluate make them."
    start = time.perf_counter()
    model, frames, precision = load_model(weights, device), params.clips.eval_frames, params.train.precision
    sampling = params.evaluate.resamples, params.seed
    table, excluded = read_predictions(folder/"predictions.csv"), store.excluded.query("split == 'test'")
    fitted = {name: round(float(getattr(model, name)), 6) for name in ("threshold", "temperature", "bias", "prevalence")}
    metrics = model_metrics(table, excluded, fitted, *sampling)
    _write(folder, metrics)   # in case that the time is over before the heatmaps are scored
    scale_heatmaps(model, store, frames, precision).to_csv(folder/"candidates.csv", index=False, float_format="%.6f")
    save_model(model, weights.with_suffix(".part"), **inspect_checkpoint(weights).metadata)   # as the stage calibrate does
    weights.with_suffix(".part").replace(weights)
    scores, thresholds, pool = score_split(model, store, frames, precision, params.seed)
    write_localisation(scores, folder/"localisation.csv")
    single = heatmap_metrics(read_localisation(folder/"localisation.csv"), thresholds, model.heatmap_constants, *sampling)[2]
    shown = dict(shown_map=model.shown_map, map_weights=model.map_weights, pooled=pooled_scores(pool, *sampling))
    metrics["localisation"] = shown | single
    _write(folder, metrics)   # likewise, before pixels are removed
    fakes = store.clips.query("split == 'test' and label == 1")
    metrics["deletion"] = deletion_metrics(deletion_rows(model, store, fakes, precision, params.seed), *sampling)
    _write(folder, metrics)
    (folder/"fitted.json").write_text(json.dumps({name: getattr(model, name) for name in MEASURED}, indent=2) + "\n")
    return metrics | dict(seconds=time.perf_counter() - start)


def _write(folder: Path, metrics: dict):
    "metrics.json, which is there whole or as it was before."
    write_json(folder/"metrics.part", metrics)
    (folder/"metrics.part").replace(folder/"metrics.json")


def _prepare(threads: int): torch.set_num_threads(threads)


class Evaluators:
    "Processes that evaluate trainings while the next one runs."
    def __init__(self, processes: int, threads: int):   # 0 processes: each evaluation is made at once, in this process
        # new interpreters, because a process that uses CUDA cannot be forked
        self.pool = multiprocessing.get_context("spawn").Pool(processes, _prepare, (threads,)) if processes else None
        self.results = {}

    def submit(self, name: str, *job):
        "Evaluate a run: the arguments of `evaluate_run`."
        pool = self.pool or ThreadPool(1)
        self.results[name] = pool.apply_async(evaluate_run, job)
        if not self.pool: self.results[name].wait()

    def finished(self, seconds: float) -> tuple[dict[str, dict], dict[str, str]]:  # metrics; why there are none, of the others
        "Wait for all evaluations, at most so long. What is not done by then is given up."
        end, done, lost = time.monotonic() + seconds, {}, {}
        for name, result in self.results.items():
            try: done[name] = result.get(max(0., end - time.monotonic()))
            except multiprocessing.TimeoutError: lost[name] = f"heatmaps were not scored within {seconds:.0f} s after the last training"
            except Exception as e: lost[name] = f"{type(e).__name__}: {e}"   # of another process: the other runs are kept
        if self.pool: self.pool.terminate()
        return done, lost


def save_weights(
    trained, path: Path, params: Params, run,   # of `train_run`; a file; of `run_params`; a `Run`
    init: dict,                                 # what the training started from
):
    "The checkpoint that evaluation starts from."
    save_model(trained.model, path, epoch=trained.epoch, arm=run.model, settings=params.models[run.model].model_dump(exclude_none=True),
               faces=params.faces.model_dump(), frames=params.clips.eval_frames, seed=params.seed, init=init)


def split_checkpoint(
    path: Path,          # safetensors
    out: Path,           # folder of the parts
    most: int,           # bytes of a part
) -> list[Path]:
    "A checkpoint in bf16, cut into files; `cat` in the order of their names puts it together again."
    shrink_checkpoint(path, whole := path.with_suffix(".bf16"))
    data = whole.read_bytes()
    parts = [out/f"{path.stem}.safetensors.{k:02}" for k in range(-(-len(data)//most))]
    for k, part in enumerate(parts): part.write_bytes(data[k*most:(k + 1)*most])
    return parts
