#!/bin/sh
# Makes sure that there are promtool and prometheus, with which the metrics, the alerts and the dashboards are checked.
# Debian and Ubuntu only. Where both are there already it does and says nothing.
#   usage: deploy/prometheus.sh
set -eu

is_there() {
    command -v promtool >/dev/null 2>&1 && command -v prometheus >/dev/null 2>&1
}
give_up() {
    echo "deploy/prometheus.sh: $1" >&2
    exit 1
}

is_there && exit 0
command -v apt-get >/dev/null 2>&1 || give_up "no apt-get here; install Prometheus yourself: https://prometheus.io/download"
as_root=
if [ "$(id -u)" != 0 ]; then
    command -v sudo >/dev/null 2>&1 || give_up "not root; as root: apt-get install prometheus"
    as_root=sudo
fi
echo "deploy/prometheus.sh: INSTALLING ON THIS MACHINE with apt-get: prometheus"
echo "deploy/prometheus.sh: the package may start a Prometheus of its own on port 9090; the tests don't use it"
$as_root apt-get update -qq
$as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends prometheus >/dev/null
is_there || give_up "what apt-get installed has no promtool"
promtool --version 2>&1 | head -n 1
