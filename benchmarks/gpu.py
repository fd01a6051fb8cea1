"""Train and judge the models of params.yaml on one GPU without DVC or package registry: from .dvcstore and the face tables alone.

Here, where `dvc repro prepare` has run:
    python benchmarks/gpu.py pack gpu_pack     # face tables, reference crops; prints the sizes, and how to get the wheels
There, in a copy of the checkout (.dvcstore included) with the folder gpu_pack in it:
    pip install --no-index --no-deps gpu_pack/wheels/*.whl && python benchmarks/gpu.py check --out OUT
    python benchmarks/gpu.py run --out OUT --minutes 8

`run` trains every model with the first seed, then with the next one, and starts nothing that would not end in time. A run's tables are
in OUT/tables.tar.gz when it ends; those of the heatmaps follow from processes beside it. Steps of 32 clips leave a large card idle
five sixths of the time: with --trainings, several runs are trained beside each other. `check` measures the device. Both need PyTorch,
torchvision, timm, accelerate, safetensors, scikit-learn, pandas, pyarrow, OpenCV with FFmpeg, SciPy, matplotlib, seaborn, PyYAML, tqdm.

Crops and augmentation are on the device. Settings are those of params.yaml, but for the clips of a step and the number of steps; recipe,
losses, choice of the epoch, calibration and evaluation are the package's own functions.
"""
import argparse
import json
import multiprocessing
import os
import pickle
import shutil
import sys
import tarfile
import tempfile
import time
import tomllib
import traceback
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

STARTED = time.monotonic()
ROOT = Path(__file__).resolve().parents[1]
WHEELS = ("fastcore", "pydantic", "pydantic-core", "ruamel-yaml", "typing-inspection", "annotated-types", "lazy-loader")
LIMIT = 25e6     # bytes that may travel
PART = 15 << 20  # bytes of a file that comes back, at most
GRACE = 60       # seconds after the end of the trainings, in which evaluations may end


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    "The command line."
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    pack = commands.add_parser("pack", help="gather what must travel beside the checkout")
    pack.add_argument("out", type=Path, help="folder; made anew, but for the wheels in it")
    run, check = commands.add_parser("run", help="train and evaluate"), commands.add_parser("check", help="measure the device")
    for command in (run, check):
        command.add_argument("--out", type=Path, required=True, help="folder of the results; at most eight files")
        command.add_argument("--pack", type=Path, default=ROOT/"gpu_pack", help="folder that `pack` made")
        command.add_argument("--root", type=Path, default=ROOT, help="the checkout")
        command.add_argument("--models", nargs="+", help="keys of params.yaml; all by default")
        command.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
        command.add_argument("--clips", type=int, default=32, help="clips of a training step")
        command.add_argument("--threads", type=int, default=os.cpu_count(), help="that decode and scale crops")
        command.add_argument("--tiny", action="store_true", help="two identity pairs of each split at 64 pixels: a rehearsal")
    run.add_argument("--minutes", type=float, default=8, help="from the start of this program; then no training runs on")
    run.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    run.add_argument("--steps", type=int, default=0, help="of each training; by default as many as the time allows, at most 3000")
    run.add_argument("--study", action="store_true", help="afterwards also the trainings of results/params.yaml")
    run.add_argument("--keep", default="", help="name of the run whose checkpoint comes back, in bf16 and in parts")
    run.add_argument("--evaluators", type=int, default=4, help="processes that score heatmaps; 0: each run waits for its scores")
    run.add_argument("--trainings", type=int, default=1, help="processes that train beside each other; more than one need --steps")
    check.add_argument("--steps", type=int, default=50, help="of the two trainings that are compared")
    args = parser.parse_args(arguments)
    if args.command == "run" and args.trainings > 1 and not args.steps:
        parser.error("--trainings needs --steps: how long a step takes beside others is not measured")
    return args


def say(text: str): print(f"[{time.monotonic() - STARTED:5.0f} s] {text}", flush=True)


