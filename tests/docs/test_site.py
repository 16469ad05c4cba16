"""The built site as a visitor sees it: `JAXBO_SITE=docs/_build pytest tests/docs`."""

import os
import re
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from tests.docs.browser import CHROMIUM, Browser, chromium

ROOT = Path(__file__).parents[2]
SITE = Path(os.environ.get("JAXBO_SITE") or ROOT / "docs/_build")
PAGES = sorted(  # without those of source code, which Sphinx makes all alike
  page for page in SITE.rglob("*.html") if not {"_static", "_modules"} & set(page.parts)
)
DESKTOP, PHONE = 1440, 390

built = pytest.mark.skipif(not PAGES, reason=f"no site in {SITE}: build it, or set JAXBO_SITE")
browsing = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: apt-get install chromium")

FAULTS = """(() => {
  const {scrollWidth, clientWidth} = document.documentElement;
  const wide = scrollWidth - clientWidth;
  const faults = wide > 0 ? [`${wide} pixels wider than the window`] : [];
  for (const picture of document.images) {
    picture.loading = "eager";
    if (picture.complete && !picture.naturalWidth) faults.push(`no picture ${picture.src}`);
    if (!picture.alt || /[0-9a-f]{16}/.test(picture.alt)) faults.push(`no alt for ${picture.src}`);
  }
  if (document.querySelector("mjx-merror")) faults.push("an equation with an error");
  return faults;
})()"""
SCROLLING = """[...document.querySelectorAll("pre")].filter(
  (code) => code.scrollWidth > code.clientWidth + 1).map((code) =>
    `code scrolls: ${code.textContent.split("\\n").sort((a, b) => b.length - a.length)[0]}`)"""
EQUATIONS = "window.MathJax?.startup ? MathJax.startup.promise.then(() => 0) : 0"


def faults(browser: Browser, page: Path) -> list[str]:
  """What a visitor would see at both widths, and what went wrong behind the page."""
  browser.resize(DESKTOP)
  browser.open(page)
  browser.evaluate(EQUATIONS)
  found = [f"desktop: {fault}" for fault in browser.evaluate(FAULTS)]
  found += [f"desktop: {fault}" for fault in browser.evaluate(SCROLLING)]
  browser.resize(PHONE)
  found += [f"phone: {fault}" for fault in browser.evaluate(FAULTS)]
  return found + browser.errors


@browsing
def test_the_faults_of_a_page_are_found(tmp_path: Path):
  page = tmp_path / "page.html"
  page.write_text(
    '<meta name="viewport" content="width=device-width"><img src="none.png" alt="words">'
    f"<pre style='overflow-x: auto'>{'code ' * 99}</pre><div style='width: 500px'>wide</div>"
    "<script>console.error('said')</script><script>undefined.thing</script>"
    '<script src="http://localhost:9/elsewhere.js"></script>'
  )
  with chromium(tmp_path / "profile") as browser:
    found = "\n".join(faults(browser, page))
  for fault in (
    "phone: 118 pixels wider",
    "no picture",
    "code scrolls",
    "said",
    "TypeError",
    "asks the network",
  ):
    assert fault in found, found


@pytest.mark.slow
@built
@browsing
def test_every_page_is_whole_at_desktop_and_phone_width(tmp_path: Path):
  """No console error, nothing asked of the network, no missing picture, no overflow."""
  with chromium(tmp_path) as browser:
    found = [
      f"{page.relative_to(SITE)}: {fault}" for page in PAGES for fault in faults(browser, page)
    ]
  assert not found, "\n".join(found)


@built
def test_every_link_within_the_site_leads_somewhere():
  """Pages, files and places in pages; `sphinx-build -b linkcheck` asks the network of others."""
  texts = {page: page.read_text() for page in PAGES}
  places = {page: set(re.findall(r'\bid="([^"]+)"', text)) for page, text in texts.items()}
  broken = []
  for page, text in texts.items():
    for link in set(re.findall(r'(?:href|src)="([^"]+)"', text)):
      parts = urlsplit(link.replace("&amp;", "&"))
      if parts.scheme or parts.netloc or link == "#":
        continue
      target = (page.parent / unquote(parts.path)).resolve() if parts.path else page
      place = unquote(parts.fragment)
      if not target.exists() or (place and place not in places.get(target, {place})):
        broken.append(f"{page.relative_to(SITE)}: {link}")
  assert not broken, "\n".join(broken)


@built
def test_every_tutorial_can_be_downloaded_and_opened_in_colab():
  notebooks = sorted((ROOT / "docs/tutorials").glob("*.ipynb"))
  colab = "colab.research.google.com/github/jaxbo/jaxbo/blob/main/docs/tutorials"
  assert len(notebooks) > 5
  for notebook in notebooks:
    page = (SITE / "tutorials" / notebook.name).with_suffix(".html").read_text()
    assert re.search(rf'href="[^"]*_downloads/[^"]*{notebook.name}"', page), notebook.name
    assert f"{colab}/{notebook.name}" in page, notebook.name
