#!/bin/sh
# Masks of lung opacity on RSNA at 1, 10 and 100 % of the labels, from cached tokens alone.
#   RSNA=/path/to/rsna sh pipelines/segment-rsna.sh      without RSNA: a synthetic stand-in
#   DECODER=conv      a light convolutional decoder instead of a linear one
#   SETTINGS="--set seeds=1 --set steps=100"             of segment
#   RSNA_ROOT=DIR      another folder than segment-rsna/ (of a stand-in segment-rsna-stand-in/)
# Uses the current run of the workspace; if nothing was trained yet, the demo's training runs first.
# Interrupted, the same command goes on.
set -eu
main=${FEATCACHE_ROOT:-featcache-data}
own=segment-rsna
[ -n "${RSNA:-}" ] || own=$own-stand-in
root=${RSNA_ROOT:-$main/$own}
featcache demo --unless-trained --root "$main"
featcache manifest rsna "${RSNA:-synthetic}" --root "$root"
featcache extract --run "$main" --text-encoder none --root "$root"
# shellcheck disable=SC2086  # several words
featcache segment --run "$main" --root "$root" --set decoder="${DECODER:-linear}" ${SETTINGS:-}
