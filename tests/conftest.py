"Options of the test command, and the order of its files."
import pytest

# then the others as they come
LONGEST_FIRST = ["test_pipeline", "test_synth", "test_audit", "test_predict", "test_localisation", "test_data"]


def pytest_addoption(parser):
    parser.addoption("--all-clips", action="store_true", help="audit every frame of every bundled clip, not a sample (several minutes)")


def pytest_collection_modifyitems(items):
    "Two workers finish together when the longest files start first."
    place = {name: i for i, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(place)))


@pytest.fixture(scope="session")
def all_clips(request): return request.config.getoption("--all-clips")


@pytest.fixture(scope="session")
def detector(tmp_path_factory):
    "Random weights, and crops of 64 pixels: what is tested with it is all around the network."
    import torch
    from spotter.model.checkpoint import save_model
    from spotter.model.network import TemporalCNN_GRU
    from spotter.predict.detector import Detector
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("checkpoint")/"random.safetensors"
    model = TemporalCNN_GRU(use_multiscale=True, use_attention=True); model.image_size = 64
    save_model(model, path, frames=4)
    return Detector(path)
