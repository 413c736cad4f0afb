#!/usr/bin/env bash
# The founding experiment on one GPU: CIFAR-10, ResNet-18, SimCLR and SimCLR + EquiMod at the published settings
# (configs/cifar10_simclr*.py), then linear evaluation (protocol equimod) and kNN.
#
# In segments: a call trains for at most $SECONDS_PER_CALL and leaves with 75 while there is more to do; call it again.
#   OUT_DIR   where runs and results live (default /tmp/eqssl-gpu; results.txt is also copied to $OUT if that is set)
#   DATA      a folder with cifar-10-binary.tar.gz, or with shared/data's *.webp.zip and unpack.py; not needed where
#             TFDS_DATA_DIR holds cifar10/3.0.2
#   EPOCHS    of both arms (default: the configs' 800). PROBE_EPOCHS is not changed: the protocol's 90.
#   EXTRA     more --config.a.b=value arguments, for both arms (the tests run a miniature on CPU this way)
#   ARMS      default "cifar10_simclr cifar10_simclr_equimod"; PROTOCOL default equimod
set -euo pipefail
cd "$(dirname "$0")/../.."
OUT_DIR=${OUT_DIR:-/tmp/eqssl-gpu}
SECONDS_PER_CALL=${SECONDS_PER_CALL:-540}
ARMS=${ARMS:-cifar10_simclr cifar10_simclr_equimod}
PROTOCOL=${PROTOCOL:-equimod}
PYTHON=${PYTHON:-python3}
export TFDS_DATA_DIR=${TFDS_DATA_DIR:-$OUT_DIR/tensorflow_datasets} PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
mkdir -p "$OUT_DIR"
eqssl() { "$PYTHON" -m equivariant_ssl.cli "$@"; }
left() { echo $((SECONDS_PER_CALL - SECONDS)); }
more() {
  echo "segment over after $SECONDS s; call again for more: $1"
  summary
  exit 75
}
summary() { "$PYTHON" benchmarks/gpu/summary.py "$OUT_DIR" $ARMS | tee "$OUT_DIR/results.txt"; [ -z "${OUT:-}" ] || cp "$OUT_DIR/results.txt" "$OUT/"; }

if [ -n "${DATA:-}" ] && [ ! -d "$TFDS_DATA_DIR/cifar10" ]; then
  if [ ! -f "$DATA/cifar-10-binary.tar.gz" ] && [ -f "$DATA/unpack.py" ]; then
    "$PYTHON" "$DATA/unpack.py" "$OUT_DIR/unpacked" > /dev/null
    DATA=$OUT_DIR/unpacked
  fi
  eqssl data prepare cifar10 --archive "$DATA/cifar-10-binary.tar.gz"
fi

for arm in $ARMS; do
  dir=$OUT_DIR/$arm
  [ ! -f "$dir/done" ] || continue
  [ "$(left)" -gt 30 ] || more "train $arm"
  rc=0
  # TERM ends a step cleanly: the state is saved and the exit code is 75.
  timeout --signal=TERM --kill-after=30 "$(left)" "$PYTHON" -m equivariant_ssl.cli train --config "$arm" --workdir "$dir" \
    --quiet ${EPOCHS:+--config.epochs=$EPOCHS} ${EXTRA:-} || rc=$?
  case $rc in
    0) touch "$dir/done" ;;
    75 | 124) more "train $arm" ;;
    *) exit "$rc" ;;
  esac
done
for arm in $ARMS; do
  dir=$OUT_DIR/$arm
  [ ! -f "$dir/evaluated" ] || continue
  [ "$(left)" -gt "${EVAL_SECONDS:-240}" ] || more "evaluate $arm"
  eqssl eval "$dir" --knn --linear --protocol "$PROTOCOL"
  if [ -n "$(grep -l '"equimod"' "$dir/config.json" || true)" ]; then eqssl eval "$dir" --equivariance; fi
  touch "$dir/evaluated"
done
summary
