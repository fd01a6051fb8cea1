"""A training whose crops lie on the device. Settings, session, losses and the choice of the epoch are those of `spotter.train`."""
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import yaml
from safetensors.torch import load_file

from spotter.core import Params
from spotter.data.loader import ClipDataset
from spotter.data.sampling import sample_positions
from spotter.data.subset import training_part
from spotter.model.network import TemporalCNN_GRU
from spotter.model.start_weights import LITE, load_lite, sha256
from spotter.runtime import autocast
from spotter.train.loop import start_epoch, train_epoch, validation_metrics
from spotter.train.resume import TrainingState, note_epoch
from spotter.train.setup import Session, make_loader, start_session

from .augment import augment, draw, normalised
from .corpus import CropStore


@dataclass(frozen=True)
class Run:
    "One training, as results/params.yaml describes them."
    name: str           # that of its tables
    model: str          # a key of params.yaml
    seed: int
    pairs: int = 0      # identity pairs to train on; 0: all
    without: str = ""   # method that neither training nor validation sees

    def part(self, store: CropStore): return training_part(store, self.pairs or None, self.without)


def planned_runs(
    models: list[str], seeds: list[int],
    first: int,                        # seed of the trainings that bear the plain name of their model
    study: dict[str, dict] | None = None,  # `runs` of results/params.yaml
) -> list[Run]:
    "Every model with the first seed, every model with the next one, and so on; then what else the study trains."
    runs = [Run(model if seed == first else f"{model}-seed{seed}", model, seed) for seed in seeds for model in models]
    more = [Run(name, **spec) for name, spec in (study or {}).items()]
    return runs + [run for run in more if run.name not in {r.name for r in runs}]


def study_runs(root) -> dict[str, dict]:
    "The trainings of `make results`, but for those on self-blended fakes: the processor makes them, and here the crops are on the device."
    runs = yaml.safe_load((root/"results"/"params.yaml").read_text())["runs"]
    return {name: {k: v for k, v in run.items() if k != "self_blend"} for name, run in runs.items() if not run["self_blend"]}


