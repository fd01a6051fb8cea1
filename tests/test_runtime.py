"What everything else stands on: settings, worker processes, the files that a piece of code depends on."
import subprocess
import sys
from pathlib import Path

import pytest

from spotter.core import find_root, load_params
from spotter.runtime import in_processes, reached_files

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
    (tmp_path/"params.yaml").write_text(text.replace("seed: 0", "sed: 0").replace("learning_rate: 2.0e-3", "learning_rate: 2e-3"))
    with pytest.raises(ValueError, match="wrong setting") as e: load_params(tmp_path/"params.yaml")
    assert "sed: unknown key" in str(e.value) and "seed: missing" in str(e.value) and "YAML reads 1e-4 as text" in str(e.value)


def test_reached_files_follow_folders_and_imports_inside_functions():
    reached = {p.relative_to(ROOT/"spotter").as_posix() for p in reached_files("from spotter.data import ClipDataset")}
    assert reached == {"core.py", *(f"data/{name}.py" for name in ("augment", "loader", "sampling"))}


def double(x): return 2*x


@pytest.mark.parametrize("workers", [0, 2])
def test_results_keep_the_order_of_the_items(workers): assert list(in_processes(double, range(5), workers)) == [0, 2, 4, 6, 8]
