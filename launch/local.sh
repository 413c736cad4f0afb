#!/usr/bin/env bash
# Train CONFIG with N processes on this machine. They are joined over loopback.
#   launch/local.sh N CONFIG [--workdir DIR] [--config.a.b=value ...]
# The same command resumes the run. DRY_RUN=1 prints the commands only.
# The default workdir is runs/CONFIG. DEVICES=k gives each process k CPU devices (default 1). On a
# machine with GPUs each process has one GPU. PER_PROCESS sets other variables for each process, in
# shell, where i is its number: PER_PROCESS='CUDA_VISIBLE_DEVICES=$((2*i)),$((2*i+1))'.
# PYTHON and PORT name the python and the port; by default they are chosen.
# TERM or INT asks all processes to save and stop. When one process fails, the others end at most
# GRACE seconds later (default 10). The exit code is that of the cause; 2 to 75 are eqssl's codes.
set -euo pipefail
if [ $# -lt 2 ] || ! [[ "$1" =~ ^[1-9][0-9]*$ ]] || [[ "$2" == -* ]]; then
  echo "usage: launch/local.sh N CONFIG [--workdir DIR] [--config.a.b=value ...]" >&2
  exit 2
fi
n=$1 config=$2
shift 2
case " $* " in *" --workdir"*) ;; *) set -- --workdir "runs/$(basename "$config" .py)" "$@" ;; esac
python=${PYTHON:-python3}
free_port='import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'
port=${PORT:-$("$python" -c "$free_port")}
if [ -z "${PER_PROCESS:-}" ] && [ -z "${CUDA_VISIBLE_DEVICES:-}" ] && [ "$n" -gt 1 ] && [ -e /dev/nvidia0 ]; then
  PER_PROCESS="CUDA_VISIBLE_DEVICES=\$i" # otherwise each takes all GPUs
fi
pids=()
own() { [ "$1" -ge 2 ] && [ "$1" -le 75 ] && [ "$1" -ne 8 ]; }
stop() { [ ${#pids[@]} -eq 0 ] || kill "-$1" "${pids[@]}" 2>/dev/null || true; }
trap 'stop TERM' TERM INT
for ((i = 0; i < n; i++)); do
  settings=(EQSSL_COORDINATOR="127.0.0.1:$port" EQSSL_PROCESSES="$n" EQSSL_PROCESS="$i"
    JAX_NUM_CPU_DEVICES="${DEVICES:-1}")
  if [ -n "${PER_PROCESS:-}" ]; then eval "settings+=($PER_PROCESS)"; fi
  command=(env "${settings[@]}" "$python" -m equivariant_ssl.cli train --config "$config" "$@")
  if [ -n "${DRY_RUN:-}" ]; then
    printf '%q ' "${command[@]}"
    echo
  else
    "${command[@]}" &
    pids+=($!)
  fi
done
code=0 deadline=
while [ ${#pids[@]} -gt 0 ]; do
  running=" $(jobs -pr | tr '\n' ' ')" left=()
  for pid in "${pids[@]}"; do
    if [[ "$running" == *" $pid "* ]]; then
      left+=("$pid")
      continue
    fi
    rc=0
    wait "$pid" 2>/dev/null || rc=$?
    # A process whose peer is gone may end with 1, 8 or a signal. A code of eqssl itself names the
    # cause, and goes before these.
    if [ "$code" -eq 0 ] || { own "$rc" && ! own "$code"; }; then code=$rc; fi
    if [ "$rc" -gt 75 ] && [ -z "$deadline" ]; then
      echo "local.sh: process $pid ended with $rc ($(kill -l "$rc" 2>/dev/null || true)); the others are stopped" >&2
    fi
  done
  pids=(${left[@]+"${left[@]}"})
  if [ "$code" -ne 0 ] && [ -z "$deadline" ]; then
    deadline=$((SECONDS + ${GRACE:-10}))
    stop TERM
  fi
  # A process that waits for a lost one takes TERM as a request to stop after this step, and never
  # finishes the step.
  if [ -n "$deadline" ] && [ "$SECONDS" -ge "$deadline" ]; then stop KILL; fi
  [ ${#pids[@]} -eq 0 ] || sleep .1
done
exit "$code"
