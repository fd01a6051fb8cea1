"""Verdict and fused heatmaps of a 24-frame clip against the verdict alone, and against pytorch-grad-cam over the same three layers.

All sides run in turn in one process, so the ratios hold while the machine's speed drifts. pytorch-grad-cam runs with its defaults:
fp32, gradients for every weight. `make bench` leaves out the allocator settings of the trainings, because a notebook does not have
them; they help the side that keeps most gradients, and lower the second ratio.
Speeds do not depend on what was learnt, so the networks have random weights.
"""
import torch
import typer
from pytorch_grad_cam import GradCAM
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
from timing import in_turn, say
from torch import nn

from spotter.core import load_params
from spotter.explain.gradcam import MultiScaleGradCAM
from spotter.runtime import autocast, resolve_precision, resolve_threads
from spotter.train.setup import make_model


class FramesAsBatch(nn.Module):
    "A clip (T, 3, H, W) as pytorch-grad-cam wants it: the frames are the batch, the clip has one verdict."
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, frames): return self.model(frames[None])


def verdict(model, clip, precision):
    with torch.inference_mode(), autocast(precision): model(clip)


def ours(model, clip, precision):
    with MultiScaleGradCAM(model, precision=precision) as explainer: explainer.generate_heatmaps(clip)


def theirs(model, clip):
    layers = list(model.get_multiscale_layers().values())
    with GradCAM(FramesAsBatch(model), layers) as explainer: explainer(clip[0], [ClassifierOutputTarget(1)])
    model.zero_grad()


def measure(key: str, frames: int, rounds: int):
    "Print the two ratios from `rounds` rounds."
    params = load_params()
    torch.set_num_threads(resolve_threads(params.threads))
    precision, spec = resolve_precision(params.train.precision), params.models[key]
    model = make_model(params, key).eval()
    clip = torch.randn(1, frames, 3, spec.image_size, spec.image_size)
    sides = {"verdict": (verdict, model, clip, precision), "heatmaps": (ours, model, clip, precision),
             "pytorch-grad-cam": (theirs, model, clip)}
    found = in_turn(sides, rounds)
    print(f"{key}: {frames} frames, {spec.backbone} @{spec.image_size}, {precision}, {torch.get_num_threads()} threads")
    for text, a, b in (("verdict and heatmaps / model(x)", "heatmaps", "verdict"),
                       ("pytorch-grad-cam, fp32 / verdict and heatmaps", "pytorch-grad-cam", "heatmaps")):
        say(f"time of {text}", [times[a]/times[b] for times in found])


def main(models: list[str] = typer.Argument(None, help="models of params.yaml; by default those with three scales"),
         frames: int = typer.Option(24, help="of the clip"),
         rounds: int = typer.Option(5, help="how often each side is timed")):
    "Print the computational cost of heatmaps."
    for key in models or [name for name, spec in load_params().models.items() if spec.use_multiscale]: measure(key, frames, rounds)


if __name__ == "__main__": typer.run(main)
