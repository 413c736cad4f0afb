#!/usr/bin/env bash
# The founding experiment on one GPU: CIFAR-10, ResNet-18, SimCLR and SimCLR + EquiMod at the published settings
# (configs/cifar10_simclr*.py), then kNN, linear evaluation (protocol equimod) and, for EquiMod, its gain.
#
# In segments: a call works for about $SECONDS_PER_CALL and leaves with 75 while there is more to do; call it again.
# One that is cut off is not lost: training goes on from its last checkpoint, an evaluation begins again.
#   OUT_DIR   where runs and results live (default /tmp/eqssl-gpu; results.txt is also copied to $OUT if that is set)
#   DATA      a folder with cifar-10-binary.tar.gz, or with shared/data's *.webp.zip and unpack.py; not needed where
#             TFDS_DATA_DIR holds cifar10/3.0.2
#   EPOCHS    of both arms (default: the configs' 800). The probe's are not changed: the protocol's 90.
#   EXTRA     more --config.a.b=value arguments, without spaces in them, for both arms (a miniature on CPU: the tests)
#   ARMS      default "cifar10_simclr cifar10_simclr_equimod"; PROTOCOL default equimod
#   TRAIN_SECONDS, EVAL_SECONDS: what must be left to begin to train (30) or an evaluation (240;
#             a call that has just begun makes one in any case)
set -euo pipefail
cd "$(dirname "$0")/../.."
OUT_DIR=${OUT_DIR:-/tmp/eqssl-gpu}
SECONDS_PER_CALL=${SECONDS_PER_CALL:-540}
TRAIN_SECONDS=${TRAIN_SECONDS:-30}
EVAL_SECONDS=${EVAL_SECONDS:-240}
PROTOCOL=${PROTOCOL:-equimod}
PYTHON=${PYTHON:-python3}
read -ra arms <<< "${ARMS:-cifar10_simclr cifar10_simclr_equimod}"
read -ra extra <<< "${EXTRA:-}"
if [ -n "${EPOCHS:-}" ]; then extra+=("--config.epochs=$EPOCHS"); fi
export TFDS_DATA_DIR=${TFDS_DATA_DIR:-$OUT_DIR/tensorflow_datasets} PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
if [ "$SECONDS_PER_CALL" -le "$TRAIN_SECONDS" ]; then
  echo "SECONDS_PER_CALL=$SECONDS_PER_CALL leaves no time to train; it must be over TRAIN_SECONDS=$TRAIN_SECONDS." >&2
  exit 2
fi
mkdir -p "$OUT_DIR"
eqssl() { "$PYTHON" -m equivariant_ssl.cli "$@"; }
left() { echo $((SECONDS_PER_CALL - SECONDS)); }
summary() {
  "$PYTHON" benchmarks/gpu/summary.py "$OUT_DIR" "${arms[@]}" | tee "$OUT_DIR/results.txt"
  if [ -n "${OUT:-}" ] && ! [ "$OUT" -ef "$OUT_DIR" ]; then cp "$OUT_DIR/results.txt" "$OUT/"; fi
}
more() {
  echo "segment over after $SECONDS s; call again for more: $1"
  summary
  exit 75
}

if [ -n "${DATA:-}" ] && [ ! -d "$TFDS_DATA_DIR/cifar10" ]; then
  if [ ! -f "$DATA/cifar-10-binary.tar.gz" ] && [ -f "$DATA/unpack.py" ]; then
    "$PYTHON" "$DATA/unpack.py" "$OUT_DIR/unpacked" > /dev/null
    DATA=$OUT_DIR/unpacked
  fi
  eqssl data prepare cifar10 --archive "$DATA/cifar-10-binary.tar.gz"
fi

for arm in "${arms[@]}"; do
  dir=$OUT_DIR/$arm
  [ ! -f "$dir/trained" ] || continue
  [ "$(left)" -gt "$TRAIN_SECONDS" ] || more "train $arm"
  rc=0
  # TERM ends a step cleanly: the state is saved and the exit code is 75.
  timeout --signal=TERM --kill-after=30 "$(left)" "$PYTHON" -m equivariant_ssl.cli train --config "$arm" \
    --workdir "$dir" --quiet ${extra[@]+"${extra[@]}"} || rc=$?
  if [ "$rc" = 0 ]; then
    touch "$dir/trained"
  elif [ "$rc" = 75 ] || [ "$(left)" -le 0 ]; then  # or it was stopped before it listened, or killed at a long step
    more "train $arm"
  else
    exit "$rc"
  fi
done
for arm in "${arms[@]}"; do
  dir=$OUT_DIR/$arm
  evaluations=(knn "$PROTOCOL")
  if grep -q '"equimod"' "$dir/config.json"; then evaluations+=(gains); fi
  for what in "${evaluations[@]}"; do
    [ ! -f "$dir/evaluated-$what" ] || continue
    [ "$(left)" -gt "$EVAL_SECONDS" ] || [ "$SECONDS" -lt 10 ] || more "evaluate $arm $what"
    eqssl eval "$dir" --protocol "$what"
    touch "$dir/evaluated-$what"
  done
done
summary
