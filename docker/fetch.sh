#!/bin/sh
# usage: fetch.sh [--wait] [MODEL ...] [-- DATASET ...]
# Fetch models and LeRobot v3.0 datasets, both owner/name, from the Hugging Face Hub into /fetched, once: what is there
# is not asked for again, so a federation restarts without the hub. With --wait only wait until another one has fetched
# them. Runs in the app image (compose.gpu.yaml, the charts).
set -eu

model_stamp() { printf '/fetched/models/.complete-%s' "$(printf '%s' "$1" | tr / -)"; }

model_is_there() { [ -e "$(model_stamp "$1")" ]; }

# A model goes into an ordinary hub cache, where the app looks for owner/name without the network; with it the
# configuration and tokenizer of the VLM that its config.json names.
fetch_model() {
  mkdir -p /fetched/models
  python -c 'import sys, pathlib; from app.policy import resolve_model; resolve_model("hf:" + sys.argv[1], pathlib.Path("/tmp"))' "$1"
  touch "$(model_stamp "$1")"
}

# It is moved into place as a whole; an empty directory is there where somebody mounted it too early.
dataset_is_there() { [ -e "/fetched/datasets/$1/meta/info.json" ]; }

# A dataset goes into a directory of its own, which a site's container gets as /data.
fetch_dataset() {
  target=/fetched/datasets/$1
  # The tag says the layout: LeRobot names its dataset revisions after the format's version.
  hf download "$1" --repo-type dataset --revision v3.0 --local-dir "$target.part"
  rm -rf "$target.part/.cache"
  mv -T "$target.part" "$target"
}

wait=no
if [ "${1-}" = --wait ]; then
  wait=yes
  shift
fi

kind=model
for name in "$@"; do
  if [ "$name" = -- ]; then
    kind=dataset
  elif "${kind}_is_there" "$name"; then
    echo "there: the $kind $name"
  elif [ "$wait" = yes ]; then
    echo "waiting for the $kind $name"
    until "${kind}_is_there" "$name"; do sleep 5; done
  else
    echo "fetching the $kind $name"
    "fetch_$kind" "$name"
  fi
done
