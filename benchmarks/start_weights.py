"""Learning curves of a short training from random weights and from those of EfficientNet-Lite: `python benchmarks/start_weights.py`.

Writes results/start_weights.csv, which nbs/2_model/45_start_weights.ipynb shows. Minutes on two cores; needs the prepared crops
(`dvc repro prepare`).
"""
import tempfile
from pathlib import Path

import pandas as pd
import typer

from spotter.core import find_root, load_params
from spotter.data.store import ClipStore
from spotter.train.loop import train


def curve(init: str, key: str, side: int, epochs: int, steps: int, batch_size: int, threads: int) -> pd.DataFrame:
    "Train a model of params.yaml on small frames. A row per epoch: init, steps, train_loss, val_auc."
    params = load_params()
    recipe = dict(init=init, sequence_epochs=0, restart_epochs=epochs, warmup_steps=steps//2, patience=epochs)
    spec = params.models[key].model_copy(update=dict(image_size=side, epochs=epochs, steps_per_epoch=steps, batch_size=batch_size))
    params = params.model_copy(update=dict(threads=threads, models={key: spec}, train=params.train.model_copy(update=recipe)))
    with tempfile.TemporaryDirectory() as folder:
        history = train(params, key, ClipStore(find_root()/"faces"), *(Path(folder)/name for name in ("out", "live", "resume")))
    return history.assign(init=init, steps=steps*(history.epoch + 1))[["init", "steps", "train_loss", "val_auc"]]


def main(key: str = typer.Option("b0", help="model of params.yaml"), side: int = typer.Option(96, help="of the frames, in pixels"),
         epochs: int = 5, steps: int = typer.Option(8, help="per epoch"), batch_size: int = 16, threads: int = 1):
    "Train once each way and write the curves."
    curves = pd.concat([curve(init, key, side, epochs, steps, batch_size, threads) for init in ("random", "lite")])
    curves.to_csv(find_root()/"results"/"start_weights.csv", index=False, float_format="%.4f", lineterminator="\n")


if __name__ == "__main__": typer.run(main)
