"""Other people's clients, each in an environment of its own, against a real server: a table of what passed.

    python -m loadtests.clients [--url http://127.0.0.1:8000] [NAME ...]

Without a URL the bundled model is served on a free port for as long as it takes. What a client does is in the program
that `CLIENTS` names; each line that it prints, `what: ok` or `what: why not`, is one try. Environments stay in
`.clients/`, which git ignores, so that a second run installs nothing.
"""

import argparse
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
CACHE = ROOT / ".clients"
BUNDLED = ROOT / "model" / "bundled"
TORCH = "torch==2.13.0"  # first, where a client needs it: left alone they fetch the build for GPUs
TRY = re.compile(r"(?P<what>[\w .,()/+-]{1,48}): (?P<how>.*)")
INSTALL_S, RUN_S = 1800, 600


@dataclass(frozen=True, slots=True)
class Client:
    """`packages` are installed in order, one call each; a program in JavaScript gets npm's."""

    name: str
    program: str
    packages: tuple[str, ...]

    @property
    def is_node(self) -> bool:
        """Whether it is JavaScript."""
        return self.program.endswith(".mjs")


CLIENTS = (
    Client("openai-2", "openai_python.py", ("openai==2.54.0",)),
    Client("openai-node", "openai_node.mjs", ("openai@6.49.0",)),
    Client("ai-sdk", "ai_sdk.mjs", ("ai@6.0.326 @ai-sdk/openai-compatible@2.0.87 zod@4",)),
    Client("llm", "llm_cli.py", ("llm==0.36",)),
    Client("langchain-openai", "langchain_openai_.py", ("langchain-openai==1.7.3",)),
    Client("litellm", "litellm_.py", ("litellm==1.106.2 mcp==2.3.0",)),
    Client("instructor", "instructor_.py", ("instructor==1.17.0",)),
    Client("guidellm", "guidellm_cli.py", (TORCH, "guidellm==0.8.1")),
    Client("aiperf", "aiperf_cli.py", ("aiperf==0.13.0",)),
    Client("open-webui", "open_webui.py", (TORCH, "open-webui==0.12.4", "playwright==1.65.2")),
)


@dataclass(frozen=True, slots=True)
class Try:
    """One thing that a client did; `how` is "ok" or why it failed."""

    client: str
    what: str
    how: str


def main() -> int:
    """The exit code: 0 if everything passed."""
    parser = argparse.ArgumentParser(description="try other people's clients against a server")
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(client.name for client in CLIENTS))
    parser.add_argument("--url", help="of a server that runs already")
    options = parser.parse_args()
    unknown = set(options.names) - {client.name for client in CLIENTS}
    if unknown:
        parser.error(f"no client {', '.join(sorted(unknown))}; there are {', '.join(c.name for c in CLIENTS)}")
    wanted = [client for client in CLIENTS if not options.names or client.name in options.names]
    tries: list[Try] = []
    with serving() if options.url is None else given(options.url) as url:
        for client in wanted:
            tries += attempt(client, url)
    print("\n" + table(wanted, tries))
    return 0 if tries and all(each.how == "ok" for each in tries) else 1


def attempt(client: Client, url: str) -> list[Try]:
    """Install it if need be, and run its program."""
    began_s = time.monotonic()
    print(f"== {client.name}", flush=True)
    try:
        command, environment = installed(client)
    except subprocess.CalledProcessError as error:
        return [Try(client.name, "install", last_line(error.stderr) or str(error))]
    except FileNotFoundError as error:
        return [Try(client.name, "install", f"{error.filename} is not there")]
    except subprocess.TimeoutExpired:
        return [Try(client.name, "install", f"not within {INSTALL_S} s")]
    settings = {"BASE_URL": f"{url}/v1", "SERVER_URL": url, "MODEL": "bundled", "MODEL_FOLDER": str(BUNDLED)}
    keys = {"OPENAI_API_KEY": "none", "OPENAI_BASE_URL": f"{url}/v1", "PYTHONWARNINGS": "ignore"}
    try:
        everything = environment | settings | keys
        ran = subprocess.run(
            command, check=False, env=everything, capture_output=True, text=True, timeout=RUN_S, cwd=home(client)
        )
        said, code, complaint = ran.stdout, ran.returncode, last_line(ran.stderr)
    except subprocess.TimeoutExpired as error:
        said, code, complaint = _text(error.stdout), 1, f"not done within {RUN_S} s"
    tries = [Try(client.name, found["what"], found["how"]) for found in map(TRY.fullmatch, said.splitlines()) if found]
    if code and all(each.how == "ok" for each in tries):
        tries.append(Try(client.name, "run", complaint or f"exit code {code}"))
    for each in tries:
        print(f"   {each.what}: {each.how}", flush=True)
    print(f"   {time.monotonic() - began_s:.0f} s", flush=True)
    return tries


