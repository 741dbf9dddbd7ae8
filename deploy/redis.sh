#!/bin/sh
# Makes sure that there is a redis-server of version 7 or newer, and libfaketime, with which the fault tests move its
# clock. Debian and Ubuntu only. Where both are there already it does and says nothing.
#   usage: deploy/redis.sh
set -eu

redis_is_there() {
    major=$(redis-server --version 2>/dev/null | sed -n 's/.*v=\([0-9]*\)\..*/\1/p')
    [ "${major:-0}" -ge 7 ]
}
faketime_is_there() {
    ls /usr/lib/*/faketime/libfaketime.so.1 >/dev/null 2>&1
}
give_up() {
    echo "deploy/redis.sh: $1" >&2
    exit 1
}

packages=
redis_is_there || packages="redis-server"
faketime_is_there || packages="${packages:+$packages }faketime"
[ "$packages" ] || exit 0

command -v apt-get >/dev/null 2>&1 || give_up "no apt-get here; install Redis 7 or newer yourself: https://redis.io/download"
as_root=
if [ "$(id -u)" != 0 ]; then
    command -v sudo >/dev/null 2>&1 || give_up "not root; as root: apt-get install $packages"
    as_root=sudo
fi
echo "deploy/redis.sh: INSTALLING ON THIS MACHINE with apt-get: $packages"
echo "deploy/redis.sh: the package may start a Redis of its own on port 6379; the tests don't use it"
$as_root apt-get update -qq
# shellcheck disable=SC2086  # several words
$as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $packages >/dev/null
redis_is_there || give_up "what apt-get installed is older than Redis 7: $(redis-server --version 2>&1)"
redis-server --version
