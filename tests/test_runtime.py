"What everything else stands on: settings, worker processes, the files that a piece of code depends on."
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from spotter.core import find_root, load_params
from spotter.runtime import in_processes, reached_files, resolve_threads, resolve_workers

ROOT = find_root(Path(__file__).parent)


@pytest.mark.parametrize("module, banned", [
    ("spotter.core", {"torch", "cv2"}),
    ("spotter.runtime", {"torch", "cv2"}),
    ("spotter.data.prepare", {"torch", "torchvision"}),          # its worker processes are new interpreters
    ("spotter.data.loader", {"torchvision", "torch._dynamo"}),   # prediction needs it, and no augmentation
])
def test_slow_imports_are_left_to_those_who_need_them(module, banned):
    code = f"import sys, {module}; sys.exit(', '.join({banned} & {{*sys.modules}}) or 0)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, f"{module} imports {done.stderr}"


def test_wrong_settings_are_named(tmp_path):
    text = (ROOT/"params.yaml").read_text()
    (tmp_path/"params.yaml").write_text(re.sub(r"learning_rate: \S+", "learning_rate: 2e-3", text.replace("seed: 0", "sed: 0")))
    with pytest.raises(ValueError, match="wrong setting") as e: load_params(tmp_path/"params.yaml")
    assert "sed: unknown key" in str(e.value) and "seed: missing" in str(e.value) and "YAML reads 1e-4 as text" in str(e.value)


def test_reached_files_follow_folders_and_imports_inside_functions():
    reached = {p.relative_to(ROOT/"spotter").as_posix() for p in reached_files("from spotter.data import ClipDataset")}
    assert reached == {"core.py", *(f"data/{name}.py" for name in ("augment", "loader", "sampling"))}


def double(x): return 2*x


@pytest.mark.parametrize("workers", [0, 2])
def test_results_keep_the_order_of_the_items(workers): assert list(in_processes(double, range(5), workers)) == [0, 2, 4, 6, 8]


def test_a_fixed_number_of_threads_stays(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert resolve_threads(7) == 7 and resolve_threads("auto") == 1 and resolve_workers(3, "auto") == 3


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system has no affinity masks")
def test_automatic_threads_are_the_cores_that_a_process_may_use():
    "Of a machine with more cores a process with a mask gets those in the mask, and with one core no process loads clips."
    code = ("import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
            "import torch; from spotter.runtime import *\n"
            "seed_everything(0, 'auto'); print(resolve_threads(), torch.get_num_threads(), resolve_workers('auto', 'auto', 'cpu'))")
    env = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=env)
    assert done.stdout.split() == ["1", "1", "0"], done.stderr


@pytest.mark.parametrize("old, new, said", [
    ("threads: auto", "threads: 0", "threads: should be auto or a whole number from 1 on, got 0"),
    ("workers: auto", "workers: many", "train.workers: should be auto or a whole number from 0 on, got 'many'")])
def test_other_numbers_of_threads_and_loader_processes_are_refused(tmp_path, old, new, said):
    (tmp_path/"params.yaml").write_text((ROOT/"params.yaml").read_text().replace(old, new))
    with pytest.raises(ValueError, match=said): load_params(tmp_path/"params.yaml")
