"""The chat page in a real browser, before servers that are well: the bundled storyteller, and one that recites."""

import threading
from pathlib import Path

from service.attention import looker
from service.errors import Overloaded
from service.http.gate import Rules
from service.keys import Keyring, add_key
from tests.browser.conftest import Storyteller
from tests.browser.driver import Browser
from tests.browser.stage import Reciter, stage
from tests.model.conftest import TINY, random_decoder, save_folder

SPEECH = """# A title

Some *soft* and **loud** words, `code`, and [a link](https://example.org/a).

1. one
2. two

- [x] done

> quoted

```python
print("<b>no</b>")
```

| a | b |
|---|---|
| 1 | 2 |

<img src=x onerror=window.done=1><script>window.done=1</script><b style="color:red">raw</b>

![a picture](https://example.org/spy.png) [bad](javascript:window.done=1) <https://example.org/auto>
<style>p { color: red }</style><iframe src="https://example.org/"></iframe><form action=x><svg onload=window.done=1>
"""


def going() -> threading.Event:
    """Said at once."""
    event = threading.Event()
    event.set()
    return event


def test_a_story_is_begun_looked_at_and_gone_on_with(browser: Browser, storyteller: Storyteller) -> None:
    browser.play("story", url=storyteller.url)


def test_what_is_changed_is_kept(browser: Browser, storyteller: Storyteller) -> None:
    browser.play("changes", url=storyteller.url)


def test_markdown_comes_as_it_grows_and_hostile_text_stays_text(browser: Browser) -> None:
    with stage(Reciter(text=SPEECH, go=going())) as port:
        browser.play("markdown", url=f"http://127.0.0.1:{port}/")


def test_a_queue_is_shown_and_to_stop_is_to_cancel(browser: Browser) -> None:
    broker = Reciter(text="so it goes " * 400, position=7)
    broker.refusal = Overloaded(1, 100)

    def room() -> None:
        broker.refusal = None

    with stage(broker) as port:
        browser.play("waiting", {"room": room, "go": broker.go.set}, url=f"http://127.0.0.1:{port}/")
    assert broker.cancelled == [broker.requests[0].id]


def test_what_the_model_can_not_remember_is_left_out(browser: Browser) -> None:
    with stage(Reciter(text="and so on.", go=going()), max_model_len=80) as port:
        browser.play("memory", url=f"http://127.0.0.1:{port}/")


def test_a_word_shows_where_every_head_looked(browser: Browser, tmp_path: Path) -> None:
    look = looker(save_folder(random_decoder(TINY), tmp_path / "tiny"))
    with stage(Reciter(text="The animal was too tired.", go=going()), look=look) as port:
        browser.play("sight", url=f"http://127.0.0.1:{port}/")


def test_a_key_is_asked_for_and_kept_for_the_tab(browser: Browser, tmp_path: Path) -> None:
    key = add_key(tmp_path / "keys.json", "reader")
    with stage(Reciter(go=going()), Rules(keyring=Keyring(tmp_path / "keys.json"))) as port:
        browser.play("keys", url=f"http://127.0.0.1:{port}/", key=key)