# ---------------------------------------------------------------- what travels

def wheel_command(out: Path) -> str:
    "How pip downloads the wheels that the machine lacks, in the versions of uv.lock."
    locked = {p["name"]: p["version"] for p in tomllib.loads((ROOT/"uv.lock").read_text())["package"]}
    names = " ".join(f"{name}=={locked[name]}" for name in WHEELS)
    return ("pip download --no-deps --only-binary=:all: --python-version 3.12 --platform manylinux_2_17_x86_64 "
            f"--platform manylinux2014_x86_64 --platform any -d {out/'wheels'} {names}")


def pack_start(
    backbone: str,
    target: Path,   # safetensors
):
    "Write the ImageNet weights that a backbone starts from in half precision: the packages that hold them are too large to travel."
    import torch
    from safetensors.torch import save_file
    from spotter.model.start_weights import LITE, lite_state
    target.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: t.half().contiguous() if t.is_floating_point() else t for name, t in lite_state(backbone).items()}, target,
              {"source": LITE[backbone].file, "sha256": LITE[backbone].sha256})


def pack(out: Path):
    "Gather face tables, reference crops and weights in a folder, and say how to get the wheels."
    from on_gpu import corpus, record
    from spotter.core import load_params
    clips, _, _ = corpus.read_tables(ROOT/"faces")
    files = corpus.tracked_files(ROOT)
    if lost := [p for p in clips.path if p not in files]:
        raise ValueError(f"{ROOT/'faces'}: {lost[0]} is not in data.dvc: the crops are of other clips; run `dvc repro prepare`")
    wheels = {p.name: p.read_bytes() for p in (out/"wheels").glob("*.whl")}   # downloaded before
    shutil.rmtree(out, ignore_errors=True); (out/"wheels").mkdir(parents=True)
    for name, data in wheels.items(): (out/"wheels"/name).write_bytes(data)
    for name in corpus.TABLES: shutil.copy(ROOT/"faces"/name, out)
    params = load_params(ROOT/"params.yaml")
    for backbone in {spec.backbone for key, spec in params.models.items() if params.recipe(key).init == "lite"}:
        pack_start(backbone, out/"start"/f"{backbone}.safetensors")
    corpus.write_references(ROOT/"faces", out/"references")
    record.write(out/"pack.json", dict(data=corpus.data_hash(ROOT), commit=record.commit(ROOT, {})))
    sizes = {p.relative_to(out): p.stat().st_size for p in sorted(out.rglob("*")) if p.is_file()}
    for path, size in sizes.items(): print(f"{size/1e6:8.2f} MB  {path}")
    print(f"{sum(sizes.values())/1e6:8.2f} MB  in all, of {LIMIT/1e6:.0f}")
    if not wheels: print(f"The wheels are missing. Get them with\n{wheel_command(out)}")
    if sum(sizes.values()) > LIMIT: raise SystemExit(f"{out} is larger than the {LIMIT/1e6:.0f} MB that may travel")


# ---------------------------------------------------------------- settings and crops

def settings(args: argparse.Namespace):
    "The settings of params.yaml, or those of a rehearsal. `SystemExit` for an unknown model."
    from spotter.core import load_params
    params = load_params(args.root/"params.yaml")
    unknown = [m for m in args.models or [] if m not in params.models]
    if unknown: raise SystemExit(f"no model {unknown[0]!r} in {args.root/'params.yaml'}: choose of {', '.join(params.models)}")
    if not args.tiny: return params
    models = {key: spec.model_copy(update=dict(image_size=64, epochs=min(3, spec.epochs))) for key, spec in params.models.items()}
    def changed(section, **values): return section.model_copy(update=values)
    return changed(params, models=models, faces=changed(params.faces, size=96), evaluate=changed(params.evaluate, resamples=20))


