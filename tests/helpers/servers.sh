#!/bin/sh
# Install the PostgreSQL, PgBouncer and Redis programs for the throwaway servers of the tests, if they are missing.
set -eu
missing=""
command -v redis-server >/dev/null 2>&1 || missing="redis-server"
if ! command -v initdb >/dev/null 2>&1 && ! ls /usr/lib/postgresql/*/bin/initdb >/dev/null 2>&1; then
    missing="$missing postgresql"
fi
command -v pgbouncer >/dev/null 2>&1 || [ -x /usr/sbin/pgbouncer ] || missing="$missing pgbouncer"
# Without a browser the dashboard's test is skipped, and without promtool that of the alert rules. Install both where that
# is possible.
if [ -f /etc/debian_version ] && [ "$(id -u)" = 0 ]; then
    command -v chromium >/dev/null 2>&1 || missing="$missing chromium"
    command -v promtool >/dev/null 2>&1 || missing="$missing prometheus"
fi
[ -z "$missing" ] && exit 0
if [ -f /etc/debian_version ] && [ "$(id -u)" = 0 ]; then
    apt-get update -qq
    # shellcheck disable=SC2086
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq $missing >/dev/null
else
    echo "make test needs these server programs, and can install them itself only as root on Debian: $missing" >&2
    echo "Install them with your system's package manager, then run make test again." >&2
    exit 1
fi
