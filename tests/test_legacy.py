"Checkpoints of the predecessor, made with `efficientnet_pytorch`, on which it was built: the same logits, however they were saved."
import argparse
import collections
import copy
import functools
import os
import pathlib
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torchvision
from efficientnet_pytorch import EfficientNet
from safetensors.torch import save_file
from torch import nn

from spotter.model.checkpoint import inspect_checkpoint, load_model, save_model
from spotter.model.legacy import OLD_FORMAT
from spotter.model.network import TemporalCNN_GRU
from spotter.model.pyramid import BACKBONES

torch.set_num_threads(1)   # the tests run side by side
KINDS = {"b0": ("efficientnet-b0", False, False), "b0 with attention": ("efficientnet-b0", True, False),
         "b0 at several scales": ("efficientnet-b0", False, True), "b3 at several scales": ("efficientnet-b3", True, True)}
WRAPPED = {"raw": lambda state: state,
           "training": lambda state: {"model": state, "epoch": 4, "optimizer": {"step": torch.zeros(1)}},
           "compiled": lambda state: {f"_orig_mod.{k}": v for k, v in state.items()},
           "compiled training": lambda state: {"model": WRAPPED["compiled"](state), "epoch": 4},
           "parallel": lambda state: {f"module.{k}": v for k, v in state.items()},
           "parallel and compiled training": lambda state: {"state_dict": WRAPPED["parallel"](WRAPPED["compiled"](state)), "epoch": 4},
           "training with a record": lambda state: beside(collections.OrderedDict(state))}


def beside(state: dict) -> dict:
    "What training scripts save beside the weights."
    return collections.OrderedDict(model_state_dict=state, epoch=np.int64(4), auc=np.float32(.5), best=np.bool_(True), run=np.str_("b0"),
                                   args=argparse.Namespace(lr=.1, out=Path("runs/a"), device=torch.device("cpu")), out=Path("/runs/a"),
                                   windows=pathlib.PureWindowsPath("C:/runs/a"), optimizer=collections.OrderedDict(step=torch.zeros(1)))


NOTES = dict(epoch=4, auc=.5, best=True, run="b0", out="/runs/a", windows="C:\\runs\\a")


