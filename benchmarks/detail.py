"""An example for `spotter benchmark`, a detector without a network.

It measures how much fine detail the sharpest place of a frame has, and where that is.
"""
import cv2
import numpy as np

def predict(path):
    video, maps = cv2.VideoCapture(path), []
    while True:
        there, frame = video.read()
        if not there: break
        detail = np.abs(cv2.Laplacian(cv2.cvtColor(frame, cv2.COLOR_BGR2GRAY), cv2.CV_32F))
        maps.append(cv2.blur(detail, (9, 9)))
    highest = np.stack(maps).max((1, 2)).mean()
    return highest/(highest + 50), np.stack(maps)   # p_fake, heatmaps (frames, height, width)
