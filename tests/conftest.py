"Options of the test command."
import pytest


def pytest_addoption(parser):
    parser.addoption("--all-clips", action="store_true", help="audit every frame of every bundled clip, not a sample (several minutes)")


@pytest.fixture(scope="session")
def all_clips(request): return request.config.getoption("--all-clips")
