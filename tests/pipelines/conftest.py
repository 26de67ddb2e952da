import pytest


@pytest.fixture
def pipeline(loud_pipeline, model_folder):
    return loud_pipeline(model_folder)
