#!/usr/bin/env bash
# Makes a small Debian (or Ubuntu) with systemd, the same as this machine's, in which the tests boot; says where it is.
# Made once by debootstrap, from the mirror that apt has here, then kept in the user's cache: tests boot copies of it.
set -euo pipefail

fail() { printf 'debian_root.sh: %s\n' "$*" >&2; exit 1; }

packages=systemd-sysv,dbus,python3
. /etc/os-release
suite=${VERSION_CODENAME:-}
root=${XDG_CACHE_HOME:-$HOME/.cache}/jef-daemon/roots/$suite-$(cksum "$0" | cut -d' ' -f1)
if [ -e "$root/etc/os-release" ]; then
  echo "$root"
  exit
fi

[ "$(id -u)" = 0 ] || fail "only root can make and boot a system to test in: run this, and those tests, as root"
command -v debootstrap >/dev/null || fail "debootstrap is missing: make setup-tests installs it"
mirror=$(apt-get indextargets --format '$(RELEASE) $(COMPONENT) $(SITE)' 'Created-By: Packages' |
  awk -v suite="$suite" '$1 == suite && $2 == "main" { print $3; exit }')
[ -n "$mirror" ] || fail "apt has no source for $suite main here: is this a Debian or Ubuntu with its archive set up?"
eval "$(apt-config shell http_proxy Acquire::http::Proxy https_proxy Acquire::https::Proxy)"
export http_proxy https_proxy

mkdir -p "${root%/*}"
# Two that come at the same time make it once.
exec 9>"$root.lock"
flock 9
if [ ! -e "$root/etc/os-release" ]; then
  rm -rf "$root.new"
  # A copy that is lost in a crash is made anew: nothing needs to reach the disk.
  DPKG_FORCE=unsafe-io debootstrap --variant=minbase --include="$packages" "$suite" "$root.new" "$mirror" \
    >"$root.log" 2>&1 || { tail -n 5 "$root.log" >&2; fail "debootstrap failed, see $root.log"; }
  rm -rf "$root.new"/var/cache/apt/*.bin "$root.new"/var/cache/apt/archives/*.deb "$root.new"/var/lib/apt/lists/*
  mv "$root.new" "$root"
fi
echo "$root"
