"What real footage is made of: people who walk, cuts, late faces, long films. The films are made of bundled clips."
from itertools import cycle
from pathlib import Path

import cv2
import numpy as np
import pytest

from spotter.data.video import read_frames, write_video
from spotter.predict.detector import Detector
from spotter.predict.outputs import record
from spotter.predict.fetch import fetch

ROOT = Path(__file__).parents[1]
REAL = [f"original_sequences/youtube/c23/videos/{name}.mp4" for name in ("000", "004")]
FAKE = "manipulated_sequences/Deepfakes/c23/videos/112_113.mp4"
pytestmark = pytest.mark.skipif(not (ROOT/"data"/"manifest.csv").exists(), reason="no bundled clips: `dvc pull data` fetches them")


@pytest.fixture(scope="module")
def heads():
    "Frames of two people, 168 pixels square with a face of some 100."
    return [np.stack([cv2.resize(f, (168, 168), interpolation=cv2.INTER_AREA) for f in read_frames(ROOT/"data"/path)[0]]) for path in REAL]


def wall(height, width):
    noise = cv2.GaussianBlur(np.random.default_rng(0).normal(0, 1, (height, width, 3)), (0, 0), 12)
    return cv2.normalize(noise, None, 60, 190, cv2.NORM_MINMAX).astype(np.uint8)


def there_and_back(frames):
    "A clip for ever, forwards and backwards, so that nothing jumps."
    return cycle(np.concatenate([frames, frames[-2:0:-1]]))


def film(path, seconds, place, heads, size=(240, 960), fps=25):
    "Heads in front of a wall. `place`: what is seen at a time: (number of the head, left edge) for each."
    moving, back = [there_and_back(h) for h in heads], wall(*size)
    def pictures():
        for i in range(round(seconds*fps)):
            picture, now = back.copy(), [next(m) for m in moving]
            for k, x in place(i/fps):
                side = now[k].shape[0]
                picture[40:40 + side, round(x):round(x) + side] = now[k]
            yield picture
    write_video(path, pictures(), fps=fps)
    return path


def test_a_walker_is_one_person(detector, heads, tmp_path):
    found = detector.analyze(film(tmp_path/"walk.mp4", 10, lambda t: [(0, 40 + 40*t)], heads), heatmaps=False)
    assert [round(p.coverage, 2) for p in found.people] == [1] and not found.cuts, found.reason
    person = found.people[0]
    middle = person.boxes[:, [0, 2]].mean(1)
    assert np.ptp(middle - 40*person.times) < 20, "the boxes go where the face goes"


