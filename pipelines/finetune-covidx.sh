#!/bin/sh
# Linear probes on COVIDx at 1, 10 and 100 % of the labels, from cached features alone.
#   COVIDX=/path/to/covidx sh pipelines/finetune-covidx.sh     without COVIDX: a synthetic stand-in
#   SETTINGS="--set head=mlp"                                  of finetune
#   COVIDX_ROOT=DIR    another folder than finetune-covidx/ (of a stand-in finetune-covidx-stand-in/)
# Uses the current run of the workspace; if nothing was trained yet, the demo's training runs first.
set -eu
main=${FEATCACHE_ROOT:-featcache-data}
own=finetune-covidx
[ -n "${COVIDX:-}" ] || own=$own-stand-in
root=${COVIDX_ROOT:-$main/$own}
featcache demo --unless-trained --root "$main"
featcache manifest covidx "${COVIDX:-synthetic}" --root "$root"
featcache extract --run "$main" --text-encoder none --root "$root"
# shellcheck disable=SC2086  # several words
featcache finetune --run "$main" --root "$root" ${SETTINGS:-}
