"A detector for pictures without faces; in a module of its own, so that worker processes import it and nothing else of the tests."
import numpy as np


def whole_frame(min_score):
    "The face is always the whole frame."
    return lambda frame: np.array([[0, 0, frame.shape[1], frame.shape[0], 1.0]])
