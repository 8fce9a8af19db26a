#!/bin/sh
# Masks of pneumothorax on SIIM-ACR at 1, 10 and 100 % of the labels, from cached tokens alone.
#   SIIM=/path/to/siim sh pipelines/segment-siim.sh      without SIIM: a synthetic stand-in
#   DECODER=conv      a light convolutional decoder instead of a linear one
#   SETTINGS="--set seeds=1 --set steps=100"             of segment
#   SIIM_ROOT=DIR      another folder than segment-siim/ (of a stand-in segment-siim-stand-in/)
# Uses the current run of the workspace; if nothing was trained yet, the demo's training runs first.
# Interrupted, the same command goes on.
set -eu
main=${FEATCACHE_ROOT:-featcache-data}
own=segment-siim
[ -n "${SIIM:-}" ] || own=$own-stand-in
root=${SIIM_ROOT:-$main/$own}
featcache demo --unless-trained --root "$main"
featcache manifest siim "${SIIM:-synthetic}" --root "$root"
featcache extract --run "$main" --text-encoder none --root "$root"
# shellcheck disable=SC2086  # several words
featcache segment --run "$main" --root "$root" --set decoder="${DECODER:-linear}" ${SETTINGS:-}