def run_params(
    params: Params,
    run: Run,
    clips: int,      # of a step
    steps: int,      # of the training, all in all
) -> Params:
    "Settings of a run: those of params.yaml, but for seed, batch, length, processes that load clips, and start, see `packed_start`."
    if params.recipe(run.model).self_blend: raise ValueError("train.self_blend is not 0: the processor makes these fakes")
    spec = params.models[run.model]
    own = spec.train.model_copy(update=dict(init="random"))
    spec = spec.model_copy(update=dict(batch_size=clips, accumulation=1, steps_per_epoch=max(1, steps//spec.epochs), train=own))
    recipe = params.train.model_copy(update=dict(workers=0))
    few = dict(threads=2)   # the processor only starts kernels, and processes beside each other would fight for its cores
    return params.model_copy(update=dict(seed=run.seed, train=recipe, models=params.models | {run.model: spec}) | few)


def packed_start(
    params: Params,   # of params.yaml
    key: str,
    folder: Path,     # that `gpu.py pack` made
) -> dict[str, torch.Tensor] | None:   # a state for `load_lite`; None for a training that starts from random weights
    "The weights that a model starts from. `ValueError` for a start that does not travel, `FileNotFoundError` when they were not packed."
    init = params.recipe(key).init
    if init not in ("random", "lite"): raise ValueError(f"{key} starts from {init}: only random and lite are packed")
    path = folder/"start"/f"{params.models[key].backbone}.safetensors"
    if init == "random": return None
    if not path.is_file(): raise FileNotFoundError(f"{path}: the weights that {key} starts from were not packed; make the folder again")
    return {name: t.float() if t.is_floating_point() else t for name, t in load_file(path).items()}


def packed_record(
    params: Params,   # of params.yaml
    key: str,
    folder: Path,     # that `gpu.py pack` made
) -> dict:            # kind, file, sha256; the last two are None for random weights
    "What a training starts from, for its checkpoint. The file is the packed one, whose weights are rounded."
    init, path = params.recipe(key).init, folder/"start"/f"{params.models[key].backbone}.safetensors"
    if init == "random": return dict(kind=init, file=None, sha256=None)
    return dict(kind=init, file=f"{LITE[params.models[key].backbone].file}, in half precision", sha256=sha256(path))


class DeviceClips:
    "The crops of some clips as uint8 on a device."
    def __init__(self, store: CropStore, clips: pd.DataFrame, device):
        self.starts = dict(zip(clips.clip_id, np.cumsum([0, *clips.n_frames])[:-1].tolist()))   # first crop of each clip
        rows = np.concatenate([store.rows[c] for c in clips.clip_id])
        self.frames, self.masks = (torch.from_numpy(array[rows]).to(device) for array in (store.crops, store.masks))


class DeviceLoader:
    "Batches of augmented training clips on the device, in the order of the product's sampler. A function of seed and epoch alone."
    def __init__(self, params: Params, key: str, store: CropStore, crops: DeviceClips):
        loader = make_loader(params, key, store)   # never iterated: its batches and what its data set would do are taken over
        self.data, self.batches, self.crops, self.epoch = loader.dataset, loader.batch_sampler, crops, 0
        device = crops.frames.device
        self.starts = np.array([crops.starts[c] for c in self.data.clip_ids])
        self.counts = self.data.counts
        self.labels = torch.tensor(self.data.labels, device=device)
        self.known = torch.tensor(self.data.mask_known, device=device)

    def __len__(self) -> int: return len(self.batches)

    @property
    def frames(self) -> int:
        "Frames of a clip in this epoch."
        return self.data.frames_at(self.epoch) if self.data.frames_at else self.data.frames

    @property
    def images(self) -> int:
        "Frames of a step in this epoch."
        return self.batches.batch_size*self.frames

    def set_epoch(self, epoch: int):
        self.epoch = epoch
        self.batches.set_epoch(epoch)

    def __iter__(self) -> Iterator[dict]:
        rng = np.random.default_rng([self.data.seed, self.epoch, 1])
        for items in self.batches: yield self.batch(np.array([i for _, _, i in items]), rng)

    def batch(self, clips: np.ndarray, rng: np.random.Generator) -> dict:
        "An item of `ClipDataset` for each of the clips, as tensors on the device."
        device = self.crops.frames.device
        places = [self.starts[i] + sample_positions(self.counts[i], self.frames, rng.random()) for i in clips]
        places, chosen = torch.from_numpy(np.stack(places)).to(device), torch.from_numpy(clips).to(device)
        draws = draw(self.data.augment, self.crops.frames.shape[1], len(clips), rng)
        frames, masks = augment(self.crops.frames[places], self.crops.masks[places], draws, self.data.image_size)
        return dict(clip=normalised(frames), mask=masks, label=self.labels[chosen], index=chosen, mask_known=self.known[chosen])


def staged(
    store: CropStore,
    clips: pd.DataFrame,   # rows of `store.clips`
    frames: int,           # T
    size: int,             # side of the network's input
    device,
    threads: int,
) -> torch.Tensor:         # (N, T, 3, size, size) float32
    "What validation and test show the network, made once by the product's `ClipDataset` and kept on the device."
    data = ClipDataset(store, clips, frames, size)
    with ThreadPoolExecutor(threads) as pool: return torch.stack(list(pool.map(lambda i: data[i]["clip"], range(len(data))))).to(device)


@torch.no_grad()
def logits_of(model: TemporalCNN_GRU, inputs: torch.Tensor, precision: str) -> np.ndarray:  # (N, 2) float32
    "`clip_logits` of clips that are on the device; the model is put into eval mode."
    model.eval()
    parts = inputs.split(16 if inputs.is_cuda else 4)
    with autocast(precision, inputs.device): return torch.cat([model(part).float().cpu() for part in parts]).numpy()


def train_steps(session: Session, batches: Iterable[dict], mask_weight: float) -> float:
    "Train on batches with the session's recipe; their mean loss."
    return train_epoch(session.accelerator, session.model, batches, session.loss_fn, session.optimizer, session.scheduler,
                       session.params.recipe(session.key).clip_norm, mask_weight)


def begin(
    params: Params,         # of `run_params`
    key: str,
    store: CropStore,       # that is trained on
    crops: DeviceClips,     # of its training clips, and perhaps of others
    start: dict | None = None,  # of `packed_start`
) -> tuple[Session, DeviceLoader]:
    "A session of `spotter.train`, and the loader on the device that replaces its own."
    session = start_session(params, key, store)
    if start:
        net = session.bare.feature_extractor.net
        load_lite(net.cpu(), start)   # on the processor, as `spotter.train` does before the network moves
        net.to(crops.frames.device)
    return session, DeviceLoader(params, key, store, crops)


@dataclass
class Trained:
    "What a training gave."
    model: TemporalCNN_GRU      # with the weights of the best epoch
    history: pd.DataFrame       # as `spotter.train.loop.train` returns it, and images a second
    epoch: int                  # of the weights
    steps: int
    images: int                 # frames that were trained on
    seconds: float              # of the training steps, without validation
    cut_short: bool             # because time was over


def train_run(
    params: Params,             # of `run_params`
    key: str,
    store: CropStore,
    crops: DeviceClips,
    inputs: torch.Tensor,       # of the store's validation clips, see `staged`
    over: Callable[[], bool] = lambda: False,  # asked after each epoch: whether to stop
    start: dict | None = None,  # of `packed_start`
    name: str = "",             # printed before each epoch
) -> Trained:
    "Train a model and keep the weights of the epoch that `note_epoch` prefers."
    session, loader = begin(params, key, store, crops, start)
    labels, recipe, now = store.clips.query("split == 'val'").label.to_numpy(), params.recipe(key), TrainingState("")
    best, steps, images, spent = None, 0, 0, 0.
    while len(now.history) < params.models[key].epochs and now.waited < recipe.patience and not (now.history and over()):
        epoch, rate = len(now.history), session.optimizer.param_groups[0]["lr"]
        mask_weight = start_epoch(session, epoch)
        loader.set_epoch(epoch)
        began = time.perf_counter()
        loss = train_steps(session, loader, mask_weight)   # reads the loss, so the device is done
        seconds, seen = time.perf_counter() - began, len(loader)*loader.images
        steps, images, spent = steps + len(loader), images + seen, spent + seconds
        scores = validation_metrics(logits_of(session.bare, inputs, recipe.precision), labels, session.loss_fn)
        row = dict(epoch=epoch, train_loss=loss, **scores, learning_rate=rate)
        if note_epoch(now, row, recipe.min_improvement):
            best = {name: t.detach().to("cpu", copy=True) for name, t in session.bare.state_dict().items()}
        now.history[-1] = row | dict(images_per_second=round(seen/seconds, 1))
        print(f"  {name}  " + "  ".join(f"{column} {value:.4g}" for column, value in now.history[-1].items()), flush=True)
    session.bare.load_state_dict(best)
    cut_short = len(now.history) < params.models[key].epochs and now.waited < recipe.patience
    return Trained(session.bare.eval(), pd.DataFrame(now.history), now.best_epoch, steps, images, spent, cut_short)
