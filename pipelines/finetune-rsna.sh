#!/bin/sh
# Pneumonia on RSNA: linear probes at 1, 10 and 100 % of the labels, and by sentences without any.
#   RSNA=/path/to/rsna sh pipelines/finetune-rsna.sh     without RSNA: a synthetic stand-in
#   SETTINGS="--set head=mlp"                            of finetune
#   RSNA_ROOT=DIR      another folder than finetune-rsna/ (of a stand-in finetune-rsna-stand-in/)
# Uses the current run of the workspace; if nothing was trained yet, the demo's training runs first.
set -eu
main=${FEATCACHE_ROOT:-featcache-data}
own=finetune-rsna
[ -n "${RSNA:-}" ] || own=$own-stand-in
root=${RSNA_ROOT:-$main/$own}
featcache demo --unless-trained --root "$main"
featcache manifest rsna "${RSNA:-synthetic}" --root "$root"
featcache extract --run "$main" --text-encoder none --root "$root"
# shellcheck disable=SC2086  # several words
featcache finetune --run "$main" --root "$root" --set label=pneumonia ${SETTINGS:-}
featcache zeroshot --run "$main" --root "$root"
