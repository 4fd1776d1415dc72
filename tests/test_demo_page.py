"""The demo page in a real browser, at the width of a desk and of a telephone.

Each tab is used as a person would.

    pip install '.[demo-test]'; apt install chromium chromium-driver

The README's picture, with trained models:

    DEMO_PICTURE=docs/demo.png python -m pytest tests/test_demo_page.py -k picture
"""

import base64
import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from conftest import ROOT, free_port, write_page_models
from tools import demo_answers

pytest.importorskip("gradio", reason="gradio is not installed: pip install '.[demo-test]'")
webdriver = pytest.importorskip("selenium.webdriver",
                                reason="selenium is not installed: pip install '.[demo-test]'")
CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = [pytest.mark.slow,
              pytest.mark.skipif(not (CHROMIUM and DRIVER),
                                 reason="no chromium and chromedriver here")]

WIDTHS = {"desk": 1200, "telephone": 390}
PATIENCE = 60                   # seconds; a busy machine is slow


class Page:
    """A browser on the demo page, with the hands and eyes of a person."""

    def __init__(self, address, width):
        options = webdriver.ChromeOptions()
        options.binary_location = CHROMIUM
        for flag in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"):
            options.add_argument(flag)
        options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
        self.browser = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
        self.width, self.address = width, address
        self.browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", {
            "width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600})
        self.browser.get(address)
        self.until(lambda: self.seen("button[role=tab]"))

    def until(self, found, what=""):
        """What a function finds; it is asked until it finds something."""
        end, error = time.monotonic() + PATIENCE, None
        while time.monotonic() < end:
            try:
                if result := found():
                    return result
            except Exception as e:          # an element went away while the page drew itself anew
                error = e
            time.sleep(0.1)
        raise AssertionError(f"not on the page after {PATIENCE} s: {what} {error or ''}\n"
                             f"{self.text()[:800]}")

    def seen(self, selector, text=None):
        """The visible elements of a CSS selector (whose text is this)."""
        elements = self.browser.find_elements("css selector", selector)
        return [e for e in elements if e.is_displayed()
                and (text is None or e.text.strip() == text)]

    def text(self):
        return self.browser.find_element("css selector", "body").text

    def press(self, name, selector="button:not([role=tab])"):
        def pressed():
            [button] = self.seen(selector, name)
            button.click()
            return True
        self.until(pressed, f"button {name!r}")

    def open(self, name):
        """Opens a tab; on a telephone the last ones are behind three dots."""
        if not self.seen("button[role=tab]", name):
            self.press("", ".overflow-menu > button")
        self.press(name, "button[role=tab], .overflow-dropdown button")

    def type(self, label, text):
        script = "return arguments[0].closest('label')?.innerText || ''"

        def typed():
            [field] = [e for e in self.seen("textarea, input[type=text]")
                       if self.browser.execute_script(script, e).startswith(label)]
            field.click()
            self.browser.execute_script("arguments[0].select()", field)
            field.send_keys(webdriver.Keys.BACKSPACE)
            # pasted: 500 words are many keys
            self.browser.execute_cdp_cmd("Input.insertText", {"text": text})
            return field.get_attribute("value") == text
        self.until(typed, f"field {label!r}")

    def upload(self, path):
        """Gives the visible picture box a file."""
        def cleared():
            [button] = self.seen('button[aria-label="Remove Image"]')
            button.click()
            return True
        self.until(cleared, "the cross of the picture")

        selector = "[data-testid=image] input[type=file], input[type=file]"
        script = "return arguments[0].closest('.tabitem')?.offsetParent !== null"

        def given():
            fields = [e for e in self.browser.find_elements("css selector", selector)
                      if self.browser.execute_script(script, e)]
            fields[0].send_keys(str(path))
            return True
        self.until(given, "the field of a file")
        time.sleep(1)

    def wait_for(self, *words):
        self.until(lambda: all(re.search(word, self.text()) for word in words), words)

    def picture(self):
        """A screenshot of the whole page -> PIL image."""
        height = self.browser.execute_script("return document.documentElement.scrollHeight")
        found = self.browser.execute_cdp_cmd("Page.captureScreenshot", {
            "captureBeyondViewport": True, "clip": {"x": 0, "y": 0, "width": self.width,
                                                    "height": height, "scale": 1}})
        return Image.open(io.BytesIO(base64.b64decode(found["data"])))


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """The address of a page that the command serves, with models of all tasks; Ctrl-C ends it."""
    models = write_page_models(tmp_path_factory.mktemp("models"))
    yield from serve(models, tmp_path_factory.mktemp("tmp"))


def serve(models, folder):
    log = folder / "log"
    with open(log, "w") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "tools.demo", *map(str, models), "--port", str(free_port())],
                                   cwd=ROOT, stdout=out,
            stderr=subprocess.STDOUT,
                                   env=os.environ | {"OMP_NUM_THREADS": "1", "TMPDIR": str(folder)})
    try:
        end = time.monotonic() + 2 * PATIENCE
        while not (found := re.search(r"open (http://127\.0\.0\.1:\d+/)", log.read_text())):
            assert process.poll() is None and time.monotonic() < end, log.read_text()
            time.sleep(0.2)
        yield found[1]
        process.send_signal(signal.SIGINT)
        assert process.wait(PATIENCE) == 130 and "demo.py: stopped" in log.read_text()
        assert not list(folder.glob("demo_*")), "uploads outlive the page"
        assert "Traceback" not in log.read_text()
    finally:
        process.kill()


