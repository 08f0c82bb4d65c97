"""The built documentation in a browser: every page renders without an error, and the search finds a method."""

from pathlib import Path

import pytest

from tests.support.browser import serve

SITE = Path(__file__).parents[2] / "build" / "site"
PAGES = sorted(str(path.relative_to(SITE)) for path in SITE.rglob("*.html") if path.name != "404.html")


@pytest.fixture(scope="module")
def address():
    with serve(SITE) as address:
        yield address


def test_the_site_is_built():
    assert "index.html" in PAGES


@pytest.mark.parametrize("page", PAGES)
def test_a_page_renders_without_an_error(page, address, browser):
    assert browser.open(f"{address}/{page}") == []
    assert browser.run("return document.querySelector('h1').innerText")
    assert browser.run("return [...document.images].every(image => image.naturalWidth)")


def test_the_search_finds_a_method(address, browser):
    assert browser.open(f"{address}/index.html") == []
    browser.run(
        "const field = document.querySelector('input.md-search__input');"
        "field.focus(); field.value = 'DoRA'; field.dispatchEvent(new Event('keyup'))"
    )
    assert "DoRA" in browser.wait("return document.querySelector('.md-search-result__item')?.innerText")
