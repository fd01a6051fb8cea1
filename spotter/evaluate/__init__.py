"Calibration on validation, tables and figures of the test split, the audit of a corpus. A public name is imported when it is first used."
import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(__name__, submod_attrs={
    "calibrate": ["calibrate_checkpoint"],
    "tables": ["prediction_table", "read_predictions"]})
