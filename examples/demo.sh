#!/usr/bin/env bash
# What `make demo` shows: one picture, compressed, asked about, stored, and asked about again without the picture.
set -euo pipefail
cd "$(dirname "$0")/.."
PATH="$PWD/${VENV:-.venv}/bin:$PATH"
stored=$(mktemp -d)
trap 'rm -rf "$stored"' EXIT

run() {
    printf '\n$ voco-llama'
    for argument in "$@"; do
        case $argument in *" "*) printf ' "%s"' "$argument" ;; *) printf ' %s' "$argument" ;; esac
    done
    printf '\n'
    voco-llama "$@"
}

echo "The picture is examples/scene.png. The model that ships with the package reads it through 1 VoCo token, not 64"
echo "vision tokens:"
run ask examples/scene.png "What colour is the circle?" --num-voco-tokens 1 --stats
run compress examples/scene.png --num-voco-tokens 2 --output "$stored/scene.safetensors"
echo
echo "From here on nobody needs the picture:"
run ask --cache "$stored/scene.safetensors" "Where is the orange circle?"
echo
echo "The other model of the package reads pictures of 576 vision tokens, as many as LLaVA-1.5 has, through 1 VoCo token:"
run ask --model voco-scenes-576 docs/source/images/twelve_objects.png "How many objects are there?" \
    --num-voco-tokens 1 --stats
