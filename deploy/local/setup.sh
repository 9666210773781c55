#!/usr/bin/env bash
# Prepares this checkout: a Python, .venv with the locked packages, the project itself, a RabbitMQ.
# Says what it does and how long it took; does nothing twice. Called by the Makefile.
#   setup.sh [--tests]     with --tests: what the tests need besides (ffmpeg, spin)
set -euo pipefail
cd "$(dirname "$0")/../.."

say() { printf '\033[1m==>\033[0m %s\n' "$*"; }
fail() { printf 'setup: %s\n' "$*" >&2; exit 1; }
as_root() { if [ "$(id -u)" = 0 ]; then "$@"; elif command -v sudo >/dev/null; then sudo "$@"; else return 1; fi; }
apt_install() {
  command -v apt-get >/dev/null || return 1
  say "installing $* with apt"
  as_root env DEBIAN_FRONTEND=noninteractive apt-get -qq -o Dpkg::Use-Pty=0 update >/dev/null || return 1
  as_root env DEBIAN_FRONTEND=noninteractive apt-get -qq -o Dpkg::Use-Pty=0 install -y --no-install-recommends "$@" >/dev/null
}

find_python() {
  local name
  for name in python3.13 python3.12 python3.11 python3 python; do
    if command -v "$name" >/dev/null && "$name" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2])' 2>/dev/null; then
      command -v "$name"
      return
    fi
  done
  return 1
}

python=$(find_python) || { apt_install python3 python3-venv && python=$(find_python); } ||
  fail "Python 3.11 or later is needed: Debian 12 and Ubuntu 24.04 have it as python3; on older ones install python3.11"

if [ ! -x .venv/bin/python ] || ! .venv/bin/python -c '' 2>/dev/null; then
  say "making .venv with $("$python" --version)"
  rm -rf .venv
  "$python" -m venv .venv 2>/dev/null || { rm -rf .venv; apt_install python3-venv && "$python" -m venv .venv; } ||
    fail "$python cannot make a virtual environment; install python3-venv (with sudo) and run this again"
fi

stamp=.venv/.installed
fingerprint=$(cat pyproject.toml requirements.lock requirements-dev.lock deploy/local/setup.sh | cksum)
if [ "$(cat $stamp 2>/dev/null)" != "$fingerprint" ]; then
  say "installing the locked packages into .venv (a minute or so)"
  began=$SECONDS
  .venv/bin/python -m pip install -q --disable-pip-version-check --require-hashes -r requirements-dev.lock 2>&1 |
    { grep -v '^WARNING: Location' || true; }
  .venv/bin/python -m pip install -q --disable-pip-version-check --no-deps --no-build-isolation -e . 2>&1 |
    { grep -v '^WARNING: Location' || true; }
  [ -x .venv/bin/jef ] || fail "the packages could not be installed; is a package index reachable? Try: .venv/bin/pip install -r requirements-dev.lock"
  echo "$fingerprint" >$stamp
  say "packages installed in $((SECONDS - began)) s"
fi

say "broker: $(.venv/bin/python deploy/local/broker.py install)"

if [ "${1:-}" = --tests ]; then
  missing=
  command -v ffmpeg >/dev/null || missing="$missing ffmpeg"
  command -v spin >/dev/null || missing="$missing spin"
  command -v cc >/dev/null || missing="$missing gcc libc6-dev"
  if [ -n "$missing" ]; then
    # shellcheck disable=SC2086
    apt_install $missing || fail "the tests need these packages:$missing; install them and run this again"
  fi
fi