@pytest.fixture(params=WIDTHS)
def page(served, request):
    page = Page(served, WIDTHS[request.param])
    yield page
    page.browser.quit()


def test_each_tab_used_once_as_a_person_would(page):
    page.press("Draw me a scene")
    page.wait_for("In this scene:", "True captions of it")
    page.type("Text", "a ___ star above a red ring")
    page.press("Say every word")
    page.wait_for("likelihood", "first choice", "third")
    words = page.until(lambda: page.seen(".textfield .text"), "the words")
    words[1].click()
    page.wait_for("left-to-right stream")
    assert page.seen(".reads .own") and page.seen(".reads .right")
    page.until(lambda: len(page.seen("img")) >= 2, "the heat maps")

    page.open("Ask")
    page.wait_for("Questions with their true answers")
    page.press("Ask")
    page.wait_for(r"\d+%")

    page.open("Describe")
    for how in demo_answers.HOW:
        page.press(how, "label")
        page.press("Describe")
        page.wait_for("of this scene|grammar does not know")

    page.open("Compare")
    page.press("Draw me two scenes")
    page.wait_for("the statement is (true|false)")
    page.press("True or false?")
    page.wait_for(r"true\s+\d+%", r"false\s+\d+%")

    page.open("Search")
    page.press("Draw me nine scenes")
    page.until(lambda: len(page.seen(".found img")) == 9, "nine pictures")
    page.press("Search")
    page.wait_for(r"-?\d\.\d\d . (true|false)")
    page.press("Put in order")
    page.wait_for("text, the best first")

    page.open("Masks")
    page.press("MLM", "label")
    page.wait_for("Share of masked words", r"On average, a row that predicts does without \d+ %")
    page.press("Draw again")

    script = "return [document.documentElement.scrollWidth, window.innerWidth]"
    sides = page.browser.execute_script(script)
    assert sides[0] <= sides[1] <= page.width, "the page is wider than its window"
    asked = [json.loads(entry["message"])["message"]
             for entry in page.browser.get_log("performance")]
    urls = [one["params"]["request"]["url"] for one in asked
            if one["method"] == "Network.requestWillBeSent"]
    elsewhere = [url for url in urls if not url.startswith((page.address, "data:", "blob:"))]
    assert len(urls) > 10 and not elsewhere
    assert not [entry for entry in page.browser.get_log("browser") if entry["level"] == "SEVERE"]


def test_what_visitors_do_wrong_gets_a_sentence_on_the_page(page, tmp_path):
    page.wait_for("In this scene:")
    page.type("Text", "")
    page.press("Say every word")
    page.wait_for("Type a text first")
    page.type("Text", "word " * 500)
    page.press("Say every word")
    page.wait_for(r"this model reads at most \d+")

    (tmp_path / "notes.png").write_text("no picture at all")
    Image.new("RGB", (1, 1), "red").save(tmp_path / "dot.png")
    Image.new("RGB", (300, 2), "red").save(tmp_path / "thread.png")
    noise = np.random.default_rng(0).integers(0, 256, (3700, 3700, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "huge.bmp")
    page.type("Text", "a red star")
    for name, says in (("notes.png", r"notes\.png: not a picture that can be read"),
                       ("thread.png", "100 times as long"),
                       ("huge.bmp", r"huge\.bmp: a file of 41 MB; at most 30 MB"),
                       ("dot.png", "first choice")):
        page.upload(tmp_path / name)
        page.press("Say every word")
        page.wait_for(says)
        assert "Traceback" not in page.text() and "/tmp" not in page.text().split("Models:")[0]

    page.open("Ask")
    page.type("Question", " ")
    page.press("Ask")
    page.wait_for("Type a question first")
    page.open("Masks")
    page.type("Sentence", "word " * 500)
    page.press("Draw again")
    page.wait_for("A sentence of 500 words; 2 to 12 fit")


def test_other_machines_cannot_reach_it(served):
    """The page listens on the loopback address alone."""
    port = int(served.rstrip("/").rpartition(":")[2])
    with socket.socket() as one:
        assert one.connect_ex(("127.0.0.1", port)) == 0
    own = next((address[4][0]
                for address in socket.getaddrinfo(socket.gethostname(), None, socket.AF_INET)
                if not address[4][0].startswith("127.")), None)
    if own is None:
        pytest.skip("this machine has no address but the loopback one")
    with socket.socket() as one:
        assert one.connect_ex((own, port)) != 0


def test_the_readme_picture_can_be_made(tmp_path):
    """With DEMO_PICTURE=docs/demo.png it is made.

    The models are those that `python -m tools.demo` opens.
    """
    target = os.environ.get("DEMO_PICTURE")
    models = [] if target else write_page_models(tmp_path)[:1]
    if target and not demo_answers.existing_defaults():
        pytest.skip("no trained models: neither models/ nor what `make` leaves in runs/ is here")
    for address in serve(models, tmp_path):
        page = Page(address, 1100)
        page.press("Draw me a scene")
        page.wait_for("In this scene:")
        time.sleep(3)
        page.press("Say every word")
        words = page.until(lambda: page.seen(".textfield .text"), "the words")
        ring = next((word for word in words if word.text in demo_answers.KINDS), words[-1])
        ring.click()
        page.wait_for("left-to-right stream")
        time.sleep(3)
        picture = page.picture()
        picture = picture.crop((0, 0, picture.width, min(picture.height, 1000)))
        picture = picture.quantize(256, dither=Image.Dither.NONE)
        path = Path(target or tmp_path / "demo.png")
        picture.save(path, optimize=True)
        assert path.stat().st_size < 200_000
        page.browser.quit()
