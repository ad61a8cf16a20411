#!/usr/bin/env bash
# usage: docker/base-image.sh [TAG]
# Build a stand-in for python:3.12-slim from Debian packages and this machine's own CPython 3.12, for machines that
# reach a Debian mirror and a package index but no image registry. The Dockerfiles do not know the difference: they
# take it as BASE_IMAGE. What this machine trusts (extra CA certificates) is baked in, so pip and uv work inside.
set -euo pipefail

tag=${1:-vlafleet-base:3.12}
say() { printf 'base-image: %s\n' "$*" >&2; }
die() { say "$*"; exit 14; }

[ "$(id -u)" = 0 ] || die "only root can build the stand-in base image: run it with sudo."
command -v mmdebstrap >/dev/null || die "mmdebstrap is missing: run docker/install-engine.sh, or 'apt-get install mmdebstrap'."
docker info >/dev/null 2>&1 || die "the Docker engine does not answer: run docker/install-engine.sh."

python=""
for candidate in "${PYTHON:-}" "$(dirname "$0")/../.venv/bin/python" python3.12; do
  if [ -n "$candidate" ] && "$candidate" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 12))' 2>/dev/null; then
    python=$candidate
    break
  fi
done
[ -n "$python" ] || die "Python 3.12 was not found: run 'make setup' first, or set PYTHON to an interpreter."
prefix=$("$python" -c 'import sys; print(sys.base_prefix)')
[ "$prefix" != /usr ] || die "this machine's Python 3.12 is the distribution's own and cannot be copied: set PYTHON to one built under its own prefix (pyenv, uv)."

# shellcheck source=/dev/null
codename=$(. /etc/os-release && printf '%s' "$VERSION_CODENAME") # the copied Python is linked against this release
stage=$(mktemp -d)
trap 'rm -rf "$stage"' EXIT
keyring=/usr/share/keyrings/debian-archive-keyring.gpg
list_sources() { # the machine's own mirror, whatever form its sources are written in
  apt-get indextargets --format "deb [signed-by=$keyring] \$(REPO_URI) \$(RELEASE) \$(COMPONENT)" 'Identifier: Packages' |
    grep -E " $codename(-updates|-security)? main\$" >"$stage/sources.list"
}
# apt names its targets only once it has fetched them.
list_sources || { apt-get update -qq && list_sources; } ||
  die "no apt source for Debian $codename main was found in /etc/apt: add one and run this again."

# Only what running Python takes: no tests, no Tk, no static library. pip comes from the bundled ensurepip.
mkdir -p "$stage/python/bin" "$stage/python/lib"
cp -a "$prefix"/bin/python3.12 "$stage/python/bin/"
ln -s python3.12 "$stage/python/bin/python3"
ln -s python3.12 "$stage/python/bin/python"
find "$prefix/lib" -maxdepth 1 -name 'libpython3*.so*' -exec cp -a {} "$stage/python/lib/" \;
tar -C "$prefix/lib" --exclude=__pycache__ --exclude=site-packages --exclude=test --exclude=tests --exclude=idlelib \
  --exclude=tkinter --exclude=turtledemo --exclude='config-3.12*' --exclude='_tkinter*.so' -c python3.12 |
  tar -C "$stage/python/lib" -x
mkdir -p "$stage/python/lib/python3.12/site-packages"
find "$stage/python" -type f -name '*.so*' -exec strip --strip-unneeded {} + 2>/dev/null || true # size only
tar -C "$stage/python" --owner=0 --group=0 -cf "$stage/python.tar" .

# The shared libraries that CPython's standard modules link against, plus certificates and time zones.
packages=ca-certificates,netbase,tzdata,libssl3,libffi8,libsqlite3-0,libreadline8,libncursesw6,libbz2-1.0,liblzma5
packages=$packages,zlib1g,libuuid1,libexpat1,libnsl2,libtirpc3,libcrypt1
ca_bundle=/etc/ssl/certs/ca-certificates.crt
say "bootstrapping Debian $codename with Python from $prefix ..."
# The single quotes are meant: mmdebstrap's hooks get the new root as $1.
# shellcheck disable=SC2016
mmdebstrap --quiet --variant=minbase --dpkgopt=force-unsafe-io --aptopt='Acquire::Languages "none"' \
  --include="$packages" \
  --customize-hook="tar -C \"\$1/usr/local\" -xf '$stage/python.tar'" \
  --customize-hook='mkdir -p "$1/usr/local/share/ca-certificates"
    find /usr/local/share/ca-certificates -name "*.crt" -exec cp {} "$1/usr/local/share/ca-certificates/" \;
    chroot "$1" ldconfig; chroot "$1" update-ca-certificates' \
  --customize-hook="mkdir -p \"\$1/etc/uv\"; printf '[global]\ncert = $ca_bundle\n' >\"\$1/etc/pip.conf\"
    printf 'native-tls = true\n' >\"\$1/etc/uv/uv.toml\"" \
  --customize-hook='chroot "$1" /usr/local/bin/python3 -m ensurepip --default-pip >/dev/null' \
  --customize-hook='rm -rf "$1"/usr/share/doc/* "$1"/usr/share/man/* "$1"/usr/share/locale/* "$1"/var/lib/apt/lists/* \
    "$1"/var/cache/apt/*.bin "$1"/var/log/*.log "$1"/var/log/apt' \
  "$codename" "$stage/root.tar" "$stage/sources.list"
docker import --change 'ENV PATH=/usr/local/bin:/usr/local/sbin:/usr/sbin:/usr/bin:/sbin:/bin' \
  --change 'ENV LANG=C.UTF-8' --change 'CMD ["python3"]' "$stage/root.tar" "$tag" >/dev/null
say "built $tag, $(docker image inspect --format '{{.Size}}' "$tag" | awk '{printf "%.0f MB", $1 / 1e6}')"
