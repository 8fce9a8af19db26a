#!/bin/sh
# The 14 findings of CheXpert at once: linear probes at 1, 10 and 100 % of the labels.
#   CHEXPERT=/path/to/chexpert sh pipelines/finetune-chexpert.sh     without it: a synthetic stand-in
#   SETTINGS="--set uncertain=positive --set blank=negative"         of finetune: what -1 and blank are
# Uses the current run of the workspace; if nothing was trained yet, the demo's training runs first.
set -eu
main=${FEATCACHE_ROOT:-featcache-data}
own=finetune-chexpert
[ -n "${CHEXPERT:-}" ] || own=$own-stand-in
root=$main/$own
featcache demo --unless-trained --root "$main"
featcache manifest chexpert "${CHEXPERT:-synthetic}" --root "$root"
featcache extract --run "$main" --text-encoder none --root "$root"
# shellcheck disable=SC2086  # several words
featcache finetune --run "$main" --root "$root" --set findings=all ${SETTINGS:---set blank=negative}
