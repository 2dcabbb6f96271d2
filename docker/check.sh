#!/usr/bin/env bash
# Build the CPU image and serve from it, without a Docker engine:
#   docker/check.sh MODEL [WORK]
# MODEL is a dense Hugging Face directory, WORK a folder that takes 12 GB (default work/docker).
# Needed: root, and Debian's packages buildah, crun, debootstrap.
#
# The base image is made here by debootstrap, since none can be pulled; every instruction of
# docker/cpu.Dockerfile then runs in a chroot (buildah). What comes out runs as compose.yaml would
# run it: as uid 10001 without capabilities, with a read-only root and no network but loopback.
# There it compresses MODEL, serves the result, is found healthy and answers a question. What ran
# and what it said goes to results/docker_check.json.
#
# BUILD_ARGS: more arguments for `buildah build`, such as an index and its pip configuration:
#   BUILD_ARGS='--secret id=pip.conf,src=pip.conf --build-arg TORCH_INDEX=https://...'
# COMPRESS_ARGS: options of `svdserve compress`.  KEEP=1: leave WORK as it is.  REUSE=1: take the
# image that an earlier run has left there.
set -euo pipefail
cd "$(dirname "$0")/.."

model=$(realpath "${1:?give a dense Hugging Face directory}")
work=$(realpath -m "${2:-work/docker}")
mkdir -p "$work"
export COMPRESS_ARGS=${COMPRESS_ARGS:---keep 0.8 --tokens 2048 --seq-len 256 --gradient-tokens 1024}
buildah() { command buildah --root "$work/store" --runroot "$work/run" --storage-driver vfs "$@"; }
say() { printf '\n== %s\n' "$*"; }
clean() {
  [ "${KEEP:-}" ] && return
  buildah rm --all > /dev/null && buildah rmi --all --force > /dev/null
  rm -rf "$work"
}
trap clean EXIT

base=$(sed -n 's/^ARG BASE=//p' docker/cpu.Dockerfile)
local_base=localhost/svdserve-check/$base
if ! buildah inspect --type image "$local_base" > /dev/null 2>&1; then
  say "debootstrap in place of $base"
  debootstrap --variant=minbase bookworm "$work/rootfs" > "$work/debootstrap.log"
  container=$(buildah from scratch)
  tar -C "$work/rootfs" --exclude=./var/cache/apt/archives/*.deb -cf "$work/rootfs.tar" .
  buildah add --quiet "$container" "$work/rootfs.tar" /
  buildah config --cmd bash \
    --env PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin "$container"
  buildah commit --quiet --rm "$container" "$local_base"
  rm -rf "$work/rootfs" "$work/rootfs.tar"
fi

if [ ! "${REUSE:-}" ]; then
  say "docker/cpu.Dockerfile, every instruction"
  # Docker's format, since OCI's has no health check.
  # shellcheck disable=SC2086
  buildah bud --isolation chroot --format docker --build-arg "BASE=$local_base" \
    ${BUILD_ARGS:-} --file docker/cpu.Dockerfile --tag svdserve:cpu .
fi

say "the image"
buildah rm --all > /dev/null
container=$(buildah from --pull-never svdserve:cpu)
root=$(buildah mount "$container")
buildah inspect --type image --format \
  'user {{.Docker.Config.User}}, entry point {{.Docker.Config.Entrypoint}} {{.Docker.Config.Cmd}}{{println}}' \
  svdserve:cpu
du -sh --apparent-size "$root" | cut -f1
found=$(
  find "$root"/{root/.cache,tmp,cache,source,var/lib/apt/lists,var/cache,etc/pip.conf} -type f -size +0 \
    2> /dev/null || true
  find "$root"/{usr,opt/svdserve}/bin -name '*g++*' -o -name '*gcc*' -o -name 'pip*'
)
[ -z "$found" ] || { printf 'caches, compilers or secrets in the last stage:\n%s\n' "$found"; exit 1; }
echo "no compiler, no pip, no cache and no pip.conf in the last stage"

say "compress, serve and ask, confined"
buildah inspect --type image --format '{{range .Docker.Config.Env}}{{println .}}{{end}}' \
  svdserve:cpu | sed '/^$/d' > "$work/environment"
rm -rf "$work/models" "$work/cache"
mkdir "$work/models" "$work/cache"
cp -rL "$model" "$work/models/dense"
chown -R 10001:10001 "$work/models" "$work/cache"
unshare --mount --pid --ipc --net --uts --fork --kill-child -- \
  bash docker/check_confined.sh "$root" "$work" | tee "$work/transcript"
python3 docker/check_record.py "$base" "$root" "$work/transcript" > results/docker_check.json
say "done"
