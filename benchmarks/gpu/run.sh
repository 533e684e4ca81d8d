#!/usr/bin/env bash
# Everything that a machine with one GPU can prove, most valuable first, in less than eight minutes.
#
#   make gpu-bundle                              on a machine with a network: .gpu-bundle/
#   bash benchmarks/gpu/run.sh [PART…]           on the GPU machine, which needs none
#
# Parts: tests saves throughput sweep. Each has a limit of its own; one that fails does not stop the next. Results are
# printed as they come and written to $OUT (default: benchmarks/results/gpu), with all that was printed in run.log: few
# files, since not every way back takes many.
set -uo pipefail
cd "$(dirname "$0")/../.."
OUT=${OUT:-benchmarks/results/gpu}
mkdir -p "$OUT"
: >"$OUT/run.log"
export OUT PYTHONUNBUFFERED=1 CUDA_VISIBLE_DEVICES=${CUDA_VISIBLE_DEVICES:-0} HF_HUB_OFFLINE=1 PYTHONWARNINGS=ignore
WORK=${WORK:-$(mktemp -d /tmp/gpu-XXXXXX)}
SHM_WORK=/dev/shm/gpu-$$
export WORK SHM_WORK TRITON_CACHE_DIR=$WORK/triton TORCH_EXTENSIONS_DIR=$WORK/extensions TORCHINDUCTOR_CACHE_DIR=$WORK/inductor
trap 'rm -rf "$SHM_WORK"' EXIT
began=$SECONDS
ip link set lo up 2>/dev/null || true # a network namespace begins without it, and process groups meet there

PYTHON=${PYTHON:-python3}
site=$WORK/site
if ! $PYTHON -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --root-user-action=ignore \
  --disable-pip-version-check --upgrade --target "$site" .gpu-bundle/*.whl; then
  echo "no bundle: run 'make gpu-bundle' where there is a network" >&2
  exit 1
fi
export PYTHONPATH=$PWD:$site PATH=$site/bin:$PATH
$PYTHON - <<'PY' | tee -a "$OUT/run.log"
import importlib.metadata as m, platform, torch
names = "torch transformers accelerate deepspeed huggingface_hub peft triton".split()
def version(name):
    try: return m.version(name)
    except m.PackageNotFoundError: return "-"
print(torch.cuda.get_device_name() if torch.cuda.is_available() else "no CUDA device", "| Python", platform.python_version(),
      "|", ", ".join(f"{name} {version(name)}" for name in names))
PY

say() { echo "== $*" | tee -a "$OUT/run.log"; }

part() { # NAME LIMIT_S COMMAND…
  local name=$1 limit=$2 start=$SECONDS code=0
  shift 2
  say "$name"
  : >"$WORK/$name.log"
  mkdir -p "$WORK/part"
  PART=$name-$$ TMPDIR=$WORK/part timeout --kill-after=10 "$limit" "$@" >"$WORK/$name.log" 2>&1 &
  tail -n +1 -f --pid=$! "$WORK/$name.log" | tee -a "$OUT/run.log"
  wait $! || code=$?
  # What it left running keeps memory of the device: the next part would run out of it.
  for environ in $(grep -lsz "^PART=$name-$$\$" /proc/[0-9]*/environ); do
    kill -KILL "$(basename "$(dirname "$environ")")" 2>/dev/null
  done
  # Nor does a part that hit its limit remove its folders.
  rm -rf "$WORK/part" "$SHM_WORK"
  say "$name: exit $code after $((SECONDS - start)) s ($((SECONDS - began)) s in all)"
}

if [[ " ${*:-tests} " == *" tests "* ]]; then # DeepSpeed's CPU Adam takes half a minute to build: beside the first tests
  setsid $PYTHON -c "from deepspeed.ops.op_builder import CPUAdamBuilder as B; B().load(verbose=False)" >"$WORK/build.log" 2>&1 &
  trap 'kill -KILL -- -'$!' 2>/dev/null; rm -rf "$SHM_WORK"' EXIT
fi

for name in ${*:-tests saves throughput sweep}; do
  case $name in
    tests) part tests "${TESTS_S:-170}" $PYTHON -m pytest ${TESTS:-tests/gpu} -q -n "${WORKERS:-10}" --timeout=160 -p no:cacheprovider --tb=short -W default ;;
    saves) part saves "${SAVES_S:-75}" $PYTHON -m benchmarks.gpu.saves ;;
    throughput) part throughput "${THROUGHPUT_S:-145}" $PYTHON -m benchmarks.gpu.throughput ;;
    sweep) part sweep "${SWEEP_S:-70}" $PYTHON -m benchmarks.gpu.sweep ;;
    *) echo "unknown part $name: tests saves throughput sweep" >&2 ;;
  esac
done
say "all: $((SECONDS - began)) s"
[ -n "${KEEP:-}" ] || rm -rf "$WORK"