def test_people_in_turn_are_two(detector, heads, tmp_path):
    path = tmp_path/"turns.mp4"
    backs = [wall(240, 320), wall(240, 320)[::-1, ::-1]//2]
    shots = [there_and_back(h) for h in heads]
    def pictures():
        for i in range(25*18):
            k = i//75 % 2
            picture = backs[k].copy(); picture[40:208, 70:238] = next(shots[k])
            yield picture
    write_video(path, pictures())
    found = detector.analyze(path, heatmaps=False)
    assert np.allclose(found.cuts, [3, 6, 9, 12, 15], atol=.1)
    assert len(found.people) == 2 and all(len(p.windows) == 3 for p in found.people)
    assert sum(p.coverage for p in found.people) == pytest.approx(sum(b - a for a, b in found.looked)/18, abs=.02)


def test_who_changes_the_seat_is_one_person(detector, heads, tmp_path):
    seats = 60, 700, 380
    found = detector.analyze(film(tmp_path/"seats.mp4", 30, lambda t: [(0, seats[int(t/10)])], heads), heatmaps=False)
    assert len(found.people) == 1, [(p.coverage, p.boxes[0]) for p in found.people]
    assert len({int(x) for x in np.round(found.people[0].boxes[:, 0]/100)}) >= 3


def test_a_face_that_comes_late_is_judged_where_it_is(detector, heads, tmp_path):
    found = detector.analyze(film(tmp_path/"late.mp4", 1, lambda t: [(0, 100)] if t >= .6 else [], heads, (240, 320)), heatmaps=False)
    assert found.verdict in ("real", "fake"), found.reason
    assert found.people[0].indices.min() >= 15 and found.people[0].coverage <= .4


def test_two_faces_that_overlap_in_time_are_both_judged(detector, heads, tmp_path):
    def place(t): return [(0, 60)]*(.2 <= t < .52) + [(1, 640)]*(.44 <= t < .75)
    found = detector.analyze(film(tmp_path/"both.mp4", 1, place, heads), heatmaps=False)
    assert sorted(p.boxes[0, 0] > 400 for p in found.people) == [False, True], found.reason


def test_a_person_in_a_tenth_of_a_film(detector, heads, tmp_path):
    def place(t): return [(0, 60)] + [(1, 640)]*(60 <= t < 72)
    found = detector.analyze(film(tmp_path/"tenth.mp4", 120, place, heads, fps=10), heatmaps=False)
    guest = next(p for p in found.people if p.boxes[0, 0] > 500)
    assert guest.times.min() >= 60 and guest.times.max() <= 72 and guest.coverage <= .1
    assert len(found.people) == 2


def test_coverage_counts_the_time_that_was_looked_at(detector, heads, tmp_path):
    found = detector.analyze(film(tmp_path/"minute.mp4", 60, lambda t: [(0, 60)], heads, (240, 320), fps=10), heatmaps=False)
    looked = sum(b - a for a, b in found.looked)
    assert looked < 15 and found.people[0].coverage == pytest.approx(looked/60, abs=.01)


def test_a_span_is_judged_alone(detector, heads, tmp_path):
    path = film(tmp_path/"span.mp4", 8, lambda t: [(int(t >= 4), 60)], heads, (240, 320))
    found = detector.analyze(path, heatmaps=False, span=(4.5, 7))
    assert found.span == pytest.approx((4.52, 7), abs=.03) and len(found.people) == 1
    assert 4.5 <= found.people[0].times.min() and found.people[0].times.max() <= 7
    assert detector.analyze(path, heatmaps=False, span=(20, 30)).verdict == "undetermined"


def test_a_budget_thins_windows_out_and_says_so(detector, heads, tmp_path):
    path = film(tmp_path/"long.mp4", 240, lambda t: [(0, 60)], heads, (240, 320), fps=5)
    hurried = Detector(detector.settings["checkpoint"], budget=.001).analyze(path, heatmaps=False)
    whole = detector.analyze(path, heatmaps=False)
    assert len(hurried.looked) + hurried.skipped == len(whole.looked) and hurried.skipped and not whole.skipped
    assert hurried.cuts is None and "time" in hurried.note, hurried.note


@pytest.mark.slow
def test_the_fake_part_of_an_hour_is_found(heads, tmp_path):
    "An hour at five frames a second: a fake is seen until minute 25, another person after that."
    fake = np.stack([cv2.resize(f, (168, 168), interpolation=cv2.INTER_AREA) for f in read_frames(ROOT/"data"/FAKE)[0]])
    path = film(tmp_path/"hour.mp4", 3600, lambda t: [(0, 60)] if t < 1500 else [(1, 60)], [fake, heads[0]], (240, 320), fps=5)
    network = ROOT/"checkpoints"/"shipped.safetensors"
    if not network.exists(): fetch(network)
    found = Detector(network).analyze(path, heatmaps=False)
    assert found.verdict == "fake" and record(found)["timeline"]["skipped"] == 0
    guilty = max(found.people, key=lambda p: p.p_fake)
    suspicious = [p for p in guilty.passages if p.p_fake >= found.settings["threshold"]]
    assert suspicious and all(p.start < 1500 for p in suspicious)
    assert len(found.looked) >= 60
