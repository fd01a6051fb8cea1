"Where a verdict comes from. A public name is imported when it is first used."
import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(__name__, submod_attrs={
    "gradcam": ["MultiScaleGradCAM"],
    "shown": ["shown_map"]})
