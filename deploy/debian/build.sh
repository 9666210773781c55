#!/usr/bin/env bash
# Builds the Debian package of this checkout, for this machine's Debian or Ubuntu and processor; says where it is.
#   build.sh [--quick] [FOLDER]     FOLDER: where to, else dist; --quick: little compressed, for tests
#   build.sh --wheels               only fetches the Python packages, into .jef/wheels
# Needs what setup.sh --tests installs (debhelper) and .venv (make setup). The Python packages are those of the lock
# file, each checked against its hash, in a virtual environment of the system's Python. Version: that of jef_daemon.
set -euo pipefail
cd "$(dirname "$0")/../.."

fail() { printf 'build.sh: %s\n' "$*" >&2; exit 1; }

fetch_wheels() { # once for each state of the lock file and each Python
  local wheels=.jef/wheels stamp
  stamp=$(cksum <requirements.lock)-$(/usr/bin/python3 -V)
  [ "$(cat $wheels/.fetched 2>/dev/null)" != "$stamp" ] || return 0
  rm -rf $wheels
  mkdir -p $wheels
  .venv/bin/python -m pip --python /usr/bin/python3 --disable-pip-version-check download -q \
    --only-binary :all: --no-deps --require-hashes -r requirements.lock -d $wheels || fail "the packages cannot be had, see above"
  echo "$stamp" >$wheels/.fetched
}

export COMPRESSION=-Zxz
if [ "${1:-}" = --quick ]; then
  COMPRESSION="-Zgzip -z1"
  shift
fi
target=${1:-dist}
[ -x .venv/bin/python ] || fail "there is no .venv yet: make setup"
/usr/bin/python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null ||
  fail "the system's /usr/bin/python3 should be 3.11 or later: Debian 12 or Ubuntu 24.04"
fetch_wheels
[ "${1:-}" != --wheels ] || exit 0
command -v dh >/dev/null || fail "debhelper is missing: deploy/local/setup.sh --tests, or apt-get install debhelper"

mkdir -p "$target"
target=$(realpath "$target")
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
source=$work/jef-daemon
mkdir -p "$source/wheel"
.venv/bin/python -m hatchling build -t wheel -d "$source/wheel" >/dev/null 2>&1 || fail "the wheel cannot be built: hatchling build"
cp -a deploy/debian/debian "$source/debian"
cp -a requirements.lock README.md config/jef.toml "$source"
mkdir "$source/docs"
cp -a docs/*.md "$source/docs"
cp -a systemd/jef-daemon* "$source/debian"

version=$(.venv/bin/python -c 'import jef_daemon; print(jef_daemon.__version__)')
maintainer="${DEBFULLNAME:-jef_daemon} <${DEBEMAIL:-root@$(hostname -f 2>/dev/null || hostname)}>"
# The same source makes the same package: its time is that of the last commit, where there is one.
SOURCE_DATE_EPOCH=${SOURCE_DATE_EPOCH:-$(git log -1 --format=%ct 2>/dev/null || date +%s)}
export SOURCE_DATE_EPOCH
cat >"$source/debian/changelog" <<END
jef-daemon ($version) unstable; urgency=medium

  * See /usr/share/doc/jef-daemon/changelog.gz.

 -- $maintainer  $(LC_ALL=C date -u -R -d "@$SOURCE_DATE_EPOCH")
END
cp CHANGELOG.md "$source/CHANGELOG.md"
# The packages' compiled parts are for one Python.
read -r python next < <(/usr/bin/python3 -c 'import sys; a, b = sys.version_info[:2]; print(f"{a}.{b} {a}.{b + 1}")')
sed "s|@MAINTAINER@|$maintainer|; s|@PYTHON@|$python|; s|@NEXT_PYTHON@|$next|" \
  "$source/debian/control.in" >"$source/debian/control"
rm "$source/debian/control.in"

export PIP="$PWD/.venv/bin/python -m pip" WHEELS="$PWD/.jef/wheels"
(cd "$source" && dpkg-buildpackage -b -us -uc -d) >"$work/log" 2>&1 || { tail -n 40 "$work/log" >&2; fail "see above"; }
cp "$work"/*.deb "$target"
for package in "$work"/*.deb; do echo "$target/${package##*/}"; done
