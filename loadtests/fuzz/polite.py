"""A client that behaves, with a key of its own: it asks for a few tokens, and for the server's health, again and again,
on one connection, and notes how long each took. `python -m loadtests.fuzz.polite` goes on until standard input ends.
"""

import argparse
import http.client
import json
import select
import sys
import time

PAUSE_S = 0.05
BODY = json.dumps({"prompt": "Once upon a time", "max_tokens": 4})


def ask(connection: http.client.HTTPConnection, method: str, path: str, key: str) -> tuple[float, int]:
    """Seconds and status; 0 if it was cut off, after which there is a new connection."""
    begun_s = time.perf_counter()
    headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
    try:
        connection.request(method, path, BODY if method == "POST" else None, headers)
        response = connection.getresponse()
        response.read()
        status = response.status
    except (http.client.HTTPException, OSError):
        connection.close()
        status = 0
    return time.perf_counter() - begun_s, status


def main() -> None:
    """Prints, for each route, seconds and statuses."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--key", required=True)
    args = parser.parse_args()
    connection = http.client.HTTPConnection("127.0.0.1", args.port, timeout=60)
    told: dict[str, list[tuple[float, int]]] = {"/health": [], "/generate": []}
    while not select.select([sys.stdin], [], [], PAUSE_S)[0]:
        told["/health"].append(ask(connection, "GET", "/health", args.key))
        told["/generate"].append(ask(connection, "POST", "/generate", args.key))
    json.dump(told, sys.stdout)


if __name__ == "__main__":
    main()
