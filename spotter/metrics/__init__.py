"Numbers only: classification, calibration, localisation, and their confidence intervals. A public name is imported when it is first used."
import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(__name__, submod_attrs={
    "threshold": ["choose_threshold"],
    "calibration": ["fit_platt", "prior_shift"],
    "classification": ["classification_metrics"],
    "bootstrap": ["bootstrap_intervals", "paired_differences"],
    "localisation": ["localisation_metrics"],
    "pooled": ["pooled_ap"]})