def read_pack(folder: Path) -> dict:
    "pack.json. `SystemExit` that says how to get it."
    if not (folder/"pack.json").is_file(): raise SystemExit(f"{folder}: no pack.json; make the folder with `gpu.py pack {folder.name}`")
    return json.loads((folder/"pack.json").read_text())


@dataclass
class Bench:
    "What trainings and checks work on."
    args: argparse.Namespace
    scratch: Path
    params: "Params"
    store: "CropStore"
    strong: "CropStore | None"   # strongly compressed test clips, where the corpus has them
    about: dict                  # what the figures have to be traced to

    @cached_property
    def crops(self) -> "DeviceClips":
        "Those of the training split, on the device of this process."
        from on_gpu import training
        return training.DeviceClips(self.store, self.store.clips.query("split == 'train'"), self.args.device)

    def __getstate__(self) -> dict: return {name: value for name, value in self.__dict__.items() if name != "crops"}


def prepare(args: argparse.Namespace, scratch: Path) -> Bench:
    "Read settings and tables, and cut the crops."
    from on_gpu import corpus, record
    from spotter.runtime import resolve_precision
    params, packed, data = settings(args), read_pack(args.pack), corpus.data_hash(args.root)
    if packed["data"] != data:
        raise SystemExit(f"{args.pack} was packed for the clips {packed['data']}, but {args.root/'data.dvc'} names {data}: pack again")
    about = dict(commit=record.commit(args.root, packed), code_sha256=record.code_hash(ROOT), data_md5=data, tiny=args.tiny,
                 started=time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()), command=" ".join(sys.argv[1:]),
                 machine=record.machine(args.device), precision=resolve_precision(params.train.precision, args.device),
                 clips_per_step=args.clips, settings=params.model_dump())
    say(f"{about['machine'].get('gpu', about['machine']['processor'])}, {about['precision']}")
    files, (clips, index, excluded) = corpus.tracked_files(args.root), corpus.read_tables(args.pack)
    if args.tiny: clips = corpus.first_pairs(clips, 2)
    store = corpus.cut_store(files, clips, index, excluded, scratch/"crops", params.faces.size, args.threads)
    clips, index = corpus.compressed(clips, index, files)
    strong = corpus.cut_store(files, clips, index, excluded, scratch/"strong", params.faces.size, args.threads) if len(clips) else None
    about["difference_from_prepared_crops"] = corpus.reference_difference(args.pack/"references", files, store)
    say(f"{len(store.index)} crops of {len(store.clips)} clips and {len(strong.index) if strong else 0} strongly compressed ones are cut; "
        f"grey levels from the prepared ones: {about['difference_from_prepared_crops']}")
    return Bench(args, scratch, params, store, strong, about)


# ---------------------------------------------------------------- trainings

def steps_that_fit(
    rates: dict[str, float],     # model -> seconds of a step
    models: list[str],           # of each run
    seconds: float,              # for all of them
    extra: float = 8,            # seconds of a run beside its steps
    most: int = 3000,
) -> int:
    "Steps of each run with which all runs fit; a tenth is kept back for the drift of the machine."
    return max(1, min(most, int((.9*seconds - extra*len(models))/sum(rates[m] for m in models))))


def choose_steps(bench: Bench, runs: list["Run"], deadline: float) -> int:
    "Steps of each run: as asked for, or as many as fit by a short measurement."
    from on_gpu import checks, training
    if bench.args.steps: return bench.args.steps
    models = [run.model for run in runs]
    rates = {m: checks.step_seconds(training.run_params(bench.params, training.Run(m, m, 0), bench.args.clips, 1000), m, bench.store,
                                    bench.crops, 10)[0] for m in dict.fromkeys(models)}
    steps = steps_that_fit(rates, models, deadline - time.monotonic())
    say("seconds of a step: " + ", ".join(f"{m} {s:.4f}" for m, s in rates.items()) + f"; {steps} steps of each run fit")
    return steps


