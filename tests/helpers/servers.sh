#!/bin/sh
# Install the programs of the tests' throwaway servers (PostgreSQL, PgBouncer, Redis and others), if they are missing.
# `make test INSTALL=0` installs nothing.
set -eu
missing=""
command -v redis-server >/dev/null 2>&1 || missing="redis-server"
if ! command -v initdb >/dev/null 2>&1 && ! ls /usr/lib/postgresql/*/bin/initdb >/dev/null 2>&1; then
    missing="$missing postgresql"
fi
command -v pgbouncer >/dev/null 2>&1 || [ -x /usr/sbin/pgbouncer ] || missing="$missing pgbouncer"
# Tests that lack a browser, promtool, nginx or Caddy are skipped by name. They are installed where that is possible.
if [ -f /etc/debian_version ] && [ "$(id -u)" = 0 ]; then
    command -v chromium >/dev/null 2>&1 || missing="$missing chromium"
    command -v promtool >/dev/null 2>&1 || missing="$missing prometheus"
    command -v nginx >/dev/null 2>&1 || missing="$missing nginx-light"
    command -v caddy >/dev/null 2>&1 || missing="$missing caddy"
fi
[ -z "$missing" ] && exit 0
if [ -f /etc/debian_version ] && [ "$(id -u)" = 0 ] && [ "${INSTALL:-1}" = 1 ]; then
    echo "make test installs these packages by apt, because the tests start their programs: $missing"
    apt-get update -qq
    # RUNLEVEL=1 keeps them from starting as services of this machine.
    # shellcheck disable=SC2086
    RUNLEVEL=1 DEBIAN_FRONTEND=noninteractive apt-get install -y -qq $missing >/dev/null
else
    echo "make test needs these programs. It installs them itself as root on Debian, without INSTALL=0: $missing" >&2
    echo "Install them with your system's package manager, then run make test again." >&2
    exit 1
fi
