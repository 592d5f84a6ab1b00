#!/bin/sh
# Installs the named Debian packages where that needs no password, otherwise says in one line what to run.
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
  apt-get -qq update && DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends "$@" >/dev/null &&
    exit 0
fi
echo "error: needed: run 'sudo apt-get install --no-install-recommends $*', then again" >&2
exit 1
