"""Size and time of codecs on stored face crops and masks: `python benchmarks/crop_codec.py`.

Writes results/crop_codec.csv, which nbs/1_data/35_codec.ipynb shows. Minutes on one core; needs the prepared crops (`dvc repro prepare`).
JPEG XL is measured where imagecodecs is installed: `uv run --with imagecodecs python benchmarks/crop_codec.py`.
"""
import io
import time
from collections.abc import Callable
from importlib.util import find_spec

import cv2
import numpy as np
import pandas as pd
import typer
from PIL import Image

from spotter.core import find_root
from spotter.data.codec import encode_crop, encode_mask
from spotter.data.store import ClipStore
from spotter.runtime import machine


def opencv(extension: str, *settings: int) -> tuple[Callable, Callable]:
    "Encoder and decoder of OpenCV for crops (RGB) and masks (0 and 1)."
    def encode(image):
        return cv2.imencode(extension, cv2.cvtColor(image, cv2.COLOR_RGB2BGR) if image.ndim == 3 else image*255, settings)[1].tobytes()
    return encode, decode


def decode(data: bytes) -> np.ndarray:
    "A crop, by OpenCV, as the store reads it."
    return cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB)


def decode_mask(data: bytes) -> np.ndarray: return cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_GRAYSCALE) & 1


def webp(method: int) -> tuple[Callable, Callable]:
    "Lossless WebP by Pillow, with the encoder's methods from 0 (quickest) to 6."
    def encode(image):
        file = io.BytesIO()
        Image.fromarray(image).save(file, "WEBP", lossless=True, method=method, quality=0)
        return file.getvalue()
    return encode, decode


def jpeg_xl(effort: int) -> tuple[Callable, Callable]:
    import imagecodecs
    return (lambda image: imagecodecs.jpegxl_encode(image, lossless=True, effort=effort, numthreads=1),
            lambda data: imagecodecs.jpegxl_decode(data, numthreads=1))


def crop_codecs() -> dict[str, tuple[Callable, Callable]]:
    "Name of a codec -> its encoder and decoder, for crops."
    up = cv2.IMWRITE_PNG_COMPRESSION, 1, cv2.IMWRITE_PNG_FILTER, cv2.IMWRITE_PNG_FILTER_UP
    known = {"PNG, level 1, filter up": opencv(".png", *up), "WebP lossless, method 0": (encode_crop, decode),
             "WebP lossless, method 1": webp(1), "WebP lossless, method 4": webp(4)}
    if find_spec("imagecodecs"): known |= {f"JPEG XL lossless, effort {n}": jpeg_xl(n) for n in (1, 2, 3)}
    known |= {f"JPEG, quality {q}": opencv(".jpg", cv2.IMWRITE_JPEG_QUALITY, q) for q in (95, 98)}
    return known | {"WebP, quality 95": opencv(".webp", cv2.IMWRITE_WEBP_QUALITY, 95)}


def mask_codecs() -> dict[str, tuple[Callable, Callable]]:
    "The same for masks."
    def png(*settings): return opencv(".png", *settings)[0], decode_mask
    def as_webp(mask): return webp(0)[0](mask*255)
    return {"PNG, 8 bits, level 1": png(cv2.IMWRITE_PNG_COMPRESSION, 1), "PNG, 1 bit": (encode_mask, decode_mask),
            "PNG, 1 bit, level 9": png(cv2.IMWRITE_PNG_BILEVEL, 1, cv2.IMWRITE_PNG_COMPRESSION, 9),
            "WebP lossless, method 0": (as_webp, decode_mask)}


def timed(job: Callable, item) -> tuple:
    "What `job` gives, and its milliseconds of this thread's processor time, in which other programs do not count."
    start = time.thread_time()
    found = job(item)
    return found, 1000*(time.thread_time() - start)


def measure(images: list[np.ndarray], encode: Callable, decode: Callable) -> dict:
    "Mean size, medians of the times, and whether every pixel comes back."
    encoded = [timed(encode, image) for image in images]
    decoded = [timed(decode, data) for data, _ in encoded]
    same = all(np.array_equal(image, back) for image, (back, _) in zip(images, decoded))
    return dict(lossless=same, kB=np.mean([len(data) for data, _ in encoded])/1000,
                encode_ms=np.median([ms for _, ms in encoded]), decode_ms=np.median([ms for _, ms in decoded]), crops=len(images))


def sample(store: ClipStore, count: int, masked: bool) -> list[np.ndarray]:
    "Crops, or masks, evenly over all that a store holds."
    index = store.index[store.index.mask_length > 0] if masked else store.index
    chosen = index.iloc[np.linspace(0, len(index) - 1, min(count, len(index))).astype(int)]
    return [store.read(row.clip_id, [row.position])[masked][0] for row in chosen.itertuples()]


def main(count: int = typer.Option(300, help="crops"), faces: str = typer.Option("faces", help="folder of prepared crops")):
    "Measure all codecs and write the table."
    cv2.setNumThreads(1)
    store, rows = ClipStore(find_root()/faces), []
    for kind, codecs in dict(crop=crop_codecs(), mask=mask_codecs()).items():
        images = sample(store, count, kind == "mask")
        for name, codec in codecs.items():
            rows.append(dict(image=kind, codec=name) | measure(images, *codec) | dict(machine=machine()["processor"]))
            print("{image} {codec}: {kB:.2f} kB, encoding {encode_ms:.2f} ms, decoding {decode_ms:.2f} ms".format(**rows[-1]), flush=True)
    pd.DataFrame(rows).to_csv(find_root()/"results"/"crop_codec.csv", index=False, float_format="%.3f", lineterminator="\n")


if __name__ == "__main__": typer.run(main)
