#!/bin/sh
# Installs what `make plugin` needs where that needs no password, otherwise says in one line what to run.
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
  apt-get -qq update && DEBIAN_FRONTEND=noninteractive apt-get -qq install -y cmake g++ >/dev/null && exit 0
fi
echo "error: cmake and a C++17 compiler are needed: run 'sudo apt-get install cmake g++', then again" >&2
exit 1
