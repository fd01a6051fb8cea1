"The network, its parts, and the files that it is saved in. A public name is imported when it is first used."
import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(__name__, submod_attrs={
    "pyramid": ["MultiScaleFeatureExtractor"],
    "attention": ["SpatialAttentionModule"],
    "network": ["TemporalCNN_GRU"],
    "checkpoint": ["inspect_checkpoint", "load_model", "save_model"],
    "logits": ["clip_logits", "p_fake"],
    "export": ["export_onnx"]})
