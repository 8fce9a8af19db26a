#!/bin/sh
# Which objective learns best: the tables of docs/objectives.md. Interrupted, it goes on run by run.
#   sh pipelines/compare-objectives.sh
#   SETTINGS="--set seeds=2" sh pipelines/compare-objectives.sh      quicker, wider intervals
# On a synthetic MIMIC-CXR-JPG, whose reports name finding, side and degree, and on the embedded
# radiographs. REAL=table.csv adds images and texts of your own. If nothing was trained yet, the
# demo's training runs first.
set -eu
main=${FEATCACHE_ROOT:-featcache-data}
root=$main/compare-objectives
extract() {
  featcache extract --backbone lite0-demo --text-encoder minilm-demo --root "$1"
}
if [ ! -d "$root/tree" ]; then
  featcache synth mimic-cxr-jpg --size small --seed 5 --out "$root/tree"
fi
featcache manifest mimic-cxr-jpg "$root/tree" --root "$root/synthetic"
extract "$root/synthetic"
# shellcheck disable=SC2086  # several words
for sweep in objectives losses-and-tokens; do
  featcache sweep "$sweep" --root "$root/synthetic" ${SETTINGS:-}
done
featcache demo --unless-trained --root "$main"
# shellcheck disable=SC2086
featcache sweep objectives --set label=class --root "$root/sample" ${SETTINGS:-} \
  --backbone "$main/features/image/lite0-demo" --manifest "$main/manifests/demo" \
  --text-encoder "$main/features/text/minilm-demo"
if [ -n "${REAL:-}" ]; then
  featcache manifest spreadsheet "$REAL" --root "$root/real"
  extract "$root/real"
  # shellcheck disable=SC2086
  featcache sweep objectives --root "$root/real" ${SETTINGS:-}
fi
