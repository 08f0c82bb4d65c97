"""The built documentation in a browser: every page renders without an error, and the search finds a method."""

from pathlib import Path

import pytest

from tests.support.browser import SLOW, open_page, served

SITE = Path(__file__).parents[2] / "build" / "site"
# The search runs in a worker: this page shows what the site's page finds, until the image has come.
SEARCH = f"""<!doctype html><title>search</title><link rel=icon href=data:,>
<iframe id=site src="/index.html?q=dora" width=1200 height=900></iframe><img src="{SLOW}"><pre id=found></pre>
<script>setInterval(() => {{ found.textContent = site.contentDocument.body?.innerText }}, 200)</script>"""
PAGES = sorted(str(path.relative_to(SITE)) for path in SITE.rglob("*.html"))


@pytest.fixture(scope="module")
def address():
    with served(SITE, {"/search": SEARCH}) as address:
        yield address


def test_the_site_is_built():
    assert "index.html" in PAGES


@pytest.mark.parametrize("page", PAGES)
def test_a_page_renders_without_an_error(page, address):
    html, console = open_page(f"{address}/{page}")
    assert "<h1" in html
    assert console == []


def test_the_search_finds_a_method(address):
    html, console = open_page(f"{address}/search", real_time=True)
    found = html.partition('<pre id="found">')[2]
    assert "matching documents" in found
    assert "DoRA" in found
    assert console == []
