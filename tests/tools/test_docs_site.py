"""The built documentation in a browser: every page renders without an error, and the search finds a method."""

from pathlib import Path

import pytest

from tests.support.browser import open_page, served

SITE = Path(__file__).parents[2] / "build" / "site"
PAGES = sorted(str(path.relative_to(SITE)) for path in SITE.rglob("*.html"))


@pytest.fixture(scope="module")
def address():
    with served(SITE) as address:
        yield address


def test_the_site_is_built():
    assert "index.html" in PAGES


@pytest.mark.parametrize("page", PAGES)
def test_a_page_renders_without_an_error(page, address):
    html, console = open_page(f"{address}/{page}")
    assert "<h1" in html
    assert console == []


def test_the_search_finds_a_method(address):
    html, console = open_page(f"{address}/index.html?q=dora")
    assert "md-search-result__item" in html
    assert console == []