class OldAttention(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.channel_attn = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(width, width//8, 1), nn.ReLU(),
                                          nn.Conv2d(width//8, width, 1), nn.Sigmoid())
        self.spatial_attn = nn.Sequential(nn.Conv2d(width, width//8, 1), nn.ReLU(), nn.Conv2d(width//8, 1, 1), nn.Sigmoid())

    def forward(self, x):
        x = x*self.channel_attn(x)
        return x*self.spatial_attn(x)


class OldScales(nn.Module):
    "The backbone in three pieces, and a fusion whose result was not used."
    def __init__(self, net: EfficientNet, width: int):
        super().__init__()
        n = len(net._blocks)
        self.block3 = nn.ModuleList([net._conv_stem, net._bn0, *net._blocks[:n//3]])
        self.block5 = nn.ModuleList(net._blocks[n//3:2*n//3])
        self.block7 = nn.ModuleList([*net._blocks[2*n//3:], net._conv_head, net._bn1])
        self.fusion = nn.Sequential(nn.Conv2d(width, 8, 1), nn.ReLU(), nn.Conv2d(8, width, 1))


class Old(nn.Module):
    def __init__(self, backbone: str, attention: bool, scales: bool, hidden: int = 512):
        super().__init__()
        self.backbone, width = EfficientNet.from_name(backbone), BACKBONES[backbone].feature_dim
        self.feature_extractor = OldScales(self.backbone, width) if scales else self.backbone
        if attention: self.spatial_attention = OldAttention(width)
        self.temporal = nn.GRU(width, hidden, 2, batch_first=True, bidirectional=True)
        self.classifier = nn.Sequential(nn.Linear(4*hidden, 512), nn.ReLU(), nn.Dropout(.3), nn.Linear(512, 128), nn.ReLU(),
                                        nn.Dropout(.3), nn.Linear(128, 2))

    def forward(self, x):
        features = self.backbone.extract_features(x.flatten(0, 1))
        if hasattr(self, "spatial_attention"): features = self.spatial_attention(features)
        temporal, _ = self.temporal(features.mean((2, 3)).unflatten(0, x.shape[:2]))
        return self.classifier(torch.cat([temporal.mean(1), temporal.amax(1)], 1))


@functools.cache
def old(kind):
    "A network of the predecessor whose batch-norms have seen data, a clip, and its logits. At native size, for which the package pads."
    backbone, attention, scales = KINDS[kind]
    torch.manual_seed(len(kind))
    model, size = Old(backbone, attention, scales), BACKBONES[backbone].image_size
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    for m in norms: m.momentum = 1.; nn.init.uniform_(m.weight, .5, 1.5); nn.init.normal_(m.bias, std=.2)
    with torch.no_grad():
        model.train()(torch.randn(2, 2, 3, size, size))
        for m in norms: m.running_mean += .1*torch.randn_like(m.running_mean)
        nn.init.normal_(model.classifier[-1].weight, std=.5)
        clip = torch.randn(1, 2, 3, size, size)
        return model.eval(), clip, model(clip)


def pairs():
    "Each kind in one wrapping, and each wrapping around one kind; the other pairs are slow tests."
    for i, kind in enumerate(KINDS):
        for j, wrapped in enumerate(WRAPPED):
            once = i == j or (i == 0 and j >= len(KINDS))
            yield pytest.param(kind, wrapped, marks=() if once else pytest.mark.slow, id=f"{kind}-{wrapped}".replace(" ", "_"))


@pytest.mark.parametrize("kind, wrapped", pairs())
def test_old_networks_give_their_logits_again(kind, wrapped, tmp_path):
    (backbone, attention, _), (model, clip, logits) = KINDS[kind], old(kind)
    path = tmp_path/"spotter_v1.pth"
    torch.save(WRAPPED[wrapped](model.state_dict()), path)
    ours, info = load_model(path), inspect_checkpoint(path)
    with torch.no_grad(): torch.testing.assert_close(ours(clip), logits, rtol=0, atol=1e-4)
    assert logits.abs().max() > .01 and not ours.training
    assert (info.backbone, info.use_multiscale, info.use_attention, info.format) == (backbone, False, attention, OLD_FORMAT)
    assert info.image_size == clip.shape[-1] and (ours.temperature, ours.bias, ours.prevalence, ours.threshold) == (1, 0, .5, .5)
    fusion = [n for n in model.state_dict() if "fusion" in n]
    assert [n for n in info.ignored if "fusion" in n] == fusion and bool(info.ignored) and info.missing == []
    assert set(info.ignored) - set(fusion) <= {"backbone._fc.weight", "backbone._fc.bias"}
    assert info.metadata == (NOTES if "record" in wrapped else {"epoch": 4} if "training" in wrapped else {})


@pytest.mark.parametrize("kind", [pytest.param(k, marks=() if k == "b0 with attention" else pytest.mark.slow) for k in KINDS])
def test_saved_again_it_is_one_of_ours(kind, tmp_path):
    model, clip, logits = old(kind)
    torch.save(model.state_dict(), tmp_path/"old.pth")
    save_model(load_model(tmp_path/"old.pth"), tmp_path/"new.safetensors", origin="old.pth")
    with torch.no_grad(): torch.testing.assert_close(load_model(tmp_path/"new.safetensors")(clip), logits, rtol=0, atol=1e-4)


@pytest.fixture(scope="module")
def plain():
    return Old("efficientnet-b0", True, False, hidden=8).state_dict()


def broken(state: dict) -> dict:
    "What must not be loaded, and what the error says."
    def less(*parts): return {k: v for k, v in state.items() if not k.startswith(parts)}
    return {"another network": ({f"strange.{i}.weight": torch.zeros(4, 4) for i in range(3)}, "not a network of the .*predecessor"),
            "two networks": (state | {f"module.{k}": v for k, v in state.items()}, "twice"),
            "no recurrent network": (less("temporal."), "recurrent network is missing"),
            "half a recurrent network": (less("temporal.weight_hh_l1"), "do not fit"),
            "no classifier": (less("classifier."), "0 layers"),
            "half an attention": (less("spatial_attention.spatial_attn"), "spatial_attn has 0 layers"),
            "a missing block": (less("backbone._blocks.7.", "feature_extractor._blocks.7."), "missing"),
            "other widths": (state | {"classifier.0.weight": torch.zeros(512, 99)}, "do not fit"),
            "two different backbones": (state | {"feature_extractor._bn1.bias": torch.full((1280,), 9.)}, "no copy"),
            "numbers": ({"epoch": 3}, "no tensors"),
            "a list": ([1, 2], "holds a list")}


@pytest.mark.parametrize("kind", broken({}))
def test_what_does_not_fit_is_refused(plain, kind, tmp_path):
    content, reason = broken(plain)[kind]
    torch.save(content, tmp_path/"strange.pth")
    with pytest.raises(ValueError, match=f"strange.pth.*{reason}"): load_model(tmp_path/"strange.pth")


@functools.cache
def foreign(kind: str) -> dict:
    "State dicts of other programs; DeepfakeBench's with the names that its source gives them."
    nets = dict(timm=lambda: timm.create_model("tf_efficientnet_b0", num_classes=2),
                imagenet=lambda: EfficientNet.from_name("efficientnet-b0"),
                resnet=torchvision.models.resnet18, torchvision=lambda: torchvision.models.efficientnet_b0(num_classes=1),
                vit=lambda: timm.create_model("vit_tiny_patch16_224"))
    if kind in nets: return nets[kind]().state_dict()
    layers = dict(bench=("backbone.efficientnet._conv_stem.weight", "backbone.efficientnet._blocks.0._bn1.weight",
                         "backbone.last_layer.weight"),
                  xception=("backbone.conv1.weight", "backbone.block1.rep.0.conv1.weight", "backbone.last_linear.1.weight"),
                  ucf=("encoder_f.conv1.weight", "encoder_c.conv1.weight", "con_gan.conv_last.weight"))
    return {name: torch.zeros(2, 3) for name in layers[kind]}


FOREIGN = dict(timm="a timm EfficientNet with 2 classes, .* it has conv_stem.weight and blocks.0.0.conv_",
               imagenet="an EfficientNet of the package efficientnet_pytorch with the 1000 classes of .* it has _conv_stem.weight",
               resnet="a ResNet with the 1000 classes of ImageNet, .* it has layer1.0.conv1.weight",
               torchvision="a torchvision EfficientNet with 1 class, .* it has features.0.0.weight",
               vit="a vision transformer with the 1000 .* cls_token",
               bench="a detector of DeepfakeBench, .* it has backbone.efficientnet._conv_stem.weight and backbone.last_layer.weight",
               xception="a detector of DeepfakeBench, .* backbone.block1.rep",
               ucf="UCF, a detector of DeepfakeBench, .* it has encoder_f.conv1.weight")


@pytest.mark.parametrize("kind", FOREIGN)
def test_a_foreign_network_is_named(kind, tmp_path):
    torch.save({"state_dict": {f"module.{k}": v for k, v in foreign(kind).items()}, "epoch": 3}, tmp_path/"foreign.pth")
    save_file(foreign(kind), tmp_path/"foreign.safetensors")
    for name in ("foreign.pth", "foreign.safetensors"):
        for read in (load_model, inspect_checkpoint):
            with pytest.raises(ValueError, match=f"{name} looks like {FOREIGN[kind]}") as told: read(tmp_path/name)
            assert "not a Spotter checkpoint: it has" in str(told.value)


def test_a_network_of_ours_without_its_settings_is_named(tmp_path):
    torch.save(TemporalCNN_GRU(hidden_size=8).state_dict(), tmp_path/"ours.pth")
    with pytest.raises(ValueError, match="ours.pth looks like a network of Spotter without its settings, which save_model writes"):
        load_model(tmp_path/"ours.pth")


class Custom:
    "A class of a training script."


REFUSED = {"an object": lambda: Custom(), "a function": lambda: len, "an array": lambda: np.ones(2), "a network": lambda: nn.Linear(2, 2),
           "a partial": lambda: functools.partial(print, 1), "a dictionary with a default": lambda: collections.defaultdict(list)}
NAMED = ["test_legacy.Custom", "len", "numpy._core.multiarray._reconstruct", "torch.nn.modules.linear.Linear", "functools.partial",
         "collections.defaultdict"]


@pytest.mark.parametrize("kind, name", zip(REFUSED, NAMED))
def test_what_is_not_on_the_list_is_refused_by_name(plain, kind, name, tmp_path):
    torch.save({"model": plain, "beside": REFUSED[kind]()}, tmp_path/"more.pth")
    with pytest.raises(ValueError, match=f"more.pth carries code: .* {name} would have to be run.* save the weights alone: torch.save"):
        load_model(tmp_path/"more.pth")


@pytest.mark.parametrize("zipped", [True, False])
def test_what_stands_beside_the_weights_is_read_and_not_made(plain, zipped, tmp_path, monkeypatch):
    "No constructor of NumPy's, argparse or pathlib is called by the file; a PosixPath could not even be made on Windows."
    torch.save(beside(plain), tmp_path/"beside.pth", _use_new_zipfile_serialization=zipped)
    def never(*_, **__): raise AssertionError("a constructor was called")
    monkeypatch.setattr(argparse.Namespace, "__init__", never); monkeypatch.setattr(argparse.Namespace, "__setattr__", never)
    monkeypatch.setattr(pathlib.PosixPath, "__new__", never)
    monkeypatch.setattr(np._core.multiarray, "scalar", never)
    assert inspect_checkpoint(tmp_path/"beside.pth").metadata == NOTES


class Trap:
    def __init__(self, marker: Path): self.marker = str(marker)
    def __reduce__(self): return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_pickle_never_runs(plain, zipped, tmp_path):
    torch.save({"model": plain, "config": Trap(tmp_path/"ran")}, tmp_path/"trap.pth", _use_new_zipfile_serialization=zipped)
    for read in (load_model, inspect_checkpoint):
        with pytest.raises(ValueError, match="trap.pth.*carries code.*(posix|nt).system would have to be run"): read(tmp_path/"trap.pth")
    assert not (tmp_path/"ran").exists()
    torch.load(tmp_path/"trap.pth", weights_only=False)
    assert (tmp_path/"ran").exists()   # the trap works


def test_damaged_files_are_named(plain, tmp_path):
    torch.save(copy.copy(plain), tmp_path/"whole.pth")
    save_file({"w": torch.zeros(4)}, tmp_path/"other.safetensors")
    data = (tmp_path/"whole.pth").read_bytes()
    contents = {"cut.pth": data[:len(data)//2], "text.pth": b"no weights here", "empty.pth": b"", "zeros.pth": bytes(1000),
                "cut.safetensors": (tmp_path/"other.safetensors").read_bytes()[:60]}
    for name, content in contents.items(): (tmp_path/name).write_bytes(content)
    for name in (*contents, "other.safetensors"):
        with pytest.raises(ValueError, match=name): load_model(tmp_path/name)
    with pytest.raises(FileNotFoundError, match="make repro"): load_model(tmp_path/"gone.pth")
