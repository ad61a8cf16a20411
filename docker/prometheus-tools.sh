#!/usr/bin/env bash
# usage: docker/prometheus-tools.sh DIR
# Put prometheus, promtool, alertmanager and amtool into DIR: links to those on PATH, and what PATH lacks out of Debian's
# packages, unpacked without installing anything. The tests run the rules on them; what is in DIR already is kept.
set -euo pipefail

say() { printf 'prometheus-tools: %s\n' "$*" >&2; }
die() { say "$*"; exit 14; }

[ $# = 1 ] || { say "usage: docker/prometheus-tools.sh DIR"; exit 2; }
mkdir -p "$1"
dir=$(cd "$1" && pwd)

packages=()
need() { # need PACKAGE TOOL...: PACKAGE has to be unpacked unless every TOOL is in DIR or on PATH
  local package=$1 tool found
  shift
  for tool in "$@"; do
    [ -x "$dir/$tool" ] && continue
    found=$(type -P "$tool") || { packages+=("$package"); return 0; }
    ln -sf "$(realpath "$found")" "$dir/$tool"
  done
}
need prometheus prometheus promtool
need prometheus-alertmanager alertmanager amtool

if [ ${#packages[@]} -gt 0 ]; then
  command -v apt-get >/dev/null ||
    die "this machine has no apt-get: install ${packages[*]//prometheus-/} from prometheus.io/download and put them on PATH."
  stage=$(mktemp -d "$dir/.unpack-XXXXXX")
  trap 'rm -rf "$stage"' EXIT
  chmod 0755 "$stage" # apt fetches as a user of its own
  (
    cd "$stage"
    apt-get download -qq "${packages[@]}" 2>/dev/null || { apt-get update -qq && apt-get download -qq "${packages[@]}"; }
  ) || die "Debian's packages ${packages[*]} cannot be downloaded: check the apt sources of this machine."
  for package in "$stage"/*.deb; do dpkg-deb -x "$package" "$stage/root"; done
  if [ -e "$stage/root/usr/bin/prometheus-alertmanager" ]; then
    # Debian's reads its templates below a fixed path (upstream's has them inside), where only an installed package is.
    # In its place, byte for byte as long: a directory that the starter beside it opens.
    rm -rf "$dir/.alertmanager"
    mkdir "$dir/.alertmanager"
    mv "$stage/root/usr/share/prometheus/alertmanager" "$dir/.alertmanager/share"
    LC_ALL=C sed 's#/usr/share/prometheus/alertmanager#/proc/self/fd/9/./././././././././#g' \
      "$stage/root/usr/bin/prometheus-alertmanager" >"$dir/.alertmanager/alertmanager"
    cat >"$stage/root/usr/bin/alertmanager" <<'STARTER'
#!/bin/sh
# Made by docker/prometheus-tools.sh.
own=$(dirname "$(realpath "$0")")/.alertmanager
exec 9<"$own/share"
exec "$own/alertmanager" "$@"
STARTER
    chmod +x "$dir/.alertmanager/alertmanager" "$stage/root/usr/bin/alertmanager"
  fi
  for tool in prometheus promtool alertmanager amtool; do
    [ ! -e "$stage/root/usr/bin/$tool" ] || mv -f "$stage/root/usr/bin/$tool" "$dir/$tool"
  done
fi

for tool in prometheus promtool alertmanager amtool; do
  [ -x "$dir/$tool" ] || die "$dir/$tool is missing after unpacking ${packages[*]}: empty $dir and run this again."
done
