#!/usr/bin/env bash
# usage: docker/prometheus-image.sh [TAG]
# Build a stand-in for the pinned images of Prometheus and Alertmanager, one for both, from Debian's packages, for machines
# that reach a Debian mirror but no image registry: PROMETHEUS_IMAGE and ALERTMANAGER_IMAGE of compose.yaml. Only the
# binaries are taken (same flags, same configuration, an older release), and busybox for wget, which the pinned images have
# too.
set -euo pipefail

tag=${1:-vlafleet-prometheus:debian}
base=${BASE_IMAGE:-vlafleet-base:3.12} # any glibc base of this machine's Debian release
say() { printf 'prometheus-image: %s\n' "$*" >&2; }

docker image inspect "$base" >/dev/null 2>&1 || { say "the image $base is missing: run docker/base-image.sh first."; exit 14; }
stage=$(mktemp -d)
trap 'rm -rf "$stage"' EXIT
chmod 0755 "$stage" # apt fetches as a user of its own
(
  cd "$stage"
  packages=(prometheus prometheus-alertmanager busybox-static)
  apt-get download -qq "${packages[@]}" 2>/dev/null || { apt-get update -qq && apt-get download -qq "${packages[@]}"; }
) || { say "Debian's packages prometheus, prometheus-alertmanager and busybox-static cannot be downloaded: check the apt sources of this machine."; exit 14; }
for package in "$stage"/*.deb; do dpkg-deb -x "$package" "$stage/root"; done
cat >"$stage/Dockerfile" <<'DOCKERFILE'
ARG BASE_IMAGE
FROM ${BASE_IMAGE}
COPY root/usr/bin/prometheus root/usr/bin/promtool root/usr/bin/amtool /bin/
COPY root/usr/bin/prometheus-alertmanager /bin/alertmanager
COPY root/usr/share/prometheus/alertmanager /usr/share/prometheus/alertmanager
COPY root/bin/busybox /bin/wget
USER 65534:65534
WORKDIR /prometheus
ENTRYPOINT ["/bin/prometheus"]
DOCKERFILE
docker build --quiet --build-arg BASE_IMAGE="$base" --tag "$tag" "$stage" >/dev/null
for program in prometheus alertmanager; do
  say "built $tag: $(docker run --rm --network none --entrypoint "/bin/$program" "$tag" --version 2>&1 | head -n 1)"
done
