# The last part of check.sh, run by it inside new mount, process, IPC and network namespaces: the
# image's root read-only, /models and /cache as volumes, /tmp and /dev/shm in memory, uid 10001,
# no capability, and no network but loopback.
set -euo pipefail
root=$1 work=$2
mapfile -t environment < "$work/environment"

mount --make-rprivate /
mount --bind "$root" "$root"
touch "$root/etc/hosts"
mount -o remount,bind,ro "$root"
mount --bind "$work/models" "$root/models"
mount --bind "$work/cache" "$root/cache"
mount -t tmpfs tmpfs "$root/tmp"
mount -t proc proc "$root/proc"
mount --rbind /sys "$root/sys"
mount -t tmpfs tmpfs "$root/dev"
mkdir -m 1777 "$root/dev/shm"
for device in null zero full random urandom; do
  touch "$root/dev/$device"
  mount --bind "/dev/$device" "$root/dev/$device"
done
ln -s /proc/self/fd "$root/dev/fd"
ip link set lo up
hostname svdserve
echo "127.0.0.1 localhost svdserve" > "$work/hosts"
mount --bind "$work/hosts" "$root/etc/hosts"

key=0123456789abcdef-of-the-check
echo "$key" > "$root/tmp/api_keys"
inside=(
  env --ignore-environment "${environment[@]}" HF_HUB_OFFLINE=1 VLLM_CPU_KVCACHE_SPACE=1
  SVDSERVE_API_KEYS_FILE=/tmp/api_keys
  chroot "$root" setpriv --reuid=10001 --regid=10001 --clear-groups --no-new-privs
  --bounding-set=-all --inh-caps=-all
)

"${inside[@]}" sh -c 'id; grep -E "CapEff|CapBnd|NoNewPrivs" /proc/self/status; ! touch /opt/x'
# shellcheck disable=SC2086
"${inside[@]}" svdserve compress /models/dense --out /models/small --resume ${COMPRESS_ARGS:-}
"${inside[@]}" svdserve serve /models/small --host 0.0.0.0 --enforce-eager \
  > "$work/server.log" 2>&1 &
server=$!
health="from urllib.request import urlopen; urlopen('http://127.0.0.1:8000/health', timeout=4)"
until "${inside[@]}" python -c "$health" 2> /dev/null; do
  kill -0 "$server" || { tail -n 40 "$work/server.log"; exit 1; }
  sleep 2
done
echo "healthy"
"${inside[@]}" python - "$key" < docker/check_client.py
grep -iE 'read-only file|permission denied|traceback' "$work/server.log" && exit 1
kill "$server"
wait "$server"
echo "SIGTERM: exit status 0"
