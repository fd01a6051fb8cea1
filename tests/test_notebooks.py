"The notebooks are the source: exporting them must give the package as it is, and they must be clean."
import filecmp
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    "A copy of notebooks and settings, exported and cleaned there."
    folder = tmp_path_factory.mktemp("copy")
    for name in ("settings.ini", "pyproject.toml", "README.md"): shutil.copy(ROOT/name, folder)
    shutil.copytree(ROOT/"nbs", folder/"nbs", ignore=shutil.ignore_patterns(".ipynb_checkpoints"))
    (folder/"spotter").mkdir()
    shutil.copy(ROOT/"spotter"/"__init__.py", folder/"spotter")
    for tool in ("nbdev_export", "nbdev_clean"):
        done = subprocess.run([Path(sys.executable).parent/tool], cwd=folder, capture_output=True, text=True, env=dict(os.environ, PYTHONPATH=str(folder)))
        assert done.returncode == 0, done.stderr
    return folder


def files(folder, pattern): return sorted(p.relative_to(folder) for p in folder.rglob(pattern) if ".ipynb_checkpoints" not in p.parts)


def test_package_is_what_the_notebooks_export(copy):
    names = files(ROOT/"spotter", "*.py")
    assert names == files(copy/"spotter", "*.py"), "run nbdev_export, and delete modules that no notebook writes"
    differ = [str(name) for name in names if not filecmp.cmp(ROOT/"spotter"/name, copy/"spotter"/name, shallow=False)]
    assert not differ, f"edit nbs/, run nbdev_export, commit both: {differ}"


def test_notebooks_are_clean(copy):
    differ = [str(name) for name in files(ROOT/"nbs", "*.ipynb") if not filecmp.cmp(ROOT/"nbs"/name, copy/"nbs"/name, shallow=False)]
    assert not differ, f"run nbdev_clean: {differ}"


@pytest.mark.parametrize("page, notebook", [("README", "index"), ("DATASHEET", "datasheet")])
def test_page_is_what_its_notebook_renders(tmp_path, page, notebook):
    options = next(line for line in (ROOT/"Makefile").read_text().replace("\\\n", "").splitlines() if f"--output {page} " in line)
    command = [sys.executable, "-m", *options.replace("jupyter nbconvert", "nbconvert").split()[1:-1], str(ROOT/"nbs"/f"{notebook}.ipynb")]
    subprocess.run(command, cwd=tmp_path, check=True)
    assert (tmp_path/f"{page}.md").read_text() == (ROOT/f"{page}.md").read_text(), "run `make readme`"
