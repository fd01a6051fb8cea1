"What a training starts from, its masks, its sequences, and that a killed one continues: across modules, and with processes that load."
import copy
import functools
import hashlib
import json
import warnings
from pathlib import Path

import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from spotter.core import ClipParams, ModelParams, RecipeChanges, apply_overlay, find_root, load_params
from spotter.data.toy import ToyStore
from spotter.model import start_weights
from spotter.model.checkpoint import inspect_checkpoint, load_model, save_model
from spotter.model.network import TemporalCNN_GRU
from spotter.model.pyramid import BACKBONES, FastSqueezeExcite, create_backbone
from spotter.model.start_weights import LITE, grow, lite_state, load_start, start_record
from spotter.train.loop import batch_loss, train
from spotter.train.losses import FocalLoss
from spotter.train.resume import fingerprint
from spotter.train.schedule import lr_factor
from spotter.train.setup import make_loader, make_model, start_session

torch.set_num_threads(1)   # the tests run side by side
SIDE = 64


def settings(**changes):
    "Settings of a tiny B0 without a pyramid; changes of the recipe, or of the model where it has such a setting."
    params = load_params(find_root(Path(__file__).parent)/"params.yaml")
    own = {k: v for k, v in changes.items() if k in ModelParams.model_fields}
    recipe = dict(workers=0, warmup_steps=1, restart_epochs=2, sequence_epochs=0, precision="fp32")
    recipe |= {k: v for k, v in changes.items() if k not in own}
    spec = dict(backbone="efficientnet-b0", image_size=SIDE, use_multiscale=False, use_attention=False, batch_size=4, accumulation=1,
                learning_rate=1e-3, epochs=2, steps_per_epoch=2)
    changed = dict(models={"toy": ModelParams(**spec | own)}, train=params.train.model_copy(update=recipe))
    return params.model_copy(update=changed | dict(threads=1, clips=ClipParams(frames=1, last_frames=2, eval_frames=2)))


# ---------------------------------------------------------------- start weights

@functools.cache
def lite_and_grown(backbone):
    "timm's Lite network with the installed weights, and the backbone grown from it."
    lite = timm.create_model(LITE[backbone].timm_name, num_classes=0, global_pool="").eval()
    lite.load_state_dict(lite_state(backbone))
    torch.manual_seed(0)
    net = create_backbone(backbone).eval()
    grow(net, lite_state(backbone))
    return lite, net


@pytest.mark.parametrize("backbone", BACKBONES)
def test_growth_preserves_the_function(backbone):
    "In float64, with ReLU6 and without squeeze-and-excitation, the grown network's first channels are those of the Lite network."
    lite, net = (copy.deepcopy(m).double() for m in lite_and_grown(backbone))
    for m in net.modules():
        if isinstance(getattr(m, "act", None), nn.SiLU): m.act = nn.ReLU6()
        if isinstance(getattr(m, "se", None), FastSqueezeExcite): m.se = nn.Identity()
    x = torch.randn(1, 3, SIDE, SIDE, dtype=torch.float64)
    with torch.no_grad(): small, large = lite.forward_features(x), net.forward_features(x)
    assert small.abs().max() > .1 and (large[:, :small.shape[1]] - small).abs().max() < 1e-10


def test_what_is_new_can_learn():
    "New channels are not copies of each other, and the zeros that keep the function have gradients."
    net = copy.deepcopy(lite_and_grown("efficientnet-b3")[1]).train()
    net.forward_features(torch.randn(2, 3, SIDE, SIDE)).square().mean().backward()
    assert net.conv_stem.weight[32:].flatten(1).unique(dim=0).shape[0] == 8
    added, cut = net.blocks[0][1].bn2.weight, net.blocks[1][0].conv_pw.weight
    assert not added.any() and added.grad.abs().min() > 0
    assert not cut[:96, 16:].any() and cut.grad[:96, 16:].abs().sum() > 0


