#!/bin/sh
# MIMIC-CXR from its folders to an Adaptor and its retrieval table; the whole way: docs/mimic.md.
#   MIMIC=/path/to/mimic-cxr-jpg REPORTS=/path/to/mimic-cxr sh pipelines/pretrain-mimic.sh
#   BACKBONE=rad-dino TEXT_ENCODER=bert      else vit-b and cxr-bert
#   EXTRACT="--scheduler ADDRESS"            of extract      SETTINGS="--set epochs=5"   of training
# REPORTS is the folder or the archive of the reports, by default MIMIC. Without MIMIC: a synthetic
# stand-in, the demo's encoders and its small Adaptor (SIZE=tiny: smaller still). Interrupted, the
# same command goes on; a manifest that is there stays.
set -eu
stage() {
  name=$1 began=$(date +%s)
  featcache "$@" --root "$root"
  times="${times:-} $name $(($(date +%s) - began))"
}
root=${FEATCACHE_ROOT:-featcache-data}/pretrain-mimic
images=vit-b texts=cxr-bert settings='' extract=''
if [ -z "${MIMIC:-}" ]; then
  root=$root-stand-in-${SIZE:-small}
  images=lite0-demo texts=minilm-demo settings="--config configs/runs/demo.yaml"
  extract="--set max_failures=0.1"  # some of its pictures are damaged on purpose
  featcache synth mimic-cxr-jpg --size "${SIZE:-small}" --out "$root/tree"
fi
images=${BACKBONE:-$images} texts=${TEXT_ENCODER:-$texts}
if [ ! -f "$root/manifests/mimic-cxr-jpg/manifest.json" ]; then
  stage manifest mimic-cxr-jpg "${MIMIC:-$root/tree}" ${REPORTS:+--set "reports=$REPORTS"}
fi
# shellcheck disable=SC2086  # several words
stage extract --backbone "$images" --text-encoder "$texts" $extract ${EXTRACT:-}
# shellcheck disable=SC2086
stage train-adaptor ${SETTINGS:-$settings}
stage retrieve
echo "seconds:$times"
