"The order of the folders, public names, the dependencies of DVC's stages, and the length of lines: read from the sources, nothing is run."
import ast
import copy
import graphlib
import json
import re
from functools import lru_cache
from pathlib import Path

import pytest
import yaml

from spotter.runtime import reached_files

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT/"spotter"
ORDER = ["core", "runtime", "executors", "data", "synth", "model", "explain", "metrics", "train", "evaluate", "predict", "cli"]
PIPELINES = ["dvc.yaml", "results/dvc.yaml"]


# ---------------------------------------------------------------- imports between the folders

def modules() -> dict[str, Path]:
    "Names of the package's modules, without its `__init__.py` files."
    found = {p.relative_to(ROOT).with_suffix(""): p for p in sorted(PACKAGE.rglob("*.py")) if p.stem not in ("__init__", "_modidx")}
    return {".".join(name.parts): path for name, path in found.items()}


def imported(path: Path, known: dict[str, Path]) -> set[str]:
    "Modules of the package that a file imports, inside functions too."
    found, above = set(), path.relative_to(ROOT).parts[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import): names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ".".join([*(above[:len(above) - node.level + 1] if node.level else ()), *filter(None, [node.module])])
            names = [base, *(f"{base}.{alias.name}" for alias in node.names)]
        else: continue
        found |= {name for name in names if name in known}
    return found


def test_every_folder_has_its_place():
    there = {p.stem for p in PACKAGE.glob("*.py")} | {p.parent.name for p in PACKAGE.glob("*/__init__.py")}
    assert there - {"__init__", "_modidx"} == set(ORDER)


def test_a_module_imports_only_from_folders_before_its_own():
    known = modules()
    place = lambda name: ORDER.index(name.split(".")[1])
    wrong = [f"{name} imports {other}" for name, path in known.items() for other in imported(path, known) if place(other) > place(name)]
    assert not wrong, wrong


def test_no_modules_import_each_other_in_a_circle():
    known = modules()
    graph = {name: imported(path, known) for name, path in known.items()}
    list(graphlib.TopologicalSorter(graph).static_order())   # CycleError names the circle


def test_the_core_imports_neither_torch_nor_opencv_nor_dask_at_the_top():
    for name in ("core", "runtime", "executors"):
        top = [node for node in ast.parse((PACKAGE/f"{name}.py").read_text()).body if isinstance(node, (ast.Import, ast.ImportFrom))]
        names = {alias.name for node in top for alias in node.names} | {getattr(node, "module", "") for node in top}
        assert not names & {"torch", "cv2", "timm", "torchvision", "distributed"}, (name, names)


# ---------------------------------------------------------------- public names

def public_names(init: Path) -> dict[str, list[str]]:
    "Names by module, of a folder's `__init__.py`, which holds a docstring and a call of lazy_loader and nothing else."
    text, load, names = ast.parse(init.read_text()).body
    assert isinstance(text.value, ast.Constant) and ast.unparse(load) == "import lazy_loader"
    assert ast.unparse(names.targets[0]) == "(__getattr__, __dir__, __all__)" and ast.unparse(names.value.func) == "lazy_loader.attach"
    (name,), (table,) = names.value.args, names.value.keywords
    assert ast.unparse(name) == "__name__" and table.arg == "submod_attrs"
    return ast.literal_eval(table.value)


def defined(path: Path) -> set[str]:
    "Names that a module binds at its top level by a definition or an assignment."
    body = ast.parse(path.read_text()).body
    targets = [t for node in body if isinstance(node, ast.Assign) for target in node.targets for t in ast.walk(target)]
    return {t.id for t in targets if isinstance(t, ast.Name)} | {n.name for n in body if isinstance(n, (ast.FunctionDef, ast.ClassDef))}


@pytest.mark.parametrize("init", sorted(PACKAGE.glob("*/__init__.py")), ids=lambda p: p.parent.name)
def test_public_names_are_defined_where_the_folder_says(init):
    for module, names in public_names(init).items():
        assert (init.parent/f"{module}.py").is_file(), module
        assert set(names) <= defined(init.parent/f"{module}.py"), (module, set(names) - defined(init.parent/f"{module}.py"))


@pytest.mark.parametrize("folder, names", dict(
    data="index_dataset ClipStore ClipDataset",
    model="TemporalCNN_GRU MultiScaleFeatureExtractor SpatialAttentionModule load_model save_model inspect_checkpoint",
    explain="MultiScaleGradCAM",
    metrics="classification_metrics localisation_metrics",
    train="FocalLoss train",
    predict="Detector").items())
def test_names_that_others_rely_on_are_public(folder, names):
    assert set(names.split()) <= {n for found in public_names(PACKAGE/folder/"__init__.py").values() for n in found}


# ---------------------------------------------------------------- what stages depend on

def load_stages(path: str) -> dict[str, dict]:
    "The stages of a dvc.yaml; of a `foreach` what is done for each."
    return {name: stage.get("do", stage) for name, stage in yaml.safe_load((ROOT/path).read_text())["stages"].items()}