def test_another_file_is_refused(tmp_path, monkeypatch):
    weights, path = LITE["efficientnet-b0"], start_weights.lite_file("efficientnet-b0")
    package = tmp_path/"other_package"; (package/"models").mkdir(parents=True); (package/"__init__.py").touch()
    data = bytearray(path.read_bytes()); data[-100] ^= 1
    (package/"models"/weights.file).write_bytes(data)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(LITE, "efficientnet-b0", weights._replace(package="other_package"))
    for use in (lambda: start_record("lite", "efficientnet-b0"), lambda: load_start(TemporalCNN_GRU(), "lite"),
                lambda: make_model(settings(init="lite"), "toy"), lambda: fingerprint(settings(init="lite"), "toy", ToyStore())):
        with pytest.raises(ValueError, match=f"{weights.file} has the SHA-256 .*uv sync --reinstall-package other-package"): use()


@pytest.mark.parametrize("options, said", [(dict(use_attention=True), "use_attention is False, not True"),
                                           (dict(backbone="efficientnet-b3"), "backbone is efficientnet-b0, not efficientnet-b3"),
                                           (dict(use_multiscale=True), "use_multiscale is False, not True")])
def test_a_checkpoint_of_another_architecture_is_refused(tmp_path, options, said):
    save_model(make_model(settings(init="random"), "toy"), tmp_path/"plain.safetensors")
    with pytest.raises(ValueError, match=f"plain.safetensors is a network of another architecture: .*{said}"):
        make_model(settings(init=str(tmp_path/"plain.safetensors"), **options), "toy")


def test_a_missing_file_is_no_reason_to_start_from_something_else(tmp_path):
    for init in (f"{tmp_path}/none.safetensors", f"imagenet:{tmp_path}/none.pth", "lite2"):
        with pytest.raises(FileNotFoundError, match="Choose random, lite, imagenet"): make_model(settings(init=init), "toy")


def test_a_training_continues_another_ones_weights(tmp_path):
    first = make_model(settings(init="random"), "toy")
    save_model(first, tmp_path/"first.safetensors")
    session = start_session(settings(init=str(tmp_path/"first.safetensors")), "toy", ToyStore())
    for (name, a), b in zip(session.bare.state_dict().items(), first.state_dict().values()): assert torch.equal(a.cpu(), b), name


def test_only_random_filters_are_whitened():
    def stem(model): return model.feature_extractor.net.conv_stem.weight.detach().cpu()
    stems = {init: stem(start_session(settings(init=init), "toy", ToyStore()).bare) for init in ("random", "lite")}
    assert torch.equal(stems["lite"], stem(make_model(settings(init="lite"), "toy")))
    w = stems["random"][:27].flatten(1)
    assert torch.allclose(w @ w.T, torch.eye(27), atol=1e-5)


def test_a_model_may_start_elsewhere():
    params = settings(init="lite", train=RecipeChanges(init="random", batch_norm="fixed", backbone_rate=.5))
    recipe = params.recipe("toy")
    assert (recipe.init, recipe.batch_norm, recipe.backbone_rate, recipe.clip_norm) == ("random", "fixed", .5, params.train.clip_norm)
    model = make_model(params, "toy").train()
    assert not model.feature_extractor.net.bn1.training and model.feature_extractor.net.bn1.weight.requires_grad


def test_settings_of_a_model_are_written_like_all_others(tmp_path):
    root = find_root(Path(__file__).parent)
    (tmp_path/"params.yaml").write_text((root/"params.yaml").read_text())
    assert apply_overlay(dict(models=dict(b3=dict(train=dict(init="random")))), tmp_path/"params.yaml") == ["models.b3.train.init"]
    params = load_params(tmp_path/"params.yaml")
    assert (params.recipe("b3").init, params.recipe("b0").init) == ("random", params.train.init)
    with pytest.raises(ValueError, match="models.b3.train.workers: unknown key"):
        apply_overlay(dict(models=dict(b3=dict(train=dict(workers=2)))), tmp_path/"params.yaml")


# ---------------------------------------------------------------- the mask head of a network without a pyramid

def plain(**options):
    torch.manual_seed(0)
    return TemporalCNN_GRU(hidden_size=8, use_attention=False, **options).eval()


def test_a_mask_head_changes_no_logit():
    x = torch.randn(1, 2, 3, 224, 224)
    with torch.no_grad():
        logits = plain()(x)
        found, mask = plain(mask_head=True)(x, return_mask=True)
    assert torch.equal(found, logits) and mask.shape == (1, 2, 7, 7)


