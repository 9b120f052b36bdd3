#!/usr/bin/env bash
# Trains the UNet and then the DiT on the shipped pictures, draws and judges both. Interrupted? Run it
# again: finished runs are kept, an unfinished one goes on from its newest checkpoint.
#   scripts/train_unet_then_dit.sh [--device cuda or any other option of `minidiffusion train`]
set -euo pipefail
cd "$(dirname "$0")/.."
PATH="$PWD/.venv/bin:$PATH"
for model in unet dit; do
  run=runs/fashion_$model
  if [ -e "$run/model.safetensors" ]; then
    echo "$run is trained already"
  elif [ -e "$run/recipe.yaml" ]; then
    minidiffusion train --resume "$run"
  else
    minidiffusion train "configs/fashion_$model.yaml" "$@"
  fi
  minidiffusion sample "$run" --force
  minidiffusion evaluate "$run"
done
