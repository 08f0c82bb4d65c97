import pytest

from tests.support.browser import start_browser


@pytest.fixture(scope="session")
def browser():
    with start_browser() as browser:
        yield browser
