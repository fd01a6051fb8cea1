"Grad-CAM against another implementation; hooks and memory that it must not leave behind."
import gc, resource

import numpy as np
import pytest
import torch
from pytorch_grad_cam import GradCAM
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
from torch import nn

from spotter.explain.gradcam import MultiScaleGradCAM
from spotter.model.network import TemporalCNN_GRU

torch.set_num_threads(1)   # the tests run side by side
SIDE = 96                  # of frames: maps of 12 × 12, 6 × 6 and 3 × 3 cells


class FramesAsBatch(nn.Module):
    "A clip (T, 3, H, W) as pytorch-grad-cam wants it: the frames are the batch, the clip has one verdict."
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, frames): return self.model(frames[None])


class AtNativeSize(GradCAM):
    "pytorch-grad-cam without the enlargement to the input's size."
    def get_target_width_height(self, input_tensor): return None


def theirs(model, clip, layer, target_class):
    "Map (T, h, w) of one layer; pytorch-grad-cam scales each frame from 0 to 1."
    frames = clip[0].clone().requires_grad_()
    with AtNativeSize(FramesAsBatch(model), [layer]) as explainer: found = explainer(frames, [ClassifierOutputTarget(target_class)])
    model.zero_grad()   # it leaves gradients in the weights
    return found


def from_0_to_1(maps):
    "Each frame minus its minimum, over its maximum."
    maps = maps - maps.min((1, 2), keepdims=True)
    top = maps.max((1, 2), keepdims=True)
    return np.divide(maps, top, out=np.zeros_like(maps), where=top > 0)


@pytest.fixture(scope="module")
def networks():
    "Networks whose batch-norm statistics are not those of a fresh one."
    torch.manual_seed(0)
    found = {}
    for name, options in {"b0": dict(use_multiscale=True), "b0_plain": dict(use_attention=False)}.items():
        model = TemporalCNN_GRU(**options).train()
        with torch.no_grad(): model(torch.randn(2, 2, 3, SIDE, SIDE))
        nn.init.normal_(model.classifier[-1].weight)   # a fresh head hardly depends on its input
        found[name] = model.eval()
    return found


@pytest.fixture(scope="module")
def clip(): return torch.rand(1, 3, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))*4 - 2


def chosen_layers(networks, name):
    "A network, and its three layers by scale."
    model = networks["b0_plain" if name == "single scale" else "b0"]
    if name != "backbone stages": return model, model.get_multiscale_layers()
    extractor = model.feature_extractor
    return model, {scale: extractor.net.get_submodule(stage["module"]) for scale, stage in extractor.stages.items()}


LAYERS = pytest.mark.parametrize("layers", ["pyramid outputs", "backbone stages", "single scale"])


@LAYERS
def test_the_maps_are_those_of_pytorch_grad_cam(networks, clip, layers):
    model, chosen = chosen_layers(networks, layers)
    seen = dict.fromkeys(chosen, False)   # with random weights a map may be empty for one of the two classes
    for target_class in (0, 1):
        with MultiScaleGradCAM(model, precision="fp32", layers=chosen) as explainer: ours = explainer.maps(clip, target_class)
        for name, layer in chosen.items():
            mine, reference = ours[name][0].numpy(), theirs(model, clip, layer, target_class)
            assert reference.shape == mine.shape
            np.testing.assert_allclose(from_0_to_1(mine), from_0_to_1(reference), atol=1e-4)
            seen[name] |= bool(reference.any())
    assert all(seen.values())


@LAYERS
def test_the_maps_are_relu_of_weighted_activations(networks, clip, layers):
    "relu(Σ w·A) by plain autograd with nothing detached, before any normalisation."
    model, chosen = chosen_layers(networks, layers)
    kept, seen = {}, dict.fromkeys(chosen, False)
    hooks = [layer.register_forward_hook(lambda m, i, o, name=name: kept.update({name: o})) for name, layer in chosen.items()]
    logits = model(clip)[0]
    for hook in hooks: hook.remove()
    for target_class in (0, 1):
        gradients = torch.autograd.grad(logits[target_class], [kept[name] for name in chosen], retain_graph=True)
        with MultiScaleGradCAM(model, precision="fp32", layers=chosen) as explainer: ours = explainer.maps(clip, target_class)
        for name, gradient in zip(chosen, gradients):
            expected = (gradient.mean((2, 3), keepdim=True)*kept[name]).sum(1).relu().detach()
            torch.testing.assert_close(ours[name][0], expected, rtol=1e-4, atol=1e-4*expected.max().item())
            seen[name] |= bool(expected.any())
    assert all(seen.values())


def test_nothing_is_left_behind_by_an_exception(networks, clip):
    model = networks["b0"]
    hooks = lambda: sum(len(m._forward_hooks) + len(m._backward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    flags, before = [p.requires_grad for p in model.parameters()], hooks()
    with pytest.raises(ZeroDivisionError):
        with MultiScaleGradCAM(model) as explainer: explainer.maps(clip); 1/0
    with pytest.raises(ValueError):
        with MultiScaleGradCAM(model) as explainer: explainer.maps(clip[0])          # a wrong shape stops the forward pass itself
    assert hooks() == before and [p.requires_grad for p in model.parameters()] == flags and all(p.grad is None for p in model.parameters())


def tensors_alive():
    gc.collect()
    return sum(torch.is_tensor(x) for x in gc.get_objects())


def test_no_tensor_stays_alive(networks):
    "The number of tensors after 10 calls is that after 3."
    clip = torch.rand(1, 2, 3, SIDE, SIDE)
    with MultiScaleGradCAM(networks["b0"]) as explainer:
        for _ in range(3): explainer.generate_heatmaps(clip)
        alive = tensors_alive()
        for _ in range(7): explainer.generate_heatmaps(clip)
        assert tensors_alive() <= alive


@pytest.mark.slow
def test_memory_does_not_grow_over_200_calls(networks):
    "Peak memory and the number of tensors alive, after a warm-up."
    clip = torch.rand(1, 2, 3, SIDE, SIDE)
    with MultiScaleGradCAM(networks["b0"]) as explainer:
        for _ in range(20): explainer.generate_heatmaps(clip)
        alive, peak = tensors_alive(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for _ in range(200): explainer.generate_heatmaps(clip)
        assert tensors_alive() <= alive
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 20_000      # kB: less than 100 kB per call


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_the_same_maps_on_a_gpu(networks, clip):
    model = networks["b0"]
    with MultiScaleGradCAM(model, precision="fp32") as explainer: here = explainer.maps(clip)
    with MultiScaleGradCAM(model.cuda(), precision="fp32") as explainer: there = explainer.maps(clip.cuda())
    model.cpu()
    for name, m in here.items(): torch.testing.assert_close(there[name].cpu(), m, rtol=1e-2, atol=1e-2*m.max().item())
