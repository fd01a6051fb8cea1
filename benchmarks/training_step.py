"""A training step on prepared clips, loading included, against bare forward and backward of the timm backbone.

Both sides run in turn in one process, in the same precision and memory format and on as many frames, so the ratio holds while the machine's speed drifts.
1.0 would mean that loading, augmentation, pyramid, attention, GRU, clipping and the optimiser cost nothing.
"""
import statistics
import time
from itertools import count

import torch
import typer

from spotter.clips import ClipStore
from spotter.core import autocast, find_root, load_params, resolve_precision
from spotter.pyramid import create_backbone
from spotter.train import batch_loss, set_up


def endless(loader):
    "Batches for ever, one epoch after the other."
    for epoch in count():
        loader.set_epoch(epoch)
        yield from loader


def training_step(session, batches):
    "One batch from the disk to the updated weights."
    batch, mask_weight = next(batches), session.params.train.mask_loss * session.params.arms[session.arm].use_multiscale
    with session.accelerator.accumulate(session.model):
        session.accelerator.backward(batch_loss(session.model, batch, session.loss_fn, mask_weight))
        if session.accelerator.sync_gradients: session.accelerator.clip_grad_norm_(session.model.parameters(), session.params.train.clip_norm)
        session.optimizer.step(); session.scheduler.step(); session.optimizer.zero_grad()


def bare_step(net, x, precision):
    "Forward and backward of the backbone alone on a tensor that is ready."
    with autocast(precision): y = net(x).mean()
    y.backward()
    net.zero_grad()


def seconds(step, *args) -> float:
    start = time.perf_counter(); step(*args)
    return time.perf_counter() - start


def measure(arm: str, steps: int) -> list[float]:
    "Ratios of throughput, one a pair of steps."
    params = load_params()
    session = set_up(params, arm, ClipStore(find_root()/"faces"))
    spec, precision = params.arms[arm], resolve_precision(params.train.precision)
    net = create_backbone(spec.backbone).to(memory_format=torch.channels_last).train()
    n = spec.batch_size * params.clips.frames
    x = torch.randn(n, 3, spec.image_size, spec.image_size).contiguous(memory_format=torch.channels_last)
    batches = endless(session.loader)
    for _ in range(3): training_step(session, batches); bare_step(net, x, precision)
    pairs = []
    for _ in range(steps):
        # a block of steps, so that batches that were loaded ahead of time do not count as free
        ours = sum(seconds(training_step, session, batches) for _ in range(4))
        bare = sum(seconds(bare_step, net, x, precision) for _ in range(4))
        pairs.append(bare / ours)
    print(f"{arm:<10} {n} frames a step, {spec.backbone} @{spec.image_size}, {precision}, {torch.get_num_threads()} threads: "
          f"speed of a training step / bare forward+backward = {statistics.median(pairs):.2f} (from {min(pairs):.2f} to {max(pairs):.2f})", flush=True)
    return pairs


def main(arms: list[str] = typer.Argument(None, help="arms of params.yaml; all by default"), steps: int = typer.Option(5, help="pairs of blocks of four steps")):
    "Print the speed of a training step as a ratio to the bare backbone's."
    for arm in arms or load_params().arms: measure(arm, steps)


if __name__ == "__main__": typer.run(main)