def judged_sets(bench: Bench, sizes: set[int]) -> dict[str, tuple["DataFrame", dict[int, "Tensor"]]]:
    "For validation and each prediction table: the clips, and what the network gets of them, by its input size."
    from on_gpu import training
    store, strong, args = bench.store, bench.strong, bench.args
    parts = {"val": (store, store.clips.query("split == 'val'")), "predictions.csv": (store, store.clips.query("split == 'test'"))}
    if strong: parts["predictions_c40.csv"] = strong, strong.clips
    def scaled(where, clips):
        return {s: training.staged(where, clips, bench.params.clips.eval_frames, s, "cpu", args.threads) for s in sorted(sizes)}
    return {name: (clips.reset_index(drop=True), scaled(where, clips)) for name, (where, clips) in parts.items()}


def one_run(bench: Bench, run: "Run", steps: int, sets: dict, deadline: float) -> dict:
    "Train a run, write its tables and its checkpoint. What the summary says of it."
    from on_gpu import evaluation, record, training
    folder, start = bench.scratch/"runs"/run.name, time.monotonic()
    folder.mkdir(parents=True)
    params, part = training.run_params(bench.params, run, bench.args.clips, steps), run.part(bench.store)
    size, val = params.models[run.model].image_size, part.clips.query("split == 'val'")
    clips, inputs = sets["val"]
    seen = inputs[size][clips.clip_id.isin(val.clip_id).to_numpy().nonzero()[0].tolist()]
    trained = training.train_run(params, run.model, part, bench.crops, seen, lambda: time.monotonic() > deadline,
                                 training.packed_start(bench.params, run.model, bench.args.pack), run.name)
    def logits(x): return training.logits_of(trained.model, x, params.train.precision)
    tests = {name: (clips, logits(inputs[size])) for name, (clips, inputs) in sets.items() if name != "val"}
    found = evaluation.write_verdicts(trained.model, (logits(seen), val.label.to_numpy()), tests, folder)
    trained.history.to_csv(folder/"history.csv", index=False, float_format="%.6f")
    row = dict(status="cut short" if trained.cut_short else "done", steps=trained.steps, epoch=trained.epoch,
               seconds=round(time.monotonic() - start, 1), images_per_second=round(trained.images/trained.seconds, 1),
               val_auc=float(trained.history.val_auc[trained.epoch]), test_auc=found["auc"])
    init = training.packed_record(bench.params, run.model, bench.args.pack)
    fitted = {name: getattr(trained.model, name) for name in ("temperature", "bias", "prevalence", "threshold")} | dict(metrics=found)
    record.write(folder/"run.json", bench.about | dict(run=row, settings=params.model_dump(), init=init) | fitted)
    evaluation.save_weights(trained, weights := weights_of(bench.scratch, run.name), params, run, init)
    if run.name == bench.args.keep: evaluation.split_checkpoint(weights, bench.args.out, PART)   # again when its heatmaps are scaled
    return row


def weights_of(scratch: Path, name: str) -> Path: return scratch/"weights"/f"{name}.safetensors"


def get_ready(device: str):
    "Import what a training needs, while the crops are cut."
    import torch
    from on_gpu import evaluation, training   # noqa: F401
    torch.zeros(1, device=device)


_own: dict = {}   # of a process that trains: what `train_all` left for it, and how long a run of each model took


def train_one(scratch: Path, run: "Run", steps: int, deadline: float) -> dict:
    "The job of a process that trains: what the summary says of the run."
    start = time.monotonic()
    if not _own:
        import torch
        bench = pickle.loads((scratch/"bench.pickle").read_bytes())
        sets = torch.load(scratch/"staged.pt", weights_only=False, mmap=True)
        def moved(inputs): return {size: x.to(bench.args.device) for size, x in inputs.items()}
        _own.update(bench=bench, sets={name: (clips, moved(inputs)) for name, (clips, inputs) in sets.items()}, took={})
    row, took = dict(started=start), _own["took"]
    if start >= deadline or start + took.get(run.model, 0) > deadline + GRACE/3:
        return row | dict(status="not started: the time is over")
    try: row |= one_run(_own["bench"], run, steps, _own["sets"], deadline)
    except Exception as e:   # of one run: the others are trained, and the exit status says that one failed
        traceback.print_exc(); row["status"] = f"failed: {type(e).__name__}: {e}"
    took[run.model] = max(took.get(run.model, 0), time.monotonic() - start)
    return row


