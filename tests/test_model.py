"The network: its scales, gradients, sizes, and frozen statistics."
import copy
import functools

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from spotter.model.network import TemporalCNN_GRU
from spotter.model.pyramid import BACKBONES, SCALES

torch.set_num_threads(1)   # the tests run side by side
SIDE = 64                  # of frames, where the size is not the point
GRIDS = {"efficientnet-b0": dict(fine=28, mid=14, semantic=7), "efficientnet-b3": dict(fine=38, mid=19, semantic=10)}
PARAMETERS = {"efficientnet-b0": (15e6, 19.5e6), "efficientnet-b3": (22e6, 28.5e6)}


def count(module): return sum(p.numel() for p in module.parameters())


@functools.cache
def full_model(backbone, **options):
    "A network in eval mode, made once. A test that changes it takes a copy."
    torch.manual_seed(0)
    return TemporalCNN_GRU(**dict(backbone=backbone, use_multiscale=True, use_attention=True) | options).eval()


def settle(model, size):
    "Batch-norm statistics of a batch of noise: with fresh ones, random weights make activations die out."
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d): m.momentum = 1.
    with torch.no_grad(): model.train()(torch.randn(2, 2, 3, size, size))
    return model.eval()


@pytest.mark.parametrize("multiscale", [True, False])
@pytest.mark.parametrize("backbone", BACKBONES)
def test_scales_and_strides(backbone, multiscale):
    "The three layers give the documented grids at native size, and exactly size / stride cells where the strides divide the size."
    model, size, shapes = full_model(backbone, use_multiscale=multiscale), BACKBONES[backbone].image_size, {}
    def note(name): return lambda module, args, out: shapes.update({name: out.shape[-2:]})
    hooks = [layer.register_forward_hook(note(name)) for name, layer in model.get_multiscale_layers().items()]
    with torch.no_grad(): model(torch.randn(1, 1, 3, size, size))
    assert {name: tuple(s) for name, s in shapes.items()} == {name: (n, n) for name, n in GRIDS[backbone].items()}
    with torch.no_grad(): model(torch.randn(1, 1, 3, 128, 128))
    assert {name: 128 / s[0] for name, s in shapes.items()} == SCALES
    for hook in hooks: hook.remove()


@pytest.mark.parametrize("backbone", BACKBONES)
def test_every_parameter_gets_a_gradient(backbone):
    model = copy.deepcopy(full_model(backbone)).train()
    nn.functional.cross_entropy(model(torch.randn(2, 2, 3, SIDE, SIDE)), torch.tensor([0, 1])).backward()
    dead = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not dead


@pytest.mark.parametrize("backbone", BACKBONES)
def test_each_scale_reaches_the_logits(backbone):
    "Without one input of the pyramid the logits change. In fp64, where rounding is ten orders of magnitude below the bound."
    model, x = settle(copy.deepcopy(full_model(backbone)), SIDE).double(), torch.randn(1, 2, 3, SIDE, SIDE).double()
    with torch.no_grad(): whole = model(x)
    for name, lateral in model.feature_extractor.pyramid.lateral.items():
        hook = lateral.register_forward_pre_hook(lambda m, args: (torch.zeros_like(args[0]),))
        with torch.no_grad(): assert (model(x) - whole).abs().max() > 1e-5, f"the {name} scale does not reach the logits"
        hook.remove()
    with torch.no_grad(): assert torch.equal(model(x), whole)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_sizes(backbone):
    model, (low, high) = full_model(backbone), PARAMETERS[backbone]
    assert low <= count(model) <= high
    assert count(model.spatial_attention) <= 120_000


@pytest.mark.parametrize("backbone", BACKBONES)
def test_pyramid_and_attention_add_a_tenth_at_most(backbone):
    "Counted at native size, on tensors without data."
    size = BACKBONES[backbone].image_size
    def cost(*modules):
        x = torch.randn(1, 3, size, size, device="meta")
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            for m in modules:
                x = copy.deepcopy(m).to("meta")(x)
                x = x[0] if isinstance(x, tuple) else x  # beside the features a module may return a map
        return counter.get_total_flops()
    model = full_model(backbone)
    plain = cost(full_model(backbone, use_multiscale=False).feature_extractor)
    assert 0 < plain and cost(model.feature_extractor, model.spatial_attention) <= 1.1 * plain


def test_the_plain_model_has_neither_pyramid_nor_attention():
    model = full_model("efficientnet-b0", use_multiscale=False, use_attention=False)
    assert model.feature_extractor.pyramid is None and model.spatial_attention is None


def test_outputs():
    model, x = full_model("efficientnet-b0"), torch.randn(2, 3, 3, 96, 96)
    with torch.no_grad():
        logits, temporal = model(x, return_temporal=True)
        again, attention = model(x, return_attention=True)
        assert model(x).shape == logits.shape == (2, 2) and torch.equal(logits, again)
    assert temporal.shape == (2, 3, 1024) and attention.shape == (2, 3, 3, 3)
    assert 0 <= attention.min() and attention.max() <= 1


def test_channels_last_from_the_constructor():
    weight = full_model("efficientnet-b0").feature_extractor.net.conv_stem.weight
    assert weight.is_contiguous(memory_format=torch.channels_last)


def test_the_whole_backbone_trains_by_default():
    assert all(p.requires_grad for p in full_model("efficientnet-b0").parameters())


def test_frozen_batch_norm_stays_frozen():
    with pytest.warns(UserWarning, match="frozen at random weights"): model = TemporalCNN_GRU(freeze_backbone=True)
    net = model.feature_extractor.net
    before = {name: b.clone() for name, b in net.named_buffers()}
    model.train()
    model(torch.randn(2, 2, 3, SIDE, SIDE)).sum().backward()
    frozen = [name for name, b in net.named_buffers() if torch.equal(b, before[name])]
    assert "bn1.running_mean" in frozen and "blocks.0.0.bn1.running_mean" in frozen and "blocks.5.1.bn1.running_mean" in frozen
    assert "blocks.6.0.bn1.running_mean" not in frozen and "bn2.running_mean" not in frozen
    assert net.conv_stem.weight.grad is None and net.blocks[6][0].conv_pw.weight.grad is not None
    model.unfreeze(); model.train()
    model(torch.randn(2, 2, 3, SIDE, SIDE)).sum().backward()
    assert not torch.equal(net.bn1.running_mean, before["bn1.running_mean"]) and net.conv_stem.weight.grad is not None


def test_pretrained_without_a_hub_says_what_to_do(monkeypatch):
    monkeypatch.setattr("spotter.model.pyramid.hf_hub_download", lambda *a, **k: (_ for _ in ()).throw(OSError("no route")))
    with pytest.raises(ConnectionError, match="train.init: lite"): TemporalCNN_GRU(pretrained=True)
