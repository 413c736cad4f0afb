#!/usr/bin/env bash
# Train CONFIG with N processes on this machine, joined over loopback.
#   launch/local.sh N CONFIG [--workdir DIR] [--config.a.b=value ...]      DRY_RUN=1 prints the commands only.
# DEVICES=k gives each process k CPU devices (default 1). On a machine with GPUs set CUDA_VISIBLE_DEVICES in PER_PROCESS,
# e.g. PER_PROCESS='CUDA_VISIBLE_DEVICES=$i'. All processes end with the first that fails; the exit code is its own.
set -euo pipefail
if [ $# -lt 2 ] || ! [[ "$1" =~ ^[1-9][0-9]*$ ]]; then
  echo "usage: launch/local.sh N CONFIG [--workdir DIR] [--config.a.b=value ...]" >&2
  exit 2
fi
n=$1 config=$2
shift 2
case " $* " in *" --workdir"*) ;; *) set -- --workdir "runs/$(basename "$config" .py)" "$@" ;; esac
python=${PYTHON:-python3}
port=${PORT:-$("$python" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')}
pids=()
stop() { kill -TERM "${pids[@]}" 2>/dev/null || true; }
trap stop TERM INT
for i in $(seq 0 $((n - 1))); do
  settings=(EQSSL_COORDINATOR="127.0.0.1:$port" EQSSL_PROCESSES="$n" EQSSL_PROCESS="$i" JAX_NUM_CPU_DEVICES="${DEVICES:-1}")
  if [ -n "${PER_PROCESS:-}" ]; then settings+=("$(eval echo "$PER_PROCESS")"); fi
  command=("$python" -m equivariant_ssl.cli train --config "$config" "$@")
  if [ -n "${DRY_RUN:-}" ]; then
    echo "${settings[*]} ${command[*]}"
  else
    env "${settings[@]}" "${command[@]}" &
    pids+=($!)
  fi
done
[ -z "${DRY_RUN:-}" ] || exit 0
code=0
for _ in "${pids[@]}"; do
  rc=0
  wait -n "${pids[@]}" || rc=$?
  if [ "$rc" -gt 128 ] && [ "$code" = 0 ] && kill -0 "${pids[@]}" 2>/dev/null; then continue; fi   # wait was interrupted by a signal
  if [ "$rc" != 0 ] && [ "$code" = 0 ]; then
    code=$rc
    stop
  fi
done
wait || true
exit "$code"
