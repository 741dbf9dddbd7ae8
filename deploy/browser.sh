#!/bin/sh
# Makes sure that there are chromium, node of version 18 or newer, and the packages of tests/browser/package.json, which
# drive and check the chat page. Debian and Ubuntu only, but for the packages. Where all is there it does and says nothing.
#   usage: deploy/browser.sh
set -eu
cd "$(dirname "$0")/../tests/browser"

node_is_there() {
    major=$(node --version 2>/dev/null | sed -n 's/^v\([0-9]*\)\..*/\1/p')
    [ "${major:-0}" -ge 18 ] && command -v npm >/dev/null 2>&1
}
chromium_is_there() {
    command -v chromium || command -v chromium-browser || command -v google-chrome
}
packages_are_there() {
    # shellcheck disable=SC2016  # they are JavaScript's
    node -e '
        const wanted = require("./package.json").devDependencies;
        for (const [name, version] of Object.entries(wanted))
            if (require(`./node_modules/${name}/package.json`).version !== version) process.exit(1)' 2>/dev/null
}
give_up() {
    echo "deploy/browser.sh: $1" >&2
    exit 1
}

packages=
chromium_is_there >/dev/null || packages="chromium"
node_is_there || packages="${packages:+$packages }nodejs npm"
if [ "$packages" ]; then
    command -v apt-get >/dev/null 2>&1 || give_up "no apt-get here; install yourself: $packages"
    as_root=
    if [ "$(id -u)" != 0 ]; then
        command -v sudo >/dev/null 2>&1 || give_up "not root; as root: apt-get install $packages"
        as_root=sudo
    fi
    echo "deploy/browser.sh: INSTALLING ON THIS MACHINE with apt-get: $packages"
    $as_root apt-get update -qq
    # shellcheck disable=SC2086  # several words
    $as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $packages >/dev/null
    node_is_there || give_up "what apt-get installed is older than node 18: $(node --version 2>&1)"
    chromium --version 2>/dev/null
fi
if ! packages_are_there; then
    echo "deploy/browser.sh: installing the packages of tests/browser/package.json"
    npm install --no-package-lock --ignore-scripts --no-audit --no-fund --loglevel=error
fi
