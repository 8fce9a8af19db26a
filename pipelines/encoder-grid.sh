#!/bin/sh
# An Adaptor for every pair of image and text features in the workspace, and one table of them all.
#   featcache extract --backbone vit-b --backbone dinov2-b --text-encoder bert --text-encoder cxr-bert
#   sh pipelines/encoder-grid.sh
# Finished pairs are left alone: after one more `extract`, only the pairs that are new are trained.
#   IMAGES="vit-b dinov2-b" TEXTS=bert   only these sets       SETTINGS="--set epochs=5"   of each run
# Runs go to encoder-grid/ in the workspace, which keeps what is current in it. If nothing was
# trained yet, the demo's training runs first.
set -eu
main=${FEATCACHE_ROOT:-featcache-data}
root=$main/encoder-grid
featcache demo --unless-trained --root "$main"
manifest=$(featcache use --root "$main" | sed -n 's/^manifest  *//p')
for image in ${IMAGES:-$(ls "$main/features/image")}; do
  for text in ${TEXTS:-$(ls "$main/features/text")}; do
    # shellcheck disable=SC2086  # several words
    featcache train-adaptor --backbone "$main/features/image/$image" \
      --text-encoder "$main/features/text/$text" --manifest "$main/manifests/$manifest" \
      --root "$root" ${SETTINGS:-}
  done
done
featcache compare --root "$root"
