#!/bin/sh
# Makes sure of the programs that check the deployment's files: shellcheck and nginx by apt-get (Debian, Ubuntu), the
# rest of deploy/checkers.txt in .checkers. Where all are there it does and says nothing. kubectl it can't install.
#   usage: deploy/checkers.sh
set -eu
cd "$(dirname "$0")/.."

if ! cmp -s deploy/checkers.txt .checkers/done; then
    "${PYTHON:-python3}" -m venv .checkers
    .checkers/bin/python -m pip install -qq --disable-pip-version-check -r deploy/checkers.txt
    cp deploy/checkers.txt .checkers/done
fi

packages=
command -v shellcheck >/dev/null 2>&1 || packages="shellcheck"
command -v nginx >/dev/null 2>&1 || [ -x /usr/sbin/nginx ] || packages="${packages:+$packages }nginx-light"
[ "$packages" ] || exit 0
command -v apt-get >/dev/null 2>&1 || {
    echo "deploy/checkers.sh: no apt-get here; install yourself: $packages" >&2
    exit 1
}
as_root=
if [ "$(id -u)" != 0 ]; then
    command -v sudo >/dev/null 2>&1 || {
        echo "deploy/checkers.sh: not root; as root: apt-get install $packages" >&2
        exit 1
    }
    as_root=sudo
fi
echo "deploy/checkers.sh: INSTALLING ON THIS MACHINE with apt-get: $packages"
$as_root apt-get update -qq
# shellcheck disable=SC2086  # several words
$as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $packages >/dev/null
