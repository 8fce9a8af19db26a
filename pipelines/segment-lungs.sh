#!/bin/sh
# The lungs in the embedded radiographs, from the tokens that the demo cached; no data to fetch.
#   DECODER=conv      a light convolutional decoder instead of a linear one
#   SETTINGS="--set seeds=1 --set fractions=[100]"       of segment
# If nothing was trained yet, the demo's training runs first. Interrupted, the same command goes on.
set -eu
main=${FEATCACHE_ROOT:-featcache-data}
featcache demo --unless-trained --root "$main"
# shellcheck disable=SC2086  # several words
featcache segment --manifest demo --root "$main" --set decoder="${DECODER:-linear}" ${SETTINGS:-}
