"""The report in a real browser: Debian's chromium, headless, with axe-core from npm for accessibility."""

import html
import json
import re
import shutil
import subprocess
import tarfile

import pytest

from analysis.frames import Results
from analysis.publish import output_files, target
from experiments.harness.runs.grids import with_seeds
from tests import needs
from tests.analysis.invented import any_run

STUDIES = ("micro_batches", "rho", "batch_size", "label_noise", "trajectories")
AXE = "axe-core@4.14.1"

SCRIPT = """
<script>{axe}</script>
<script>
addEventListener("load", async () => {{
  const seen = {{}}, table = document.querySelector("#table-rho"), rows = () => [...table.tBodies[0].rows];
  const column = n => rows().map(row => row.cells[n].textContent.trim());
  const heads = [...table.querySelectorAll("th")], place = heads.findIndex(h => h.textContent.trim() === "rho");
  seen.width = [document.documentElement.scrollWidth, innerWidth];
  heads[place].querySelector("button").click();
  seen.ascending = column(place);
  heads[place].querySelector("button").click();
  seen.descending = column(place);
  seen.sorted = heads[place].getAttribute("aria-sort");
  const field = document.querySelector("input[data-for=table-rho]");
  field.value = "msam"; field.dispatchEvent(new Event("input"));
  seen.matches = rows().filter(row => !row.hidden).map(row => row.textContent.includes("mSAM"));
  field.value = ""; field.dispatchEvent(new Event("input"));
  const runs = document.querySelector("input[data-for=list-of-runs]"), link = table.querySelector("a.run");
  runs.value = "no such run"; runs.dispatchEvent(new Event("input"));
  link.click();
  await new Promise(done => setTimeout(done, 50));
  const run = document.getElementById(link.hash.slice(1));
  seen.opened = [run.tagName, run.open, run.hidden];
  const several = [...document.querySelectorAll("td details.runs")].filter(d => d.querySelectorAll("a").length > 1);
  seen.folded = several.map(d => d.open);
  const lines = [...document.querySelectorAll("#rho tbody tr, .forest tbody tr")];
  seen.tallest = Math.max(...lines.map(row => row.getBoundingClientRect().height));
  const within = d => d.offsetLeft >= 0 && d.offsetLeft <= d.parentElement.offsetWidth;
  seen.dots = [...document.querySelectorAll(".plot .dot")].map(within);
  const checked = await axe.run();
  const bad = checked.violations.filter(v => ["serious", "critical"].includes(v.impact));
  seen.axe = bad.map(v => v.id + ": " + v.nodes[0].html);
  seen.passed = checked.passes.length;
  parent.postMessage(JSON.stringify(seen), "*");
}});
</script>
"""


FRAME = """<!doctype html><html lang="en"><title>frame</title>
<script>addEventListener("message", event => document.documentElement.dataset.seen = event.data);</script>
<iframe title="report" src="report.html" style="width: {width}px; height: 900px; border: 0"></iframe></html>
"""
"""A window cannot be narrower than 500 pixels, but a frame in it can."""


@pytest.fixture(scope="module")
def chromium():
    needs.require("browser")
    return shutil.which("chromium")


@pytest.fixture(scope="module")
def axe(tmp_path_factory):
    needs.require("browser")
    folder = tmp_path_factory.mktemp("axe")
    done = subprocess.run(["npm", "pack", "--silent", AXE], cwd=folder, capture_output=True, text=True, timeout=300)
    if done.returncode:
        needs.unavailable("browser", f"npm could not fetch {AXE}: {done.stderr.strip()[-200:]}")
    with tarfile.open(next(folder.glob("*.tgz"))) as archive:
        return archive.extractfile("package/axe.min.js").read().decode()


@pytest.fixture(scope="module")
def page():
    """A report with all tables and studies of the smoke profile, from made-up runs."""
    targets = [target(name, "smoke") for name in ("table1", "table3", "table4", "theory", *STUDIES)]
    specs = dict.fromkeys(run for t in targets for run in with_seeds(t.cells, t.seeds))
    return output_files("smoke", targets, Results.of(map(any_run, specs)))["report.html"]


def observe(chromium, axe, page, folder, width):
    script = SCRIPT.format(axe=axe)
    (folder / "report.html").write_text(page.replace("</body>", f"{script}</body>"), encoding="utf-8")
    path = folder / "frame.html"
    path.write_text(FRAME.format(width=width), encoding="utf-8")
    options = ["--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}"]
    options += ["--window-size=1400,1000", "--virtual-time-budget=30000", "--dump-dom"]
    done = subprocess.run([chromium, *options, path.as_uri()], capture_output=True, text=True, timeout=180)
    match = re.search(r'data-seen="([^"]*)"', done.stdout)
    assert match, done.stderr[-2000:]
    return json.loads(html.unescape(match.group(1)))


@pytest.mark.rare
@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_sorts_searches_links_to_runs_fits_and_is_accessible(chromium, axe, page, tmp_path, width):
    observed = observe(chromium, axe, page, tmp_path, width)
    rhos = [float(text or "nan") for text in observed["ascending"]]
    numbers = [rho for rho in rhos if rho == rho]
    assert len(numbers) >= 2
    assert numbers == sorted(numbers)
    assert observed["descending"] == observed["ascending"][::-1]
    assert observed["sorted"] == "descending"
    assert observed["matches"]
    assert all(observed["matches"])
    assert observed["opened"] == ["DETAILS", True, False]
    assert observed["width"][0] <= observed["width"][1] == width, "nothing overflows at the side"
    assert observed["folded"]
    assert not any(observed["folded"]), "a row's runs are listed on request"
    assert observed["tallest"] < 200, "no row is a tall column of links"
    assert observed["dots"]
    assert all(observed["dots"]), "every effect is within its axis"
    assert observed["passed"] > 10
    assert observed["axe"] == []