def write_tables(folder: Path, out: Path):
    "Pack the tables of all runs so far into one file, which is there whole or as it was before."
    with tarfile.open(out/"tables.part", "w:gz") as tar: tar.add(folder, arcname="runs")
    (out/"tables.part").replace(out/"tables.tar.gz")


def summarise(rows: dict[str, dict], tables: Path, done: dict[str, dict], lost: dict[str, str]):
    "Add what the evaluations found, as far as they came, to the rows of the runs."
    for name, reason in lost.items(): rows[name]["evaluation"] = reason; say(f"{name}: {reason}")
    for name in (*done, *lost):
        file = tables/name/"metrics.json"
        if not file.is_file(): continue
        metrics = json.loads(file.read_text())
        rows[name] |= {f"test_auc_{end}": metrics["auc"][end] for end in ("lo", "hi")} | dict(ece=metrics["ece"]["value"])
        if "localisation" not in metrics: continue
        pooled = metrics["localisation"]["pooled"]["all fakes"]["scores"]
        rows[name] |= dict(shown_map=metrics["localisation"]["shown_map"])
        rows[name] |= {f"pooled AP of {source}": score["value"] for source, score in pooled.items()}
    for name, metrics in done.items(): rows[name] |= dict(evaluation_seconds=round(metrics["seconds"], 1))