def test_the_mask_loss_teaches_it():
    model, x = plain(mask_head=True).train(), torch.randn(2, 1, 3, SIDE, SIDE)
    batch = dict(clip=x, label=torch.tensor([0, 1]), mask=torch.zeros(2, 1, SIDE, SIDE), mask_known=torch.tensor([True, True]))
    batch["mask"][1, 0, :32] = 1
    batch_loss(model, batch, FocalLoss(), mask_weight=2.).backward()
    assert model.mask_head.weight.grad.abs().sum() > 0


def test_old_checkpoints_without_the_key_are_as_they_were(tmp_path):
    "A checkpoint from before there was a mask head: the same logits, no mask without a pyramid, and one with it."
    for pyramid in (False, True):
        model, x = plain(use_multiscale=pyramid), torch.randn(1, 1, 3, SIDE, SIDE)
        save_model(model, tmp_path/"new.safetensors")
        with safe_open(tmp_path/"new.safetensors", "pt") as f: header = json.loads(f.metadata()["spotter"])
        del header["config"]["mask_head"]
        save_file(load_file(tmp_path/"new.safetensors"), tmp_path/"old.safetensors", {"spotter": json.dumps(header)})
        old = load_model(tmp_path/"old.safetensors")
        with torch.no_grad(): assert torch.equal(old(x), model(x))
        assert old.has_mask == pyramid


def test_a_mask_head_is_saved_and_loaded(tmp_path):
    model, x = plain(mask_head=True), torch.randn(1, 1, 3, SIDE, SIDE)
    save_model(model, tmp_path/"a.safetensors")
    with torch.no_grad(): assert torch.equal(load_model(tmp_path/"a.safetensors")(x, return_mask=True)[1], model(x, return_mask=True)[1])


# ---------------------------------------------------------------- few clips

def test_a_training_on_fewer_clips_than_a_batch_ends_and_says_so(tmp_path):
    params = settings(init="random", batch_size=16, steps_per_epoch=0, accumulation=2)
    with pytest.warns(UserWarning, match="4 training clips are fewer than a batch of 16.*add clips, or lower models.toy.batch_size"):
        history = train(params, "toy", ToyStore(pairs=3), tmp_path/"out", tmp_path/"live", tmp_path/"resume")
    assert len(history) == 2 and history.train_loss.gt(0).all() and (tmp_path/"out"/"weights.safetensors").is_file()


def test_a_training_on_enough_clips_says_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(make_loader(settings(batch_size=4, steps_per_epoch=0), "toy", ToyStore(pairs=3))) == 1


@pytest.mark.parametrize("cycle", [(0, 2), (2, 0), (-1, 1)])
def test_a_schedule_that_would_never_end_is_refused(cycle):
    with pytest.raises(ValueError, match=f"cycles of {cycle[0]} steps, each {cycle[1]} times as long .* 1 or more"): lr_factor(0, *cycle)


# ---------------------------------------------------------------- sequences, and continuing

class Killed(Exception): pass


class BreakingStore(ToyStore):
    "Kills the process that loads the training clips in its third epoch; each process counts its own reads."
    reads = 0
    def read(self, *args):
        self.reads += 1
        if self.reads > 2*8 + 2: raise Killed("killed")
        return super().read(*args)


def test_a_killed_training_with_sequences_ends_with_the_same_bytes(tmp_path):
    "With a process that loads and lives through the epochs: all but the head frozen in the first one, two frames a clip in the third."
    changes = dict(epochs=3, unfreeze_epoch=1, trainable_blocks=0, sequence_epochs=1)
    params, stores = settings(init="lite", workers=1, **changes), dict(whole=ToyStore(), broken=ToyStore())
    def run(name, store): return train(params, "toy", store, tmp_path/name, tmp_path/f"{name}_live", tmp_path/f"{name}_resume")
    whole = run("whole", stores["whole"])
    with pytest.raises(Killed): run("broken", BreakingStore())
    assert (tmp_path/"broken_resume"/"toy"/"progress.json").is_file()
    assert run("broken", stores["broken"]).equals(whole)
    for name in ("weights", "last"):
        digests = {hashlib.sha256((tmp_path/run/f"{name}.safetensors").read_bytes()).hexdigest() for run in ("whole", "broken")}
        assert len(digests) == 1
    record = inspect_checkpoint(tmp_path/"whole"/"last.safetensors").metadata["init"]
    assert record == dict(kind="lite", file=LITE["efficientnet-b0"].file, sha256=LITE["efficientnet-b0"].sha256)
