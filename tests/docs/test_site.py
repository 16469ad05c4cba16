"""The built site as a visitor sees it: `JAXBO_SITE=docs/_build pytest tests/docs`."""

import os
import re
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from tests.docs.browser import CHROMIUM, chromium

ROOT = Path(__file__).parents[2]
SITE = Path(os.environ.get("JAXBO_SITE") or ROOT / "docs/_build")
PAGES = sorted(  # without those of source code, which Sphinx makes all alike
  page for page in SITE.rglob("*.html") if not {"_static", "_modules"} & set(page.parts)
)
DESKTOP, PHONE = 1440, 390

pytestmark = [
  pytest.mark.skipif(not PAGES, reason=f"no site in {SITE}: build it, or set JAXBO_SITE"),
  pytest.mark.xdist_group("site"),
]

FAULTS = """(() => {
  const wide = document.documentElement.scrollWidth - window.innerWidth;
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


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: apt-get install chromium")
def test_every_page_is_whole_at_desktop_and_phone_width(tmp_path: Path):
  """No console error, nothing asked of the network, no missing picture, no overflow."""
  faults = []
  with chromium(tmp_path) as browser:
    for page in PAGES:
      browser.resize(DESKTOP)
      browser.open(page)
      browser.evaluate(EQUATIONS)
      found = [f"desktop: {fault}" for fault in browser.evaluate(FAULTS)]
      found += [f"desktop: {fault}" for fault in browser.evaluate(SCROLLING)]
      browser.resize(PHONE)
      found += [f"phone: {fault}" for fault in browser.evaluate(FAULTS)]
      faults += [f"{page.relative_to(SITE)}: {fault}" for fault in found + browser.errors]
  assert not faults, "\n".join(faults)


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
