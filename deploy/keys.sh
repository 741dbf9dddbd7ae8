#!/bin/sh
# An API key for compose.yaml, printed once. The first call also makes deploy/secrets: the passwords of Redis and Grafana.
#   usage: deploy/keys.sh NAME [--weight N] [--max-concurrent N] ...      as: millrace keys add --help
# Where docker is not to be used, MILLRACE names the program to make keys with: MILLRACE=.venv/bin/millrace deploy/keys.sh ada
set -eu
cd "$(dirname "$0")"
[ "$#" -gt 0 ] || {
    echo "usage: deploy/keys.sh NAME [--weight N] [--max-concurrent N] [--requests-per-minute N] [--tokens-per-minute N]" >&2
    exit 2
}
secrets=${SECRETS:-secrets}

# The folder is closed; the files are open, since the containers that get one run as other users.
umask 022
[ -d "$secrets" ] || mkdir -m 700 "$secrets"
[ -d "$secrets/keys" ] || mkdir "$secrets/keys"
for name in redis_admin redis_api redis_worker grafana; do
    [ -s "$secrets/$name" ] || head -c 32 /dev/urandom | sha256sum | cut -c 1-64 | tr -d '\n' >"$secrets/$name"
done
if [ ! -s "$secrets/users.acl" ]; then
    sed -e "s/SHA256_OF_THE_PASSWORD_OF_ADMIN/$(sha256sum <"$secrets/redis_admin" | cut -c 1-64)/" \
        -e "s/SHA256_OF_THE_PASSWORD_OF_API/$(sha256sum <"$secrets/redis_api" | cut -c 1-64)/" \
        -e "s/SHA256_OF_THE_PASSWORD_OF_WORKER/$(sha256sum <"$secrets/redis_worker" | cut -c 1-64)/" \
        redis/users.acl >"$secrets/users.acl"
fi

if [ -n "${MILLRACE:-}" ]; then
    "$MILLRACE" keys add --file "$secrets/keys/keys.json" "$@"
    chmod 644 "$secrets/keys/keys.json"
    exit
fi
docker compose -f compose.yaml run --rm --no-deps --quiet-pull --user "$(id -u):$(id -g)" keys "$@"
chmod 644 "$secrets/keys/keys.json"
for api in api-1 api-2; do
    [ -z "$(docker compose -f compose.yaml ps --quiet --status running "$api" 2>/dev/null)" ] ||
        docker compose -f compose.yaml kill --signal HUP "$api"
done
