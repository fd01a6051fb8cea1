"""Computational cost of each step from frames to the verdict of a whole video, as a ratio to the bare backbone.

- bare backbone, the lower limit: timm's backbone on 24 frames that are ready, in the same precision and memory format
- plain network: the same layers on efficientnet_pytorch, in fp32 and PyTorch's default memory format
- video: ten seconds of 1280 × 720 at 25 frames per second, H.264, with one face
- footage: a minute of that, with heatmaps; and five seconds of it in 3840 × 2160

Speeds do not depend on what was learnt, so the networks have random weights. They show the map that was chosen for the trained ones,
because Grad-CAM costs more than the mask head; "verdict and Grad-CAM" is that at three scales in any case.
"""
import json
import statistics
import tempfile
from pathlib import Path

import cv2
import numpy as np
import onnxruntime
import torch
import typer
from efficientnet_pytorch import EfficientNet
from timing import in_turn, say
from torch import nn

from spotter.core import find_root, load_params
from spotter.data.video import iter_frames, read_frames, write_video
from spotter.explain.gradcam import MultiScaleGradCAM
from spotter.model.checkpoint import save_model
from spotter.model.export import export_onnx
from spotter.model.network import TemporalCNN_GRU, pool_over_time
from spotter.model.pyramid import create_backbone
from spotter.predict.detector import Detector
from spotter.predict.windows import FRAMES
from spotter.runtime import autocast, resolve_precision, resolve_threads
from spotter.train.setup import make_model


class PlainNetwork(nn.Module):
    "Spotter's network without its optimisations: backbone of efficientnet_pytorch, fp32, channels first."
    def __init__(self, model: TemporalCNN_GRU):
        super().__init__()
        self.net, self.head = EfficientNet.from_name(model.config["backbone"], include_top=False), model.feature_extractor
        self.attention, self.temporal, self.classifier = model.spatial_attention, model.temporal, model.classifier
        self.to(memory_format=torch.contiguous_format)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        maps = self.net.extract_endpoints(x.flatten(0, 1))
        merged, mask = self.head.pyramid({name: maps[f"reduction_{i}"] for name, i in (("fine", 3), ("mid", 4), ("semantic", 5))})
        features, _ = self.attention(self.head.gate(maps["reduction_6"], mask.sigmoid()) + merged)
        temporal, _ = self.temporal(features.mean((2, 3)).unflatten(0, x.shape[:2]))
        return self.classifier(pool_over_time(temporal))


def long_video(path: Path, seconds: int = 10, rate: int = 25, height: int = 720) -> Path:
    "A bundled clip, played forwards and backwards in turn, in the middle of a frame of 16:9."
    frames, _ = read_frames(next(iter(sorted((find_root()/"data/original_sequences").rglob("*.mp4")))))
    large, border = [cv2.resize(f, (height, height), interpolation=cv2.INTER_CUBIC) for f in frames], height*7//18
    wide = [cv2.copyMakeBorder(f, 0, 0, border, border, cv2.BORDER_REFLECT) for f in large]
    order = np.abs((np.arange(seconds*rate) + len(wide) - 1) % (2*len(wide) - 2) - (len(wide) - 1))
    write_video(path, [wide[i] for i in order], rate)
    return path


def forward(net, x, precision):
    with torch.inference_mode(), autocast(precision): net(x)


def with_heatmaps(model, clip, precision):
    with MultiScaleGradCAM(model, precision=precision) as explainer: explainer.generate_heatmaps(clip)


def decode(video: Path, threads: int): return sum(1 for _ in iter_frames(video, [10**9], threads=threads))


def footage(detector: Detector, bare, ready, precision: str, rounds: int, folder: Path):
    "Print what a minute costs, and what large pictures do."
    minute, small, large = (long_video(folder/f"{n}.mp4", s, height=h) for n, (s, h) in enumerate([(60, 720), (5, 720), (5, 2160)]))
    found, threads = {}, torch.get_num_threads()
    def look(name, video): found[name] = detector.analyze(video)
    sides = {"bare": (forward, bare, ready, precision), "minute": (look, "minute", minute), "720p": (look, "720p", small),
             "4K": (look, "4K", large), "decoding 4K": (decode, large, threads)}
    times = in_turn(sides, rounds)
    frames = len(found["minute"].people[0].indices)
    bare_on_these = [t["bare"]*frames/len(ready) for t in times]
    say(f"time of analyze(a minute of 720p) / bare backbone on its {frames} crops", [t["minute"]/b for t, b in zip(times, bare_on_these)])
    say("what analyze takes longer in 4K than in 720p / decoding 4K", [(t["4K"] - t["720p"])/t["decoding 4K"] for t in times])
    parts = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in found["minute"].seconds.items())
    print(f"    the minute: {parts}; the network runs beside the others", flush=True)


