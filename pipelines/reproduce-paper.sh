#!/bin/sh
# The paper's tables beside ours, on one page, with what is wrong with its protocol.
#   RSNA=/path SIIM=/path COVIDX=/path sh pipelines/reproduce-paper.sh
#   without one of the three: a synthetic stand-in in its place, and its table says so
#   BACKBONE=dinov2-b TEXT_ENCODER=biobert      an Adaptor on these encoders; else the current run
#   TRAIN="--config configs/runs/paper.yaml"    of its training, e.g. the paper's own function
#   DECODER=conv  PROBES="--set seeds=1"  MASKS="--set seeds=1"      of the heads
# Runs the recipes of the four tables one after the other. What is finished is kept; interrupted,
# the same command goes on. RSNA is encoded once for both of its tables. Stand-ins have folders of
# their own, and unless MASKS says otherwise their decoders take one seed and 100 steps.
set -eu
here=$(dirname "$0")
main=${FEATCACHE_ROOT:-featcache-data}
work=$main
featcache demo --unless-trained --root "$main"
current() { featcache use --root "$main" | sed -n "s/^$1  *//p"; }
if [ -n "${BACKBONE:-}${TEXT_ENCODER:-}" ]; then
  work=$main/reproduce-paper
  manifest=$main/manifests/$(current manifest)
  images=$main/features/image/${BACKBONE:-$(current image)}
  texts=$main/features/text/${TEXT_ENCODER:-$(current text)}
  set -- --manifest "$manifest" --root "$work"
  [ -d "$images" ] || featcache extract --backbone "$BACKBONE" --text-encoder none "$@"
  [ -d "$texts" ] || featcache extract --backbone none --text-encoder "$TEXT_ENCODER" "$@"
  [ ! -d "$images" ] || set -- "$@" --backbone "$images"
  [ ! -d "$texts" ] || set -- "$@" --text-encoder "$texts"
  # shellcheck disable=SC2086  # several words
  featcache train-adaptor "$@" ${TRAIN:-}
fi
export FEATCACHE_ROOT="$work" RSNA_ROOT COVIDX_ROOT SIIM_ROOT
own() { if [ -n "$2" ]; then echo "$work/$1"; else echo "$work/stand-in-${1#*-}"; fi; }
masks() { if [ -n "$1" ]; then echo "${MASKS:-}"; else echo "${MASKS:-$quick}"; fi; }
quick="--set seeds=1 --set steps=100"
RSNA_ROOT=$(own finetune-rsna "${RSNA:-}")
COVIDX_ROOT=$(own finetune-covidx "${COVIDX:-}")
SIIM_ROOT=$(own segment-siim "${SIIM:-}")
SETTINGS=${PROBES:-} sh "$here/finetune-rsna.sh"
SETTINGS=${PROBES:-} sh "$here/finetune-covidx.sh"
SETTINGS=$(masks "${SIIM:-}") sh "$here/segment-siim.sh"
[ -z "${RSNA:-}" ] || [ ! -d "$work/segment-rsna" ] || RSNA_ROOT=$work/segment-rsna
SETTINGS=$(masks "${RSNA:-}") sh "$here/segment-rsna.sh"
featcache reproduce --root "$work"