def train_all(args: argparse.Namespace, scratch: Path) -> int:
    "The command `run`; its exit status."
    import pandas as pd, torch
    from on_gpu import evaluation, record, training
    trainers = ProcessPoolExecutor(args.trainings, multiprocessing.get_context("spawn"))   # forks cannot use CUDA
    for _ in range(args.trainings): trainers.submit(get_ready, args.device)
    bench, deadline, tables = prepare(args, scratch), STARTED + 60*args.minutes, scratch/"runs"
    study = training.study_runs(args.root) if args.study else {}
    runs = training.planned_runs(args.models or list(bench.params.models), args.seeds, bench.params.seed, study)
    if args.keep and args.keep not in {run.name for run in runs}:
        raise SystemExit(f"--keep {args.keep}: no such run, only {', '.join(run.name for run in runs)}")
    evaluators = evaluation.Evaluators(args.evaluators, 1 if args.trainings > 1 else max(1, (os.cpu_count() or 1)//4))
    torch.save(judged_sets(bench, {bench.params.models[run.model].image_size for run in runs}), scratch/"staged.pt")
    (scratch/"bench.pickle").write_bytes(pickle.dumps(bench))
    steps = choose_steps(bench, runs, deadline)
    rows = {run.name: dict(model=run.model, seed=run.seed, pairs=run.pairs, without=run.without) for run in runs}
    say(f"{len(runs)} runs of {steps} steps, {args.trainings} at a time")
    with record.Utilisation(args.device) as utilisation, trainers:
        jobs = {trainers.submit(train_one, scratch, run, steps, deadline): run for run in runs}
        for job in as_completed(jobs):
            run = jobs[job]
            try: row = job.result()
            except Exception as e: row = dict(started=time.monotonic(), status=f"failed: {type(e).__name__}: {e}")   # its process ended
            rows[run.name] |= row | dict(gpu_percent=utilisation.since(row["started"]))
            if rows[run.name].pop("started") and row["status"] in ("done", "cut short"):
                params = training.run_params(bench.params, run, args.clips, steps)
                evaluators.submit(run.name, weights_of(scratch, run.name), tables/run.name, run.part(bench.store), params, args.device)
                write_tables(tables, args.out)
            say(f"{run.name}: " + ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in rows[run.name].items()))
        done, lost = evaluators.finished(max(0, deadline + GRACE - time.monotonic()))
    summarise(rows, tables, done, lost)
    if args.keep in done: evaluation.split_checkpoint(weights_of(scratch, args.keep), args.out, PART)
    if tables.is_dir(): write_tables(tables, args.out)
    pd.DataFrame.from_dict(rows, orient="index").rename_axis("name").to_csv(args.out/"summary.csv")
    record.write(args.out/"run.json", bench.about | dict(steps=steps, seconds=round(time.monotonic() - STARTED, 1), runs=rows))
    say(f"{len(done)} of {len(runs)} runs are trained and evaluated: {args.out}/summary.csv, run.json, tables.tar.gz")
    return 0 if len(done) == len(runs) else 1


# ---------------------------------------------------------------- checks

def check_all(args: argparse.Namespace, scratch: Path) -> int:
    "The command `check`; its exit status."
    from on_gpu import checks, corpus, record, training
    from spotter.model.checkpoint import save_model
    bench = prepare(args, scratch)
    params, store, crops, found = bench.params, bench.store, bench.crops, bench.about
    def note(name, value):
        found[name] = value
        record.write(args.out/"check.json", found)   # at once, in case that the time ends
        say(f"{name}: {value}")
    def own(key, clips): return training.run_params(params, training.Run(key, key, params.seed), clips, 1000)
    note("seconds until the crops were on the device", round(time.monotonic() - STARTED, 1))
    models = args.models or list(params.models)
    key = next((m for m in models if params.models[m].use_multiscale), models[-1])
    repeated, model = checks.repeatability(own(key, args.clips), key, store, crops, args.steps)
    note("repeatability", repeated)
    fakes = store.clips.query("split == 'test' and label == 1")
    for tf32 in (False, True):
        name = f"maps against the processor's, {'with' if tf32 else 'without'} TF32"
        note(name, checks.agreement(model, store, fakes, params.clips.eval_frames, args.device, tf32))
    seconds = checks.video_seconds(model, store, fakes.clip_id.iloc[0], args.device, params.train.precision)
    note("a video's seconds in the network", seconds)
    save_model(model, scratch/"check.safetensors", faces=params.faces.model_dump(), frames=params.clips.eval_frames)
    video = corpus.tracked_files(args.root)[fakes.path.iloc[0]]
    note(f"predict --device {args.device}", checks.predicted(video, scratch/"check.safetensors", args.device))
    with record.Utilisation(args.device) as utilisation:
        for clips in (args.clips, 4*args.clips) if args.device == "cuda" else (args.clips,):
            for key in models:
                start = time.monotonic()
                speed = checks.speeds(own(key, clips), key, store, crops, 1 if args.tiny else 20)
                note(f"images a second, {key}, {clips} clips a step", speed | dict(gpu_percent=utilisation.since(start)))
    say(f"written to {args.out/'check.json'}")
    return 0


def main() -> int:
    args = parse()
    root = str((ROOT if args.command == "pack" else args.root).resolve())
    sys.path.insert(0, root)   # processes that evaluate are told
    os.environ |= dict(TQDM_DISABLE="1", CUBLAS_WORKSPACE_CONFIG=":4096:8", HF_HUB_OFFLINE="1")
    if args.command == "pack": pack(args.out); return 0
    if args.device == "cpu": os.environ["CUDA_VISIBLE_DEVICES"] = ""   # accelerate takes a GPU where it sees one
    settings(args); read_pack(args.pack)   # what is wrong there is said before anything takes long
    import torch
    if args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit(f"PyTorch {torch.__version__} sees no CUDA device here; for a rehearsal say --device cpu --tiny")
    args.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="spotter-gpu-") as scratch:
        return (train_all if args.command == "run" else check_all)(args, Path(scratch))


if __name__ == "__main__": sys.exit(main())
