"""Open WebUI: its server, started with pip's command, and a chat with it in a headless browser."""

import os
import shutil
import socket
import subprocess
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path

from playwright.sync_api import expect, sync_playwright
from tries import BASE_URL, MODEL, run

START_S, ANSWER_MS = 400, 90_000
QUIET = ("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking")


@contextmanager
def serving():
    """Its URL, once it answers."""
    data = Path.cwd() / "data"
    shutil.rmtree(data, ignore_errors=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = {
        "OPENAI_API_BASE_URL": BASE_URL,
        "OPENAI_API_KEY": "none",
        "WEBUI_AUTH": "False",
        "ENABLE_OLLAMA_API": "False",
        "OFFLINE_MODE": "true",
        "HF_HUB_OFFLINE": "1",
        "RAG_EMBEDDING_ENGINE": "openai",
        "DATA_DIR": str(data),
        "WEBUI_SECRET_KEY": "none",
    }
    command = ["open-webui", "serve", "--host", "127.0.0.1", "--port", str(port)]
    with Path("open-webui.log").open("w") as log:
        process = subprocess.Popen(command, env={**os.environ, **settings}, stdout=log, stderr=log)
        try:
            url, deadline_s = f"http://127.0.0.1:{port}", time.monotonic() + START_S
            while not _answers(url + "/health"):
                if process.poll() is not None or time.monotonic() > deadline_s:
                    raise RuntimeError(Path("open-webui.log").read_text()[-200:])
                time.sleep(1)
            yield url
        finally:
            process.terminate()
            process.wait(30)


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def chat() -> bool:
    """Say something and see an answer; screenshots stay in the client's folder."""
    with serving() as url, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=list(QUIET))
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.goto(f"{url}/?models={MODEL}")
        box = page.locator("#chat-input")
        expect(box).to_be_visible(timeout=ANSWER_MS)
        page.wait_for_timeout(3000)
        page.screenshot(path="opened.png")
        news = page.get_by_role("button", name="Okay, Let's Go!")
        if news.count():
            news.click()
        box.click()
        page.keyboard.type("Tell me a story about a fox.")
        page.keyboard.press("Enter")
        answer = page.locator(".chat-assistant").last
        expect(answer).to_contain_text(" ", timeout=ANSWER_MS)
        page.wait_for_timeout(8000)
        page.screenshot(path="answered.png")
        text = answer.inner_text()
        browser.close()
    return len(text.split()) > 20


run(chat_in_the_browser=chat)
