#!/bin/sh
# The whole pipeline on the embedded radiographs. Every step is safe to rerun.
set -eu
featcache demo
