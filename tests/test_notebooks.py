"The notebooks are the source: exporting them must give the package as it is, and they must be clean."
import filecmp
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import yaml

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    "A copy of notebooks and settings, exported and cleaned there."
    folder = tmp_path_factory.mktemp("copy")
    for name in ("settings.ini", "pyproject.toml", "README.md"): shutil.copy(ROOT/name, folder)
    shutil.copytree(ROOT/"nbs", folder/"nbs", ignore=shutil.ignore_patterns(".ipynb_checkpoints"))
    for init in (ROOT/"spotter").rglob("__init__.py"):   # the only files that are written by hand
        (folder/init.relative_to(ROOT)).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(init, folder/init.relative_to(ROOT))
    for tool in ("nbdev_export", "nbdev_clean"):
        command, env = [Path(sys.executable).parent/tool], dict(os.environ, PYTHONPATH=str(folder))
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=env)
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


PAGES = pytest.mark.parametrize("page, notebook", [("README", "index"), ("DATASHEET", "datasheet")])


def render(page: str, notebook: Path, folder: Path, *more: str) -> str:
    "The page as the Makefile's own command makes it in that folder."
    options = next(line for line in (ROOT/"Makefile").read_text().replace("\\\n", "").splitlines() if f"--output {page} " in line)
    options = options.replace("jupyter nbconvert", "nbconvert").split()[1:-1]
    subprocess.run([sys.executable, "-m", *options, *more, str(notebook)], cwd=folder, check=True)
    return (folder/f"{page}.md").read_text()


@PAGES
def test_page_is_what_its_notebook_renders(tmp_path, page, notebook):
    assert render(page, ROOT/"nbs"/f"{notebook}.ipynb", tmp_path) == (ROOT/f"{page}.md").read_text(), "run `make readme`"


@pytest.mark.slow
@PAGES
def test_page_tells_of_the_files_as_they_are(tmp_path, page, notebook):
    text = render(page, ROOT/"nbs"/f"{notebook}.ipynb", tmp_path, "--execute")
    assert text == (ROOT/f"{page}.md").read_text(), "the files have changed since: run `make readme`"


def texts(path): return ["".join(c["source"]) for c in json.loads(path.read_text())["cells"] if c["cell_type"] == "markdown"]


def test_prose_of_pages_and_stages_holds_no_figures():
    "A number in prose outlives the run that it came from; code cells read theirs from files."
    allowed = (r"95 %|100 %|\[1\.00, 1\.00\]|3\.1[12]|2\.0|1\.0|gamma=0,1,2|1803\.09010|2204\.08376|"
               r"recall at 5 % false alarms|0\.5 is chance")
    for path in [*sorted((ROOT/"nbs"/"stages").glob("*.ipynb")), ROOT/"nbs"/"index.ipynb", ROOT/"nbs"/"datasheet.ipynb"]:
        found = [m.group() for text in texts(path) for m in re.finditer(r"\d+[.,]\d+|\d+ ?%", re.sub(allowed, "", text))]
        assert not found, f"{path}: read {found} from a file of the run"


@pytest.mark.slow
def test_readme_follows_the_files(tmp_path):
    for name in ("settings.ini", "pyproject.toml", "params.yaml", "dvc.yaml"): shutil.copy(ROOT/name, tmp_path)
    for name in ("data", "reports", "spotter"): (tmp_path/name).symlink_to(ROOT/name)
    shutil.copytree(ROOT/"metrics", tmp_path/"metrics", ignore=shutil.ignore_patterns("results*")); (tmp_path/"nbs").mkdir()
    shutil.copytree(ROOT/"benchmarks", tmp_path/"benchmarks"); shutil.copytree(ROOT/"results", tmp_path/"results")
    shutil.copy(ROOT/"nbs"/"index.ipynb", tmp_path/"nbs")
    names = ("comparison.csv", "localisation.csv")
    once, places = (pd.read_csv(tmp_path/"metrics"/name) for name in names)
    once.loc[(once.name == "b0") & (once.figure == "auc"), ["value", "lo", "hi"]] = .1234, .0567, .2345
    once = pd.concat([once, once[once.name == "b0"].assign(name="b0_fourth")])
    chosen = (places.source == "b0: shown") & (places.score == "iou") & (places.by == "all")
    places.loc[chosen, ["value", "lo", "hi"]] = .7654, .6543, .8765
    for name, changed in zip(names, (once, places)): changed.to_csv(tmp_path/"metrics"/name, index=False)
    shutil.copytree(tmp_path/"metrics"/"models"/"b0", tmp_path/"metrics"/"models"/"b0_fourth")
    settings = yaml.safe_load((tmp_path/"params.yaml").read_text())
    settings["models"]["b0"]["steps_per_epoch"] = 777
    settings["models"]["b0_fourth"] = settings["models"]["b0"] | dict(image_size=192)   # a fourth model, trained once
    (tmp_path/"params.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))
    options = "--log-level=ERROR --to markdown --execute --output page nbs/index.ipynb".split()
    subprocess.run([sys.executable, "-m", "nbconvert", *options], cwd=tmp_path, check=True)
    page, before = (tmp_path/"nbs"/"page.md").read_text(), (ROOT/"README.md").read_text()
    for said in ("0.12 [0.06, 0.23]", "0.77 [0.65, 0.88]"): assert said in page and said not in before
    steps = re.compile(r"- `b0`: .*?([\d,]+) steps")
    assert steps.search(page)[1] == "6,216" != steps.search(before)[1]
    assert "- `b0_fourth`: EfficientNet-B0 at 192 pixels" in page and "`b0_fourth`" not in before
    header = next(line for line in page.splitlines() if line.startswith("|  |"))
    assert header.split(" | ")[1:] == ["`handmade`", "`b0_plain`", "`b0`", "`b3`", "`b0_fourth` |"]
