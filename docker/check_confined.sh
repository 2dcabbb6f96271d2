# The last part of check.sh, run by it inside new mount, process, IPC and network namespaces: the
# image's root read-only, /models and /cache as volumes, /tmp and /dev/shm in memory, uid 10001,
# no capability, and no network but loopback.
set -euo pipefail
root=$1 work=$2 model=$3
mapfile -t environment < "$work/environment"

mount --make-rprivate /
mount --bind "$root" "$root"
mount -o remount,bind,ro "$root"
mount --bind "$work/models" "$root/models"
mount --bind "$model" "$root/models/dense"
mount -o remount,bind,ro "$root/models/dense"
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

inside() {
  env --ignore-environment "${environment[@]}" HF_HUB_OFFLINE=1 VLLM_CPU_KVCACHE_SPACE=1 \
    chroot "$root" setpriv --reuid=10001 --regid=10001 --clear-groups --no-new-privs \
    --bounding-set=-all --inh-caps=-all "$@"
}

inside sh -c 'id; grep -E "CapEff|NoNewPrivs" /proc/self/status; touch /opt/x 2>&1 || true'
# shellcheck disable=SC2086
inside svdserve compress /models/dense --out /models/small ${COMPRESS_ARGS:-}
inside svdserve serve /models/small --host 0.0.0.0 --enforce-eager --max-model-len 1024 \
  > "$work/server.log" 2>&1 &
server=$!
health="from urllib.request import urlopen; urlopen('http://127.0.0.1:8000/health', timeout=4)"
until inside python -c "$health" 2> /dev/null; do
  kill -0 "$server" || { tail -n 40 "$work/server.log"; exit 1; }
  sleep 2
done
echo "healthy"
inside python - <<'PYTHON'
import json
from urllib.request import Request, urlopen

def post(path, **body):
    request = Request(f"http://127.0.0.1:8000{path}", json.dumps(body).encode(), {"Content-Type": "application/json"})
    return json.load(urlopen(request))

model = "/models/small"
answer = post("/v1/completions", model=model, prompt="The capital of France is", max_tokens=16, temperature=0)
print("answer:", repr(answer["choices"][0]["text"]))
schema = {"type": "object", "properties": {"name": {"type": "string", "maxLength": 8}}, "required": ["name"]}
structured = post(
    "/v1/completions", model=model, prompt="A person as JSON: ", max_tokens=48, temperature=0,
    structured_outputs={"json": schema},
)
print("structured:", json.loads(structured["choices"][0]["text"]))
metrics = urlopen("http://127.0.0.1:8000/metrics").read().decode()
print(*(line for line in metrics.splitlines() if line.startswith("svdserve_")), sep="\n")
PYTHON
grep -iE 'fused|read-only|permission denied' "$work/server.log" | head -5 || true
kill "$server"
wait "$server" || true
