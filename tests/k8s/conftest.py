"""What running the charts' pods takes: a Docker engine, the images, the demo's datasets."""

from tests.docker.conftest import demo_datasets, engine, images

__all__ = ["demo_datasets", "engine", "images"]
