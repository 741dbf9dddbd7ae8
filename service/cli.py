"""The `millrace` command: reads the command line, calls the room that does the work, turns refusals into one line.

Heavy rooms are imported only by the command that needs them, so that `--help` and typing mistakes answer at once.
"""

import argparse
import signal
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path

from model.chat_template import ChatTemplateError
from model.config import CheckpointError, EngineConfigError
from model.training.options import OptionError, add_arguments
from service.child import KEEPER_GONE, die_with
from service.errors import MillraceError
from service.settings import Settings, SettingsError, shown_url

STARTUP_FAILED = 3
REFUSALS = (ChatTemplateError, CheckpointError, EngineConfigError, OptionError, SettingsError, MillraceError)

EPILOG = """examples:
  millrace serve                                   the bundled model on http://127.0.0.1:8000
  millrace serve --model path/to/folder --port 9000
  millrace generate "Once upon a time"
  millrace chat                                    talk to the server on http://127.0.0.1:8000
  millrace keys add ada --file keys.json           a key, for: millrace serve --api-keys-file keys.json
  millrace train --data stories.txt --out my-model
in parts, any number of each, that meet in a Redis:
  millrace api --redis-url redis://localhost       HTTP, without a GPU or the weights
  millrace worker --redis-url redis://localhost    an engine
  millrace load-functions --redis-url redis://admin:password@localhost     where workers may not do that
"""


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point. Exit codes: 0 done, 2 wrong usage, 3 can't start or go on (one line on stderr says why)."""
    parser = argparse.ArgumentParser(
        prog="millrace", epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True, metavar="command")
    _serve_arguments(commands.add_parser("serve", help="serve a model over HTTP"))
    _api_arguments(commands.add_parser("api", help="HTTP alone, before a queue in Redis"))
    _worker_arguments(commands.add_parser("worker", help="an engine alone, behind a queue in Redis"))
    _load_arguments(commands.add_parser("load-functions", help="bring the queue's functions into a Redis"))
    _engine_arguments(commands.add_parser("engine"))  # for a worker's own use, and not listed
    _generate_arguments(commands.add_parser("generate", help="write a text to the terminal"))
    _chat_arguments(commands.add_parser("chat", help="talk to a running server"))
    _train_arguments(commands.add_parser("train", help="train a model from text"))
    _attention_arguments(commands.add_parser("attention", help="draw where each head of a model looks"))
    _keys_arguments(commands.add_parser("keys", help="make keys for clients"))
    _health_arguments(commands.add_parser("health", help="ask a server on this machine how it is"))
    args = parser.parse_args(argv)
    try:
        args.run(args)
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        if not _is_refusal(error):
            raise
        print(f"millrace: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(STARTUP_FAILED)


def _is_refusal(error: Exception) -> bool:
    """Whether an error was raised on purpose, for a person to read; anything else keeps its traceback."""
    return isinstance(error, REFUSALS)


def _model_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", help="a Hugging Face folder (default: the bundled storyteller)")
    parser.add_argument("--dtype", choices=["auto", "float32", "bfloat16", "float16"])
    parser.add_argument("--quantize", choices=["none", "int8"], help="int8: weights of one byte, half the memory")


def _engine_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"])
    parser.add_argument(
        "--deterministic",
        action="store_const",
        const=True,
        help="the same text in any batch also in 16 bits and on a GPU; slower",
    )
    parser.add_argument("--max-model-len", type=int, metavar="TOKENS", help="prompt and output together")
    parser.add_argument("--max-num-seqs", type=int, metavar="N", help="sequences computed in one step")
    parser.add_argument("--cache-gib", type=float, metavar="GIB", help="memory for the paged cache")
    parser.add_argument(
        "--no-native",
        dest="native",
        action="store_const",
        const=False,
        help="on a CPU, compute with torch alone: slower",
    )
    parser.add_argument(
        "--no-prefix-cache",
        dest="prefix_cache",
        action="store_const",
        const=False,
        help="compute every prompt from its beginning",
    )


def _worker_options(parser: argparse.ArgumentParser) -> None:
    _engine_options(parser)
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads that compute; default: cores - 1")
    parser.add_argument("--stuck-s", type=float, metavar="S", help="seconds without a step until an engine has failed")
    parser.add_argument("--lease-s", type=float, metavar="S", help="seconds that a silent worker keeps its requests")


def _redis_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--redis-url", metavar="URL", help="redis://[user:password@]host:port, best in the environment")
    parser.add_argument("--redis-password-file", type=Path, metavar="FILE", help="the password, where the URL has none")
    parser.add_argument("--redis-ca-file", type=Path, metavar="FILE", help="PEM of who certifies a rediss:// server")


def _process_options(parser: argparse.ArgumentParser) -> None:
    _redis_option(parser)
    parser.add_argument("--drain-s", type=float, metavar="S", help="on SIGTERM, seconds for running requests to end")
    parser.add_argument("--metrics-port", type=int, metavar="PORT", help="a port of its own for /metrics")
    parser.add_argument("--metrics-host", metavar="HOST", help="where it listens; default: this machine only")
    parser.add_argument("--otlp-endpoint", metavar="URL", help="where traces go, such as http://127.0.0.1:4318")
    parser.add_argument("--log-json", action="store_const", const=True, help="log lines as JSON")


def _door_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model-name", help="the name clients use (default: the folder's)")
    parser.add_argument("--host")
    parser.add_argument("--port", type=int)
    parser.add_argument("--api-keys-file", type=Path, metavar="FILE", help="who may ask; see: millrace keys add --help")
    parser.add_argument(
        "--insecure-no-auth", action="store_const", const=True, help="listen beyond this machine without keys"
    )
    parser.add_argument("--allowed-hosts", metavar="NAMES", help="Host headers that are answered, with commas between")
    parser.add_argument(
        "--cors-origin",
        action="append",
        metavar="ORIGIN",
        help="https://... of a page elsewhere that may ask; repeat it",
    )
    parser.add_argument("--max-connections", type=int, metavar="N", help="connections at a time, idle ones included")
    parser.add_argument("--max-waiting", type=int, metavar="N", help="requests that may wait before new ones get 429")
    parser.add_argument("--keep-s", type=float, metavar="S", help="seconds that an ended request can be read again")
    parser.add_argument("--orphan-s", type=float, metavar="S", help="seconds that a resumable one runs with no reader")
    parser.add_argument("--max-request-s", type=float, metavar="S", help="longest life of a request")


def _lazily(room: str, function: str) -> Callable[[argparse.Namespace], None]:
    def run(args: argparse.Namespace) -> None:
        getattr(import_module(room), function)(args)

    return run


def _settings(args: argparse.Namespace, needs_redis: bool = False) -> Settings:
    own = ("run", "parent", "name", "keeper", "up", "worker", "alive")
    settings = Settings.load(
        **{key: value for key, value in vars(args).items() if key not in own and value is not None}
    )
    if needs_redis and settings.redis_url is None:
        raise SettingsError("--redis-url or MILLRACE_REDIS_URL: missing; give one, such as redis://localhost:6379/0")
    return settings


def _serve_arguments(parser: argparse.ArgumentParser) -> None:
    for options in (_model_arguments, _worker_options, _door_options, _process_options):
        options(parser)
    parser.add_argument(
        "--attention-view",
        action="store_const",
        const=True,
        help="the chat page shows where each head looked; takes the weights' memory once more",
    )
    parser.set_defaults(run=_serve)


def _serve(args: argparse.Namespace) -> None:
    settings = _settings(args)
    if settings.attention_view and settings.redis_url is not None:
        raise SettingsError("--attention-view: only where one process does everything, without --redis-url")
    import_module("service.serve" if settings.redis_url is None else "service.api").serve(settings)


def _api_arguments(parser: argparse.ArgumentParser) -> None:
    for options in (_model_arguments, _door_options, _process_options):
        options(parser)
    parser.set_defaults(run=lambda args: import_module("service.api").api(_settings(args, needs_redis=True)))


def _worker_arguments(parser: argparse.ArgumentParser) -> None:
    for options in (_model_arguments, _worker_options, _process_options):
        options(parser)
    parser.add_argument("--parent", type=int, help=argparse.SUPPRESS)  # the process to end with
    parser.set_defaults(run=_worker)


def _worker(args: argparse.Namespace) -> None:
    if args.parent is not None:
        die_with(args.parent, signal.SIGTERM)
    import_module("service.keeper").keep(_settings(args, needs_redis=True))


def _load_arguments(parser: argparse.ArgumentParser) -> None:
    _redis_option(parser)
    parser.set_defaults(run=_load_functions)


def _load_functions(args: argparse.Namespace) -> None:
    url = _settings(args, needs_redis=True).queue_url
    assert url is not None
    import_module("service.broker.redis").check(url, load=True)
    print(f"loaded into {shown_url(url)}")


def _engine_arguments(parser: argparse.ArgumentParser) -> None:
    """Its settings are in its environment."""
    parser.add_argument("--name", required=True)
    parser.add_argument("--keeper", type=int, required=True)
    parser.add_argument("--up", type=int, required=True)
    parser.set_defaults(run=_engine)


def _engine(args: argparse.Namespace) -> None:
    die_with(args.keeper, KEEPER_GONE)
    import_module("service.work").work(_settings(args, needs_redis=True), args.name, args.up)


def _generate_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("prompt")
    _model_arguments(parser)
    _engine_options(parser)
    parser.add_argument("--max-tokens", type=int, default=200)
    parser.add_argument("--temperature", type=float)
    parser.add_argument("--top-p", type=float)
    parser.add_argument("--seed", type=int, help="the same seed gives the same text (default: drawn and told)")
    parser.set_defaults(run=_lazily("service.terminal", "generate"))


def _chat_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--api-key", metavar="KEY", help="for a server that asks for one")
    parser.add_argument(
        "--model", help="the folder whose chat template and tokenizer to use (default: the bundled one)"
    )
    parser.add_argument("--max-tokens", type=int, default=200)
    parser.set_defaults(run=_lazily("service.terminal", "chat"))


def _train_arguments(parser: argparse.ArgumentParser) -> None:
    add_arguments(parser)
    parser.set_defaults(run=_lazily("service.terminal", "train"))


def _attention_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("text")
    parser.add_argument("--model", help="a Hugging Face folder (default: the bundled storyteller)")
    parser.add_argument("--out", type=Path, default=Path("maps.png"), metavar="FILE", help="the picture (%(default)s)")
    parser.add_argument("--layer", type=int, help="the one drawn large, from 0 (default: the most telling)")
    parser.add_argument("--head", type=int, help="of that layer, from 0")
    parser.set_defaults(run=_lazily("service.attention", "attention"))


def _keys_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(required=True, metavar="action")
    add = actions.add_parser("add", help="make a key, or one more for a name that has one, and print it")
    add.add_argument("name", metavar="NAME", help="whose it is: the name in the queue's fair shares")
    add.add_argument("--file", type=Path, required=True, help="the file given to a server as --api-keys-file")
    add.add_argument("--weight", type=float, help="share of the queue, against 1 of others")
    for limit in ("max-concurrent", "requests-per-minute", "tokens-per-minute"):
        add.add_argument(f"--{limit}", type=int, metavar="N", help="for all keys of the name together; default: none")
    parser.set_defaults(run=_add_key)


def _add_key(args: argparse.Namespace) -> None:
    limits = {name: getattr(args, name) for name in ("max_concurrent", "requests_per_minute", "tokens_per_minute")}
    print(import_module("service.keys").add_key(args.file, args.name, weight=args.weight, **limits))
    told = f"a key of {args.name}, shown only now: {args.file} holds its hash. A running server looks after a SIGHUP"
    print(told, file=sys.stderr)


def _health_arguments(parser: argparse.ArgumentParser) -> None:
    """The ports are those of the settings, so that in a container no flag is needed."""
    parser.add_argument("--port", type=int, help="of the api or server that is asked")
    parser.add_argument("--metrics-port", type=int, metavar="PORT", help="of the worker that is asked")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--alive", action="store_true", help="whether it answers at all, rather than is ready to serve")
    what.add_argument("--worker", action="store_true", help="whether a worker's engine is up, by its metrics port")
    parser.set_defaults(run=_health)


def _health(args: argparse.Namespace) -> None:
    healthy, told = import_module("service.health").ask(_settings(args), worker=args.worker, alive=args.alive)
    print(told, file=sys.stdout if healthy else sys.stderr)
    sys.exit(0 if healthy else 1)


if __name__ == "__main__":
    main()
