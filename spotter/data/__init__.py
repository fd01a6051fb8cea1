"Corpora, videos, face crops, and what a network gets of them. A public name is imported when it is first used."
import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(__name__, submod_attrs={
    "names": ["CorpusError"],
    "corpora": ["index_dataset"],
    "video": ["VideoError"],
    "faces": ["NoFaceError"],
    "sampling": ["BalancedSampler", "sample_positions"],
    "store": ["ClipStore"],
    "prepare": ["prepare_corpus"],
    "loader": ["ClipDataset", "to_input"]})