def measure(key: str, rounds: int, folder: Path):
    "Print the ratios of one model."
    params = load_params(); torch.set_num_threads(resolve_threads(params.threads))
    precision, spec = resolve_precision(params.train.precision), params.models[key]
    model, plain = make_model(params, key).eval(), PlainNetwork(make_model(params, key)).eval()
    bare = create_backbone(spec.backbone).eval().to(memory_format=torch.channels_last)
    clip = torch.randn(1, FRAMES, 3, spec.image_size, spec.image_size)
    ready = clip[0].contiguous(memory_format=torch.channels_last)
    model.shown_map = json.loads((find_root()/f"metrics/models/{key}/metrics.json").read_text())["localisation"]["shown_map"]
    save_model(model, folder/"random.safetensors", faces=params.faces.model_dump(), frames=params.clips.eval_frames)
    detector, video = Detector(folder/"random.safetensors", precision=precision), long_video(folder/"video.mp4")
    looked = {True: [], False: []}   # with heatmaps or without -> analyses
    options = onnxruntime.SessionOptions(); options.intra_op_num_threads = torch.get_num_threads()
    export_onnx(model, folder/"random.onnx")
    session = onnxruntime.InferenceSession(folder/"random.onnx", options, providers=["CPUExecutionProvider"])
    sides = {"bare": (forward, bare, ready, precision), "model": (forward, model, clip, precision),
             "heatmaps": (with_heatmaps, model, clip, precision), "plain": (forward, plain, clip, "fp32"),
             "onnx": (lambda: session.run(None, {"clip": clip.numpy()}),),
             "analyze": (lambda: looked[True].append(detector.analyze(video)),),
             "verdict": (lambda: looked[False].append(detector.analyze(video, heatmaps=False)),)}
    found = in_turn(sides, rounds)
    against = lambda a, b="bare": [times[a]/times[b] for times in found]
    print(f"{key}: {FRAMES} frames, {spec.backbone} @{spec.image_size}, {precision}, channels_last, {torch.get_num_threads()} threads, "
          f"shows the map {model.shown_map!r}")
    texts = dict(model="model(x)", heatmaps="verdict and Grad-CAM", onnx="ONNX Runtime, fp32", analyze="analyze(video)")
    for name, text in texts.items(): say(f"time of {text} / bare backbone", against(name))
    say("time of the plain network / model(x)", against("plain", "model"))
    parts = {"decoding": ("reading", True), "faces": ("faces", True), "model": ("network", False)}
    timed = {heat: analyses[1::2] for heat, analyses in looked.items()}   # the second of each pair, see `in_turn`
    share = {name: statistics.median(a.seconds[key]/times["bare"] for a, times in zip(timed[heat], found))
             for name, (key, heat) in parts.items()}
    share["heatmaps"] = statistics.median((a.seconds["network"] - b.seconds["network"])/times["bare"]
                                          for a, b, times in zip(timed[True], timed[False], found))
    frames, text = len(timed[True][0].people[0].indices), ", ".join(f"{name} {value:.2f}" for name, value in share.items())
    print(f"    of that, on {frames} frames: {text}", flush=True)
    footage(detector, bare, ready, precision, rounds, folder)


def main(models: list[str] = typer.Argument(None, help="models of params.yaml; by default those with three scales"),
         rounds: int = typer.Option(5, help="how often each side is timed")):
    "Print the time of inference as a ratio to the bare backbone's."
    for key in models or [name for name, spec in load_params().models.items() if spec.use_multiscale]:
        with tempfile.TemporaryDirectory() as folder: measure(key, rounds, Path(folder))


if __name__ == "__main__": typer.run(main)
