"""Drive a real JupyterLab in Chromium: start it, open a notebook, run it, move a slider, look.

The lab is started by the project's own command, in a copy of the notebooks, with its token on.
"""

import os
import re
import shutil
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import nbformat
import psutil
from nbformat.sign import NotebookNotary
from playwright.sync_api import Browser, Locator, Page, sync_playwright

ROOT = Path(__file__).resolve().parent.parent.parent
SCREENSHOTS = ROOT / "build" / "screenshots"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
PATIENCE = 60  # seconds for anything that has to come
ADDRESS = re.compile(r"http://127\.0\.0\.1:\d+/lab/tree/(\S+)\?token=\w+")
WHOLE_NOTEBOOK = '{"windowingMode": "none"}'  # else JupyterLab draws only the cells in view


class Panel(NamedTuple):
    """What a panel shows: the addresses of its pictures and its text."""

    pictures: list[str]
    text: str


@contextmanager
def start_lab(folder: Path, notebooks: Path = ROOT / "notebooks"):
    """Serve a copy of `notebooks` from `folder`; yields the address that `moe-lab lab` printed.

    The copies are signed as trusted, as after a reader's first run: untrusted widgets would only show their text.
    """
    shutil.copytree(notebooks, folder / "notebooks")
    settings = folder / "jupyter" / "settings" / "@jupyterlab" / "notebook-extension"
    settings.mkdir(parents=True)
    (settings / "tracker.jupyterlab-settings").write_text(WHOLE_NOTEBOOK)
    for path in (folder / "notebooks").glob("*.ipynb"):
        NotebookNotary(data_dir=str(folder / "jupyter")).sign(nbformat.read(path, as_version=4))
    environment = os.environ | {
        "JUPYTER_CONFIG_DIR": str(folder / "jupyter"),
        "JUPYTER_DATA_DIR": str(folder / "jupyter"),
        "JUPYTER_RUNTIME_DIR": str(folder / "jupyter" / "runtime"),
        "JUPYTERLAB_SETTINGS_DIR": str(settings.parent.parent),
        "JUPYTERLAB_WORKSPACES_DIR": str(folder / "jupyter" / "workspaces"),
    }
    command = [sys.executable, "-m", "moe_lab", "lab", "--no-browser", "--port", str(free_port())]
    log = folder / "lab.log"
    with log.open("w") as output:
        server = psutil.Popen(command, cwd=folder, env=environment, stdout=output, stderr=subprocess.STDOUT)
    try:
        yield wait_for_address(server, log)
    finally:
        stop(server)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_for_address(server: psutil.Popen, log: Path) -> str:
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        if match := ADDRESS.search(log.read_text()):
            return match.group()
        if server.poll() is not None:
            break
        time.sleep(0.1)
    raise RuntimeError(f"JupyterLab printed no address:\n{log.read_text()}")


def stop(server: psutil.Popen) -> None:
    """End the server and its kernels; nothing may stay behind."""
    family = [server, *server.children(recursive=True)] if server.poll() is None else []
    for process in family[:1]:
        process.terminate()
    _, alive = psutil.wait_procs(family, timeout=20)
    for process in alive:
        process.kill()


@contextmanager
def start_browser():
    """Yields a Chromium with a fresh profile."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        try:
            yield browser
        finally:
            browser.close()


def new_page(browser: Browser) -> Page:
    page = browser.new_page(viewport={"width": 1440, "height": 900})
    page.set_default_timeout(PATIENCE * 1000)
    return page


def open_notebook(page: Page, address: str, name: str) -> None:
    """Show a notebook, with its kernel idle and every cell drawn. Nothing is run."""
    page.goto(re.sub(r"notebooks/[^?]+", f"notebooks/{name}", address) + "&reset")  # no tabs of earlier pages
    page.locator(".jp-Notebook .jp-Cell").first.wait_for()
    page.get_by_text("| Idle").first.wait_for()
    page.wait_for_function("!document.querySelector('.jp-Notebook').innerText.includes('Loading widget...')")


def run_all(page: Page) -> float:
    """Run every cell; returns the seconds until the last one is done.

    Stored counts look like fresh ones, so they are blanked first.
    """
    prompts = ".jp-CodeCell .jp-InputPrompt"
    page.evaluate("css => document.querySelectorAll(css).forEach(node => { node.textContent = ''; })", prompts)
    page.get_by_role("menuitem", name="Run", exact=True).click()
    started = time.monotonic()
    page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
    page.wait_for_function(
        r"css => [...document.querySelectorAll(css)].every(node => /^\[\d+\]:?$/.test(node.textContent.trim()))",
        arg=prompts,
    )
    return time.monotonic() - started


def run_cell(page: Page, text: str) -> None:
    """Run the first code cell that holds `text`, until it is done."""
    cell = page.locator(".jp-CodeCell").filter(has=page.locator(".jp-InputArea", has_text=text)).first
    prompt = cell.locator(".jp-InputPrompt").first
    prompt.evaluate("node => { node.textContent = ''; }")
    cell.locator(".cm-content").click()
    page.keyboard.press("Control+Enter")
    cell.locator(".jp-InputPrompt", has_text=re.compile(r"^\[\d+\]:?$")).first.wait_for()


def press(page: Page, name: str) -> None:
    """Press the button of a panel."""
    page.locator(".jp-OutputArea").get_by_role("button", name=name, exact=True).click()


def wait_for_text(page: Page, text: str) -> None:
    """Until some widget says it."""
    page.locator(".widget-html-content", has_text=text).first.wait_for()


def errors(page: Page) -> list[str]:
    """Texts that a reader must never meet: tracebacks, and widgets that could not be drawn."""
    shown = page.locator(".jp-Notebook").inner_text()
    tracebacks = page.locator('.jp-OutputArea [data-mime-type="application/vnd.jupyter.error"]').all_inner_texts()
    return tracebacks + re.findall(r"Error displaying widget.*|Error creating widget.*", shown)


def slider(page: Page, label: str | None = None) -> Locator:
    """The handle of the slider with this label, or of the first slider."""
    sliders = page.locator(".jp-OutputArea .widget-slider")
    if label is not None:
        sliders = sliders.filter(has=page.locator(".widget-label", has_text=re.compile(rf"^{re.escape(label)}$")))
    return sliders.first.locator(".noUi-handle").first


def panel(page: Page) -> Panel:
    """What the widgets of the page show now: text first, which panels set after their pictures."""
    text = "\n".join(page.locator(".widget-html-content").all_inner_texts())
    return Panel(page.locator("img.widget-image").evaluate_all("images => images.map(image => image.src)"), text)


def move_slider(page: Page, label: str | None = None, key: str = "ArrowRight") -> tuple[Panel, Panel]:
    """Press a key on a slider; returns the panel before, and once a picture and the text have changed."""
    handle = slider(page, label)
    handle.scroll_into_view_if_needed()
    before = panel(page)
    handle.focus()
    page.keyboard.press(key)
    deadline = time.monotonic() + PATIENCE
    while (after := panel(page)).pictures == before.pictures or after.text == before.text or "computing" in after.text:
        if time.monotonic() > deadline:
            raise TimeoutError(f"{key} changed too little: {before} -> {after}")
        page.wait_for_timeout(20)
    return before, after


def screenshot(page: Page, name: str) -> Path:
    """Keep a picture of the page, to be looked at."""
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=SCREENSHOTS / f"{name}.png")
    return SCREENSHOTS / f"{name}.png"
