"Detectors for pictures without faces, and a pause, in a module of their own: worker processes import it and nothing else of the tests."
import os
import time

import numpy as np


def whole_frame(min_score):
    "The face is always the whole frame."
    return lambda frame: np.array([[0, 0, frame.shape[1], frame.shape[0], 1.0]])


def slow_whole_frame(min_score):
    "The same, at the speed of a detector on a slow machine."
    detect = whole_frame(min_score)
    def slow(frame):
        time.sleep(.02)
        return detect(frame)
    return slow


def pause(number):
    "Which process worked, for a while."
    time.sleep(.3)
    return os.getpid()
