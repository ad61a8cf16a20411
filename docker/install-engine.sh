#!/usr/bin/env bash
# Make a Docker engine with buildx and compose answer on this machine; does nothing when one already does.
# Debian 12's own engine (20.10) and compose (1.29) reject current compose files, so on Debian 12 the packages of
# the next release are taken from the mirror this machine already uses, pinned so low that nothing else moves.
set -euo pipefail

# compose.yaml mounts one directory of a volume at a time (volume subpath): engine 26 and compose 2.26 brought that.
engine_min=26
compose_min=2.26.0
suite=trixie

say() { printf 'install-engine: %s\n' "$*" >&2; }
die() { say "$*"; exit 14; }

at_least() { # at_least WANTED ACTUAL: versions, the older one sorts first
  [ -n "$2" ] && [ "$(printf '%s\n%s\n' "$1" "$2" | sort -V | head -n 1)" = "$1" ]
}

# A docker client may be on PATH with no engine or no plugins behind it, so each part is asked for its version.
engine_version() { docker version --format '{{.Server.Version}}' 2>/dev/null | sed 's/[^0-9.].*//' || true; }
daemon_version() { dockerd --version 2>/dev/null | sed -n 's/.*version \([0-9.]*\).*/\1/p' || true; }
compose_version() { docker compose version --short 2>/dev/null | sed 's/^v//; s/[^0-9.].*//' || true; }

tools_present() {
  at_least "$compose_min" "$(compose_version)" && docker buildx version >/dev/null 2>&1
}

install_packages() {
  [ "$(id -u)" = 0 ] || die "Docker $engine_min or newer with buildx and compose $compose_min is missing and only root can install it: run 'sudo bash docker/install-engine.sh', or install Docker as its documentation says."
  command -v apt-get >/dev/null || die "Docker is missing and this machine has no apt-get: install Docker $engine_min or newer with compose $compose_min as its documentation says."
  # shellcheck source=/dev/null
  codename=$(. /etc/os-release && printf '%s' "${VERSION_CODENAME:-}")
  local mirror from=""
  export DEBIAN_FRONTEND=noninteractive
  apt-get update -qq # apt names its targets only once it has fetched them
  # The archive this machine installs from, whatever form its sources are written in.
  # shellcheck disable=SC2016 # apt-get fills in $(...), not the shell
  mirror=$(apt-get indextargets --format '$(REPO_URI) $(RELEASE) $(COMPONENT)' 'Identifier: Packages' |
    awk -v release="$codename" '$2 == release && $3 == "main" {print $1; exit}')
  if [ "$codename" = bookworm ]; then
    [ -n "$mirror" ] || die "no apt source for Debian $codename main was found in /etc/apt: add one and run this again."
    local keyring=/usr/share/keyrings/debian-archive-keyring.gpg
    [ -r "$keyring" ] || die "$keyring is missing: install the package debian-archive-keyring and run this again."
    printf 'Package: *\nPin: release n=%s\nPin-Priority: 100\n' "$suite" >"/etc/apt/preferences.d/$suite"
    # shellcheck disable=SC2016
    if [ -z "$(apt-get indextargets --format '$(RELEASE)' "Release: $suite")" ]; then
      printf 'Types: deb\nURIs: %s\nSuites: %s\nComponents: main\nSigned-By: %s\n' "$mirror" "$suite" "$keyring" \
        >"/etc/apt/sources.list.d/$suite.sources"
      apt-get update -qq
    fi
    from="/$suite"
  elif [ "$codename" != "$suite" ]; then
    die "Docker $engine_min or newer with compose $compose_min is missing and this script knows only Debian 12 and 13, not '${codename:-unknown}': install Docker as its documentation says."
  fi
  say "installing Docker from Debian $suite ..."
  # runc, iptables and tini come from the running release: they are new enough, and the next release's tini would
  # take its libc along. mmdebstrap makes the stand-in base image (docker/base-image.sh) where no registry answers.
  apt-get install -y -qq --no-install-recommends ca-certificates mmdebstrap \
    "docker.io$from" "docker-cli$from" "containerd$from" "docker-buildx$from" "docker-compose$from" \
    runc iptables tini >/dev/null
}

start_engine() {
  [ "$(id -u)" = 0 ] || die "the Docker engine does not answer: start it (for example 'sudo systemctl start docker'), or add this user to the group docker, and try again."
  say "starting dockerd (log: /var/log/dockerd.log) ..."
  # systemd runs it where systemd runs at all; a container or a bare sandbox has none.
  if [ -d /run/systemd/system ]; then
    systemctl start docker
  else
    # Left by an engine that was killed: dockerd would refuse to start.
    grep -qs dockerd "/proc/$(cat /var/run/docker.pid 2>/dev/null)/cmdline" || rm -f /var/run/docker.pid
    setsid dockerd >/var/log/dockerd.log 2>&1 </dev/null &
  fi
  # It answered within 2 s wherever it was measured; 60 s covers a cold disk.
  for _ in $(seq 60); do
    sleep 1
    docker info >/dev/null 2>&1 && return
    [ -d /run/systemd/system ] || kill -0 $! 2>/dev/null || break
  done
  tail -n 1 /var/log/dockerd.log >&2 || true
  die "dockerd did not start: /var/log/dockerd.log says why."
}

if ! { tools_present && { at_least "$engine_min" "$(engine_version)" || at_least "$engine_min" "$(daemon_version)"; }; }; then
  install_packages
  hash -r
  tools_present || die "Docker was installed, but 'docker compose' still does not answer with $compose_min or newer: is another docker first on PATH ($(command -v docker))?"
fi
docker info >/dev/null 2>&1 || start_engine
at_least "$engine_min" "$(engine_version)" || die "the Docker engine that answers is $(engine_version); $engine_min or newer is needed."
say "Docker $(engine_version), compose $(compose_version)"
