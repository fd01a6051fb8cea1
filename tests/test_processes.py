"A training in two processes on a CPU: the curve of one process, each validation clip once, and what is left when one is killed."
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

from spotter.data.toy import ToyStore
from spotter.model.checkpoint import inspect_checkpoint, load_model
from spotter.train.launch import train_together
from test_train import settings

torch.set_num_threads(1)
# fixed statistics: others are of a process's part of the batch. The backbone is freed in the second epoch, the fourth is of sequences
RECIPE = dict(init="lite", batch_norm="fixed", epochs=4, unfreeze_epoch=1, trainable_blocks=0, sequence_epochs=1, accumulation=2,
              mask_loss=1.)


class HalfMasked(ToyStore):
    "Every other fake has no mask, so that the processes know different numbers of them."
    def __init__(self):
        super().__init__()
        self.clips.loc[self.clips.clip_id.str.startswith("fake") & (self.clips.target_id.astype(int) % 2 == 1), "has_mask"] = False


class NotedStore(HalfMasked):
    "Notes which clips are read, and by whom."
    def __init__(self, notes):
        super().__init__()
        self.notes = notes

    def read(self, clip_id, positions):
        with open(self.notes/f"{os.getpid()}.txt", "a") as file: file.write(f"{clip_id}\n")
        return super().read(clip_id, positions)


class DeadlyStore(HalfMasked):
    "Kills the second process in the third epoch; an epoch is two parts of two clips, and four validation clips."
    reads = 0
    def read(self, clip_id, positions):
        self.reads += 1
        if os.environ.get("RANK") == "1" and self.reads == 2*(2*2 + 4) + 3: os.kill(os.getpid(), signal.SIGKILL)
        return super().read(clip_id, positions)


class NoNumberStore(HalfMasked):
    "Says something in the second process that is no picture."
    def read(self, clip_id, positions):
        if os.environ.get("RANK") == "1": raise ValueError(f"{clip_id}: the shard is damaged")
        return super().read(clip_id, positions)


def run(folder, name, store, processes):
    params = settings(**RECIPE)
    params = params.model_copy(update=dict(train=params.train.model_copy(update=dict(processes=processes))))
    return train_together(params, "toy", store, folder/name, folder/f"{name}_live", folder/f"{name}_resume")


@pytest.mark.slow
def test_two_processes_give_the_curve_of_one(tmp_path):
    for name in ("notes1", "notes2"): (tmp_path/name).mkdir()
    one, two = (run(tmp_path, f"run{n}", NotedStore(tmp_path/f"notes{n}"), n) for n in (1, 2))
    assert np.abs(one[["train_loss", "val_loss"]] - two[["train_loss", "val_loss"]]).max().max() < 1e-4, (one, two)
    assert np.allclose(one.val_auc, two.val_auc) and one.learning_rate.equals(two.learning_rate)
    weights = [load_model(tmp_path/f"run{n}"/"last.safetensors").state_dict() for n in (1, 2)]
    apart = max((a.float() - weights[1][name].float()).abs().max().item() for name, a in weights[0].items())
    assert apart < 1e-3, apart
    notes = {n: sorted((tmp_path/f"notes{n}").glob("*.txt")) for n in (1, 2)}
    read = {n: [p.read_text().split() for p in paths] for n, paths in notes.items()}
    assert [len(r) for r in read.values()] == [1, 2] and sorted(sum(read[2], [])) == sorted(read[1][0]), "no clip twice, none left out"
    val = set(HalfMasked().clips.query("split == 'val'").clip_id)
    seen = [[c for c in r if c in val] for r in read[2]]
    assert not set(seen[0]) & set(seen[1]) and set(seen[0]) | set(seen[1]) == val
    assert sorted(sum(seen, [])) == sorted([*val]*4), "each validation clip once in each of four epochs"
    metadata = [inspect_checkpoint(tmp_path/f"run{n}"/"weights.safetensors").metadata for n in (1, 2)]
    assert metadata[0] == metadata[1]
    assert [("processes" in (tmp_path/f"run{n}_live"/"machine.json").read_text()) for n in (1, 2)] == [False, True]
    for n in (1, 2):
        assert sorted(p.name for p in (tmp_path/f"run{n}").iterdir()) == ["last.safetensors", "weights.safetensors"]
        assert not [*(tmp_path/f"run{n}_resume").iterdir()]


@pytest.mark.slow
def test_a_killed_process_ends_the_run_and_the_training_goes_on(tmp_path, capfd):
    whole = run(tmp_path, "whole", HalfMasked(), 2)
    with pytest.raises(RuntimeError, match="process . of 2 .*the others were ended. Its log is .*stderr.log.*run the same again") as told:
        run(tmp_path, "broken", DeadlyStore(), 2)
    log = Path(str(told.value).partition("Its log is ")[2].partition(". What the training")[0])
    assert log.is_file() and (tmp_path/"broken_resume"/"toy"/"progress.json").is_file()
    again = run(tmp_path, "broken", HalfMasked(), 2)
    assert again.equals(whole)
    for name in ("last", "weights"):
        a, b = (load_model(tmp_path/run/f"{name}.safetensors").state_dict() for run in ("whole", "broken"))
        assert all(torch.equal(t, b[key]) for key, t in a.items())


@pytest.mark.slow
def test_an_error_in_a_process_is_told(tmp_path):
    with pytest.raises(RuntimeError, match="of 2 ended with exit code 1.*Its log is"):
        run(tmp_path, "damaged", NoNumberStore(), 2)


def test_a_batch_that_cannot_be_shared_is_refused(monkeypatch):
    from spotter.train.devices import check_shares
    with pytest.raises(ValueError, match="models.toy.batch_size is 4, which 3 processes cannot share evenly"): check_shares(3, "toy", 4, 9)
    params = settings(**RECIPE)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    two = params.model_copy(update=dict(train=params.train.model_copy(update=dict(processes=2))))
    with pytest.raises(ValueError, match="train.processes is 2, but this machine has 1 GPUs"):
        train_together(two, "toy", ToyStore(), "out", "live", "resume")