def code_of(notebook: Path) -> str:
    "Code cells of a notebook without lines for IPython."
    cells = json.loads(notebook.read_text())["cells"]
    lines = [line for c in cells if c["cell_type"] == "code" for line in "".join(c["source"]).splitlines()]
    return "\n".join("" if line.startswith(("%", "!")) else line for line in lines)


@lru_cache
def reached(notebook: str) -> list[str]:
    "Files of the package that a stage notebook reaches, relative to the project."
    return [p.relative_to(ROOT).as_posix() for p in reached_files(code_of(ROOT/notebook), root=ROOT)]


def notebooks_of(stage: dict) -> list[str]:
    return list(dict.fromkeys(re.findall(r"nbs/stages/\w+\.ipynb", json.dumps(stage["cmd"]))))


def covers(dep: str, file: str) -> bool: return file == dep or file.startswith(f"{dep}/")


def wrong_deps(stages: dict[str, dict], path: str) -> list[str]:
    "What the `deps` of stages lack, and what they name in vain."
    found = []
    for name, stage in stages.items():
        files = {file: notebook for notebook in notebooks_of(stage) for file in reached(notebook)}
        deps = [d for d in stage["deps"] if covers("spotter", d)]
        missing = [file for file in files if not any(covers(d, file) for d in deps)]
        needless = [d for d in deps if not any(covers(d, file) for file in files)]
        said = [f"{files[file]} reaches {file}, which no dep covers; add it, or its folder" for file in missing]
        said += [f"no notebook of the stage reaches {d}; take it out of the deps" for d in needless]
        said += [f"{notebook} is not among the deps" for notebook in notebooks_of(stage) if notebook not in stage["deps"]]
        found += [f"{path}, stage {name}: {text}" for text in said]
    return found


@pytest.mark.parametrize("path", PIPELINES)
def test_stages_depend_on_every_module_that_they_reach(path):
    assert not (found := wrong_deps(load_stages(path), path)), "\n".join(found)


@pytest.mark.parametrize("path", PIPELINES)
def test_a_dep_that_is_taken_out_is_missed(path):
    stages, tried = load_stages(path), 0
    for name, stage in stages.items():
        for dep in [d for d in stage["deps"] if covers("spotter", d)]:
            less = copy.deepcopy(stages); less[name]["deps"].remove(dep)
            found = [f for f in wrong_deps(less, path) if f.startswith(f"{path}, stage {name}: ") and f" reaches {dep}" in f]
            assert found, (name, dep); tried += 1
    assert tried > 20


@pytest.mark.parametrize("path", PIPELINES)
def test_a_dep_that_nothing_reaches_is_named(path):
    stages = load_stages(path); stages["prepare"]["deps"].append("spotter/predict")
    assert f"{path}, stage prepare: no notebook of the stage reaches spotter/predict; take it out of the deps" in wrong_deps(stages, path)


@pytest.mark.parametrize("path", PIPELINES)
def test_figures_intervals_and_commands_retrain_nothing(path):
    deps = load_stages(path)["train"]["deps"]
    folders = "explain", "evaluate", "predict", "synth"
    later = [p.relative_to(PACKAGE).as_posix() for folder in folders for p in (PACKAGE/folder).glob("*.py")]
    for file in [*later, "metrics/bootstrap.py", "metrics/localisation.py", "data/video.py", "cli.py"]:
        assert not any(covers(d, f"spotter/{file}") for d in deps), file


@pytest.mark.parametrize("path", PIPELINES)
def test_figures_prepare_nothing_again(path):
    for file in ("evaluate/figures.py", "metrics/bootstrap.py", "cli.py"):
        assert not any(covers(d, f"spotter/{file}") for d in load_stages(path)["prepare"]["deps"]), file


def test_the_fingerprint_of_a_training_covers_no_more_than_its_stage():
    files = [p.relative_to(ROOT).as_posix() for p in reached_files("from spotter.train.loop import train", root=ROOT)]
    assert all(any(covers(d, file) for d in load_stages("dvc.yaml")["train"]["deps"]) for file in files)


@pytest.mark.parametrize("path", PIPELINES)
def test_no_stage_names_a_model(path):
    "Models come from params.yaml alone."
    text = re.sub(r"^\s*#.*$", "", (ROOT/path).read_text(), flags=re.M)
    for key in yaml.safe_load((ROOT/"params.yaml").read_text())["models"]: assert not re.search(rf"\b{key}\b", text), key


# ---------------------------------------------------------------- lines

def code_lines(path: Path) -> list[str]:
    "Lines of a Python file, or of a notebook's code cells."
    if path.suffix == ".py": return path.read_text().splitlines()
    return [line for c in json.loads(path.read_text())["cells"] if c["cell_type"] == "code" for line in "".join(c["source"]).splitlines()]


def test_lines_of_code_end_before_140_characters():
    paths = [p for pattern in ("nbs/**/*.ipynb", "tests/*.py", "benchmarks/**/*.py") for p in sorted(ROOT.glob(pattern))]
    paths = [p for p in paths if ".ipynb_checkpoints" not in p.parts]
    long = [(p.relative_to(ROOT), len(line), line.strip()[:60]) for p in paths for line in code_lines(p) if len(line) >= 140]
    assert not long, "\n".join(f"{path}: {length} characters: {start} …" for path, length, start in long)
