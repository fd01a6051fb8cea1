"""What a figure of a GPU run has to be traced to: device, libraries, code, settings, clips; and how busy the device was."""
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import threading
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

LIBRARIES = "torch", "torchvision", "timm", "accelerate", "numpy", "pandas", "scikit-learn", "opencv-python-headless", "opencv-python"


def commit(
    root: Path,
    packed: dict,   # pack.json
) -> str:
    "Commit of the checkout, with a + where files differ from it; where there is no git repository, the one that was packed."
    def git(*arguments): return subprocess.run(["git", "-C", root, *arguments], capture_output=True, text=True)
    found = git("rev-parse", "HEAD") if shutil.which("git") else None
    if found is None or found.returncode: return packed.get("commit", "unknown")
    return found.stdout.strip() + ("+" if git("status", "--porcelain", "--untracked-files=no").stdout.strip() else "")


def code_hash(root: Path) -> str:
    "SHA-256 over the package and the settings, which tells runs of different code apart where there is no git."
    digest = hashlib.sha256()
    for path in sorted([*(root/"spotter").rglob("*.py"), *(root/"benchmarks").rglob("*.py"), root/"params.yaml"]):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def machine(device: str) -> dict:
    "The device, the processor and the libraries."
    libraries = {}
    for name in LIBRARIES:
        try: libraries[name] = version(name)
        except PackageNotFoundError: continue
    about = dict(device=device, processor=_processor(), cores=os.cpu_count(), python=platform.python_version(), libraries=libraries)
    if device != "cuda": return about
    return about | dict(gpu=torch.cuda.get_device_name(), memory_gib=round(torch.cuda.get_device_properties(0).total_memory/2**30, 1),
                        capability=".".join(map(str, torch.cuda.get_device_capability())), cuda=torch.version.cuda,
                        cudnn=torch.backends.cudnn.version())


def _processor() -> str:
    "Model of the processor, as Linux names it."
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.*)", cpuinfo.read_text()) if cpuinfo.is_file() else None
    return found[1] if found else platform.processor()


class Utilisation:
    "How busy a GPU is, asked of nvidia-smi twice a second while the context lasts. Without nvidia-smi there is nothing to know."
    def __init__(self, device: str):
        self.samples, self.process = [], None   # (time.monotonic(), percent of the time in which a kernel ran)
        self.asked = device == "cuda" and shutil.which("nvidia-smi") is not None

    def __enter__(self):
        if self.asked:
            command = ["nvidia-smi", "--query-gpu=utilization.gpu", "--format=csv,noheader,nounits", "-lms", "500", "-i", "0"]
            self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
            threading.Thread(target=self._read, daemon=True).start()
        return self

    def _read(self):
        for line in self.process.stdout:
            if line.strip().isdigit(): self.samples.append((time.monotonic(), int(line)))

    def __exit__(self, *error):
        if self.process: self.process.terminate(); self.process.wait()

    def since(self, start: float) -> float | None:  # percent, a mean; None when it is not known
        "Mean since a time of `time.monotonic`."
        found = [percent for moment, percent in list(self.samples) if moment >= start]
        return round(sum(found)/len(found), 1) if found else None


def write(path: Path, data: dict):
    "JSON with the numbers that were measured; NumPy's and infinite numbers are written as text or as plain ones."
    path.write_text(json.dumps(data, indent=2, default=lambda x: x.item() if hasattr(x, "item") else str(x)) + "\n")