def home(client: Client) -> Path:
    """Its folder."""
    return CACHE / re.sub(r"\W+", "-", client.name)


def installed(client: Client) -> tuple[list[str], dict[str, str]]:
    """The command that runs its program, and the environment for it. What was installed is kept, unless the list of
    packages has changed. Raises `CalledProcessError` and `TimeoutExpired`."""
    folder = home(client)
    folder.mkdir(parents=True, exist_ok=True)
    stamp, wanted = folder / "installed.txt", "\n".join(client.packages)
    programs = HERE / "programs"
    environment = {**os.environ, "HOME": str(folder), "OMP_NUM_THREADS": "1"}
    is_new = not stamp.is_file() or stamp.read_text() != wanted
    if client.is_node:
        if is_new:
            for packages in client.packages:
                _run(["npm", "install", "--no-audit", "--no-fund", "--prefix", str(folder), *packages.split()])
        for program in (client.program, "tries.mjs"):  # modules are looked for beside the program
            (folder / program).write_bytes((programs / program).read_bytes())
        command = ["node", str(folder / client.program)]
    else:
        python = folder / "venv" / "bin" / "python"
        if is_new:
            _run([sys.executable, "-m", "venv", str(folder / "venv")])
            for packages in client.packages:
                pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--prefer-binary"]
                _run([*pip, *packages.split()])
        command = [str(python), str(programs / client.program)]
        environment["PATH"] = f"{python.parent}:{environment['PATH']}"
    stamp.write_text(wanted)
    return command, environment


def _run(command: list[str]) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=INSTALL_S)


@contextmanager
def serving() -> Iterator[str]:
    """The bundled model on a free port."""
    command = [sys.executable, "-m", "service.cli", "serve", "--port", "0"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert process.stdout is not None
    try:
        lines = iter(process.stdout.readline, "")
        found = next((url for line in lines if (url := re.search(r"http://[\w.:]+\d", line))), None)
        if found is None:
            raise SystemExit("the server did not start; try: make serve")
        yield found[0]
    finally:
        process.terminate()
        process.wait(60)


@contextmanager
def given(url: str) -> Iterator[str]:
    """A server that somebody else runs."""
    yield url.rstrip("/")


def table(clients: list[Client], tries: list[Try]) -> str:
    """Markdown, a line for each client."""
    lines = ["| client | passed | failed |", "| --- | --- | --- |"]
    for client in clients:
        own = [each for each in tries if each.client == client.name]
        passed = ", ".join(each.what for each in own if each.how == "ok")
        failed = "; ".join(f"{each.what}: {each.how}" for each in own if each.how != "ok")
        versions = " ".join(package for packages in client.packages for package in packages.split())
        lines.append(f"| {versions} | {passed} | {failed} |")
    return "\n".join(lines)


def last_line(text: str | None) -> str:
    """Of what a program complained."""
    lines = [line.strip() for line in (text or "").splitlines() if line.strip()]
    return lines[-1][:200].replace("|", "/") if lines else ""


def _text(output: str | bytes | None) -> str:
    return output.decode(errors="replace") if isinstance(output, bytes) else output or ""


if __name__ == "__main__":
    sys.exit(main())
