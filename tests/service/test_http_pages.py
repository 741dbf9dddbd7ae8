"""The two pages as files: complete, small, strict, and in need of nobody else."""

import gzip
import re

import pytest

from service.http.pages import CHAT, DOCS, FOLDER
from tests.service.helpers_http import Door

OTHERS_WORK = ("marked.js", "purify.js", "vendored.txt")
LINK = re.compile(r"""(?:src=|href=|from |import )["'](/[^"'#]*)["']""")


@pytest.mark.parametrize("page", ["/", "/docs"])
async def test_a_page_is_there_with_all_its_parts(page: str) -> None:
    door, todo, seen = Door(loaded=False), [page], set[str]()
    while todo:
        response = await door.ask("GET", url := todo.pop())
        assert response.status_code == 200, url
        seen.add(url)
        if not url.endswith(OTHERS_WORK):
            todo += set(LINK.findall(response.text)) - seen
    parts = {path.name for path in FOLDER.iterdir() if (path.stem == "docs") == (page == "/docs")}
    assert parts - {url.rsplit("/", 1)[1] for url in seen} <= {CHAT, DOCS}, "files that nothing asks for"


async def test_a_page_may_do_nothing_but_what_it_does() -> None:
    for path in ("/", "/docs", "/page/chat.js"):
        headers = (await Door().ask("GET", path)).headers
        policy = dict(part.split(" ", 1) for part in headers["content-security-policy"].split("; "))
        assert policy["default-src"] == policy["frame-ancestors"] == "'none'"
        assert policy["script-src"] == policy["connect-src"] == "'self'"
        assert policy["require-trusted-types-for"] == "'script'"
        assert headers["x-content-type-options"] == "nosniff"


def test_nothing_is_asked_of_another_host() -> None:
    ours = [path for path in FOLDER.iterdir() if path.name not in OTHERS_WORK]
    known = re.compile(r"http://localhost|http://www\.w3\.org/2000/svg")  # an example, and a name that nobody fetches
    assert not [path.name for path in ours if re.search(r"https?://\w", known.sub("", path.read_text()))]


def test_the_chat_page_is_under_60_kb() -> None:
    parts = [path.read_bytes() for path in FOLDER.iterdir() if path.stem != "docs"]
    assert sum(len(gzip.compress(part)) for part in parts) < 60_000


async def test_it_comes_compressed_and_only_once() -> None:
    door = Door()
    plain = await door.ask("GET", "/page/marked.js", headers={"accept-encoding": "identity"})
    small = await door.ask("GET", "/page/marked.js", headers={"accept-encoding": "gzip"})
    assert plain.content == small.content
    assert int(small.headers["content-length"]) < len(plain.content) / 3
    again = await door.ask("GET", "/page/marked.js", headers={"if-none-match": small.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")


@pytest.mark.parametrize(
    "path", ["/page/", "/page/..%2fapp.py", "/page/../pages.py", "/page/chat.html", "/page/docs.js"]
)
async def test_nothing_else_is_served(path: str) -> None:
    assert (await Door().ask("GET", path)).status_code == 404
