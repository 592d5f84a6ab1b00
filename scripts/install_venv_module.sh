#!/bin/sh
# Debian and Ubuntu split ensurepip off into python3-venv. Installs it where that needs no password,
# otherwise says in one line what to run.
package="$("$1" -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])')"
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
  apt-get -qq update && apt-get -qq install -y "$package" >/dev/null && exit 0
fi
echo "error: this Python cannot make virtual environments: run 'sudo apt-get install $package', then again" >&2
exit 1
