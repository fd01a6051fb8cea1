"""A training step on prepared clips, loading included, against bare forward and backward of the timm backbone.

Both sides run in turn in one process, in the same precision and memory format and on as many frames, so the ratio holds while
the machine's speed drifts. 1.0 would mean that loading, augmentation, pyramid, attention, GRU, clipping and the optimiser cost nothing.
"""
from itertools import count

import torch
import typer
from timing import say, seconds

from spotter.core import find_root, load_params
from spotter.data.store import ClipStore
from spotter.model.pyramid import create_backbone
from spotter.runtime import autocast, resolve_precision
from spotter.train.loop import batch_loss
from spotter.train.setup import depthwise_in_fp32, start_session


def endless(loader):
    "Batches without end, one epoch after the other."
    for epoch in count():
        loader.set_epoch(epoch)
        yield from loader


def training_step(session, batches):
    "One batch, from the stored crops to the updated weights."
    batch, recipe = next(batches), session.params.recipe(session.key)
    with session.accelerator.accumulate(session.model):
        session.accelerator.backward(batch_loss(session.model, batch, session.loss_fn, recipe.mask_loss))
        if session.accelerator.sync_gradients:
            session.accelerator.clip_grad_norm_(session.model.parameters(), recipe.clip_norm)
        session.optimizer.step(); session.scheduler.step(); session.optimizer.zero_grad()


def bare_step(net, x, precision):
    "Forward and backward of the backbone alone on a tensor that is ready."
    with autocast(precision): y = net(x).mean()
    y.backward()
    net.zero_grad()


def measure(key: str, pairs: int, block: int = 3):
    "Print the ratios of throughput, from `pairs` times a block of steps of each side."
    params = load_params()
    params = params.model_copy(update=dict(train=params.train.model_copy(update=dict(sequence_epochs=0))))   # every step has as many clips
    session = start_session(params, key, ClipStore(find_root()/"faces"))
    spec, precision = params.models[key], resolve_precision(params.train.precision)
    n = spec.batch_size * params.clips.frames
    x = torch.randn(n, 3, spec.image_size, spec.image_size).contiguous(memory_format=torch.channels_last)
    nets = {name: create_backbone(spec.backbone).train().to(memory_format=torch.channels_last)
            for name in ("unchanged", "depthwise in fp32")}
    depthwise_in_fp32(nets["depthwise in fp32"])
    batches, ratios = endless(session.loader), {name: [] for name in nets}
    for _ in range(2): training_step(session, batches)
    for net in nets.values(): bare_step(net, x, precision)
    for _ in range(pairs):
        # a block of steps, so that batches which were loaded ahead of time do not count as free
        ours = sum(seconds(training_step, session, batches) for _ in range(block))
        for name, net in nets.items(): ratios[name].append(sum(seconds(bare_step, net, x, precision) for _ in range(block)) / ours)
    print(f"{key}: {n} frames per step, {spec.backbone} @{spec.image_size}, {precision}, channels_last, {torch.get_num_threads()} threads")
    for name, found in ratios.items(): say(f"speed of a training step / bare forward+backward, backbone {name}", found)


def main(models: list[str] = typer.Argument(None, help="models of params.yaml; all by default"),
         pairs: int = typer.Option(3, help="how often both sides are timed")):
    "Print the speed of a training step as a ratio to the bare backbone's."
    for key in models or load_params().models: measure(key, pairs)


if __name__ == "__main__": typer.run(main)
