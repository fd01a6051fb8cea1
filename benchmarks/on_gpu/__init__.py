"Parts of gpu.py: the bundled clips without DVC, augmentation and training on one device, evaluation beside it, checks, and records."
