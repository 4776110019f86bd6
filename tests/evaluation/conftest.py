from tests.tasks.conftest import tiny_llama  # noqa: F401
from tests.training.conftest import workspace  # noqa: F401
