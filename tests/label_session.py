"""In a person's place: opens the page of label_preferences.py in headless Chromium and answers by keys, as a synthetic teacher
that prefers the clip in which the robot gets further (in MuJoCo's x).

    python tests/label_session.py runs/FOLDER --labels 60

Debian: apt-get install chromium chromium-driver; and pip install selenium. The tests use the parts.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import torch

SCRIPT = Path(__file__).resolve().parent.parent / "label_preferences.py"
KEYS = {"left": "\ue012", "right": "\ue014", "down": "\ue015"}  # WebDriver's names of the arrows
OPTIONS = (
    "--headless=new --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-component-update "
    "--disable-sync --window-size=900,780"
)


def browser_missing() -> str:
    """What has to be installed for `open_browser`; empty if nothing."""
    programs = [name for name in ("chromium", "chromedriver") if not shutil.which(name)]
    if programs:
        return f"no {' and no '.join(programs)} here: apt-get install chromium chromium-driver"
    return "" if find_spec("selenium") else "no selenium here: pip install selenium"


def open_browser():
    """A headless Chromium."""
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for option in OPTIONS.split() + ["--no-sandbox"] * (os.geteuid() == 0):  # root has no sandbox
        options.add_argument(option)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    return webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))


def serve(folder: Path, *words: str) -> tuple[subprocess.Popen, str]:
    """A server of its own for the folder, and the address that it prints; `before` is what it printed before that."""
    command = [sys.executable, str(SCRIPT), str(folder), "--port", "0", *words]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    process.before = ""
    for line in process.stdout:
        if address := re.match("open (http.*)", line):
            return process, address[1].replace("0.0.0.0", "127.0.0.1")
        process.before += line
    raise RuntimeError(f"label_preferences.py ended:\n{process.before}")


def wait(driver, found, seconds: float = 240):
    """What `found()` returns once that is true."""
    limit = time.monotonic() + seconds
    while not (result := found()):
        assert time.monotonic() < limit, f"took too long; the page says: {driver.find_element('tag name', 'body').text}"
        time.sleep(0.02)
    return result


def shown(driver) -> dict:
    """The question whose clip is on the screen, once one is."""
    return wait(driver, lambda: driver.execute_script("return clip.hidden ? null : shown"))


def press(driver, key: str) -> None:
    """Press a key on the page."""
    driver.find_element("tag name", "body").send_keys(KEYS.get(key, key))


def progress_in_x(pair: dict) -> torch.Tensor:
    """How far the robot gets in each of the two fragments (2,)."""
    return pair["states"][:, -1, 0] - pair["states"][:, 0, 0]


def main(folder: Path, labels: int, screenshot: Path | None) -> None:
    """Answer so many questions, in about a quarter of a second each and what it takes to draw the clips."""
    process, address = serve(folder, "--labeller", "synthetic", "--question", "Which one gets further?")
    driver = open_browser()
    try:
        driver.get(address)
        for number in range(labels):
            question = shown(driver)
            if screenshot and number == labels // 2:
                time.sleep(1)
                driver.save_screenshot(str(screenshot))
            pair = torch.load(folder / f"preferences/{question['pair']:07}.pt", weights_only=True)
            first, second = progress_in_x(pair)
            better = int(second > first)
            press(driver, "left" if better == question["left"] else "right")
        wait(driver, lambda: driver.execute_script("return shown === null || !clip.hidden"))
        print(driver.find_element("id", "progress").text)
    finally:
        driver.quit()
        process.terminate()
        process.wait()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--labels", type=int, default=60)
    parser.add_argument("--screenshot", type=Path)
    main(**vars(parser.parse_args()))
