#!/usr/bin/env bash
# Train CONFIG on all workers of a Cloud TPU slice, which is requested as a queued resource.
#   ZONE=us-central2-b BUCKET=mine SOURCE=git+https://... launch/tpu/train.sh CONFIG [--config.a.b=value ...]
# The same command resumes the run. DRY_RUN=1 prints the commands only.
# The run is in gs://$BUCKET/$NAME. Each worker mounts the bucket (gcsfuse), since all must see the
# run. Data sets are looked for in gs://$BUCKET/tensorflow_datasets. TYPE names the slice, RUNTIME
# its software, SOURCE what pip installs there. SPOT=1 requests a cheaper slice, which can be taken
# away. The slice costs money until it is deleted:
#   gcloud compute tpus queued-resources delete NAME --zone ZONE --force
set -euo pipefail
if [ $# -lt 1 ] || [[ "$1" == -* ]] ||
  [ -z "${ZONE:-}" ] || [ -z "${BUCKET:-}" ] || [ -z "${SOURCE:-}" ]; then
  echo "usage: ZONE=... BUCKET=... SOURCE=... launch/tpu/train.sh CONFIG [--config.a.b=value ...]" >&2
  exit 2
fi
config=$1
shift
base=$(basename "$config" .py)
name=${NAME:-eqssl-${base//_/-}}
tpus=(gcloud compute tpus)
where=(--zone "$ZONE")
if [ -n "${PROJECT:-}" ]; then where+=(--project "$PROJECT"); fi
quoted() {
  local words
  printf -v words ' %q' "$@"
  echo "${words# }"
}
run() {
  if [ -n "${DRY_RUN:-}" ]; then
    quoted "$@"
  else
    "$@"
  fi
}
state() {
  "${tpus[@]}" queued-resources describe "$name" "${where[@]}" --format 'value(state.state)' 2>/dev/null || echo NONE
}
ask() {
  local spot=()
  if [ -n "${SPOT:-}" ]; then spot=(--spot); fi
  run "${tpus[@]}" queued-resources create "$name" --node-id "$name" "${where[@]}" \
    --accelerator-type "${TYPE:-v4-32}" --runtime-version "${RUNTIME:-tpu-ubuntu2204-base}" ${spot[@]+"${spot[@]}"}
}
on_all() { run "${tpus[@]}" tpu-vm ssh "$name" "${where[@]}" --worker all --command "$1"; }

if [ -n "${DRY_RUN:-}" ]; then
  ask
else
  now=$(state)
  if [[ "$now" == SUSPENDED || "$now" == FAILED ]]; then # a spot slice that was taken away
    run "${tpus[@]}" queued-resources delete "$name" "${where[@]}" --force --quiet
    now=NONE
  fi
  if [ "$now" = NONE ]; then ask; fi
  now=$(state)
  until [ "$now" = ACTIVE ]; do
    echo "train.sh: $name is $now" >&2
    if [[ "$now" == SUSPENDED || "$now" == FAILED ]]; then exit 1; fi # as without quota; again: the same command
    sleep "${WAIT:-30}"
    now=$(state)
  done
fi
# Orbax commits a checkpoint by renaming its folder, and all workers must see at once what one
# wrote: hence the options of gcsfuse. The image's own Python is too old, so uv installs another.
on_all "command -v gcsfuse >/dev/null || { \
echo deb https://packages.cloud.google.com/apt gcsfuse-\$(lsb_release -cs) main | sudo tee /etc/apt/sources.list.d/gcsfuse.list && \
curl -s https://packages.cloud.google.com/apt/doc/apt-key.gpg | sudo apt-key add - && \
sudo apt-get -qq update && sudo apt-get -qq install gcsfuse; }"
on_all "mkdir -p runs && { mountpoint -q runs || gcsfuse --implicit-dirs --rename-dir-limit 100000 \
--metadata-cache-ttl-secs 0 $(printf %q "$BUCKET") runs; }"
on_all "{ [ -x eqssl/bin/python ] || { curl -LsSf https://astral.sh/uv/install.sh | sh && \
.local/bin/uv venv -q --seed --python 3.12 eqssl; }; } && eqssl/bin/pip install -q $(printf %q "equivariant-ssl[tpu] @ $SOURCE")"
on_all "TFDS_DATA_DIR=runs/tensorflow_datasets eqssl/bin/python -m equivariant_ssl.cli train --config \
$(quoted "$config" --workdir "runs/$name" "$@")"
