#!/usr/bin/env bash
# usage: docker/build-images.sh [superlink] [supernode] [app]
# Build the images that compose.yaml runs (all three when none is named), from the pinned Python base image; where no
# image registry answers, from a stand-in made of Debian packages (docker/base-image.sh), which it says.
set -euo pipefail
cd "$(dirname "$0")/.."

stand_in=vlafleet-base:3.12
version=${VLAFLEET_VERSION:-0.1.0} # the tag in compose.yaml
say() { printf 'build-images: %s\n' "$*" >&2; }

docker info >/dev/null 2>&1 || { say "the Docker engine does not answer: run docker/install-engine.sh, or start Docker."; exit 14; }
[ $# -gt 0 ] || set -- superlink supernode app
for name in "$@"; do
  [ -f "docker/$name.Dockerfile" ] || { say "there is no image '$name': choose superlink, supernode or app."; exit 2; }
done

pinned=$(sed -n 's/^ARG BASE_IMAGE=//p' docker/superlink.Dockerfile)
base=${BASE_IMAGE:-$pinned}
# Only the manifest is asked for: 30 s is ample for a few kilobytes, and a filtered registry would hang for minutes.
if [ -z "${BASE_IMAGE:-}" ] && ! docker image inspect "$base" >/dev/null 2>&1 &&
  ! timeout 30 docker buildx imagetools inspect "$base" >/dev/null 2>&1; then
  say "no image registry answers for $base."
  docker image inspect "$stand_in" >/dev/null 2>&1 || bash docker/base-image.sh "$stand_in"
  say "building on the stand-in $stand_in instead; publish only images built on the pinned base."
  base=$stand_in
fi

for name in "$@"; do
  started=$SECONDS
  docker build --quiet --file "docker/$name.Dockerfile" --build-arg BASE_IMAGE="$base" --tag "vlafleet-$name:$version" . >/dev/null
  say "vlafleet-$name:$version: $(docker image inspect --format '{{.Size}}' "vlafleet-$name:$version" | awk '{printf "%.2f GB", $1 / 1e9}'), $((SECONDS - started)) s"
done
