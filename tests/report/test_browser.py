"""The report in a real browser: it fits desktop and phone, runs nothing, and asks the network for nothing."""

import contextlib
import json
import re
import shutil
import subprocess
import urllib.request

import pytest

from direct_rlhf.report.html import write_report

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="needs chromium and chromedriver on the PATH"),
]
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
WHEN_COMPLETE = """
const done = arguments[0], look = () => {{{}}};
if (document.readyState === 'complete') done(look()); else addEventListener('load', () => done(look()));
"""  # a busy machine may answer before the page is whole
LAYOUT = """
const wide = [...document.querySelectorAll('main *')].filter(e => !e.closest('.scroll, figure.wide, pre, svg')
  && e.getBoundingClientRect().right > innerWidth + 1).map(e => e.tagName + '.' + e.className);
return {inner: innerWidth, scroll: document.documentElement.scrollWidth, wide: wide.slice(0, 5),
  scripts: document.scripts.length, frames: frames.length, open: document.querySelectorAll('details[open]').length,
  flat: [...document.querySelectorAll('svg.plot')].filter(s => s.checkVisibility() && s.getBoundingClientRect().height < 60).length,
  pictures: document.querySelectorAll('svg.plot').length,
  loaded: performance.getEntriesByType('resource').length, title: document.title};
"""


def call(url, body=None, method=None):
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data=data, method=method, headers={"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)["value"]


@contextlib.contextmanager
def browser(width, height, profile):
    """A WebDriver session's address, on a screen of that size."""
    process = subprocess.Popen([DRIVER, "--port=0"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        for line in process.stdout:
            if found := re.search(r"started successfully on port (\d+)", line):
                break
        server = f"http://127.0.0.1:{found[1]}/session"
        options = {
            "binary": CHROMIUM,
            "args": [*FLAGS, f"--user-data-dir={profile}"],
            "mobileEmulation": {
                "deviceMetrics": {"width": width, "height": height, "pixelRatio": 1, "mobile": width < 600}
            },
        }
        wanted = {"browserName": "chrome", "goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
        session = f"{server}/{call(server, {'capabilities': {'alwaysMatch': wanted}})['sessionId']}"
        try:
            yield session
        finally:
            call(session, method="DELETE")
    finally:
        process.terminate()
        process.wait(timeout=20)
        process.stdout.close()


@pytest.mark.parametrize(("width", "height"), [(1280, 900), (390, 844)])
def test_the_report_fits_the_screen_and_is_inert(make_run, hostile_run, tmp_path, width, height):
    reports = [
        write_report([hostile_run], tmp_path / "hostile.html"),
        write_report(
            [make_run("one", ("base", "direct_ppo")), make_run("a-run-with-a-rather-long-name", ("base", "direct_ppo"))]
        ),
    ]
    with browser(width, height, tmp_path / "profile") as session:
        for report in reports:
            call(f"{session}/url", {"url": report.as_uri()})
            found = call(f"{session}/execute/async", {"script": WHEN_COMPLETE.format(LAYOUT), "args": []})
            assert found["inner"] == width
            assert found["scroll"] <= width, f"{report.name} is wider than {width}: {found['wide']}"
            assert found["wide"] == []
            assert found["title"].startswith("direct-rlhf: ")
            assert (found["scripts"], found["frames"], found["loaded"], found["open"], found["flat"]) == (0, 0, 0, 0, 0)
            assert found["pictures"] >= 20
        assert [entry["message"] for entry in call(f"{session}/se/log", {"type": "browser"})] == []
