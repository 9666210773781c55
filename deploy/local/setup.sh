#!/usr/bin/env bash
# Prepares this checkout: a Python, .venv with the locked packages, the project itself, a RabbitMQ.
# Says what it does and how long it took; does nothing twice. Called by the Makefile.
#   setup.sh [--demo|--tests]
#                          with --demo: ffmpeg for the demo's film, where it can be had; it goes without, too
#                          with --tests: what the tests need besides (ffmpeg, spin, node, systemd, a C compiler,
#                          Prometheus, tools of Debian packages, a small system to boot)
set -euo pipefail
cd "$(dirname "$0")/../.."

say() { printf '\033[1m==>\033[0m %s\n' "$*"; }
fail() { printf 'setup: %s\n' "$*" >&2; exit 1; }
step() { # WHAT COMMAND...: run it, say what and how long
  local what=$1 began=$SECONDS
  shift
  say "$what …"
  "$@" || return
  say "$what: done in $((SECONDS - began)) s"
}

apt=()
find_apt() { # and learn what there is
  local sudo=
  command -v apt-get >/dev/null || return 1
  if [ "$(id -u)" != 0 ]; then
    command -v sudo >/dev/null || return 1
    sudo=sudo
  fi
  [ ${#apt[@]} -eq 0 ] || return 0
  apt=($sudo env DEBIAN_FRONTEND=noninteractive apt-get -qq -o Dpkg::Use-Pty=0 -o DPkg::Lock::Timeout=300)
  # A failed update is no end: the packages may be known already.
  "${apt[@]}" update >/dev/null || true
}

apt_install() {
  find_apt || return
  say "installing $* with apt"
  "${apt[@]}" install -y --no-install-recommends "$@" >/dev/null
}

apt_unpack() { # PACKAGE FOLDER: only its files. Installed, the package of a daemon would start one of the system's.
  local folder
  find_apt || return
  say "unpacking $1 from apt into $2"
  folder=$(mktemp -d) &&
    (cd "$folder" && apt-get -qq -o APT::Sandbox::User="$(id -un)" download "$1" >/dev/null) &&
    rm -rf "$2.new" && mkdir -p "$2.new" && dpkg-deb -x "$folder"/*.deb "$2.new" &&
    rm -rf "$2" && mv "$2.new" "$2" && rm -rf "$folder"
}

# --- a Python ----------------------------------------------------------------------------------------------

find_python() {
  local name
  for name in python3.13 python3.12 python3.11 python3 python; do
    if "$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then
      command -v "$name"
      return
    fi
  done
  return 1
}

make_environment() {
  rm -rf .venv
  "$1" -m venv .venv >/dev/null 2>&1 || { rm -rf .venv; return 1; }
}

python=$(find_python) || { apt_install python3 python3-venv && python=$(find_python); } ||
  fail "Python 3.11 or later is needed: Debian 12 and Ubuntu 24.04 have it as python3; on older ones install python3.11"

if ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
  version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
  # Debian and Ubuntu keep ensurepip in a package apart, one per version.
  step "making .venv with Python $version" make_environment "$python" ||
    { apt_install "python$version-venv" && make_environment "$python"; } ||
    { apt_install python3 python3-venv && make_environment /usr/bin/python3; } ||
    fail "$python cannot make a virtual environment: install python$version-venv (as root) and run this again"
fi

# --- the packages ------------------------------------------------------------------------------------------

install_packages() {
  local pip=(.venv/bin/python -m pip install -q --disable-pip-version-check --no-warn-script-location)
  # pip warns root of what concerns only the system's own Python.
  export PIP_ROOT_USER_ACTION=ignore
  # The lock file is whole. Left to resolve, older pips (23.2) take `coverage[toml]` in its newest version, whatever is
  # pinned, and refuse it for its missing hash: a checkout would fail from the day of somebody else's release on.
  "${pip[@]}" --require-hashes --no-deps -r requirements-dev.lock &&
    "${pip[@]}" --no-deps --no-build-isolation -e .
}

stamp=.venv/.installed
fingerprint=$(cat pyproject.toml requirements.lock requirements-dev.lock deploy/local/setup.sh | cksum)
if [ "$(cat $stamp 2>/dev/null)" != "$fingerprint" ]; then
  step "installing the locked packages into .venv (a minute or so)" install_packages ||
    fail "the packages could not be installed, see above; with the network and a package index in reach, run this again"
  echo "$fingerprint" >$stamp
fi

# --- the broker --------------------------------------------------------------------------------------------

broker=$(.venv/bin/python deploy/local/broker.py install) || exit 1
say "broker: $broker"

# --- the demo's film -------------------------------------------------------------------------------------

if [ "${1:-}" = --demo ] && ! command -v ffmpeg >/dev/null; then
  apt_install ffmpeg || say "ffmpeg cannot be installed here: the demo goes without its film"
fi

# --- what the tests run besides ----------------------------------------------------------------------------

if [ "${1:-}" = --tests ]; then
  missing=()
  command -v ffmpeg >/dev/null || missing+=(ffmpeg)
  command -v node >/dev/null || missing+=(nodejs)
  command -v npm >/dev/null || missing+=(npm)
  command -v spin >/dev/null || missing+=(spin)
  command -v faketime >/dev/null || missing+=(faketime)
  command -v systemd-analyze >/dev/null || missing+=(systemd)
  command -v cc >/dev/null || missing+=(gcc libc6-dev)
  # The Debian package: built, judged, and installed on a machine with a systemd of its own.
  command -v dh >/dev/null || missing+=(debhelper)
  command -v lintian >/dev/null || missing+=(lintian)
  command -v debootstrap >/dev/null || missing+=(debootstrap)
  command -v systemd-nspawn >/dev/null || missing+=(systemd-container)
  if [ ${#missing[@]} -gt 0 ]; then
    apt_install "${missing[@]}" || fail "the tests need these programs, install them and run this again: ${missing[*]}"
  fi
  if ! command -v prometheus >/dev/null || ! command -v promtool >/dev/null; then
    [ -x .jef/prometheus/usr/bin/promtool ] || apt_unpack prometheus .jef/prometheus ||
      fail "the tests need Prometheus and its promtool on the path: install them and run this again"
  fi
  deploy/debian/build.sh --wheels || exit 1
  if [ "$(id -u)" = 0 ]; then
    root=$(deploy/local/debian_root.sh) || exit 1
    say "a system to boot in tests: $root"
  else
    say "not root: tests/acceptance/test_systemd.py, which boots a system, will fail here"
  fi
fi
