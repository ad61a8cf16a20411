#!/bin/sh
# usage: fetch.sh MODEL DATASET...
# Fetch a model (owner/name) and LeRobot v3.0 datasets from the Hugging Face Hub into /fetched, once: what is there is
# not asked for again, so a federation restarts without the hub. Runs in the app image (compose.gpu.yaml).
set -eu

model=$1
shift

# The model goes into an ordinary hub cache, where the app looks for owner/name without the network; with it the
# configuration and tokenizer of the VLM that its config.json names.
stamp=/fetched/models/.complete-$(printf '%s' "$model" | tr / -)
if [ ! -e "$stamp" ]; then
  echo "fetching the model $model"
  mkdir -p /fetched/models
  python -c 'import sys, pathlib; from app.policy import resolve_model; resolve_model("hf:" + sys.argv[1], pathlib.Path("/tmp"))' "$model"
  touch "$stamp"
fi

# A dataset goes into a directory of its own, which a site's container gets as /data.
for dataset in "$@"; do
  target=/fetched/datasets/$dataset
  if [ ! -e "$target" ]; then
    echo "fetching the dataset $dataset"
    # The tag says the layout: LeRobot names its dataset revisions after the format's version.
    hf download "$dataset" --repo-type dataset --revision v3.0 --local-dir "$target.part"
    rm -rf "$target.part/.cache"
    mv "$target.part" "$target"
  fi
done
echo "fetched: $model $*"
