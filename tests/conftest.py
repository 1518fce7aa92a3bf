"""For all tests."""

import gc


def pytest_collection_finish(session):
    """What is imported by now stays: the garbage collector need not look at all of it again and again."""
    gc.collect()
    gc.freeze()
