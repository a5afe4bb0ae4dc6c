#!/bin/sh
# A virtual environment of its own for a package that a benchmark compares us with: benchmarks/peers.sh NAME.
# They share constraints.txt with ours, so that torch and transformers are the same on both sides.
set -eu

name=${1:-}
case "$name" in
    trl-ppo) packages="trl==1.12.0" ;;      # the last release with PPO
    trl-reward) packages="trl==1.16.*" ;;
    mergekit) packages="mergekit==0.1.5" ;;
    *)
        echo "usage: benchmarks/peers.sh trl-ppo|trl-reward|mergekit" >&2
        exit 2
        ;;
esac

here=$(cd "$(dirname "$0")" && pwd)
folder="$here/.venvs/$name"
wanted="$packages $(cksum < "$here/../constraints.txt")"
stamp="$folder/.installed"
if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ]; then
    echo "$name is there: $folder"
    exit 0
fi
[ -x "$folder/bin/python" ] || "${PYTHON:-python3}" -m venv "$folder"
# shellcheck disable=SC2086  # several packages are several words
"$folder/bin/pip" install --quiet --disable-pip-version-check --constraint "$here/../constraints.txt" $packages
echo "$wanted" > "$stamp"
echo "$name is ready: $folder"
